"""Layers of which each rank of an axis holds a slice.

`ColumnParallelLinear` cuts the output features of a linear layer, `RowParallelLinear`
the input features, `VocabParallelEmbedding` the vocabulary. Column, any elementwise
function, then row needs one all_reduce forward and one backward. Parameters keep their
names and carry a `Cut`; a layer made with one rank runs the same lines.

Chapter: parallelism/tensor_parallel. Reference: Shoeybi et al. 2019, Megatron-LM,
arXiv:1909.08053.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from labpkg.processes.cuts import Cut, cut_of, mark_cut
from labpkg.processes.region_hooks import Region
from labpkg.processes.regions import (
    ColumnLinear,
    RowLinear,
    check_sequence,
    f,
    f_sequence,
    g,
    g_sequence,
    join,
)
from labpkg.processes.replicas import broadcast_state, require_device


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Layout:
    """How a layer lies on an axis.

    Attributes:
        mesh: The axis.
        cuts: How each parameter that is cut is cut, by its name in the layer.
        is_sequence: Whether activations outside the layer are cut along T.
        gathers: Whether a column layer returns all features.
        region: What shares the entry of a column layer with others, if anything.
    """

    mesh: DeviceMesh
    cuts: dict[str, Cut]
    is_sequence: bool = False
    gathers: bool = False
    region: Region | None = None

    def __deepcopy__(self, memo: dict) -> Self:
        return self  # a copied layer lies on the same axis

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a layer that is cut over ranks is no object to save; save what "
            "full_state_dict(model) returns"
        )


def block_lengths(
    name: str, length: int, n: int, *, unit: int = 1, blocks: Sequence[int] = ()
) -> tuple[int, ...]:
    """Return the blocks of a dim that n ranks are to cut, or refuse.

    Args:
        name: How a message calls the dim.
        length: Of the dim.
        n: Ranks.
        unit: Slices are to be multiples of this, such as the width of a head.
        blocks: Lengths of matrices that are stacked along the dim; by default one.

    Raises:
        ValueError: If the blocks do not add up to the dim, or n slices of whole units
            do not make up each.
    """
    blocks = tuple(blocks) or (length,)
    if sum(blocks) != length or min(blocks) < 1:
        raise ValueError(
            f"{name}={length} is not the sum of blocks {blocks}; give the lengths of "
            "the matrices that are stacked in it"
        )
    for block in blocks:
        if block % unit:
            raise ValueError(
                f"{name}={block} is not a multiple of {unit}, the rows that must stay "
                "together; pass the width of what may not be cut, such as a head"
            )
        if (block // unit) % n:
            step = unit * n
            units = f" = {block // unit} units of {unit}" if unit > 1 else ""
            raise ValueError(
                f"{name}={block}{units} is not divisible by tp={n}; choose a multiple "
                f"of {step}, such as {-(-block // step) * step}, or fewer ranks"
            )
    return blocks


class ParallelLayer(nn.Module):
    """What the three layers share: parameters of which `layout` says how they lie."""

    layout: Layout

    def take_layout(self, layout: Layout) -> None:
        """Cut the whole parameters in place; one that is tied and cut already stays.

        Args:
            layout: How the layer lies from now on.
        """
        self.layout = layout
        for name, cut in layout.cuts.items():
            parameter = self.get_parameter(name)
            if cut_of(parameter) is None:
                parameter.data = cut.take(parameter.data)
            mark_cut(parameter, cut)
        # Without hooks nn.TransformerEncoderLayer reads the weights and does not call.
        self.register_forward_pre_hook(_do_nothing)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, cut in self.layout.cuts.items():
            mark_cut(self.get_parameter(name), cut)  # torch copies no marks

    def extra_repr(self) -> str:
        """Show the whole sizes and the number of slices."""
        return f"{super().extra_repr()}, tp={self.layout.mesh.size()}"


class ColumnParallelLinear(ParallelLayer, nn.Linear):
    """A linear layer of which each rank computes 1/n of the output features.

    y = x W^T + b with W (out, in) cut into n pieces of rows: rank r has W_r and b_r and
    returns its features. Backward adds up dx over the ranks while dW is computed.

    Every rank draws the whole layer and takes the values of rank 0 of the axis, so that
    seeds may differ. `apply_tensor_parallel` turns the layers of a model into these.

    Args:
        in_features: Features of x.
        out_features: Features of y over all ranks.
        mesh: The tensor-parallel axis.
        bias: Whether there is a b.
        unit: A rank's features are a multiple of this: the width of a head.
        blocks: Lengths of matrices that are stacked in W, each of which is cut by
            itself, such as (D, D, D) for queries, keys and values.
        gather_output: Return all features on every rank.
        sequence_parallel: x is this rank's positions; y has all positions.
        device: Where, as in torch.
        dtype: Of the parameters, as in torch.

    Shape: x (..., in) -> (..., out/n), or (..., out) with `gather_output`; with
        `sequence_parallel` x (B, T/n, in) -> (B, T, out/n)

    Raises:
        ValueError: If n does not divide the features (of each block, in whole units);
            in forward, if x does not have all.

    Communication: nothing forward, an all_reduce of dx backward. With
    `sequence_parallel` an all_gather of x forward and again for dW, a reduce_scatter of
    dx. With `gather_output` an all_gather of y forward.

    Reference: Shoeybi et al. 2019, arXiv:1909.08053, section 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mesh: DeviceMesh,
        *,
        bias: bool = True,
        unit: int = 1,
        blocks: Sequence[int] = (),
        gather_output: bool = False,
        sequence_parallel: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        blocks = block_lengths(
            *("out_features", out_features, mesh.size()), unit=unit, blocks=blocks
        )
        super().__init__(in_features, out_features, bias, device, dtype)
        _start_equal(self, mesh)
        options = {"is_sequence": sequence_parallel, "gathers": gather_output}
        self.take_layout(cut_layout(self, mesh, 0, blocks, **options))

    def forward(self, input: Tensor) -> Tensor:
        """Return this rank's features, or all of them.

        Args:
            input: All features; of this rank's positions with `sequence_parallel`.

        Raises:
            ValueError: If there are not all features, or no sequence where it is cut.
        """
        mesh, is_sequence, entered = self.layout.mesh, self.layout.is_sequence, None
        if input.shape[-1] != self.in_features:
            raise ValueError(
                f"a column layer takes all {self.in_features} features, got "
                f"{input.shape[-1]}; cut the layer before it by `row`, or let it gather"
            )
        if is_sequence:
            check_sequence(input)
        if self.layout.region is not None:
            enter = f_sequence if is_sequence else f
            entered = self.layout.region.entered(input, enter)
        enters = entered is None
        x, weight, bias = _cast(input if enters else entered, self.weight, self.bias)
        y = ColumnLinear.apply(x, weight, bias, mesh, enters, is_sequence and enters)
        return join(y, mesh) if self.layout.gathers else y


class RowParallelLinear(ParallelLayer, nn.Linear):
    """A linear layer of which each rank takes 1/n of the input features.

    y = sum_r x_r W_r^T + b with W (out, in) cut into n pieces of columns. The ranks'
    terms are added up, then the bias is added, once.

    Args:
        in_features: Features of x over all ranks.
        out_features: Features of y.
        mesh: The tensor-parallel axis.
        bias: Whether there is a b; it is whole on every rank.
        unit: A rank's features are a multiple of this: the width of a head.
        sequence_parallel: y is this rank's positions.
        device: Where, as in torch.
        dtype: Of the parameters, as in torch.

    Shape: x (..., in/n) -> (..., out); with `sequence_parallel` x (B, T, in/n) -> (B,
        T/n, out)

    Raises:
        ValueError: If n does not divide the features (in whole units); in forward, if x
            does not have in/n features or n does not divide T.

    Communication: an all_reduce of y forward, nothing backward. With
    `sequence_parallel` a reduce_scatter of y forward and an all_gather of dy backward.

    Reference: Shoeybi et al. 2019, arXiv:1909.08053, section 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mesh: DeviceMesh,
        *,
        bias: bool = True,
        unit: int = 1,
        sequence_parallel: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        blocks = block_lengths("in_features", in_features, mesh.size(), unit=unit)
        super().__init__(in_features, out_features, bias, device, dtype)
        _start_equal(self, mesh)
        layout = cut_layout(self, mesh, 1, blocks, is_sequence=sequence_parallel)
        self.take_layout(layout)

    def forward(self, input: Tensor) -> Tensor:
        """Return the sum of all ranks' terms.

        Args:
            input: This rank's features.

        Raises:
            ValueError: If it has others, or if n does not divide T.
        """
        layout = self.layout
        if input.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"a row layer takes this rank's {self.weight.shape[1]} of "
                f"{self.in_features} features, got {input.shape[-1]}; cut the layer "
                "before it by `column`, without gathering"
            )
        if layout.is_sequence:
            check_sequence(input, layout.mesh)
        x, weight, bias = _cast(input, self.weight, self.bias)
        return RowLinear.apply(x, weight, bias, layout.mesh, layout.is_sequence)


class VocabParallelEmbedding(ParallelLayer, nn.Embedding):
    """An embedding of which each rank holds 1/n of the vocabulary.

    A rank looks up the tokens of its own rows, has zeros for all others, and the sum
    over the ranks is the embedding.

    Args:
        num_embeddings: V, rows over all ranks.
        embedding_dim: D, length of a row.
        mesh: The tensor-parallel axis.
        padding_idx: A token whose row gets no gradient.
        sequence_parallel: Return this rank's positions only.
        device: Where, as in torch.
        dtype: Of the parameter, as in torch.

    Shape: tokens (...) -> (..., D); with `sequence_parallel` (B, T) -> (B, T/n, D)

    Raises:
        ValueError: If n does not divide V; in forward, if n does not divide T.
        IndexError: In forward on the CPU, for a token outside the vocabulary.

    Communication: an all_reduce of the result forward, nothing backward; with
    `sequence_parallel` a reduce_scatter forward and an all_gather backward.

    Reference: Shoeybi et al. 2019, arXiv:1909.08053, section 3.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        mesh: DeviceMesh,
        *,
        padding_idx: int | None = None,
        sequence_parallel: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        blocks = block_lengths("num_embeddings", num_embeddings, mesh.size())
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype
        )
        _start_equal(self, mesh)
        layout = cut_layout(self, mesh, 0, blocks, is_sequence=sequence_parallel)
        self.take_layout(layout)

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of the tokens.

        Args:
            input: Tokens, the same on every rank.
        """
        mesh, rows = self.layout.mesh, self.weight.shape[0]
        first = rows * mesh.get_local_rank()
        own = input - first
        # A token of no rank keeps its bad number, so that the lookup refuses it.
        before, after = (own < 0) & (input >= 0), own >= rows
        elsewhere = before | (after & (input < self.num_embeddings))
        padding = None if self.padding_idx is None else self.padding_idx - first
        if padding is not None and not 0 <= padding < rows:
            padding = None
        y = F.embedding(own.masked_fill(elsewhere, 0), self.weight, padding)
        y = y.masked_fill(elsewhere.unsqueeze(-1), 0)
        return g_sequence(y, mesh) if self.layout.is_sequence else g(y, mesh)


def cut_layout(
    layer: nn.Module,
    mesh: DeviceMesh,
    dim: int,
    blocks: tuple[int, ...],
    **options: Any,
) -> Layout:
    """Return the layout of a whole layer of which one dim is to be cut.

    Args:
        layer: A linear layer or an embedding.
        mesh: The tensor-parallel axis.
        dim: 0 for output features or tokens, 1 for input features, which a bias has
            not.
        blocks: Lengths of the matrices that are stacked along it.
        **options: Further attributes of the layout.
    """
    cuts = {
        # Another stage, with which the layer shares it, may have cut it.
        name: Cut(mesh, dim, (cut_of(parameter) or parameter).shape, blocks)
        for name, parameter in layer.named_parameters(recurse=False)
        if parameter.ndim > dim
    }
    return Layout(mesh=mesh, cuts=cuts, **options)


def _do_nothing(*_: Any) -> None: ...


def _start_equal(layer: nn.Module, mesh: DeviceMesh) -> None:
    require_device(layer, mesh, allows_meta=True)
    broadcast_state(layer.parameters(), mesh)


def _cast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Do what autocast does to a linear layer; it knows no function of ours."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)

    def cast(t: Tensor) -> Tensor:
        return t if t.dtype == torch.float64 else t.to(dtype)

    return cast(x), cast(weight), None if bias is None else cast(bias)
