"""The two models of the book, an MLP and a GPT, without a line of parallel code.

Contract: parallelism enters from outside. Each GPT layer reads its number of heads and
hidden units from the weights it holds, so a tensor-parallel rank can keep a slice of
them and run the same forward. `GPT.forward` is the composition of `pipeline_units()`.

Notation: B batch, T sequence, D width, F feed-forward, N heads, H = D / N head width,
V vocabulary, L layers.

Chapters: foundations/training_loop, foundations/transformer.
References: Vaswani et al. 2017, arXiv:1706.03762; Radford et al. 2019, Language models
are unsupervised multitask learners (GPT-2); Press and Wolf 2017, arXiv:1608.05859 (tied
embeddings).
"""

from __future__ import annotations

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

    Shape:
        x (..., widths[0]) -> (..., widths[-1])

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
    the residual stream divided by sqrt(2 L), so that its variance does not grow with
    depth. The standard deviation is 1 / sqrt(3 D), which is GPT-2's 0.02 at its width
    of 768 and keeps small models from starting too flat to learn. The model has exactly
    `config.shape.num_parameters` parameters.

    Args:
        config: sizes.

    Shape:
        tokens (B, T) -> logits (B, T, V)

    Raises:
        ValueError: in forward, for tokens that are not (B, T) or longer than
            `config.sequence_length`.

    Reference:
        Radford et al. 2019, Language models are unsupervised multitask learners.
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
        std = (3 * shape.width) ** -0.5
        for name, weight in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(weight, std=std * (2 * shape.num_layers) ** -0.5)
            elif weight.dim() > 1:
                nn.init.normal_(weight, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the token that follows each position.

        Args:
            tokens: Token numbers, int64; T is at most the sequence length.

        Shape:
            tokens (B, T) -> (B, T, V)
        """
        x = tokens
        for unit in self.pipeline_units():
            x = unit(x)
        return x

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
    ) -> Tensor:
        """Continue a prompt, one sampled token after the other.

        Each new token costs one forward over the last `config.sequence_length` tokens.

        Args:
            prompt: at least one token.
            num_tokens: tokens to add.
            temperature: divides the logits; 0 takes the most likely token.
            generator: source of randomness on the device of the model.

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
        if num_tokens < 0 or temperature < 0:
            raise ValueError(
                f"num_tokens={num_tokens} and temperature={temperature} must be >= 0"
            )
        tokens = prompt
        for _ in range(num_tokens):
            recent = tokens[:, -self.config.sequence_length :]
            logits = self(recent)[:, -1]  # (B, V)
            if temperature == 0:
                next_token = logits.argmax(-1, keepdim=True)
            else:
                probabilities = torch.softmax(logits.float() / temperature, -1)
                next_token = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat([tokens, next_token], dim=1)
        return tokens


class Embedding(nn.Module):
    """Add a learned vector per token and one per position.

    Args:
        shape: sizes.

    Shape:
        tokens (B, T) -> (B, T, D)

    Raises:
        ValueError: in forward, for tokens that are not (B, T) or too long.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab_size, shape.width)
        self.positions = nn.Embedding(shape.sequence_length, shape.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the start of the residual stream."""
        longest = self.positions.num_embeddings
        if tokens.dim() != 2 or tokens.shape[1] > longest:
            raise ValueError(
                f"tokens must be (B, T) with T <= sequence_length={longest}, got "
                f"{tuple(tokens.shape)}; crop them or make a longer model"
            )
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.tokens(tokens) + self.positions(positions)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream.

    Args:
        shape: sizes.

    Shape:
        x (B, T, D) -> (B, T, D)
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.width, bias=False)
        self.attention = Attention(shape)
        self.mlp_norm = nn.LayerNorm(shape.width, bias=False)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream after this layer."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Causal self-attention with one fused product for queries, keys and values.

    The rows of `qkv.weight` are ordered head by head, (N, 3, H): the H query rows of
    head 0, its key rows, its value rows, then head 1. A contiguous slice of rows is
    therefore a number of whole heads, and forward takes the number of heads from what
    the product returns (`-1`), so the layer also works with a slice.

    Args:
        shape: sizes.

    Shape:
        x (B, T, D) -> (B, T, D)

    Reference:
        Vaswani et al. 2017, arXiv:1706.03762; the slicing by heads: Shoeybi et al.
        2019, Megatron-LM, arXiv:1909.08053.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.head_width = shape.head_width
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return what each position reads from itself and the positions before it."""
        qkv = self.qkv(x).unflatten(-1, (-1, 3, self.head_width))  # (B, T, N, 3, H)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # (B, N, T, H) each
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))  # (B, T, D)


class FeedForward(nn.Module):
    """The same two-layer network at every position.

    Args:
        shape: sizes.

    Shape:
        x (B, T, D) -> (B, T, D)
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

    Shape:
        x (B, T, D) -> logits (B, T, V)
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.width, bias=False)
        self.output = nn.Linear(shape.width, shape.vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.output(self.norm(x))
