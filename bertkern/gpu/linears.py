"""Linear layers as the GPU's operators take them: y = activation(x W^T + b), made once of a layer's tensors.

Each is called with rows and gives floats; `grid` says on which grid a layer wants its rows as int8 codes, None as
floats. Layers that read the same rows are joined into one where that is one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.bsr import BsrWeight
from ..ops.block_sparse import block_index, block_sparse_linear
from ..ops.block_sparse_int8 import block_sparse_linear_int8
from ..ops.groupwise_planes import GroupwisePlanes
from ..ops.groupwise_triton import groupwise_linear_cuda
from ..ops.int8_triton import int8_linear_cuda, int8_requantize_cuda, pack_int8_weight
from ..ops.rowwise_triton import Codes, symmetric
from .rows import Grid, Rows

# In the order of bertkern.nn.activations.
_ACTIVATIONS = (
    lambda x: x,
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    F.relu,
    torch.tanh,
    F.silu,
)


class Linear:
    """What all of them are.

    Attributes:
        name: for reports.
        width: N.
        grid: step and zero point of the codes that it takes; None: it takes floats.
        exact: whether what comes out is to be kept as it is, because it is exact in fp32 or rounded to codes.
    """

    name: str
    grid: Grid | None = None
    exact: bool = False

    @property
    def width(self) -> int:
        raise NotImplementedError

    def __call__(self, x: Rows, dtype: torch.dtype, activation: int = 0) -> Tensor:
        """[T, N] in `dtype`."""
        raise NotImplementedError

    def chained(self, x: Rows, dtype: torch.dtype, activation: int, following: Linear) -> Rows:
        """The rows for the layer that takes this one's result."""
        return Rows(self(x, dtype, activation), x.live)


@dataclass(frozen=True, eq=False)
class Dense(Linear):
    """A float weight [N, K] and bias, by torch's own product."""

    weight: Tensor
    bias: Tensor | None
    name = "torch"

    @property
    def width(self) -> int:
        return self.weight.shape[0]

    @property
    def exact(self) -> bool:
        return self.weight.dtype == torch.float32

    def __call__(self, x: Rows, dtype: torch.dtype, activation: int = 0) -> Tensor:
        assert x.values is not None
        y = F.linear(x.values.to(self.weight.dtype), self.weight, self.bias)
        return _ACTIVATIONS[activation](y).to(dtype)


@dataclass(frozen=True, eq=False)
class Int8(Linear):
    """Codes of the weight, as `pack_int8_weight` lays them out, and what belongs to them."""

    weight: Tensor
    sums: Tensor
    scale: Tensor
    bias: Tensor | None
    grid: Grid
    output_scale: float = 0.0
    # int32 [1]: the zero point of codes that another layer made on this one's static grid; None: 0.
    zero: Tensor | None = None
    name = "int8"

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, bias: Tensor | None, grid: Grid, output_scale: float = 0.0) -> Int8:
        """Of codes [N, K] and scales [N] or [1]."""
        weight, sums = pack_int8_weight(codes)
        if weight.shape == codes.shape and codes.is_contiguous() and codes.data_ptr() % 16 == 0:
            weight = codes  # which lie as they should: no second copy
        zero = None
        if grid[0] > 0 and not symmetric(*grid):
            zero = torch.full((1,), grid[1] - 128, dtype=torch.int32, device=codes.device)
        return cls(weight, sums, scale.expand(codes.shape[0]).contiguous(), bias, grid, output_scale, zero)

    @property
    def width(self) -> int:
        return self.weight.shape[0]

    @property
    def exact(self) -> bool:
        return self.output_scale > 0

    def _arguments(self, x: Rows, activation: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        codes, scale, zero = x.codes(self.grid)
        given = (codes, scale, self.weight, self.scale, self.bias)
        sums = None if zero is None else self.sums
        named = {"zero_point": zero, "weight_sums": sums, "activation": activation, "count": x.live}
        return given, {**named, "output_scale": self.output_scale}

    def __call__(self, x: Rows, dtype: torch.dtype, activation: int = 0) -> Tensor:
        given, named = self._arguments(x, activation)
        return int8_linear_cuda(*given, out_dtype=dtype, **named)

    def chained(self, x: Rows, dtype: torch.dtype, activation: int, following: Linear) -> Rows:
        if following.grid is None or following.grid[0] <= 0 or not isinstance(following, Int8):
            return super().chained(x, dtype, activation, following)
        # On a static grid the result is rounded where it is made.
        step, zero_point = following.grid
        offset = 0 if symmetric(step, zero_point) else zero_point - 128
        given, named = self._arguments(x, activation)
        codes, scale = int8_requantize_cuda(*given, out_scale=step, out_zero_point=offset, **named)
        return Rows(None, x.live, Codes(codes, scale.flatten(), following.zero), following.grid)


@dataclass(frozen=True, eq=False)
class BlockSparse(Linear):
    """The nonzero blocks of a float weight."""

    values: Tensor
    index: Tensor
    bias: Tensor | None
    out_features: int
    name = "block-sparse"

    @property
    def width(self) -> int:
        return self.out_features

    @property
    def exact(self) -> bool:
        return self.values.dtype == torch.float32

    def __call__(self, x: Rows, dtype: torch.dtype, activation: int = 0) -> Tensor:
        assert x.values is not None
        y = block_sparse_linear(x.values.to(self.values.dtype), self.values, self.index, self.out_features, self.bias)
        return _ACTIVATIONS[activation](y).to(dtype)


@dataclass(frozen=True, eq=False)
class BlockSparseInt8(Linear):
    """The nonzero blocks of int8 codes; without an activation it gives the bits that `Int8` gives of all codes."""

    values: Tensor
    index: Tensor
    scale: Tensor
    sums: Tensor
    bias: Tensor | None
    grid: Grid
    name = "block-sparse int8"

    @classmethod
    def of(cls, blocks: BsrWeight, scale: Tensor, bias: Tensor | None, grid: Grid) -> BlockSparseInt8:
        """Of codes [N, K] as their blocks and scales [N] or [1]."""
        sums = blocks.to_dense().sum(1, dtype=torch.int32)
        return cls(blocks.values, block_index(blocks), scale.expand(blocks.shape[0]).contiguous(), sums, bias, grid)

    @property
    def width(self) -> int:
        return self.scale.shape[0]

    def __call__(self, x: Rows, dtype: torch.dtype, activation: int = 0) -> Tensor:
        codes, scale, zero = x.codes(self.grid)
        return block_sparse_linear_int8(
            codes, scale, self.values, self.scale, self.index, self.width, self.bias, zero=zero,
            column_sum=None if zero is None else self.sums, activation=activation, out_dtype=dtype, count=x.live,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Groupwise(Linear):
    """Low-bit codes; their operator rounds activations itself."""

    planes: GroupwisePlanes
    bias: Tensor | None
    options: dict[str, Any]
    name = "group-wise"

    @property
    def width(self) -> int:
        return self.planes.scale.shape[-1]

    @property
    def exact(self) -> bool:
        return False

    def __call__(self, x: Rows, dtype: torch.dtype, activation: int = 0) -> Tensor:
        assert x.values is not None
        return groupwise_linear_cuda(
            x.values, self.planes, self.bias, activation=activation, out_dtype=dtype, **self.options
        )


def joined(linears: Sequence[Linear]) -> Linear | None:
    """One layer whose result is those of `linears` side by side, or None where that is not one product.

    Its weight is a copy.
    """
    kinds = {type(linear) for linear in linears}
    if kinds == {Int8}:
        first = linears[0]
        if any(linear.grid != first.grid or linear.output_scale != first.output_scale for linear in linears):
            return None
        weight, sums, scale = (
            torch.cat([getattr(linear, n) for linear in linears]) for n in ("weight", "sums", "scale")
        )
        return Int8(weight, sums, scale, _biases(linears), first.grid, first.output_scale, first.zero)
    if kinds == {Dense} and len({linear.weight.dtype for linear in linears}) == 1:
        return Dense(torch.cat([linear.weight for linear in linears]), _biases(linears))
    return None


def _biases(linears: Sequence[Any]) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    dtype = next(linear.bias.dtype for linear in linears if linear.bias is not None)
    zeros = [linear.weight.new_zeros(linear.width, dtype=dtype) for linear in linears]
    return torch.cat(
        [zero if linear.bias is None else linear.bias for linear, zero in zip(linears, zeros, strict=True)]
    )
