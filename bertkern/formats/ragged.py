"""Removed rows and columns: what is left of a matrix, dense, and where it stood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .canonical import VALUES, CanonicalWeight, dense_weight


@dataclass(frozen=True, eq=False, repr=False)
class RaggedWeight(CanonicalWeight):
    """A matrix [N, K] without its zero rows and columns.

    Attributes:
        values: [n', k'] fp32, bf16, fp16, fp64 or int8 codes.
        rows: int32 [n'], the rows that are left, ascending.
        columns: int32 [k'], the columns that are left, ascending.
        shape: (N, K).

    Example:
        >>> RaggedWeight.from_dense(torch.tensor([[0.0, 0.0], [0.0, 3.0]])).values
        tensor([[3.]])
    """

    values: Tensor
    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]

    TENSORS: ClassVar[tuple[str, ...]] = ("values", "rows", "columns")

    @classmethod
    def from_dense(cls, weight: Tensor) -> RaggedWeight:
        """`weight` [N, K] without the rows and the columns that are all zeros; NaN and Inf are no zeros, -0.0 is one.

        Raises:
            ValueError: weight is no matrix of a dtype that weights have.
        """
        weight = dense_weight("RaggedWeight.from_dense", weight)
        nonzero = weight != 0
        rows, columns = (nonzero.any(dim).nonzero().flatten() for dim in (1, 0))
        values = weight.index_select(0, rows).index_select(1, columns)
        return cls(values, rows.to(torch.int32), columns.to(torch.int32), tuple(weight.shape))

    def to_dense(self) -> Tensor:
        """[N, K], dtype of the values."""
        dense = self.values.new_zeros(self.shape)
        dense[self.rows.long()[:, None], self.columns.long()] = self.values
        return dense

    def check(self) -> RaggedWeight:
        shape = self._check_shape()
        values = self._check_tensor("values", ["n'", "k'"], VALUES)
        for name, left, size in zip(("rows", "columns"), values.shape, shape, strict=True):
            index = self._check_tensor(name, [left])
            self._check_range(name, size)
            if bool((index[1:] <= index[:-1]).any()):
                raise ValueError(f"RaggedWeight: expected {name} to be strictly ascending. Got others.")
        return self

    def transpose(self) -> RaggedWeight:
        """The matrix [K, N]."""
        return RaggedWeight(self.values.t().contiguous(), self.columns, self.rows, self.shape[::-1])
