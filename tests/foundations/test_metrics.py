"""Scores from counts: scikit-learn's numbers, and merging that is exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
    precision_score,
    recall_score,
)

import labpkg as lab
from labpkg.foundations.metrics import ConfusionMatrix, RunningMean

SCORES = [
    ("precision", precision_score),
    ("recall", recall_score),
    ("f1", f1_score),
]


def counted(predictions, targets, num_classes: int) -> ConfusionMatrix:
    matrix = ConfusionMatrix(num_classes)
    matrix.update(torch.tensor(predictions), torch.tensor(targets))
    return matrix


@st.composite
def classifications(draw):
    """Few samples of up to 5 classes: most have a class that nobody has or predicts."""
    num_classes = draw(st.integers(2, 5))
    label = st.integers(0, num_classes - 1)
    pairs = draw(st.lists(st.tuples(label, label), min_size=1, max_size=12))
    return num_classes, [p for p, _ in pairs], [t for _, t in pairs]


@settings(deadline=None, max_examples=200)
@given(case=classifications())
def test_every_score_is_that_of_scikit_learn(case):
    num_classes, predictions, targets = case
    labels = list(range(num_classes))
    ours = counted(predictions, targets, num_classes)
    theirs = confusion_matrix(targets, predictions, labels=labels)
    assert ours.counts.tolist() == theirs.tolist()
    assert ours.accuracy() == pytest.approx(
        accuracy_score(targets, predictions), abs=1e-12
    )
    # All three in one call: scikit-learn takes its time for each.
    for average in (None, "macro", "micro", "weighted"):
        options = {"labels": labels, "zero_division": 0, "average": average}
        scores = precision_recall_fscore_support(targets, predictions, **options)
        for (name, _), expected in zip(SCORES, scores, strict=False):
            score = getattr(ours, name)
            if average is None:
                assert score().tolist() == pytest.approx(expected.tolist(), abs=1e-12)
            else:
                found = score(average=average).item()
                assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("positive", [0, 1])
@pytest.mark.parametrize(("name", "reference"), SCORES)
@pytest.mark.parametrize(
    ("predictions", "targets"),
    [
        ([0, 1, 1, 0, 1], [0, 1, 0, 1, 1]),
        ([0, 0, 0, 0, 0], [0, 1, 0, 1, 1]),  # no prediction of 1: precision 0 / 0
        ([1, 0, 1, 0, 0], [0, 0, 0, 0, 0]),  # no sample of 1: recall 0 / 0
        ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),  # neither: F1 0 / 0
    ],
)
def test_one_positive_class_is_scikit_learns_binary_score(
    predictions, targets, name, reference, positive
):
    ours = getattr(counted(predictions, targets, 2), name)(positive=positive)
    options = {"pos_label": positive, "zero_division": 0}
    assert ours.shape == ()
    assert ours.item() == reference(targets, predictions, **options)


def test_scores_and_their_winners_count_alike():
    logits = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(28).reshape(4, 7) % 3
    from_logits, from_classes = ConfusionMatrix(3), ConfusionMatrix(3)
    from_logits.update(logits.requires_grad_(), targets)
    from_classes.update(logits.argmax(-1), targets)
    assert torch.equal(from_logits.counts, from_classes.counts)
    assert from_logits.counts.sum() == 28


def test_batches_add_up_and_empty_ones_change_nothing():
    matrix = counted([0, 1], [0, 0], 2)
    matrix.update(torch.empty(0, 2), torch.empty(0, dtype=torch.int64))
    matrix.update(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    assert matrix.counts.tolist() == [[1, 1], [0, 0]]
    matrix.update(torch.tensor([True, False]), torch.tensor([1, 1]))
    assert matrix.counts.tolist() == [[1, 1], [1, 1]]


def test_counts_stay_exact_where_float32_does_not():
    matrix = ConfusionMatrix(2)
    matrix.counts += torch.tensor([[2**24, 0], [0, 0]])
    matrix.update(torch.tensor([0]), torch.tensor([0]))
    assert matrix.counts[0, 0].item() == 2**24 + 1


def test_merging_leaves_the_own_counts_alone():
    matrix = counted([0, 1], [0, 0], 2)
    assert matrix.merged(lambda counts: counts.mul_(3)).counts.sum() == 6
    assert matrix.counts.sum() == 2


def _rank_scores(predictions, targets, borders):
    """Return F1 of this rank's shard, of the merged counts, and the merged counts."""
    mesh = lab.make_mesh(dp=len(borders) - 1)["dp"]
    rank = mesh.get_local_rank()
    shard = slice(borders[rank], borders[rank + 1])
    matrix = ConfusionMatrix(2)
    matrix.update(predictions[shard], targets[shard])
    whole = matrix.merged(lambda counts: lab.all_reduce(counts, mesh))
    own = matrix.f1(positive=1).item() if matrix.counts.any() else None
    return own, whole.f1(positive=1).item(), whole.counts


def test_merged_counts_give_the_true_f1_and_rank_f1s_do_not(world4):
    # One positive in ten, sorted by label: three of four ranks hold no positive.
    generator = torch.Generator().manual_seed(0)
    targets = (torch.arange(400) >= 360).long()
    flipped = torch.rand(400, generator=generator) < torch.where(targets == 1, 0.3, 0.1)
    predictions = targets ^ flipped.long()
    truth = f1_score(targets, predictions)
    answers = world4.run(_rank_scores, predictions, targets, [0, 100, 200, 300, 400])
    assert [merged for _, merged, _ in answers] == [truth] * 4
    assert all(
        counts.tolist() == confusion_matrix(targets, predictions).tolist()
        for _, _, counts in answers
    )
    mean_of_ranks = sum(own for own, _, _ in answers) / 4
    assert mean_of_ranks < truth / 2


def test_a_rank_without_samples_merges(world2):
    predictions, targets = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0])
    first, second = world2.run(_rank_scores, predictions, targets, [0, 3, 3])
    assert (first[0], second[0]) == (2 / 3, None)
    assert first[1] == second[1] == 2 / 3


@pytest.mark.parametrize("score", ["accuracy", "precision", "recall", "f1"])
def test_no_score_of_nothing(score):
    with pytest.raises(ValueError, match=r"nothing was counted.*merged\(reduce\)"):
        getattr(ConfusionMatrix(3), score)()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average": "mean"}, "average='mean' is unknown; choose macro, micro"),
        ({"average": "binary"}, "positive= for one class"),
        ({"average": "macro", "positive": 1}, "exclude each other"),
        ({"positive": 2}, "positive=2 is not a class; choose 0 to 1"),
        ({"positive": -1}, "positive=-1 is not a class"),
    ],
)
@pytest.mark.parametrize("score", ["precision", "recall", "f1"])
def test_unknown_options_raise(score, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(counted([0, 1], [0, 0], 2), score)(**options)


@pytest.mark.parametrize(
    ("predictions", "targets", "message"),
    [
        ([0, 3], [0, 1], "prediction 3 is not one of 3 classes"),
        ([0, 1], [0, -100], "target -100 is not one of 3 classes"),
        ([0, 1], [0.0, 1.0], r"of torch\.float32; call .*\.long\(\)"),
        ([[0], [1]], [0, 1], r"got \(2, 1\) and \(2,\).*squeeze"),
        ([0.2, 0.9], [0, 1], r"one score per class .* \(score > 0\)\.long\(\)"),
        ([[0.1, 0.2]] * 2, [0, 1], r"scores \(\.\.\., 3\) .* got \(2, 2\)"),
        ([[0.1, float("nan"), 0.2]], [0], "the scores hold nan"),
    ],
)
def test_what_cannot_be_counted_raises_and_counts_nothing(
    predictions, targets, message
):
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=message):
        matrix.update(torch.tensor(predictions), torch.tensor(targets))
    assert not matrix.counts.any()


def test_one_class_is_no_classification():
    with pytest.raises(ValueError, match="num_classes=1 must be at least 2"):
        ConfusionMatrix(1)


# ---- means by counts ---------------------------------------------------------------


def test_a_mean_weighs_by_counts_and_starts_again():
    mean = RunningMean()
    mean.add(torch.tensor(1.0, requires_grad=True), 3)
    mean.add(5.0, 1)
    assert mean.read() == (2.0, 4)  # a mean of the two means gives 3
    mean.add(7.0, 2)
    assert mean.read() == (7.0, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mean_in_half_precision_is_weighed_exactly(dtype):
    mean = RunningMean()
    mean.add(torch.tensor(2.25, dtype=dtype), 40_001)  # 90,002.25: no number of float16
    assert mean.read() == (2.25, 40_001)


def test_nothing_weighs_nothing_even_when_it_is_nan():
    mean = RunningMean()
    mean.add(torch.tensor(float("nan")), 0)
    mean.add(2.0, 1)
    assert mean.read() == (2.0, 1)


def test_a_mean_of_nothing_raises_and_a_later_one_works():
    mean = RunningMean()
    with pytest.raises(ValueError, match="no rank has added anything"):
        mean.read()
    with pytest.raises(ValueError, match="count=-1 must be at least 0"):
        mean.add(1.0, -1)
    mean.add(1.0, 1)
    assert mean.read() == (1.0, 1)


def _means():
    mesh = lab.make_mesh(dp=2)["dp"]
    rank = mesh.get_local_rank()
    mean = RunningMean(reduce=lambda totals: lab.all_reduce(totals, mesh))
    mean.add(torch.tensor(1.0), 3)
    if rank == 1:
        mean.add(torch.tensor(5.0), 1)
    first = mean.read()
    if rank == 1:
        mean.add(torch.tensor(4.0), 2)
    return first, mean.read()


def test_a_mean_over_ranks_counts_what_each_has_seen(world2):
    # (3 * 1) and (3 * 1 + 1 * 5) over 3 and 4; a mean of the two means gives 1.5.
    assert world2.run(_means) == [((11 / 7, 7), (4.0, 2))] * 2
