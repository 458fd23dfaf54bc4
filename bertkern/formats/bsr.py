"""Block-sparse rows: the blocks of a matrix that hold a nonzero, block row by block row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .canonical import LARGEST, VALUES, CanonicalWeight, check_index, dense_weight, pointers, row_of

# What `smallest` looks at, and the share of a dense file that it has to save.
_BLOCKS = ((1, 1), (1, 2), (1, 4), (4, 1), (1, 8), (4, 4), (16, 1), (8, 8), (16, 4), (16, 16), (32, 32), (64, 64))
_LEAST_SAVED = 0.1
# Of crow and col.
_INDEX_BYTES = 4


@dataclass(frozen=True, eq=False, repr=False)
class BsrWeight(CanonicalWeight):
    """A matrix [N, K] as blocks [br, bc] of any size; those at the edges are full ones with zeros outside of it.

    Attributes:
        crow: int32 [ceil(N / br) + 1], where each block row begins in `col` and `values`; the last is nnzb.
        col: int32 [nnzb], the block columns, ascending within a block row.
        values: [nnzb, br, bc] fp32, bf16, fp16, fp64 or int8 codes.
        shape: (N, K).

    Example:
        >>> BsrWeight.from_dense(torch.eye(5), (2, 2))
        BsrWeight((5, 5), float32, crow=[4], col=[3], values=[3, 2, 2])
    """

    crow: Tensor
    col: Tensor
    values: Tensor
    shape: tuple[int, int]

    TENSORS: ClassVar[tuple[str, ...]] = ("crow", "col", "values")

    @classmethod
    def from_dense(cls, weight: Tensor, block: Sequence[int]) -> BsrWeight:
        """The blocks of `weight` [N, K] that hold anything but zeros; NaN and Inf are no zeros, -0.0 is one.

        Args:
            weight: [N, K].
            block: (br, bc), at least (1, 1); neither has to divide the matrix.

        Raises:
            ValueError: weight is no matrix of a dtype that weights have, or block is no pair of sizes.
        """
        weight = dense_weight("BsrWeight.from_dense", weight)
        br, bc = _block(block)
        n, k = weight.shape
        rows, columns = -(-n // br), -(-k // bc)
        if rows * br * columns * bc > LARGEST:
            raise ValueError(
                f"BsrWeight.from_dense: expected blocks that fit a matrix {[n, k]} rounded up to fewer than 2^31 "
                f"elements. Got {[br, bc]}."
            )
        if (rows * br, columns * bc) != (n, k):
            weight = torch.nn.functional.pad(weight, (0, columns * bc - k, 0, rows * br - n))
        kept = _any((weight != 0).contiguous(), br, bc)
        row, col = kept.nonzero(as_tuple=True)
        blocks = weight.reshape(rows, br, columns, bc).permute(0, 2, 1, 3)
        values = blocks[row, col].contiguous()
        return cls(pointers(kept.sum(1)), col.to(torch.int32), values, (n, k))

    @classmethod
    def smallest(cls, weight: Tensor) -> BsrWeight | None:
        """`weight` [N, K] in the blocks of which a file is the smallest, or None where they save less than a tenth.

        The choice depends on the places of the zeros and on nothing else.

        Raises:
            ValueError: weight is no matrix of a dtype that weights have.

        Example:
            >>> BsrWeight.smallest(torch.eye(64).repeat_interleave(4, 1)).block
            (1, 4)
        """
        weight = dense_weight("BsrWeight.smallest", weight)
        nonzero, size = weight != 0, weight.dtype.itemsize
        least = (1 - _LEAST_SAVED) * weight.nbytes
        if int(nonzero.count_nonzero()) * size >= least:
            return None
        best = None
        for br, bc in _BLOCKS:
            n, k = (-(-side // of) * of for side, of in zip(weight.shape, (br, bc), strict=True))
            if n * k > LARGEST:
                continue
            padded = torch.nn.functional.pad(nonzero, (0, k - weight.shape[1], 0, n - weight.shape[0])).contiguous()
            kept = int(_any(padded, br, bc).count_nonzero())
            nbytes = kept * (br * bc * size + _INDEX_BYTES) + (n // br + 1) * _INDEX_BYTES
            if nbytes < least:
                least, best = nbytes, (br, bc)
        return None if best is None else cls.from_dense(weight, best)

    def to_dense(self) -> Tensor:
        """[N, K], dtype of the values."""
        (n, k), (br, bc) = self.shape, self.block
        rows, columns = -(-n // br), -(-k // bc)
        dense = self.values.new_zeros(rows, br, columns, bc)
        dense.permute(0, 2, 1, 3)[row_of(self.crow, len(self.col)), self.col.long()] = self.values
        return dense.view(rows * br, columns * bc)[:n, :k].contiguous()

    def check(self) -> BsrWeight:
        n, k = self._check_shape()
        values = self._check_tensor("values", ["nnzb", "br", "bc"], VALUES)
        br, bc = self.block
        if br < 1 or bc < 1:
            raise ValueError(f"BsrWeight: expected blocks of at least [1, 1]. Got {[br, bc]}.")
        rows, columns = -(-n // br), -(-k // bc)
        check_index(self, rows, columns, "block")
        bottom = values[int(self.crow[-2]) :, n % br :] if n % br else values[:0]
        right = values[self.col == columns - 1][:, :, k % bc :] if k % bc else values[:0]
        if bool((bottom != 0).any()) or bool((right != 0).any()):
            raise ValueError(
                f"BsrWeight: expected zeros where blocks {[br, bc]} reach beyond the matrix {[n, k]}. Got others."
            )
        return self

    @property
    def block(self) -> tuple[int, int]:
        """(br, bc)."""
        return self.values.shape[1], self.values.shape[2]

    @property
    def density(self) -> float:
        """Kept blocks of all blocks; 0 where there are none."""
        (n, k), (br, bc) = self.shape, self.block
        blocks = -(-n // br) * -(-k // bc)
        return len(self.col) / blocks if blocks else 0.0

    def transpose(self) -> BsrWeight:
        """The matrix [K, N] in blocks [bc, br]."""
        columns = -(-self.shape[1] // self.block[1])
        order = torch.argsort(self.col, stable=True)
        return BsrWeight(
            pointers(torch.bincount(self.col, minlength=columns)),
            row_of(self.crow, len(self.col))[order].to(torch.int32),
            self.values[order].transpose(1, 2).contiguous(),
            self.shape[::-1],
        )

    @classmethod
    def from_torch(cls, weight: Tensor, shape: Sequence[int] | None = None) -> BsrWeight:
        """The weight of a torch.sparse_bsr tensor; it may share memory with it.

        Args:
            weight: of layout torch.sparse_bsr, [N, K].
            shape: (N, K) without the rows and columns that torch needed to fill the last blocks; None: the tensor's.

        Raises:
            ValueError: another layout, batches, or `check` finds something wrong.
        """
        return cls(
            *_parts("BsrWeight", weight, torch.sparse_bsr), tuple(weight.shape if shape is None else shape)
        ).check()

    def to_torch(self) -> Tensor:
        """A torch.sparse_bsr tensor that shares memory with this one.

        torch's blocks divide its matrices: the result is [N, K] rounded up to whole blocks, zeros beyond.
        """
        rows, columns = len(self.crow) - 1, -(-self.shape[1] // self.block[1])
        shape = (rows * self.block[0], columns * self.block[1])
        return torch.sparse_bsr_tensor(self.crow, self.col, self.values, shape, check_invariants=True)


def _block(block: Sequence[int]) -> tuple[int, int]:
    sizes = tuple(block) if isinstance(block, (tuple, list)) else ()
    if len(sizes) != 2 or not all(type(size) is int and 1 <= size <= LARGEST for size in sizes):
        raise ValueError(f"BsrWeight.from_dense: expected block to be two sizes (br, bc) from 1. Got {block!r}.")
    return sizes[0], sizes[1]


def _any(nonzero: Tensor, br: int, bc: int) -> Tensor:
    """bool [rows / br, columns / bc]: whether a block of `nonzero`, contiguous, holds a True."""
    n, k = nonzero.shape
    found = nonzero.view(torch.uint8)
    if br > 1:
        found = found.view(n // br, br, k).amax(1)
    found = found.view(n // br, k // bc, bc)
    # torch reduces a short last dimension slowly; a comparison of wider integers takes 8, 4 or 2 flags at once.
    for dtype in (torch.int64, torch.int32, torch.int16):
        while found.shape[2] % dtype.itemsize == 0:
            found = (found.view(dtype) != 0).view(torch.uint8)
    return found.amax(2).view(torch.bool)


def _parts(name: str, weight: Tensor, layout: torch.layout) -> tuple[Tensor, Tensor, Tensor]:
    """int32 crow and col, and values, of a compressed torch tensor without batches."""
    got = weight.layout if isinstance(weight, Tensor) else type(weight).__name__
    if got != layout:
        raise ValueError(f"{name}.from_torch: expected a tensor of layout {layout}. Got {got}.")
    stored = weight.values()
    if weight.dim() != 2 or stored.dim() != (3 if layout == torch.sparse_bsr else 1):
        raise ValueError(f"{name}.from_torch: expected a matrix [N, K] without batches. Got {list(weight.shape)}.")
    if max(weight.shape, default=0) > LARGEST or stored.shape[0] > LARGEST:
        raise ValueError(f"{name}.from_torch: expected indices within 32 bits. Got {list(weight.shape)}.")
    index = (weight.crow_indices(), weight.col_indices())
    return *(part.to(torch.int32) for part in index), stored.detach()
