"""Weights rounded to group-wise grids whose ranges a method finds; in blocks of rows, for memory's sake."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .groupwise import BITS, GroupwiseWeight, expect_bits, grid, group_count, quantize_groupwise

# Weights that are rounded at a time: some megabytes of temporaries, whatever the shape.
BLOCK = 2**20
PERCENTILE = 0.1
# Of the search for the least error: how many shares of a group's range are tried, and the least of them; by which
# powers of their ratio either end is then moved on its own; by how many steps of the grid both are; and how often the
# grid is fitted.
SHARES, LEAST = 9, 0.1
MOVES = (-0.75, -0.375, 0.375, 0.75)
STEPS = (-1, -0.5, 0, 0.5, 1)
FINE_STEPS = tuple(step / 4 for step in range(-8, 9) if step)  # symmetric grids have but one end to move
REFITS = 3
# Elements that it works on at a time, so that they stay in a cache, and how many a group counts as at least.
CACHED, LEAST_ELEMENTS = 2**18, 32

Ranges = tuple[Tensor, Tensor]


class Grid(NamedTuple):
    """Which grids there are; see `grid`."""

    symmetric: bool
    whole_zero: bool


def round_weight(
    weight: Tensor,
    bits: Tensor | Sequence[int] | int,
    group_size: int,
    axis: str = "n",
    *,
    method: str = "minmax",
    symmetric: bool = False,
    whole_zero: bool = False,
    shared: bool = False,
) -> GroupwiseWeight:
    """The low-bit form of weight [N, K], see `quantize_groupwise`.

    Args:
        method: "minmax": a grid reaches from the smallest to the largest weight of its group; "percentile": from the
            0.1th to the 99.9th percentile, interpolated; "mse": the one of the least squared error that a
            search finds, which may begin or end up to a step outside of the group's own range: never a greater error
            than by "minmax", and of a group of 64 within 2 % of the least among such grids.

    Example:
        >>> weight = torch.randn(64, 48)
        >>> errors = [(round_weight(weight, 2, 16, method=m).dequantize() - weight).norm() for m in ("minmax", "mse")]
        >>> bool(errors[1] < errors[0])
        True

    Source: arXiv 1909.05840, section 3.3, and its authors' code (percentiles).
    """
    if method not in METHODS:
        raise ValueError(f"round_weight: expected method to be one of {tuple(METHODS)}. Got {method!r}.")
    find, (n, k) = METHODS[method], weight.shape
    each = expect_bits("round_weight", bits, group_count((n, k), axis, group_size)).to(weight.device)
    on = Grid(symmetric, whole_zero)
    ranges = find_ranges(find, weight, each, group_size, axis, on, shared) if shared else None
    height = max(1, BLOCK // max(1, k))
    if axis == "n":
        height = max(1, height // group_size) * group_size
    parts = []
    for first in range(0, n, height):
        part = weight[first : first + height].detach().float()
        part_bits = each[first // group_size :][: -(-part.shape[0] // group_size)] if axis == "n" else each
        found = find_ranges(find, part, part_bits, group_size, axis, on, shared) if ranges is None else ranges
        how = {"symmetric": symmetric, "whole_zero": whole_zero, "shared": shared, "ranges": found}
        parts.append(quantize_groupwise(part, part_bits, group_size, axis, **how))
    return _joined(parts, (n, k), each, shared)


def find_ranges(
    find: Callable[..., Ranges],
    weight: Tensor,
    bits: Tensor,
    group_size: int,
    axis: str,
    on: Grid,
    shared: bool,
) -> Ranges:
    """(low, high) of each group, of the shape of scale.

    Args:
        find: of METHODS: gets groups [G, elements], their bits [G] and `on`.
    """
    lows, highs = [], []
    for groups, count in _cut(weight.detach().float(), group_size, axis, shared):
        first = sum(low.shape[-1] for low in lows)
        wide = bits[first : first + count]
        rows = groups.shape[0] // max(1, count)
        low, high = find(groups, wide if rows == 1 else wide.repeat(rows), on)
        shape = (count,) if axis == "n" else (rows, count)
        lows.append(low.view(shape))
        highs.append(high.view(shape))
    # Mostly all groups are of equal size, and quantization-aware training comes here at every step.
    return (lows[0], highs[0]) if len(lows) == 1 else (torch.cat(lows, -1), torch.cat(highs, -1))


def _cut(weight: Tensor, size: int, axis: str, shared: bool) -> Iterator[tuple[Tensor, int]]:
    """Groups of equal size as rows of a matrix, and how many lie along the axis; the shorter last one follows alone."""
    side = weight.shape[0] if axis == "n" else weight.shape[1]
    whole = side // size * size
    for part, length in ((slice(0, whole), size), (slice(whole, side), side - whole)):
        count = (part.stop - part.start) // length if length else 0
        if count and axis == "n":
            yield weight[part].reshape(count, -1), count
        elif count:
            groups = weight[:, part].reshape(-1, count, length)
            yield (groups.transpose(0, 1).reshape(count, -1) if shared else groups.reshape(-1, length)), count


def _minmax(groups: Tensor, bits: Tensor, on: Grid) -> Ranges:
    return groups.amin(1), groups.amax(1)


def _percentile(groups: Tensor, bits: Tensor, on: Grid) -> Ranges:
    last = groups.shape[1] - 1

    def value(share: float, largest: bool) -> Tensor:
        at = share * last
        below = int(at)
        above = min(below + 1, last)
        # Few lie beyond: in one pass, they are found together.
        beyond = groups.topk(last - below + 1 if largest else above + 1, 1, largest).values
        low, high = (beyond[:, last - place if largest else place] for place in (below, above))
        return torch.lerp(low, high, at - below)

    return value(PERCENTILE / 100, False), value(1 - PERCENTILE / 100, True)


def _least_error(groups: Tensor, bits: Tensor, on: Grid) -> Ranges:
    """The best ranges that a search finds; see `_Search`."""
    rows = max(1, CACHED // max(groups.shape[1], LEAST_ELEMENTS))
    parts = zip(groups.split(rows), bits.split(rows), strict=True)
    lows, highs = zip(*(_Search(part, wide, on).run() for part, wide in parts), strict=True)
    return torch.cat(lows), torch.cat(highs)


class _Search:
    """The ranges of groups [G, elements] that round them with the least squared error.

    The error has a local minimum nearly wherever a point of the grid passes from one element to another. Tried are
    shares of each group's whole range, then moves of either end, then of both by parts of a step of the grid; the best
    grid is fitted to its codes by least squares.

    Attributes:
        low, high: the best ranges so far, from the smallest to the largest element at first: [G].
    """

    def __init__(self, groups: Tensor, bits: Tensor, on: Grid) -> None:
        self._groups, self._bits, self._on = groups.contiguous(), bits, on
        self._bottom, self._top = int(on.symmetric), 2.0 ** bits.float() - 1
        self._limit = float(self._top[0]) if bool((bits == bits[0]).all()) else None  # of all groups
        self._scaled, self._codes = torch.empty_like(self._groups), torch.empty_like(self._groups)
        self.low, self.high = groups.amin(1), groups.amax(1)
        self._error = self._lost(*grid(self.low, self.high, bits, *on))
        self._first = self.low, self.high

    def run(self) -> Ranges:
        """The best ranges."""
        self._shrink()
        self._shift()
        for _ in range(REFITS):
            self._refit()
        # `grid` makes other grids than were tried of ranges too small to count in steps of.
        better = self._told(self.low, self.high) <= self._told(*self._first)
        low, high = (torch.where(better, *ends) for ends in zip((self.low, self.high), self._first, strict=True))
        return low, high

    def _shrink(self) -> None:
        """Shares of the range about the group's mean, of both ends at once, then of either alone."""
        low, high = self.low, self.high
        if self._on.symmetric:
            middle, high = torch.zeros_like(low), torch.maximum(-low, high)
            low = -high
        else:
            middle = self._groups.mean(1)
        powers = self._powers()
        shares, moves = powers[:SHARES], powers[SHARES:]
        self._try(torch.lerp(middle, low, shares), torch.lerp(middle, high, shares))
        if self._on.symmetric:
            self._try(self.low * moves, self.high * moves)
        else:
            self._try(torch.lerp(middle, self.low, moves), self.high)
            self._try(self.low, torch.lerp(middle, self.high, moves))

    def _powers(self) -> Tensor:
        """The ratio of two shares to the powers of 1 to SHARES, and of MOVES: [powers, G]."""
        table = []
        for bits in BITS:
            # Cutting off an outlier a side costs its distance and makes all others' steps smaller: the more elements
            # and the fewer steps there are, the smaller is the best share.
            least = max(LEAST, 1 / (1 + self._groups.shape[1] / (3 * (2**bits - 1) ** 2)))
            table.append([least ** (power / SHARES) for power in (*range(1, SHARES + 1), *MOVES)])
        return torch.tensor(table, device=self._bits.device)[self._bits.long() - BITS[0]].T

    def _shift(self) -> None:
        """Both ends by parts of a step."""
        scale, _ = self._grid(self.low, self.high)
        by = scale * torch.tensor(FINE_STEPS if self._on.symmetric else STEPS, device=scale.device)[:, None]
        if self._on.symmetric:
            self._try(self.low - by, self.high + by)
        else:
            down, up = (self.low - by).repeat(len(by), 1), (self.high + by).repeat_interleave(len(by), 0)
            self._try(down, up)

    def _refit(self) -> None:
        """Least squares for the codes, in the scale and, unless it is whole or the middle, the zero point."""
        scale, zero = self._grid(self.low, self.high)
        self._round(scale, zero)
        fixed = any(self._on)
        centre = zero if fixed else self._codes.mean(1)
        codes = self._codes.sub_(centre[:, None])
        slope = torch.linalg.vecdot(codes, self._scaled.sub_(centre[:, None])) / torch.linalg.vecdot(codes, codes)
        # In steps of the old grid, the element of a code: centre + away + slope * (code - centre).
        away = 0.0 if fixed else self._scaled.mean(1)
        ends = (((end - centre) * slope + away + centre - zero) * scale for end in (self._bottom, self._top))
        self._try(*ends)

    def _try(self, low: Tensor, high: Tensor) -> None:
        """Takes the best of these ranges, [G] or [tries, G], where it is better than what there is."""
        low, high = torch.broadcast_tensors(torch.atleast_2d(low), torch.atleast_2d(high))
        low, high = torch.cat([self.low[None], low]), torch.cat([self.high[None], high])
        grids = zip(*(part[1:] for part in self._grid(low, high)), strict=True)
        errors = torch.stack([self._error, *(self._lost(scale, zero) for scale, zero in grids)])
        # Ends that make no grid give NaN, or less than nothing.
        best = errors.masked_fill_(~(errors >= 0), float("inf")).argmin(0, keepdim=True)
        self._error, self.low, self.high = (part.gather(0, best)[0] for part in (errors, low, high))

    def _grid(self, low: Tensor, high: Tensor) -> Ranges:
        """(scale, zero) as `grid` has them, of ranges that are none too."""
        if self._on.symmetric:
            zero = (self._top + 1) / 2
            return torch.maximum(-low, high) / (zero - 1), zero.expand_as(low)
        if self._on.whole_zero:
            low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / self._top
        zero = -low / scale
        return scale, zero.round_() if self._on.whole_zero else zero

    def _round(self, scale: Tensor, zero: Tensor) -> None:
        """Elements in steps of their grid, and their codes."""
        torch.div(self._groups, scale[:, None], out=self._scaled).add_(zero[:, None])
        torch.round(self._scaled, out=self._codes).clamp_(self._bottom, self._limit)
        if self._limit is None:
            torch.minimum(self._codes, self._top[:, None], out=self._codes)

    def _lost(self, scale: Tensor, zero: Tensor) -> Tensor:
        """The root of the squared error of each group."""
        self._round(scale, zero)
        return torch.linalg.vector_norm(self._codes.sub_(self._scaled), dim=1).mul_(scale)

    def _told(self, low: Tensor, high: Tensor) -> Tensor:
        """The same of what a weight of these ranges holds."""
        scale, zero = grid(low, high, self._bits, *self._on)
        self._round(scale, zero)
        rounded = self._codes.sub_(zero[:, None]).mul_(scale[:, None])
        return torch.linalg.vector_norm(rounded.sub_(self._groups), dim=1)


def _joined(parts: list[GroupwiseWeight], shape: tuple[int, int], bits: Tensor, shared: bool) -> GroupwiseWeight:
    """Blocks of rows one below the other; rows of codes begin at whole bytes."""
    first = parts[0]
    if len(parts) == 1:
        return first
    scale, zero = first.scale, first.zero
    if not shared:
        scale = torch.cat([part.scale for part in parts])
        zero = None if zero is None else torch.cat([part.zero for part in parts])
    codes = torch.cat([part.codes for part in parts])
    return GroupwiseWeight(codes, scale, zero, bits, shape, first.axis, first.group_size).check()


METHODS: dict[str, Callable[..., Ranges]] = {"minmax": _minmax, "percentile": _percentile, "mse": _least_error}
