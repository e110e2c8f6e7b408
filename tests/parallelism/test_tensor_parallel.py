"""`apply_tensor_parallel` against one process; ranks start from different seeds."""

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import labpkg as lab
from labpkg.parallelism.tensor_parallel import (
    apply_tensor_parallel,
    gpt_tensor_parallel_plan,
)
from labpkg.parallelism.vocabulary_loss import vocab_parallel_cross_entropy
from labpkg.processes import collectives, region_hooks
from labpkg.processes.cuts import cut_of

TOLERANCE = 1e-12
T, D, V = 8, 16, 12
CONFIG = lab.GPTConfig(
    num_layers=2, width=D, num_heads=4, sequence_length=T, vocab_size=V
)


class GroupedAttention(nn.Module):
    """Four query heads of width 4 that share two heads of keys and values."""

    def __init__(self, is_fused: bool) -> None:
        super().__init__()
        self.heads = nn.RMSNorm(4)  # of queries; a rank sees its own heads
        self.is_fused = is_fused
        if is_fused:
            self.qkv = nn.Linear(D, 32)
        else:
            self.q, self.k, self.v = (nn.Linear(D, m) for m in (16, 8, 8))
        self.out = nn.Linear(16, D)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_fused:
            qkv = self.qkv(x)
            share = qkv.shape[-1] // 4
            parts = qkv.split([2 * share, share, share], -1)
        else:
            parts = self.q(x), self.k(x), self.v(x)
        q, k, v = (p.unflatten(-1, (-1, 4)).transpose(1, 2) for p in parts)
        q = self.heads(q)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """Its input enters two layers, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, 24, bias=False), nn.Linear(D, 24)
        self.down = nn.Linear(24, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class LlamaBlock(nn.Module):
    def __init__(self, is_fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(D), nn.LayerNorm(D)
        self.attention, self.mlp = GroupedAttention(is_fused), GatedMLP()
        self.gain = nn.Parameter(torch.rand(D))  # of no layer
        self.shift = nn.Buffer(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gain * self.attention(self.norm1(x)) + self.shift
        return x + self.mlp(self.norm2(x))


class Llama(nn.Module):
    """Biases, grouped heads, a gate; the output weights are the embedding."""

    def __init__(self, is_fused: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(LlamaBlock(is_fused) for _ in range(2))
        self.norm = nn.RMSNorm(D)
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Classifier(nn.Module):
    """The head sees the mean over all positions, and is cut by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(V, D), LlamaBlock(True)
        self.pool, self.head = Pool(), nn.Linear(D, V)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.pool(self.block(self.embed(tokens))))


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True).expand(-1, T, -1)


LLAMA = {
    "*.q": "column:4",
    "*.[kv]": "column:4",
    "*.qkv": "column_fused:16+8+8:4",
    "*.heads": "partial",
    "*.out": "row:4",
    "*.gate": "column",
    "*.up": "column",
    "*.down": "row",
    "embed": "vocab",
    "head": "column_gather",
}
SEQUENCE = {"embed": "vocab_sequence", "*norm*": "sequence", "blocks.?": "sequence"}


def llama_plan(*without: str, **more: str) -> dict[str, str]:
    plan = {**LLAMA, **{k.replace("_", "."): v for k, v in more.items()}}
    return {key: value for key, value in plan.items() if key not in without}


SEPARATE, FUSED = ("*.qkv",), ("*.q", "*.[kv]")
REGIONS = {"*.attention": "region", "*.mlp": "region"}


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    plan: dict[str, str]
    sequence_parallel: bool = False
    parallel_loss: bool = False


def gpt_case(*, tied: bool = True, sequence: bool = False, loss: bool = False) -> Case:
    config = lab.GPTConfig(
        num_layers=2, width=D, num_heads=4, sequence_length=T, vocab_size=V, tied=tied
    )
    plan = gpt_tensor_parallel_plan(
        config, sequence_parallel=sequence, parallel_loss=loss
    )
    return Case(lambda: lab.GPT(config), plan, sequence, loss)


CASES = {
    "gpt": gpt_case(),
    "gpt, untied": gpt_case(tied=False),
    "gpt, parallel loss": gpt_case(loss=True),
    "gpt, sequence": gpt_case(sequence=True),
    "gpt, sequence, untied": gpt_case(sequence=True, tied=False),
    "gpt, sequence, parallel loss": gpt_case(sequence=True, loss=True),
}
GROUPED = {
    "llama": Case(lambda: Llama(False), llama_plan(*SEPARATE)),
    "llama, fused": Case(
        lambda: Llama(True),  # cut layers inside keep their own gradients
        llama_plan(*FUSED, "*.heads") | {"*.attention": "partial"},
    ),
    "llama, regions": Case(lambda: Llama(False), llama_plan(*SEPARATE) | REGIONS),
    "llama, sequence": Case(
        lambda: Llama(False), llama_plan(*SEPARATE) | SEQUENCE, True
    ),
    "llama, fused, sequence": Case(
        lambda: Llama(True), llama_plan(*FUSED) | SEQUENCE, True
    ),
    "llama, regions, sequence": Case(
        lambda: Llama(False), llama_plan(*SEPARATE) | SEQUENCE | REGIONS, True
    ),
    "llama, a region of whole sequences": Case(
        lambda: Llama(False),
        llama_plan(*SEPARATE)
        | {"head": "whole", "norm": "whole"}
        # Tied: the embedding is not cut, and each rank looks up all positions.
        | {"embed": "sequence_scatter", "blocks.0.*norm?": "sequence"}
        | {"blocks.0": "sequence", "blocks.1": "sequence_gather"}
        | {"blocks.1.attention": "region"},
        True,
    ),
    "classifier": Case(Classifier, llama_plan(*FUSED, "head")),
    "classifier, sequence": Case(
        Classifier,
        llama_plan(*FUSED, "head")
        | {"embed": "vocab_sequence", "block": "sequence", "*.norm*": "sequence"}
        | {"pool": "sequence_gather", "head": "whole"},
        True,
    ),
}


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    tokens, targets = torch.randint(V, (2, 4, T), generator=generator)
    return tokens, targets


def start(case: Case):
    """Return the axis, the reference and the parallel model of this rank."""
    torch.set_default_dtype(torch.float64)
    mesh = lab.make_mesh(tp=dist.get_world_size())["tp"]
    torch.manual_seed(0)
    reference = case.build()
    torch.manual_seed(mesh.get_local_rank())
    model = apply_tensor_parallel(
        case.build(), mesh, case.plan, sequence_parallel=case.sequence_parallel
    )
    return mesh, reference, model


def loss_of(case, mesh, output, targets):
    if case.parallel_loss:
        return vocab_parallel_cross_entropy(output, targets, mesh)
    return lab.cross_entropy(output, targets)


def whole(parameter: Tensor, value: Tensor | None = None) -> Tensor:
    cut, value = cut_of(parameter), parameter.detach() if value is None else value
    return value if cut is None else cut.gather(value)


def difference(model: nn.Module, reference: nn.Module, *, gradients: bool) -> float:
    """Return the largest deviation of parameters, or of their gradients."""
    found = []
    named = zip(model.named_parameters(), reference.named_parameters(), strict=True)
    for (name, p), (same, q) in named:
        assert name == same
        if gradients:
            assert p.grad is not None, name
            found.append((whole(p, p.grad) - q.grad).abs().max().item())
        else:
            found.append((whole(p) - q).abs().max().item())
    return max(found)


def is_equal_on_all_ranks(model, mesh) -> bool:
    """Whether what is not cut is the same on all ranks, bit by bit."""
    replicated = [p.detach().flatten() for p in model.parameters() if not cut_of(p)]
    flat = torch.cat(replicated)
    return bool((lab.all_gather(flat[None], mesh) == flat).all())


def train(case: Case, num_steps: int = 1, is_off: bool = False):
    """Return deviations of losses, gradients and parameters over some steps."""
    mesh, reference, model = start(case)
    models = (reference, model)
    optimizers = [lab.AdamW(m.parameters(), lr=1e-2, eps=1e-2) for m in models]
    deviations = []
    with collectives.off() if is_off else nullcontext():
        for step in range(num_steps):
            for micro_batch in range(2):  # accumulated
                tokens, targets = batch(2 * step + micro_batch)
                loss = loss_of(case, mesh, model(tokens), targets)
                loss.backward()
                expected = lab.cross_entropy(reference(tokens), targets)
                expected.backward()
                deviations.append(abs(loss.item() - expected.item()))
            deviations.append(difference(model, reference, gradients=True))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        deviations.append(difference(model, reference, gradients=False))
        return max(deviations), is_equal_on_all_ranks(model, mesh)


def train_all(cases: dict[str, Case], **options):
    return {name: train(case, **options) for name, case in cases.items()}


def test_models_train_as_in_one_process(world2, world4):
    name = "gpt, sequence, parallel loss"
    of_four = world4.run(train_all, {name: CASES[name]})
    of_two = world2.run(train_all, CASES | GROUPED)
    longer = world2.run(
        train_all, {"llama, sequence": GROUPED["llama, sequence"]}, num_steps=3
    )
    for ranks in (of_four, of_two, longer):
        for results in ranks:
            for name, (deviation, is_equal) in results.items():
                assert deviation < TOLERANCE, name
                assert is_equal, name


def test_one_rank_runs_the_same_lines():
    names = "gpt, sequence, parallel loss", "llama, regions"
    with lab.World(1, device="cpu") as world:
        cases = {name: (CASES | GROUPED)[name] for name in names}
        results = world.run(train_all, cases)[0]
    assert max(deviation for deviation, _ in results.values()) < TOLERANCE


def test_without_communication_everything_deviates(world2):
    for results in world2.run(train_all, CASES | GROUPED, is_off=True):
        for name, (deviation, _) in results.items():
            assert deviation > 1e-3, name


def test_without_the_sum_the_gradients_of_norms_are_parts(world2):
    def run():
        region_hooks.SumGradients._sum = lambda self, gradient: gradient
        names = "gpt, sequence", "llama"  # norms of positions, of heads
        return [train((CASES | GROUPED)[name])[0] for name in names]

    for deviations in world2.run(run):
        assert min(deviations) > 1e-3


def test_the_weights_are_those_of_the_first_rank(world2):
    def run(is_off):
        with collectives.off() if is_off else nullcontext():
            _, reference, model = start(CASES["gpt"])
        return difference(model, reference, gradients=False)

    assert world2.run(run, False) == [0, 0]
    assert world2.run(run, True)[1] > 1e-3


# ---- random numbers ----------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 24), nn.Linear(24, D)
        self.inner, self.outer = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.down(self.inner(self.up(x))))


NOISY = {"up": "column", "down": "row", "inner": "dropout"}


def test_dropout_is_equal_outside_regions_and_different_inside(world2):
    def run():
        _, _, model = start(Case(Noisy, NOISY))
        masks = {}
        for name in ("inner", "outer"):
            keep = lambda _, x, y, name=name: masks.update({name: y != 0})
            model.get_submodule(name).register_forward_hook(keep)
        y = model(torch.ones(64, D))
        return masks, y, torch.rand(3)

    (masks, y, later), (other_masks, other_y, other_later) = world2.run(run)
    assert torch.equal(masks["outer"], other_masks["outer"])
    assert 0.4 < (masks["inner"] == other_masks["inner"]).double().mean() < 0.6
    assert 0.4 < masks["inner"].double().mean() < 0.6
    assert torch.equal(y, other_y)
    assert torch.equal(later, other_later)


def test_dropout_of_a_rank_takes_one_number_and_leaves_no_trace(world2):
    class Broken(nn.Dropout):
        def forward(self, input: Tensor) -> Tensor:
            super().forward(input)
            raise OverflowError

    def run():
        mesh = lab.make_mesh(tp=2)["tp"]
        layers = {"fine": nn.Dropout(), "broken": Broken(), "up": nn.Linear(2, 2)}
        plan = {"fine": "dropout", "broken": "dropout", "up": "column"}
        model = apply_tensor_parallel(nn.ModuleDict(layers), mesh, plan)
        x = torch.ones(100)

        def drawn(call):
            torch.manual_seed(5)
            call()
            return torch.rand(()).item()

        def fail():
            with pytest.raises(OverflowError):
                model["broken"](x)

        torch.manual_seed(5)
        torch.randint(2**62, ())
        after_one = torch.rand(()).item()
        assert drawn(lambda: model["fine"](x)) == after_one
        assert drawn(fail) == after_one
        model.eval()
        assert drawn(lambda: model["fine"](x)) == drawn(lambda: None) != after_one

    world2.run(run)


def test_recomputation_repeats_everything(world2):
    def run(sequence):
        plan = NOISY | ({"outer": "dropout"} if sequence else {})
        mesh, _, model = start(Case(Noisy, plan, sequence))
        x = torch.randn(2, T, D, generator=torch.Generator().manual_seed(1))
        x = x.chunk(2, 1)[mesh.get_local_rank()] if sequence else x
        gradients = []
        for call in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
            torch.manual_seed(3)
            model.zero_grad()
            call(x).square().sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        return all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

    assert world2.run(lambda: run(False) and run(True)) == [True, True]


def test_a_gpt_with_recomputed_blocks_has_the_same_gradients(world2):
    def run(name):
        _, reference, model = start((CASES | GROUPED)[name])
        tokens, targets = batch(0)
        for block in model.blocks:
            whole = lambda x, cache=None, block=block: type(block).forward(block, x)
            block.forward = lambda x, cache=None, whole=whole: checkpoint(
                whole, x, use_reentrant=False
            )
        lab.cross_entropy(model(tokens), targets).backward()
        lab.cross_entropy(reference(tokens), targets).backward()
        return difference(model, reference, gradients=True)

    names = "gpt", "gpt, sequence", "llama, regions", "llama, regions, sequence"
    assert max(world2.run(lambda: max(map(run, names)))) < TOLERANCE


# ---- what people do with models ----------------------------------------------------


def test_a_copy_is_parallel_too(world2):
    def run(name):
        mesh, reference, model = start((CASES | GROUPED)[name])
        model = copy.deepcopy(model)
        tokens, targets = batch(0)
        loss_of(CASES[name], mesh, model(tokens), targets).backward()
        lab.cross_entropy(reference(tokens), targets).backward()
        return difference(model, reference, gradients=True)

    def both():
        return max(run("gpt"), run("gpt, sequence, parallel loss"))

    assert max(world2.run(both)) < TOLERANCE


def test_a_parallel_model_is_not_pickled(world2):
    def run():
        for name in ("gpt", "gpt, sequence"):
            _, _, model = start(CASES[name])
            with pytest.raises(TypeError, match="full_state_dict"):
                pickle.dumps(model)
        mesh = lab.make_mesh(tp=2)["tp"]
        noisy = apply_tensor_parallel(nn.Dropout(), mesh, {"": "dropout"})
        with pytest.raises(TypeError, match="full_state_dict"):
            pickle.dumps(noisy)

    world2.run(run)


def test_frozen_layers_stay_frozen_and_may_thaw(world2):
    def frozen() -> nn.Module:
        model = lab.GPT(CONFIG)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(("blocks.0", "embedding")))
        return model

    def run(sequence):
        case = gpt_case(sequence=sequence)
        _, reference, model = start(Case(frozen, case.plan, sequence))
        tokens, targets = batch(0)
        found = []
        for is_thawed in (False, True):
            for m in (model, reference):
                m.zero_grad()
                if is_thawed:
                    m.requires_grad_(True)
                lab.cross_entropy(m(tokens), targets).backward()
            named = zip(model.parameters(), reference.parameters(), strict=True)
            for p, q in named:
                assert (p.grad is None) == (q.grad is None)
                if p.grad is not None:
                    found.append((whole(p, p.grad) - q.grad).abs().max().item())
        return max(found)

    assert max(world2.run(lambda: max(run(False), run(True)))) < TOLERANCE


def test_a_second_plan_leaves_what_is_parallel_alone(world2):
    def run():
        mesh, reference, model = start(
            Case(lambda: lab.MLP(4, 6, 4, 6, 4), {"0": "column", "2": "row"})
        )
        apply_tensor_parallel(model, mesh, {"4": "column", "6": "row"})
        return difference(model, reference, gradients=False)

    assert world2.run(run) == [0, 0]


def test_layers_of_torch_and_changes_in_place(world2):
    class Encoder(nn.TransformerEncoderLayer):
        """Without gradients it computes with weights of layers that have no hooks."""

        def __init__(self) -> None:
            super().__init__(D, 4, 32, 0.0, batch_first=True)

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear1, self.linear2 = nn.Linear(D, 32), nn.Linear(32, D)
            self.last = nn.Linear(D, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.linear2(self.linear1(x).relu_()).sigmoid_()
            return self.last(x.tanh_()).sin_()

    def run():
        found = []
        plan = {"linear1": "column", "linear2": "row"}
        ends = {"last": "column_gather"}
        sequence = {"": "sequence", "linear1": "column", "linear2": "row"} | ends
        cases = (
            Case(Encoder, plan),
            Case(InPlace, plan | ends),
            Case(InPlace, sequence, sequence_parallel=True),
        )
        for case in cases:
            mesh, reference, model = start(case)
            for batch_size in (1, 3):
                x = torch.randn(batch_size, 4, D, generator=torch.Generator())
                own = x.chunk(2, 1)[mesh.get_local_rank()]
                own = own if case.sequence_parallel else x
                found.append((model(own) - reference(x)).abs().max().item())
                for m, mine in ((model, own), (reference, x)):
                    m.zero_grad()
                    m(mine).square().sum().backward()
                found.append(difference(model, reference, gradients=True))
                with torch.no_grad():
                    y, expected = model.eval()(own), reference.eval()(x)
                found.append((y - expected).abs().max().item())
        return max(found)

    assert max(world2.run(run)) < TOLERANCE


def test_an_optimizer_made_before_trains_the_slices(world2):
    def run():
        mesh = lab.make_mesh(tp=2)["tp"]
        model = lab.MLP(4, 6, 4)
        sgd = lab.SGD(model.parameters(), lr=0.1)
        model(torch.ones(4)).sum().backward()
        apply_tensor_parallel(model, mesh, {"0": "column", "2": "row"})
        assert all(p.grad is None for p in model.parameters())
        weight = model.get_parameter("0.weight")
        before = weight.clone()
        model(torch.ones(4)).sum().backward()
        sgd.step()
        return weight.shape, bool((weight != before).any())

    assert world2.run(run) == [((3, 4), True)] * 2


def test_a_gpt_generates_as_in_one_process(world2):
    def run():
        models = start(CASES["gpt"])[1:]
        prompt = torch.tensor([[1, 2, 3]])
        texts = []
        for m in models:
            assert isinstance(m, lab.GPT)
            torch.manual_seed(0)
            texts.append(m.generate(prompt, num_tokens=9).tolist())
        return texts

    for mine, expected in world2.run(run):
        assert mine == expected


def test_the_wrong_cut_breaks_at_the_nonlinearity(world2):
    def run():
        torch.set_default_dtype(torch.float64)
        mesh = lab.make_mesh(tp=2)["tp"]
        model = apply_tensor_parallel(lab.MLP(4, 6, 4), mesh, {"2": "row"})
        with lab.count_comms() as log, pytest.raises(ValueError, match="3 of 6"):
            model(torch.ones(4))
        return log["tp"].calls

    assert world2.run(run) == [0, 0]


def test_bytes_of_a_step(world2):
    def run(sequence, loss):
        case = gpt_case(sequence=sequence, loss=loss)
        mesh, _, model = start(case)
        tokens, targets = batch(0)
        with lab.count_comms() as log:
            loss_of(case, mesh, model(tokens), targets).backward()
        kinds = ("all_reduce", "all_gather", "reduce_scatter")
        return [log["tp", kind].payload_bytes for kind in kinds]

    number, layers = 8, 2
    activations, logits = 4 * T * D * number, 4 * T * V * number
    norms, per_token = (2 * layers + 1) * D * number, 4 * T * number
    # Embedding; each block forward and backward; dx of the head.
    sums = (1 + 4 * layers + 1) * activations
    assert world2.run(run, False, False)[0] == [sums, logits, 0]
    assert world2.run(run, False, True)[0] == [sums + 3 * per_token, 0, 0]
    # Each pair: x forward and again backward, dy; the head; the embedding's gradient.
    gathered = (6 * layers + 2 + 1) * activations
    scattered = (4 * layers + 1) * activations
    assert world2.run(run, True, False)[0] == [
        activations + norms,
        gathered + logits,
        scattered,
    ]
    assert world2.run(run, True, True)[0] == [
        activations + norms + 3 * per_token,
        gathered,
        scattered,
    ]


def test_a_region_enters_once(world2):
    def run(name):
        case = GROUPED[name]
        mesh, _, model = start(case)
        tokens, targets = batch(0)
        with lab.count_comms() as log:
            loss_of(case, mesh, model(tokens), targets).backward()
        return log["tp", "all_reduce"].calls

    # Embedding, head; for each block the norm of heads, sums forward, and backward
    # one of each column layer or one of each region.
    assert world2.run(run, "llama")[0] == 2 + 2 * (1 + 2 + 5)
    assert world2.run(run, "llama, regions")[0] == 2 + 2 * (1 + 2 + 2)


def test_a_layer_in_a_region_may_be_called_alone(world2):
    def run():
        gradients = []
        for m in start(GROUPED["llama, regions"])[1:]:
            mlp = m.get_submodule("blocks.0.mlp")
            x = torch.ones(3, D, requires_grad=True)
            with torch.no_grad():
                mlp(x)  # leaves nothing behind
            mlp(x).sum().backward()
            m.get_submodule("blocks.0.attention.out")(
                m.get_submodule("blocks.0.attention.q")(x)
            ).sum().backward()
            gradients.append(x.grad)
        return (gradients[0] - gradients[1]).abs().max().item()

    assert max(world2.run(run)) < TOLERANCE


def test_layers_of_a_region_share_only_what_has_gradients(world2):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(D, 4), nn.Linear(D, 4)
            self.out = nn.Linear(4, D)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                gate = self.left(x)
            return self.out(gate * self.right(x))

    def run():
        plan = {"": "region", "left": "column", "right": "column", "out": "row"}
        _, reference, model = start(Case(Twice, plan))
        leaves = []
        for m in (model, reference):
            x = torch.ones(3, D, requires_grad=True)
            m(x).square().sum().backward()
            leaves.append(x.grad)
        return (leaves[0] - leaves[1]).abs().max().item()

    assert max(world2.run(run)) < TOLERANCE


def test_autocast(world2):
    def run(sequence):
        case = gpt_case(sequence=sequence)
        _, reference, model = start(case)
        tokens, targets = batch(0)
        for m in (model, reference):
            m.float()
            with torch.autocast("cpu", torch.bfloat16), lab.count_comms() as log:
                logits = m(tokens)
                lab.cross_entropy(logits, targets).backward()
            assert logits.dtype == torch.bfloat16
            assert all(p.grad.dtype == torch.float32 for p in m.parameters())
            if m is model:
                calls = log["tp", "all_gather"]
        assert sequence or calls.payload_bytes == 2 * 4 * T * V
        scale = max(q.grad.abs().max().item() for q in reference.parameters())
        return difference(model, reference, gradients=True) / scale

    assert max(world2.run(lambda: max(run(False), run(True)))) < 0.05


# ---- bad input ---------------------------------------------------------------------

BAD = {
    "no module of the model matches 'blocks.*.mlp.upp'; the nearest": {
        "blocks.*.mlp.upp": "column"
    },
    "the plan is empty": {},
    "'columns' is no value of a plan": {"head.output": "columns"},
    "'column:x' is no value": {"head.output": "column:x"},
    "'column:0' is no value": {"head.output": "column:0"},
    "'column_fused' is no value": {"head.output": "column_fused"},
    "'column_fused:2:0' is no value": {"head.output": "column_fused:2:0"},
    "'column_gather:2' is no value": {"head.output": "column_gather:2"},
    "'vocab:3' is no value": {"head.output": "vocab:3"},
    "is named twice, by '*.mlp.up' as 'column'": {"*.mlp.up": "column", "*.up": "row"},
    "is a LayerNorm, but 'row' cuts a Linear": {"blocks.0.mlp_norm": "row"},
    "is a Linear, but 'vocab' cuts a Embedding": {"head.output": "vocab"},
    "embedding.positions: num_embeddings=9 is not divisible by tp=2; choose a multiple "
    "of 2, such as 10": {"embedding.positions": "vocab"},
    "3 units of 5 is not divisible by tp=2": {"blocks.0.attention.out": "row:5"},
    "in_features=15 is not a multiple of 4": {"blocks.0.attention.out": "row:4"},
    "is not the sum of blocks": {"*.qkv": "column_fused:15+15"},
    "is not 2 equal matrices": {"*.qkv": "column_fused:2"},
    "15 = 3 units of 5 is not divisible by tp=2": {"*.qkv": "column_fused:3:5"},
    "5 = 1 units of 5 is not divisible by tp=2": {"*.qkv": "column_fused:20+20+5:5"},
    "but the plan names 1 inside": {"*.mlp": "region", "*.mlp.up": "column"},
    "are one parameter, but would be cut in two ways": {"embedding.tokens": "vocab"},
    "'sequence' has no effect without": {"head.norm": "sequence"},
}
BAD_SEQUENCE = {
    "the plan does not name the module of embedding.tokens.weight": {"*.up": "column"},
    "the plan does not name the module of blocks.0.attention_norm.weight": {
        "embedding": "sequence_scatter",
        "*.up": "column",
    },
    "embedding.tokens.weight and head.output.weight are one parameter, but one of": {
        "embedding": "sequence_scatter",
        "blocks.?": "sequence",
        "head": "sequence",
    },
    "'vocab' returns all positions": {
        "embedding.tokens": "vocab",
        "head.output": "column",
        "embedding.positions": "whole",
        "blocks.?": "sequence",
        "head.norm": "sequence",
    },
}


def apart():
    """Plans for the stages of one rank, which share the matrix of tokens."""
    mesh = lab.make_mesh(tp=2)["tp"]
    first, last = lab.split_stages(lab.GPT(CONFIG), 2)
    apply_tensor_parallel(first, mesh, {"embedding.tokens": "vocab"})
    tied = "what another stage shares and head.output.weight are one parameter"
    for plan, message in (
        ({"head.norm": "partial"}, tied),
        ({"head.output": "row"}, tied),
        ({"head.outputs": "column"}, "no module of the model matches 'head.outputs'"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_tensor_parallel(last, mesh, plan)
    plan = {"embedding.tokens": "vocab", "head.output": "column"}  # of both stages
    apply_tensor_parallel(last, mesh, plan)
    cut = cut_of(first.get_parameter("embedding.tokens.weight"))
    return None if cut is None else tuple(cut.shape)


def test_stages_agree_on_the_cut_of_what_they_share(world2):
    assert world2.run(apart) == [(V, D)] * 2


def test_bad_plans_raise_on_every_rank_and_change_nothing(world2):
    config = lab.GPTConfig(
        num_layers=1, width=15, num_heads=3, sequence_length=9, vocab_size=V
    )

    def run(plans, sequence):
        mesh = lab.make_mesh(tp=2)["tp"]
        model = lab.GPT(config)
        before = copy.deepcopy(model.state_dict())
        messages = []
        for plan in plans:
            with lab.count_comms() as log, pytest.raises(ValueError) as error:
                apply_tensor_parallel(model, mesh, plan, sequence_parallel=sequence)
            messages.append(str(error.value))
            assert log["tp", "broadcast"].calls == log["tp", "all_reduce"].calls == 0
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
        model(torch.zeros(1, 9, dtype=torch.long))
        lab.barrier()
        return messages

    for plans, sequence in ((BAD, False), (BAD_SEQUENCE, True)):
        for messages in world2.run(run, list(plans.values()), sequence):
            for expected, message in zip(plans, messages, strict=True):
                assert expected in message


def test_other_bad_input_raises_on_every_rank(world2):
    def run():
        meshes = lab.make_mesh(tp=2)
        mesh, rank = meshes["tp"], meshes["tp"].get_local_rank()
        plan, messages = {"": "column"}, []

        def refuse(model, plan, mesh=mesh, **options):
            with pytest.raises(ValueError) as error:
                apply_tensor_parallel(model, mesh, plan, **options)
            messages.append(str(error.value))

        refuse(nn.Linear(2, 2), plan, mesh=meshes)
        partly = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
        refuse(partly, {"0": "column"})
        refuse(nn.Linear(2, 2 + rank), plan)
        refuse(nn.Linear(2, 2), {"": "row" if rank else "column"})
        refuse(nn.Linear(2, 2), plan, sequence_parallel=bool(rank))
        cut = apply_tensor_parallel(nn.Linear(2, 2), mesh, plan)
        refuse(cut, plan)
        noisy = apply_tensor_parallel(nn.Dropout(), mesh, {"": "dropout"})
        refuse(noisy, {"": "dropout"})
        replica = lab.DataParallel(nn.Linear(2, 2), meshes["dp"])
        refuse(replica.module, plan)
        for option in (
            {"max_norm": 1.0},
            {"scale_grad_by_freq": True},
            {"sparse": True},
        ):
            refuse(nn.Embedding(4, 2, **option), {"": "vocab"})
        shard = lab.fully_shard(nn.Linear(2, 2), meshes["dp"])
        refuse(shard, plan)
        lab.barrier()
        return messages

    expected = (
        "has 4 axes",
        "lies on meta",
        "holds another model",
        "has another plan",
        "has another plan",
        "is parallel already",
        "named by a plan before",
        "belongs to another DataParallel",
        *["max_norm, scale_grad_by_freq and sparse"] * 3,
        "is cut by ZeRO",
    )
    for messages in world2.run(run):
        for part, message in zip(expected, messages, strict=True):
            assert part in message


def test_bad_activations_raise_on_every_rank(world2):
    def run():
        messages, sent = [], []
        _, _, model = start(CASES["gpt, sequence"])
        _, _, classifier = start(GROUPED["classifier, sequence"])
        _, _, llama = start(GROUPED["llama, sequence"])
        pool = classifier.get_submodule("pool")
        calls = (
            lambda: model(torch.zeros(1, 5, dtype=torch.long)),
            lambda: llama(torch.zeros(1, 5, dtype=torch.long)),
            lambda: llama.blocks[0].attention.q(torch.zeros(4, D)),
            lambda: llama.blocks[0].attention.out(torch.zeros(1, 5, 8)),
            lambda: llama.blocks[0].attention.q(torch.zeros(1, 4, D // 2)),
            lambda: pool(torch.zeros(4, D)),
            lambda: pool(x=[1.0]),
            lambda: pool(),
        )
        for call in calls:
            with lab.count_comms() as log, pytest.raises(ValueError) as error:
                call()
            messages.append(str(error.value))
            sent.append(log["tp"].calls)
        return messages, sent

    expected = (
        "T=5 is not divisible by tp=2; pad or crop it to a multiple of 2, such as 6",
        "T=5 is not divisible by tp=2",
        "cuts T of (B, T, ...), got (4, 16)",
        "T=5 is not divisible by tp=2",
        "takes all 16 features, got 8",
        "cuts T of (B, T, ...), got (4, 16)",
        "is a list and no tensor",
        "is a NoneType and no tensor",
    )
    for messages, sent in world2.run(run):
        # What is scattered is first made: here by a sum over the vocabulary.
        assert sent == [1] + [0] * (len(expected) - 1)
        for part, message in zip(expected, messages, strict=True):
            assert part in message
