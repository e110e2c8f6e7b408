import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from labpkg.foundations.losses import cross_entropy

F64 = torch.float64


def case(*shape: int, scale: float = 1.0, dtype=F64, seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, generator=random, dtype=F64)
    targets = torch.randint(shape[-1], shape[:-1], generator=random)
    return logits.to(dtype).requires_grad_(), targets


def torch_loss(logits, targets, **options):
    loss = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), **options
    )
    return loss.reshape(targets.shape) if options.get("reduction") == "none" else loss


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    scale=st.sampled_from([1.0, 50.0, 1e4]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    ignored=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_torch(shape, scale, smoothing, reduction, ignored, seed):
    logits, targets = case(*shape, scale=scale, seed=seed)
    if ignored and targets.numel() > 1:
        targets.view(-1)[0] = -7
    options = {
        "ignore_index": -7,
        "label_smoothing": smoothing,
        "reduction": reduction,
    }
    ours = cross_entropy(logits, targets, **options)
    theirs = torch_loss(logits, targets, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = torch.rand(ours.shape, dtype=F64)
    (got,) = torch.autograd.grad((ours * weights).sum(), logits)
    (expected,) = torch.autograd.grad((theirs * weights).sum(), logits)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_are_the_derivatives(smoothing, reduction):
    logits, targets = case(2, 3, 5)
    targets[0, 1] = -100

    def loss(z):
        return cross_entropy(z, targets, label_smoothing=smoothing, reduction=reduction)

    assert gradcheck(loss, (logits,))
    assert gradgradcheck(loss, (logits,))


def test_gradient_is_p_minus_y_over_the_batch():
    logits, targets = case(4, 3)
    cross_entropy(logits, targets).backward()
    expected = torch.softmax(logits, -1) - F.one_hot(targets, 3)
    torch.testing.assert_close(logits.grad, expected / 4, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_logits_stay_finite(dtype):
    top = torch.finfo(dtype).max / 4
    logits = torch.tensor([[top, 0.0], [-top, 0.0], [top, -top]], dtype=dtype)
    logits.requires_grad_()
    loss = cross_entropy(logits, torch.tensor([0, 1, 0]))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_a_masked_class_gets_no_gradient():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]], dtype=F64, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(torch.log1p(torch.tensor(-1.0).exp()).item())
    assert logits.grad is not None
    assert logits.grad[0, 2] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logits, targets = case(64, 100, scale=4.0, dtype=dtype)
    loss = cross_entropy(logits, targets)
    loss.backward()
    exact, _ = case(64, 100, scale=4.0, dtype=dtype)
    exact = exact.detach().to(F64).requires_grad_()
    expected = F.cross_entropy(exact, targets)
    expected.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert logits.grad is not None
    assert exact.grad is not None
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.to(F64), exact.grad, rtol=4e-3, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 5)])
def test_zero_counted_targets_cost_nothing(shape):
    logits, targets = case(*shape)
    loss = cross_entropy(logits, targets.fill_(-100))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(shape, dtype=F64))


def test_inputs_are_left_alone():
    logits, targets = case(3, 4)
    before = logits.detach().clone(), targets.clone()
    cross_entropy(logits, targets, label_smoothing=0.1).backward()
    assert torch.equal(logits.detach(), before[0])
    assert torch.equal(targets, before[1])


def test_backward_keeps_only_the_logits():
    logits, targets = case(32, 1000)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x) or x, lambda x: x
    )
    with hooks:
        cross_entropy(logits, targets)
    large = [x for x in kept if x.numel() >= logits.numel()]
    assert len(large) == 1
    assert large[0].data_ptr() == logits.data_ptr()


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3).long(), r"\(2, 3\) and \(3,\)"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4).long(), "classes are the last dim"),
        (torch.tensor(1.0), torch.tensor(0), "must agree"),
        (torch.zeros(2, 0), torch.zeros(2).long(), "must agree"),
        (torch.zeros(2, 3), torch.zeros(2), r"int64.*call \.long\(\)"),
        (torch.zeros(2, 3).long(), torch.zeros(2).long(), "floating point"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "target 3 is not a class.*V=3"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), "target -1 is not a class"),
    ],
)
def test_bad_tensors_raise(logits, targets, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(logits, targets)


def test_bad_options_raise():
    logits, targets = case(2, 3)
    with pytest.raises(ValueError, match=r"label_smoothing=1\.5"):
        cross_entropy(logits, targets, label_smoothing=1.5)
    with pytest.raises(ValueError, match="reduction='avg' is unknown"):
        cross_entropy(logits, targets, reduction="avg")


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("row", "smoothing", "what"),
    [
        ([0.0, NAN, NAN], 0.0, "class 1 is nan"),
        ([0.0, 1.0, INF], 0.0, "class 2 is inf"),
        ([-INF, -INF, -INF], 0.0, "every class is -inf"),
        ([1.0, -INF, 0.0], 1.0, "class 1 is -inf and is smoothed"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nan_raises_with_the_first_position(row, smoothing, what, dtype):
    logits = torch.zeros(2, 4, 3, dtype=dtype)
    logits[1, 2] = logits[1, 3] = torch.tensor(row)
    targets = torch.ones(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"logits\[1, 2\] give a NaN.*{what}.*rate"):
        cross_entropy(logits, targets, label_smoothing=smoothing)
    with pytest.raises(ValueError, match=rf"^logits give a NaN loss: {what}"):
        cross_entropy(logits[1, 2], targets[1, 2], label_smoothing=smoothing)


def test_nan_at_an_ignored_position_raises_too():
    logits = torch.tensor([[0.0, 0.0], [NAN, 0.0]])
    with pytest.raises(
        ValueError, match=r"logits\[1\] give a NaN loss: class 0 is nan"
    ):
        cross_entropy(logits, torch.tensor([0, -100]))


def test_an_impossible_target_costs_infinitely_much_and_does_not_raise():
    logits = torch.tensor([[0.0, -INF]])
    assert cross_entropy(logits, torch.tensor([1])) == INF


def test_values_are_asked_for_on_the_cpu_only():
    logits = torch.zeros(2, 3, device="meta", requires_grad=True)  # has no values
    loss = cross_entropy(logits, torch.zeros(2, dtype=torch.int64, device="meta"))
    loss.backward()
    assert loss.shape == ()
    assert logits.grad is not None


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 7), (2, 50_000)])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16]
)
def test_probabilities_warn(shape, dtype):
    logits, targets = case(*shape, scale=2.0, dtype=torch.float32)
    p = torch.softmax(logits.detach(), -1).to(dtype)
    with pytest.warns(UserWarning, match="got probabilities.*scores before softmax"):
        cross_entropy(p, targets)


def test_certain_probabilities_warn_and_the_loss_has_a_floor():
    targets = torch.arange(10)
    with pytest.warns(UserWarning, match="softmax is applied twice"):
        loss = cross_entropy(F.one_hot(targets, 10).to(F64), targets)
    floor = -torch.log(torch.tensor(torch.e / (torch.e + 9), dtype=F64))
    torch.testing.assert_close(loss, floor, rtol=1e-12, atol=0)


def no_probabilities():
    p = torch.softmax(case(3, 4)[0].detach(), -1)
    yield "log-probabilities", p.log()
    yield "zeros", torch.zeros(3, 4)
    yield "one class", torch.ones(3, 1)
    yield "a later row is no distribution", torch.cat([p, p.new_full((1, 4), 2.0)])
    yield "a later row is negative", torch.cat([p, p.new_tensor([[1.5, -0.5, 0, 0]])])
    yield "the first row is negative", torch.cat([p.new_tensor([[2.0, -1, 0, 0]]), p])
    yield "off by a part in a thousand", 1.001 * p.float()
    yield "no rows", torch.zeros(0, 4)


@pytest.mark.parametrize(
    "logits", [pytest.param(x, id=name) for name, x in no_probabilities()]
)
def test_what_is_no_probability_does_not_warn(logits):
    targets = torch.zeros(len(logits), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cross_entropy(logits, targets)


def test_log_probabilities_are_logits():
    logits, targets = case(6, 5, scale=3.0)
    log_p = torch.log_softmax(logits, -1)
    torch.testing.assert_close(
        cross_entropy(log_p, targets),
        cross_entropy(logits, targets),
        rtol=1e-12,
        atol=0,
    )


def test_each_line_is_told_once():
    p, targets = torch.full((2, 4), 0.25), torch.zeros(2, dtype=torch.int64)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")  # as in a plain interpreter
        for _ in range(3):
            cross_entropy(p, targets)
            cross_entropy(p, targets)
    assert [w.filename for w in told] == [__file__] * 2
    assert told[1].lineno == told[0].lineno + 1


def test_for_true_logits_one_row_is_looked_at(monkeypatch):
    logits, targets = case(64, 8)
    read = []
    monkeypatch.setattr(
        "labpkg.foundations.losses._sum_to_one",
        lambda rows: read.append(rows.numel()) or False,
    )
    cross_entropy(logits, targets)
    assert read == [8]  # one row of V, not (B, V)
