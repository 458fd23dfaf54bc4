"""n:m weights, 2:4 above all: of every m neighbours along K, n are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .canonical import VALUES, CanonicalWeight, dense_weight


@dataclass(frozen=True, eq=False, repr=False)
class NmWeight(CanonicalWeight):
    """A matrix [N, K] in groups of m along K, of which each keeps n elements; a last group that is short has zeros
    beyond the matrix.

    Attributes:
        values: [N, ceil(K / m) * n] fp32, bf16, fp16, fp64 or int8 codes; zeros where a group has fewer nonzeros.
        index: uint8, of the same shape: the position of each value within its group, ascending.
        shape: (N, K).
        n, m: 1 <= n <= m <= 256.

    Example:
        >>> NmWeight.from_dense(torch.tensor([[0.0, 5.0, 0.0, 7.0]])).index
        tensor([[1, 3]], dtype=torch.uint8)
    """

    values: Tensor
    index: Tensor
    shape: tuple[int, int]
    n: int = 2
    m: int = 4

    TENSORS: ClassVar[tuple[str, ...]] = ("values", "index")

    @classmethod
    def from_dense(cls, weight: Tensor, n: int = 2, m: int = 4) -> NmWeight:
        """`weight` [N, K], of which no group of m has more than n nonzeros. A group with fewer also stores its first
        zeros; NaN and Inf are no zeros, -0.0 is one.

        Raises:
            ValueError: weight is no matrix of a dtype that weights have, a group has more nonzeros, or n and m are not
                as above.
        """
        _check_pattern("NmWeight.from_dense", n, m)
        weight = dense_weight("NmWeight.from_dense", weight)
        rows, k = weight.shape
        groups = -(-k // m)
        if groups * m != k:
            weight = torch.nn.functional.pad(weight, (0, groups * m - k))
        weight = weight.reshape(rows, groups, m)
        nonzero = weight != 0
        counts = nonzero.sum(2, dtype=torch.int16)
        if bool((counts > n).any()):
            row, group = (counts > n).nonzero()[0].tolist()
            raise ValueError(
                f"NmWeight.from_dense: expected at most {n} nonzeros in each {m} along K. "
                f"Got {int(counts[row, group])} in row {row} from column {group * m}."
            )
        # The first zeros fill a group up.
        free = (~nonzero).cumsum(2, dtype=torch.int16)
        kept = nonzero | (free <= (n - counts)[:, :, None])
        position = torch.arange(m, dtype=torch.uint8, device=weight.device).expand(rows, groups, m)
        shape = (rows, groups * n)
        return cls(weight[kept].view(shape), position[kept].view(shape), (rows, k), n, m)

    def to_dense(self) -> Tensor:
        """[N, K], dtype of the values."""
        rows, k = self.shape
        groups = -(-k // self.m)
        dense = self.values.new_zeros(rows, groups, self.m)
        stored = (rows, groups, self.n)
        dense.scatter_(2, self.index.view(stored).long(), self.values.view(stored))
        return dense.view(rows, groups * self.m)[:, :k].contiguous()

    def check(self) -> NmWeight:
        rows, k = self._check_shape()
        _check_pattern("NmWeight", self.n, self.m)
        groups, tail = -(-k // self.m), k % self.m
        values = self._check_tensor("values", [rows, groups * self.n], VALUES)
        index = self._check_tensor("index", [rows, groups * self.n], torch.uint8)
        self._check_range("index", self.m)
        index = index.reshape(rows, groups, self.n)
        if bool((index[:, :, 1:] <= index[:, :, :-1]).any()):
            raise ValueError("NmWeight: expected index to be strictly ascending within a group. Got others.")
        if tail:
            last = values.reshape(rows, groups, self.n)[:, -1]
            if bool(((last != 0) & (index[:, -1] >= tail)).any()):
                raise ValueError(f"NmWeight: expected zeros beyond the matrix {[rows, k]}. Got others.")
        return self

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: Sequence[int], prefix: str = "", n: int = 2, m: int = 4
    ) -> NmWeight:
        """As for every canonical form, with the pattern n:m, which no tensor tells."""
        return super().from_tensors(tensors, shape, prefix, n=n, m=m)


def _check_pattern(caller: str, n: int, m: int) -> None:
    if type(n) is not int or type(m) is not int or not 1 <= n <= m <= 256:
        raise ValueError(f"{caller}: expected 1 <= n <= m <= 256. Got n = {n!r}, m = {m!r}.")
