"""Hidden states on their way through a layer: rows of floats, and the int8 codes that linear layers take of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..ops.rowwise_triton import Codes, add_layernorm_cuda, add_layernorm_quantize_cuda, quantize_rows_cuda

# Step and zero point of int8 activations, as of `bertkern.ops.pack_qlinear`.
Grid = tuple[float, int]


class Rows:
    """Rows [T, K], as floats, as codes on some grid, or both; codes are made when they are first asked for.

    Attributes:
        values: fp32, bf16 or fp16; None where there are codes alone.
        live: int32 [1], how many rows there are; None: all.
    """

    def __init__(
        self, values: Tensor | None, live: Tensor | None = None, codes: Codes | None = None, grid: Grid | None = None
    ) -> None:
        self.values, self.live = values, live
        self._codes, self._grid = codes, grid

    def codes(self, grid: Grid) -> Codes:
        """The rows' codes on a grid."""
        if self._codes is None or self._grid != grid:
            assert self.values is not None
            self._codes, self._grid = quantize_rows_cuda(self.values, *grid, self.live), grid
        return self._codes


class Norm(NamedTuple):
    """A LayerNorm over the last dimension."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor, residual: Tensor | None, live: Tensor | None, grid: Grid | None) -> Rows:
        """LayerNorm(x + residual), with its codes where the next layer takes them on `grid`."""
        if grid is None:
            return Rows(add_layernorm_cuda(x, residual, self.weight, self.bias, self.eps, live), live)
        y, codes = add_layernorm_quantize_cuda(x, residual, self.weight, self.bias, self.eps, *grid, live)
        return Rows(y, live, codes, grid)
