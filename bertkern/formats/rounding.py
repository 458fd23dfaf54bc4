"""Weights rounded to group-wise grids whose ranges a method finds; in blocks of rows, for memory's sake."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .groupwise import GroupwiseWeight, expect_bits, grid, group_count, quantize_groupwise

# Weights that are rounded at a time: some megabytes of temporaries, whatever the shape.
BLOCK = 2**20
PERCENTILE = 0.1
# Shares of a group's range that are tried, and how both ends are then moved on their own. The best grid for weights of
# a normal distribution reaches over 0.9 of their range at 8 bits, 0.65 at 4 and 0.4 at 2; outliers leave less.
SHARES = tuple(share / 20 for share in range(20, 1, -1))
MOVES = (-0.1, -0.05, -0.025, 0.025, 0.05, 0.1)

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
            0.1th to the 99.9th percentile, interpolated; "mse": the one of the least squared error, within the
            smallest and the largest weight, that a search finds: never a greater error than by "minmax".

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
        low, high = find(groups, wide.repeat(rows), on)
        shape = (count,) if axis == "n" else (rows, count)
        lows.append(low.view(shape))
        highs.append(high.view(shape))
    return torch.cat(lows, -1), torch.cat(highs, -1)


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

    def value(share: float) -> Tensor:
        at = share * last
        below = int(at)
        low = groups.kthvalue(below + 1, 1).values
        return low if below == last else torch.lerp(low, groups.kthvalue(below + 2, 1).values, at - below)

    return value(PERCENTILE / 100), value(1 - PERCENTILE / 100)


def _least_error(groups: Tensor, bits: Tensor, on: Grid) -> Ranges:
    """Tries shares of each group's range about its mean, then moves of either end."""
    low, high = groups.amin(1), groups.amax(1)
    middle = torch.zeros_like(low) if on.symmetric else groups.mean(1)
    below, above = middle - low, high - middle
    best = _error(groups, low, high, bits, on)
    ends = torch.ones_like(low), torch.ones_like(low)

    def attempt(down: Tensor, up: Tensor) -> None:
        nonlocal best, ends
        down, up = down.clamp(0.05, 1), up.clamp(0.05, 1)
        error = _error(groups, middle - down * below, middle + up * above, bits, on)
        better = error < best
        best = torch.where(better, error, best)
        ends = torch.where(better, down, ends[0]), torch.where(better, up, ends[1])

    for share in SHARES[1:]:
        attempt(torch.full_like(low, share), torch.full_like(low, share))
    down, up = ends
    for move in MOVES:
        attempt(down + move, up + move if on.symmetric else up)
    if not on.symmetric:
        down, up = ends
        for move in MOVES:
            attempt(down, up + move)
    return middle - ends[0] * below, middle + ends[1] * above


def _error(groups: Tensor, low: Tensor, high: Tensor, bits: Tensor, on: Grid) -> Tensor:
    """The squared error of each group [G, elements] on its grid."""
    scale, zero = grid(low, high, bits, *on)
    scale, zero = scale[:, None], zero[:, None]
    top = (2.0 ** bits.float() - 1)[:, None]
    codes = (groups / scale).add_(zero).round_().clamp_(min=1 if on.symmetric else 0)
    torch.minimum(codes, top, out=codes)
    return codes.sub_(zero).mul_(scale).sub_(groups).square_().sum(1)


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
