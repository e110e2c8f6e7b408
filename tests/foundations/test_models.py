import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from labpkg.foundations.losses import cross_entropy
from labpkg.foundations.models import GPT, MLP, Attention, GPTConfig, KVCache

CONFIG = GPTConfig(
    num_layers=3, width=24, num_heads=4, sequence_length=10, vocab_size=31, ffn_width=40
)


def make_gpt(**changes) -> GPT:
    torch.manual_seed(0)
    sizes = {name: getattr(CONFIG, name) for name in CONFIG.__slots__}
    return GPT(GPTConfig(**{**sizes, **changes})).double()


def make_tokens(batch: int = 2, length: int = 10) -> torch.Tensor:
    return torch.randint(
        31, (batch, length), generator=torch.Generator().manual_seed(1)
    )


def test_mlp_is_linear_relu_linear():
    model = MLP(5, 7, 3)
    first, second = model[0], model[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    x = torch.randn(2, 4, 5)
    expected = (x @ first.weight.T + first.bias).clamp(min=0) @ second.weight.T
    torch.testing.assert_close(model(x), expected + second.bias)
    assert len(MLP(5, 3)) == 1


def test_mlp_can_be_sliced():
    model, x = MLP(5, 7, 6, 3), torch.randn(2, 5)
    torch.testing.assert_close(model[2:](model[:2](x)), model(x))


@pytest.mark.parametrize("widths", [(), (4,), (4, 0, 2)])
def test_mlp_refuses_bad_widths(widths):
    with pytest.raises(ValueError, match="needs an input and an output width"):
        MLP(*widths)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_shape(tied):
    model = make_gpt(tied=tied)
    assert sum(p.numel() for p in model.parameters()) == (
        model.config.shape.num_parameters
    )


def test_default_ffn_width_is_four_times_the_width():
    config = GPTConfig(num_layers=1, width=8, num_heads=2, sequence_length=4)
    assert config.shape.ffn_width == 32
    assert GPT(config).blocks[0].mlp.up.weight.shape == (32, 8)  # pyright: ignore


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_of_the_shape(tied):
    model, tokens = make_gpt(tied=tied), make_tokens()
    # The math backend runs attention as plain products, which the counter sees; it
    # counts the full square of scores, as the convention of `flops_per_token` does.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        cross_entropy(model(tokens), tokens).backward()
    assert counter.get_total_flops() == (
        tokens.numel() * model.config.shape.flops_per_token
    )


def test_future_tokens_never_change_past_logits():
    model, tokens = make_gpt(), make_tokens()
    before = model(tokens)
    for t in range(1, 10):
        changed = tokens.clone()
        changed[:, t:] = (changed[:, t:] + 7) % 31
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
        assert (after[:, t] - before[:, t]).abs().max() > 1e-6


def attention_formula(layer: Attention, x: torch.Tensor, num_heads: int):
    T, H = x.shape[1], x.shape[2] // num_heads
    rows = layer.qkv.weight.view(num_heads, 3, H, -1)  # the documented order
    heads = []
    for wq, wk, wv in rows:
        q, k, v = x @ wq.T, x @ wk.T, x @ wv.T
        scores = q @ k.transpose(1, 2) / H**0.5
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v)
    return torch.cat(heads, -1) @ layer.out.weight.T


def test_attention_equals_the_formula():
    layer = Attention(CONFIG.shape).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), attention_formula(layer, x, 4))


def test_attention_works_with_a_slice_of_whole_heads():
    layer = Attention(CONFIG.shape).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    whole, parts = layer(x), []
    for rank in range(2):
        part = Attention(CONFIG.shape)
        part.qkv.weight = nn.Parameter(layer.qkv.weight.chunk(2, 0)[rank])
        part.out.weight = nn.Parameter(layer.out.weight.chunk(2, 1)[rank])
        parts.append(part(x))
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("tied", [True, False])
def test_forward_is_the_composition_of_its_units(tied):
    model, tokens = make_gpt(tied=tied), make_tokens()
    embedding, *blocks, head = model.pipeline_units()
    assert len(blocks) == 3
    x = embedding(tokens)
    assert x.shape == (2, 10, 24)
    for block in blocks:
        x = block(x)
    assert torch.equal(head(x), model(tokens))
    shared = set(embedding.parameters()) & set(head.parameters())
    assert len(shared) == (1 if tied else 0)


def test_tied_weight_gets_both_gradients():
    tied, untied, tokens = make_gpt(), make_gpt(tied=False), make_tokens()
    untied.load_state_dict(tied.state_dict())
    for model in (tied, untied):
        cross_entropy(model(tokens), tokens).backward()
    gradients = [
        weight.grad
        for weight in (
            tied.embedding.tokens.weight,
            untied.embedding.tokens.weight,
            untied.head.output.weight,
        )
    ]
    assert all(g is not None for g in gradients)
    torch.testing.assert_close(gradients[0], gradients[1] + gradients[2])  # pyright: ignore


def test_initial_scale_and_loss():
    torch.manual_seed(0)
    model = GPT(GPTConfig(num_layers=8, width=64, num_heads=4, sequence_length=32))
    block = model.blocks[0]
    for name, expected in [
        ("attention.qkv", 192**-0.5),
        ("mlp.up", 192**-0.5),
        ("attention.out", 192**-0.5 / 4),
        ("mlp.down", 192**-0.5 / 4),
    ]:
        assert block.get_submodule(name).weight.std().item() == pytest.approx(  # pyright: ignore
            expected, rel=0.05
        )
    tokens = torch.randint(256, (4, 33))
    loss = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    assert loss.item() == pytest.approx(torch.tensor(256.0).log().item(), abs=0.3)


def test_gpt_learns_to_copy():
    model, tokens = make_gpt(num_layers=1), make_tokens(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1  # pyright: ignore[reportPossiblyUnboundVariable]
    written = model.generate(tokens[:, :1], num_tokens=9, temperature=0)
    assert torch.equal(written, tokens)


def test_generate_is_greedy_and_crops():
    model, prompt = make_gpt(), make_tokens(3, 8)
    written = model.generate(prompt, num_tokens=6, temperature=0)
    assert written.shape == (3, 14)
    assert torch.equal(written[:, :8], prompt)
    for t in range(8, 14):
        expected = model(written[:, max(0, t - 10) : t])[:, -1].argmax(-1)
        assert torch.equal(written[:, t], expected)


def test_generate_samples_the_softmax():
    model = make_gpt(num_layers=1)
    prompt = torch.zeros(4000, 1, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data *= 8  # far from uniform
    drawn = model.generate(prompt, num_tokens=1, temperature=2.0, generator=generator)
    probabilities = (model(prompt[:1])[0, -1] / 2.0).softmax(-1)
    frequencies = torch.bincount(drawn[:, 1], minlength=31) / 4000
    assert (probabilities - frequencies).abs().max() < 0.03
    assert probabilities.max() > 0.1
    again = model.generate(
        prompt,
        num_tokens=1,
        temperature=2.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(drawn, again)


@pytest.mark.parametrize("lengths", [(10,), (4, 1, 1, 1, 3), (1,) * 10, (1, 9)])
def test_cached_logits_equal_uncached_ones(lengths):
    model, tokens = make_gpt(), make_tokens()
    caches = [KVCache() for _ in model.blocks]
    parts = [model(part, caches) for part in tokens.split(lengths, 1)]
    torch.testing.assert_close(
        torch.cat(parts, 1), model(tokens), rtol=1e-12, atol=1e-12
    )
    assert [len(cache) for cache in caches] == [10, 10, 10]


def test_a_cache_of_another_text_changes_the_logits():
    model, tokens = make_gpt(), make_tokens()
    caches = [KVCache() for _ in model.blocks]
    model((tokens[:, :4] + 1) % 31, caches)
    assert (model(tokens[:, 4:], caches) - model(tokens)[:, 4:]).abs().max() > 1e-6


@pytest.mark.parametrize(("length", "num_tokens"), [(1, 9), (6, 4), (6, 9), (13, 3)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_with_cache_writes_the_same(length, num_tokens, temperature):
    model, prompt = make_gpt(), make_tokens(3, length)
    for p in model.parameters():
        p.data *= 4  # far from uniform
    with_cache, without = (
        model.generate(
            prompt,
            num_tokens=num_tokens,
            temperature=temperature,
            generator=torch.Generator().manual_seed(0),
            cache=cache,
        )
        for cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_a_cached_token_is_read_once_until_the_window_slides():
    model, read = make_gpt(), []
    model.embedding.register_forward_hook(
        lambda module, inputs, output: read.append(inputs[0].shape[1])
    )
    model.generate(make_tokens(1, 4), num_tokens=9)
    assert read == [4, 1, 1, 1, 1, 1, 1, 10, 10]
    read.clear()
    model.generate(make_tokens(1, 4), num_tokens=9, cache=False)
    assert read == [4, 5, 6, 7, 8, 9, 10, 10, 10]


def test_the_cache_of_a_slice_holds_its_heads():
    layer, cache = Attention(CONFIG.shape), KVCache()
    layer.qkv.weight = nn.Parameter(layer.qkv.weight.chunk(2, 0)[0])
    layer.out.weight = nn.Parameter(layer.out.weight.chunk(2, 1)[0])
    x = torch.randn(2, 7, 24)
    whole = layer(x)
    parts = [layer(part, cache) for part in x.split([5, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert cache.kept is not None
    assert [part.shape for part in cache.kept] == [(2, 2, 7, 6)] * 2


def test_bad_input_raises():
    model = make_gpt()
    with pytest.raises(ValueError, match=r"T <= sequence_length=10, got \(2, 11\)"):
        model(make_tokens(2, 11))
    with pytest.raises(ValueError, match=r"tokens must be \(B, T\)"):
        model(make_tokens()[0])
    caches = [KVCache() for _ in model.blocks]
    model(make_tokens(2, 8), caches)
    with pytest.raises(ValueError, match=r"got \(2, 3\) after 8 cached tokens"):
        model(make_tokens(2, 3), caches)
    with pytest.raises(ValueError, match="2 caches for 3 blocks"):
        model(make_tokens(), caches[1:])
    with pytest.raises(ValueError, match=r"T >= 1, got \(2, 0\)"):
        model.generate(make_tokens()[:, :0], num_tokens=1)
    with pytest.raises(ValueError, match=r"prompt\[None\]"):
        model.generate(make_tokens()[0], num_tokens=1)
    with pytest.raises(ValueError, match=r"temperature=-1"):
        model.generate(make_tokens(), num_tokens=1, temperature=-1)
    with pytest.raises(ValueError, match="temperature=nan"):
        model.generate(make_tokens(), num_tokens=1, temperature=math.nan)
    with pytest.raises(ValueError, match="width=24 is not divisible by num_heads=5"):
        make_gpt(num_heads=5)
