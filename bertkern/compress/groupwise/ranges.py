"""Ranges of groups by the error that rounding makes where inputs are large."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bertkern.formats.groupwise import grid, group_ranges

from .grids import Grids

# Shares of a group's range about its middle that are tried, and by how much of it each end is then moved on its own.
SHARES = tuple(1 - 0.7 * step / 32 for step in range(33))
MOVES = tuple(0.04 * step for step in range(-6, 7))

Ends = tuple[Tensor, Tensor]


def weighted_ends(
    weight: Tensor,
    importance: Tensor,
    bits: Tensor,
    group_size: int,
    axis: str,
    symmetric: bool = False,
    shared: bool = False,
) -> Ends:
    """(scale, zero) of each group of weight [N, K]: of the grids that are tried the one with the least sum of
    importance x squared error of the nearest codes.

    Args:
        importance: of the columns, [K]. The mean squares of a layer's inputs make the sum the error of its outputs,
            as if the inputs had nothing to do with each other.
        bits: of each group.
    """
    ends = group_ranges(weight, axis, group_size, shared)
    search = _Search(weight, importance, bits, group_size, axis, symmetric, shared)
    low, high = ends
    middle = torch.zeros_like(low) if symmetric else (low + high) / 2
    for share in SHARES:
        search.attempt(middle - share * (middle - low), middle + share * (high - middle))
    if not symmetric:
        for down, up in ((1.0, 0.0), (0.0, 1.0)):
            low, high = search.ends
            for move in MOVES:
                search.attempt(low + down * move * (high - low), high - up * move * (high - low))
    return search.scale, search.zero


class _Search:
    """The best grid so far of each group."""

    def __init__(
        self,
        weight: Tensor,
        importance: Tensor,
        bits: Tensor,
        group_size: int,
        axis: str,
        symmetric: bool,
        shared: bool,
    ) -> None:
        self._weight, self._importance, self._shared = weight, importance, shared
        self._layout = bits, tuple(weight.shape), axis, group_size, symmetric
        self._error: Tensor | None = None

    def attempt(self, low: Tensor, high: Tensor) -> None:
        """Takes the grids between these ends where they are better."""
        bits, *_, symmetric = self._layout
        scale, zero = grid(low, high, bits, symmetric)
        grids = Grids(scale, zero, *self._layout)
        lost = grids.rounded(self._weight).sub_(self._weight).square_().mul_(self._importance)
        error = self._summed(lost)
        if self._error is None:
            self._error, self.scale, self.zero, self.ends = error, scale, zero, (low, high)
            return
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.scale, self.zero = torch.where(better, scale, self.scale), torch.where(better, zero, self.zero)
        self.ends = torch.where(better, low, self.ends[0]), torch.where(better, high, self.ends[1])

    def _summed(self, lost: Tensor) -> Tensor:
        """Of each group, in the shape of scale."""
        _, _, axis, size, _ = self._layout
        rows = lost.sum(1)[None] if axis == "n" else lost
        sums = F.pad(rows, (0, -rows.shape[1] % size)).unflatten(1, (-1, size)).sum(2)
        return sums[0] if axis == "n" else sums.sum(0, keepdim=True) if self._shared else sums
