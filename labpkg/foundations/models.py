"""The two models of the book, an MLP and a GPT, without a line of parallel code.

Contract: parallelism enters from outside. Each GPT layer reads its number of heads and
hidden units from the weights it holds, so a tensor-parallel rank can keep a slice of
them and run the same forward. `GPT.forward` is the composition of `pipeline_units()`.

Letters: B batch, T sequence, D width, F feed-forward, N heads, H = D / N, V, L.
Chapters: foundations/training_loop, foundations/transformer.
References: Vaswani et al. 2017, arXiv:1706.03762; Radford et al. 2019, Language models
are unsupervised multitask learners; Press and Wolf 2017, arXiv:1608.05859 (tied).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labpkg.planning.shapes import ModelShape


class MLP(nn.Sequential):
    """Linear layers with ReLU between them: MLP(64, 32, 10) classifies digits.

    Args:
        *widths: input width, hidden widths, output width.

    Shape: x (..., widths[0]) -> (..., widths[-1])

    Raises:
        ValueError: for fewer than two widths or one below 1.
    """

    def __init__(self, *widths: int) -> None:
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(
                f"an MLP needs an input and an output width >= 1, got {widths}; "
                "write e.g. MLP(64, 32, 10)"
            )
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        super().__init__(*layers[:-1])

    def __getitem__(self, index: int | slice) -> nn.Module:
        # nn.Sequential slices by calling its own class with modules, not widths.
        if isinstance(index, slice):
            return nn.Sequential(*list(self)[index])
        return super().__getitem__(index)


@dataclass(frozen=True, kw_only=True, slots=True)
class GPTConfig:
    """Describe a `GPT`.

    Args:
        num_layers: L, blocks.
        width: D, of the residual stream; a multiple of `num_heads`.
        num_heads: N, attention heads.
        sequence_length: T, the longest sequence.
        vocab_size: V; 256 reads bytes.
        ffn_width: F, hidden width of the feed-forward part; None means 4 D.
        tied: whether the output matrix is the token embedding.

    Raises:
        ValueError: if a size is smaller than 1 or does not divide.
    """

    num_layers: int
    width: int
    num_heads: int
    sequence_length: int
    vocab_size: int = 256
    ffn_width: int | None = None
    tied: bool = True

    def __post_init__(self) -> None:
        _ = self.shape  # validates every size

    @property
    def shape(self) -> ModelShape:
        """The sizes as `labpkg.planning` wants them."""
        return ModelShape(
            num_layers=self.num_layers,
            width=self.width,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            ffn_width=4 * self.width if self.ffn_width is None else self.ffn_width,
            vocab_size=self.vocab_size,
            sequence_length=self.sequence_length,
            tied=self.tied,
            gated_mlp=False,
        )


class GPT(nn.Module):
    """A decoder-only Transformer: pre-norm, learned positions, no biases.

    Weights start as in GPT-2, normal, with the two matrices of a block that write to
    the residual stream divided by sqrt(2 L): its variance does not grow with depth. The
    standard deviation is 1 / sqrt(3 D): 0.02 at GPT-2's width, more in a small model.

    Args:
        config: sizes.

    Shape: tokens (B, T) -> logits (B, T, V)

    Reference: Radford et al. 2019 (GPT-2).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        shape = config.shape
        self.embedding = Embedding(shape)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.head = Head(shape)
        if config.tied:
            self.head.output.weight = self.embedding.tokens.weight
        for name, weight in self.named_parameters():
            self.init_parameter(name, weight)

    def init_parameter(self, name: str, tensor: Tensor) -> bool:
        """Give a matrix its initial value; see `materialize`.

        Args:
            name: of the parameter.
            tensor: all of it, filled in place.

        Returns:
            Whether it is filled; a norm begins as its layer says.
        """
        std = (3 * self.config.width) ** -0.5
        if name.endswith(("out.weight", "down.weight")):
            std *= (2 * self.config.num_layers) ** -0.5
        if tensor.dim() > 1:
            nn.init.normal_(tensor, std=std)
        return tensor.dim() > 1

    def forward(
        self, tokens: Tensor, caches: Sequence[KVCache] | None = None
    ) -> Tensor:
        """Return the logits of the token that follows each position.

        With caches the tokens continue those that the caches have seen, and only the
        new ones are computed: T after t old ones cost T (t + T) scores in each head.

        Args:
            tokens: token numbers, int64; with those in the caches at most as many as
                the sequence length.
            caches: one for each block, all new or used together before.

        Shape:
            tokens (B, T) -> (B, T, V)

        Raises:
            ValueError: for tokens that are not (B, T) or too many, or too few caches.
        """
        x = tokens
        if caches is None:
            for unit in self.pipeline_units():
                x = unit(x)
            return x
        if len(caches) != len(self.blocks):
            raise ValueError(
                f"{len(caches)} caches for {len(self.blocks)} blocks; make them with "
                "[KVCache() for _ in model.blocks]"
            )
        x = self.embedding(tokens, start=len(caches[0]))
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache)
        return self.head(x)

    def pipeline_units(self) -> list[nn.Module]:
        """Return the modules whose composition is forward: embedding, blocks, head.

        With tied weights the first and the last unit hold the same parameter: whoever
        puts them on different ranks must keep two copies and add their gradients.
        """
        return [self.embedding, *self.blocks, self.head]

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        *,
        num_tokens: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        cache: bool = True,
    ) -> Tensor:
        """Continue a prompt, one sampled token after the other.

        With the cache the prompt is read once and each new token costs one forward over
        itself. Beyond `config.sequence_length` tokens the window slides: each token in
        it has a new position, hence new keys and values, and a new token costs one
        forward over the whole window, as it does without the cache.

        Args:
            prompt: at least one token.
            num_tokens: tokens to add.
            temperature: divides the logits; 0 takes the most likely token.
            generator: source of randomness on the device of the model.
            cache: whether to keep keys and values; the result is equal up to rounding.

        Returns:
            The prompt and its continuation.

        Shape:
            prompt (B, T) -> (B, T + num_tokens)

        Raises:
            ValueError: for a prompt that is not (B, T >= 1), or a negative number.
        """
        if prompt.dim() != 2 or prompt.shape[1] == 0:
            raise ValueError(
                f"prompt must be (B, T) with T >= 1, got {tuple(prompt.shape)}; add "
                "the batch dim with prompt[None], start with at least one token"
            )
        if num_tokens < 0 or not 0 <= temperature < torch.inf:  # also refuses nan
            raise ValueError(
                f"num_tokens={num_tokens} and temperature={temperature} must be finite "
                "and at least 0; choose e.g. temperature=1.0"
            )
        longest = self.config.sequence_length
        caches = [KVCache() for _ in self.blocks] if cache else None
        tokens, unread = prompt, prompt[:, -longest:]
        for _ in range(num_tokens):
            logits = self(unread, caches)[:, -1]  # (B, V)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                probabilities = torch.softmax(logits.float() / temperature, -1)
                new = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat([tokens, new], dim=1)
            if tokens.shape[1] > longest:
                caches = None  # each position changes, and all keys and values
            unread = tokens[:, -longest:] if caches is None else new
        return tokens


class KVCache:
    """The keys and values that one attention layer has computed so far.

    After T tokens that is 2 B T D numbers; on a rank with some of the heads, fewer.
    """

    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        """Return T, the number of tokens seen."""
        return 0 if self.kept is None else self.kept[0].shape[2]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of new tokens and return those of all.

        Args:
            k: keys (B, N, T, H).
            v: values (B, N, T, H).
        """
        if self.kept is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(self.kept, (k, v), strict=True))
        self.kept = k, v
        return k, v


class Embedding(nn.Module):
    """Add a learned vector per token and one per position.

    Args:
        shape: sizes.

    Shape: tokens (B, T) -> (B, T, D)

    Raises:
        ValueError: in forward, for tokens that are not (B, T) or too long.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab_size, shape.width)
        self.positions = nn.Embedding(shape.sequence_length, shape.width)

    def forward(self, tokens: Tensor, *, start: int = 0) -> Tensor:
        """Return the start of the residual stream; the first token is at `start`."""
        longest = self.positions.num_embeddings
        if tokens.dim() != 2 or start + tokens.shape[1] > longest:
            after = f" after {start} cached tokens" if start else ""
            raise ValueError(
                f"tokens must be (B, T) with T <= sequence_length={longest}, got "
                f"{tuple(tokens.shape)}{after}; crop them or make a longer model"
            )
        end = start + tokens.shape[1]
        positions = torch.arange(start, end, device=tokens.device)
        return self.tokens(tokens) + self.positions(positions)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream.

    Args:
        shape: sizes.

    Shape: x (B, T, D) -> (B, T, D)
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.width, bias=False)
        self.attention = Attention(shape)
        self.mlp_norm = nn.LayerNorm(shape.width, bias=False)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the residual stream after this layer."""
        x = x + self.attention(self.attention_norm(x), cache)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Causal self-attention with one fused product for queries, keys and values.

    The rows of `qkv.weight` are ordered head by head, (N, 3, H): the H query rows of
    head 0, its key rows, its value rows, then head 1. A contiguous slice of rows is
    therefore a number of whole heads, and forward takes the number of heads from what
    the product returns (`-1`), so the layer also works with a slice.

    Args:
        shape: sizes.

    Shape: x (B, T, D) -> (B, T, D)

    Reference: Vaswani et al. 2017, arXiv:1706.03762; the slicing by heads: Shoeybi et
        al. 2019, Megatron-LM, arXiv:1909.08053.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.head_width = shape.head_width
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return what each position reads from itself and the positions before it."""
        qkv = self.qkv(x).unflatten(-1, (-1, 3, self.head_width))  # (B, T, N, 3, H)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # (B, N, T, H) each
        mask = None
        if cache is not None:
            k, v = cache.append(k, v)  # (B, N, len + T, H) each
            if k.shape[2] > q.shape[2]:
                # `is_causal` would put query 0 at key 0, but it comes after the cache.
                past = k.shape[2] - q.shape[2]
                mask = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(past)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None
        )
        return self.out(mixed.transpose(1, 2).flatten(2))  # (B, T, D)


class FeedForward(nn.Module):
    """The same two-layer network at every position.

    Args:
        shape: sizes.

    Shape: x (B, T, D) -> (B, T, D)
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, shape.ffn_width, bias=False)
        self.down = nn.Linear(shape.ffn_width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update of each position."""
        return self.down(F.gelu(self.up(x)))


class Head(nn.Module):
    """Normalise the residual stream and score every token of the vocabulary.

    Args:
        shape: sizes.

    Shape: x (B, T, D) -> logits (B, T, V)
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.width, bias=False)
        self.output = nn.Linear(shape.width, shape.vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.output(self.norm(x))
