"""Compressed sparse rows: the elements of a matrix that are not zero, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .bsr import BsrWeight, _parts
from .canonical import VALUES, CanonicalWeight, check_index, dense_weight, pointers, row_of


@dataclass(frozen=True, eq=False, repr=False)
class CsrWeight(CanonicalWeight):
    """A matrix [N, K] as its nonzeros.

    Attributes:
        crow: int32 [N + 1], where each row begins in `col` and `values`; the last is nnz.
        col: int32 [nnz], the columns, ascending within a row.
        values: [nnz] fp32, bf16, fp16, fp64 or int8 codes; zeros among them stay.
        shape: (N, K).

    Example:
        >>> CsrWeight.from_dense(torch.tensor([[0.0, 2.0], [0.0, 0.0]])).col
        tensor([1], dtype=torch.int32)
    """

    crow: Tensor
    col: Tensor
    values: Tensor
    shape: tuple[int, int]

    TENSORS: ClassVar[tuple[str, ...]] = ("crow", "col", "values")

    @classmethod
    def from_dense(cls, weight: Tensor) -> CsrWeight:
        """The elements of `weight` [N, K] that are not zero; NaN and Inf are not, -0.0 is.

        Raises:
            ValueError: weight is no matrix of a dtype that weights have.
        """
        weight = dense_weight("CsrWeight.from_dense", weight)
        nonzero = weight != 0
        # Twice as fast as pairs of indices.
        flat = nonzero.flatten().nonzero().flatten()
        col = (flat % weight.shape[1]).to(torch.int32) if flat.numel() else flat.to(torch.int32)
        return cls(pointers(nonzero.sum(1)), col, weight.reshape(-1)[flat], tuple(weight.shape))

    def to_dense(self) -> Tensor:
        """[N, K], dtype of the values."""
        dense = self.values.new_zeros(self.shape)
        dense[row_of(self.crow, len(self.col)), self.col.long()] = self.values
        return dense

    def check(self) -> CsrWeight:
        n, k = self._check_shape()
        self._check_tensor("values", ["nnz"], VALUES)
        check_index(self, n, k, "element")
        return self

    def blocks(self) -> BsrWeight:
        """The same matrix in blocks [1, 1]; memory is shared."""
        return BsrWeight(self.crow, self.col, self.values.view(-1, 1, 1), self.shape)

    def transpose(self) -> CsrWeight:
        """The matrix [K, N]."""
        order = torch.argsort(self.col, stable=True)
        return CsrWeight(
            pointers(torch.bincount(self.col, minlength=self.shape[1])),
            row_of(self.crow, len(self.col))[order].to(torch.int32),
            self.values[order],
            self.shape[::-1],
        )

    @classmethod
    def from_torch(cls, weight: Tensor) -> CsrWeight:
        """The weight of a torch.sparse_csr tensor; it may share memory with it.

        Raises:
            ValueError: another layout, batches, or `check` finds something wrong.
        """
        return cls(*_parts("CsrWeight", weight, torch.sparse_csr), weight.shape).check()

    def to_torch(self) -> Tensor:
        """A torch.sparse_csr tensor that shares memory with this one."""
        return torch.sparse_csr_tensor(self.crow, self.col, self.values, self.shape, check_invariants=True)
