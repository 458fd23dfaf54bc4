"""The grid that a dense matrix already lies on: fake-quantized weights, found again without loss.

A group's values are few and evenly spaced. Their step is the greatest common divisor of their differences, found as
Euclid does but with room for rounding; scale and zero point are then the fp32 numbers near it at which
(q - zero) * scale, computed in fp32, gives every value bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from .canonical import dense_weight, short
from .groupwise import BITS, GroupwiseWeight, group_ranges, pack_codes

# Points of the largest grid.
_LEVELS = 2 ** BITS[-1]
# Values that are looked at together: some tens of megabytes of float64.
_BLOCK = 2**20
# What rounding may move a difference or a point by, in units of eps times the group's largest value.
_ROUNDING = 4
# Columns that a group along K has at least; scales of fewer weigh more than their codes save.
_SMALLEST_RUN = 8
# Of mixed widths: what they must save on average, in bits, over one width for all.
_WORTH_MIXING = 0.5
# The largest common factor of a group's codes that is allowed for.
_FACTORS = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def find_grid(weight: Tensor, exact: bool = True) -> GroupwiseWeight | None:
    """The group-wise form of a matrix whose values lie on grids already, or None.

    Tried are, in this order: groups of rows, from all of them down to single ones; groups of columns that all rows
    share, likewise; runs of columns with scales of their own in each row. The first that fits is taken, if it is
    smaller than the dense matrix. Each group gets the fewest bits that hold its points; where widths differ they stay
    so only if that saves half a bit on average. Zero points are whole where 0 is a point of the grid, and left out
    where all groups are symmetric.

    A matrix off the grids is told by a few of its rows and columns.

    Args:
        weight: [N, K], fp32, bf16 or fp16. Of half-precision ones steps must stand out of the rounding: up to about 4
            bits of bf16 and 6 of fp16, one less in short runs.
        exact: whether `dequantize(weight.dtype)` must equal weight bit for bit, but for the sign of zeros. Else it may
            differ by 4 eps of the group's largest value, as after dividing by a scale instead of multiplying.

    Raises:
        ValueError: no matrix of these dtypes.

    Example:
        >>> find_grid(quantize_groupwise(torch.randn(64, 48), 4, 8).dequantize())
        GroupwiseWeight((64, 48), 4 bits, 8 groups of 8 along n)
    """
    found = grid_of(weight, exact)
    if found is None:
        return None
    codes = torch.cat([part.to(torch.uint8) for _, part in _codes(found, weight.detach())])
    return pack_codes(codes, found.scale, found.zero, found.bits, found.axis, found.group_size)


def grid_of(weight: Tensor, exact: bool = True) -> GroupwiseWeight | None:
    """What `find_grid` finds, without the codes: its tensor of them is empty."""
    w = dense_weight("find_grid", weight)
    if w.dtype not in DTYPES:
        raise ValueError(
            f"find_grid: expected weight of dtype {' or '.join(map(short, DTYPES))}. Got {short(w.dtype)}."
        )
    if not w.numel():
        return None
    for find in (_along_n, _along_k_shared, _along_k):
        made = find(w, exact)
        if made is not None and _smaller(made, w) and _holds(made, w, exact):
            return made
    return None


# ----------------------------------------------------------------------------------------------------- where groups lie
def _along_n(w: Tensor, exact: bool) -> GroupwiseWeight | None:
    found = _groups_of_rows(w, exact)
    return None if found is None else _grids(w, found[1], "n", found[0])


def _along_k_shared(w: Tensor, exact: bool) -> GroupwiseWeight | None:
    found = _groups_of_rows(w.T, exact)
    return None if found is None else _grids(w, found[1], "k", found[0], rows=1)


def _along_k(w: Tensor, exact: bool) -> GroupwiseWeight | None:
    """Runs of columns, each row's with a scale of its own."""
    n, k = w.shape
    sizes = sorted(size for size in {16, 32, 64, 128, *_divisors(k)} if _SMALLEST_RUN <= size < k)
    # What does not hold for short runs holds for none that they divide.
    wrong: list[int] = []
    for size in sizes:
        if any(size % part == 0 for part in wrong) or _fit(_runs(_some(w), size), exact) is None:
            wrong.append(size)
    for size in sorted(set(sizes) - set(wrong), reverse=True):
        fit = _joined(_fit(_runs(w[rows], size), exact) for rows in _blocks(n, k))
        if fit is not None:
            return _grids(w, fit, "k", size, rows=n)
    return None


def _groups_of_rows(w: Tensor, exact: bool) -> tuple[int, _Fit] | None:
    """The largest groups of rows [A, B] that lie on grids, and their fit; None where single rows do not."""
    if _fit(_some(w), exact) is None:
        return None
    alone = _joined(_fit(w[rows], exact) for rows in _blocks(*w.shape))
    if alone is None:
        return None
    # A scale is that of its neighbour but for rounding, or starts a new group; rows of one value go with any.
    count = len(w)
    known = torch.where(alone.top > 0, torch.arange(count, device=w.device), 0).cummax(0).values
    scale = alone.scale[known]
    moved = (scale[1:] - scale[:-1]).abs() > 2**-20 * scale[1:]
    starts = (moved.nonzero().flatten() + 1).tolist()
    for size in sorted({count, *_divisors(count), gcd(*starts) or count}, reverse=True):
        if size == 1:
            break
        # What the values of several rows have in common shows in their points: no need to look at the rows again.
        groups = _together(alone.points, size)
        few = groups[torch.linspace(0, len(groups) - 1, 4).long().unique()]
        if _fit(few, exact) is not None:
            fit = _joined(_fit(groups[rows], exact) for rows in _blocks(*groups.shape))
            if fit is not None:
                return size, fit
    return 1, alone


def _together(points: Tensor, size: int) -> Tensor:
    """[A, B] as [groups, size * B]; a group that is short repeats its last row."""
    short_by = -len(points) % size
    if short_by:
        points = torch.cat([points, points[-1:].expand(short_by, -1)])
    return points.reshape(-1, size * points.shape[1])


def _runs(w: Tensor, size: int) -> Tensor:
    """[A, B] as [A * groups, size]; a run that is short repeats its last value."""
    short_by = -w.shape[1] % size
    if short_by:
        w = torch.cat([w, w[:, -1:].expand(-1, short_by)], 1)
    return w.reshape(-1, size)


def _some(w: Tensor) -> Tensor:
    """A few rows, from all over."""
    return w[torch.linspace(0, len(w) - 1, 6, device=w.device).long().unique()]


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    height = max(1, _BLOCK // max(1, columns))
    return (slice(first, min(rows, first + height)) for first in range(0, rows, height))


def _divisors(of: int) -> list[int]:
    return [size for size in range(1, of + 1) if of % size == 0]


# ------------------------------------------------------------------------------------------------------ grids of groups
class _Fit(NamedTuple):
    """Grids of G groups: scale and zero fp32 [G], top int64 [G] (the highest code), whole bool [G] (of zeros); points
    [G, P], the different values of each group, some of them repeated."""

    scale: Tensor
    zero: Tensor
    top: Tensor
    whole: Tensor
    points: Tensor


def _joined(fits: Iterator[_Fit | None]) -> _Fit | None:
    """Fits one after the other; None, as soon as one of them is."""
    parts: list[_Fit] = []
    for fit in fits:
        if fit is None:
            return None
        parts.append(fit)
    width = max(part.points.shape[1] for part in parts)
    points = (torch.cat([p.points, p.points[:, :1].expand(-1, width - p.points.shape[1])], 1) for p in parts)
    return _Fit(*(torch.cat([part[i] for part in parts]) for i in range(4)), torch.cat(list(points)))


def _fit(values: Tensor, exact: bool) -> _Fit | None:
    """The grids of groups [G, E], or None where one group is on none."""
    points = _distinct(values, exact)
    if points is None:
        return None
    v = points.double()
    low, high = torch.aminmax(v, dim=1)
    noise = _noise(low, high, values.dtype)
    step = _step(v, low, high, noise, exact)
    if step is None:
        return None
    codes = ((v - low[:, None]) / step[:, None]).round_()
    top = codes.amax(1)
    scale, zero = torch.ones_like(low, dtype=torch.float32), torch.zeros_like(low, dtype=torch.float32)
    whole = torch.ones_like(low, dtype=torch.bool)
    left = torch.arange(len(v), device=v.device)
    # Codes with a common factor show a multiple of the step: only the step itself was a number of fp32.
    for factor in range(1, _FACTORS + 1 if exact else 2):
        if bool((top[left] * factor >= _LEVELS).any()):
            return None
        for find in (_multiples, _shifted):
            here = (v[left], codes[left] * factor, low[left], step[left] / factor, noise[left], values.dtype, exact)
            a, b, right = find(*here)
            done = left[right]
            scale[done], zero[done], whole[done] = a[right], b[right], find is _multiples
            top[done] *= factor
            left = left[~right]
            if not len(left):
                return _Fit(scale, zero, top.long(), whole, points)
    return None


def _distinct(values: Tensor, exact: bool) -> Tensor | None:
    """The different values of each group [G, E], [G, P], or all of them where there are few; None where one group has
    more than a grid."""
    low, high = (end.float() for end in torch.aminmax(values, dim=1))
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        return None
    if values.shape[1] <= 2 * _LEVELS:
        return values
    ends = torch.stack([low, high], 1).double()
    noise = _noise(ends[:, 0], ends[:, 1], values.dtype)
    # Some values tell the step; where they were no good sample, all of them do.
    for stride in (values.shape[1] // _LEVELS, 1):
        step = _step(torch.cat([values[:, ::stride].double(), ends], 1), ends[:, 0], ends[:, 1], noise, exact)
        if step is None:
            return None
        codes = ((values.float() - low[:, None]) / step.float()[:, None]).round_().long()
        table = values[:, :1].expand(-1, int(codes.max()) + 1).clone().scatter_(1, codes, values)
        if bool((table.gather(1, codes) == values).all()):
            return table
    return None


def _noise(low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    return _ROUNDING * torch.finfo(dtype).eps * torch.maximum(-low, high).abs()


def _step(v: Tensor, low: Tensor, high: Tensor, noise: Tensor, exact: bool) -> Tensor | None:
    """The step of each group, float64 [G]; None where one has no step or more than 255 of them. Of groups of one value
    it is that value's size."""
    spread, size = high - low, torch.maximum(-low, high).abs()
    some = v[:, :: max(1, v.shape[1] // _LEVELS)].sort(dim=1).values
    # Of gaps that are alike, the one between the smallest values has the least rounding in it; unless an offset was
    # added last.
    share = torch.maximum(some[:, 1:].abs(), some[:, :-1].abs()) / torch.where(size > 0, size, 1.0)[:, None]
    blur = noise[:, None] * (share if exact else torch.ones_like(share))
    gaps = some.diff(dim=1)
    gaps = torch.where(gaps > blur, gaps + blur, float("inf"))
    step, error = spread.clone(), noise.clone()
    if gaps.shape[1]:
        gap, at = gaps.min(1)
        blur = blur.gather(1, at[:, None])[:, 0]
        step, error = torch.where(gap < float("inf"), gap - blur, step), torch.where(gap < float("inf"), blur, error)
    flat = spread == 0
    step[flat] = torch.where(size > 0, size, 1.0)[flat]
    left = (~flat).nonzero().flatten()
    while len(left):
        now, off, least = step[left], error[left], noise[left]
        if bool(((spread[left] / now > _LEVELS - 0.5) | (now <= 2 * least)).any()):
            return None
        part = v[left] - low[left, None]
        # The more steps a difference has, the better it tells the step, as long as they can be counted.
        for _ in range(4):
            count = (part / now[:, None]).round()
            room = least[:, None] + count * off[:, None]
            sure = ((part - count * now[:, None]).abs() <= room) & (room < now[:, None] / 4)
            most, at = torch.where(sure, count, 0.0).max(1)
            better = most * off > least
            now = torch.where(better, part.gather(1, at[:, None])[:, 0] / most, now)
            off = torch.where(better, least / most, off)
        count = (part / now[:, None]).round()
        room = least[:, None] + count * off[:, None]
        rest = (part - count * now[:, None]).abs()
        # What is left over is a smaller step.
        rest, at = torch.where(rest > room, rest + room, float("inf")).min(1)
        room = room.gather(1, at[:, None])[:, 0]
        smaller = rest < float("inf")
        step[left], error[left] = torch.where(smaller, rest - room, now), torch.where(smaller, room, off)
        left = left[smaller]
    return step


# What finds scale and zero point of groups takes their values [G, P], codes (from 0), lowest value, step and noise, and
# gives back scale, zero and whether they are right, all of shape [G].
def _multiples(
    v: Tensor, codes: Tensor, low: Tensor, step: Tensor, noise: Tensor, dtype: torch.dtype, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of grids with 0 among their points, so that values are multiples of the scale."""
    first = (low / step).round()
    m = codes + first[:, None]
    size, times = v.abs(), m.abs()
    # Half the distance of neighbours in dtype: by so much a product may have been rounded.
    half = torch.ldexp(torch.ones_like(v), torch.frexp(size).exponent - 2) * torch.finfo(dtype).eps
    least = torch.where(times > 0, (size - half) / times, 0.0).amax(1)
    most = torch.where(times > 0, (size + half) / times, float("inf")).amin(1)
    middle = torch.where(most < float("inf"), (least + most) / 2, step).float()
    scale, right = middle.clone(), torch.zeros_like(step, dtype=torch.bool)
    near = first.abs() < 2**15
    for ulps in (0, 1, -1, 2, -2):
        tried = _next(middle, ulps)
        fits = _gives(v, m, tried, noise, dtype, exact) & near & ~right
        scale, right = torch.where(fits, tried, scale), right | fits
    return scale, -first.float(), right


def _shifted(
    v: Tensor, codes: Tensor, low: Tensor, step: Tensor, noise: Tensor, dtype: torch.dtype, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of grids that pass 0 by."""
    # The value nearest to 0 has the least rounding in it and says where 0 lies.
    near = v.abs().argmin(1, keepdim=True)
    value, code = v.gather(1, near)[:, 0], codes.gather(1, near)[:, 0]
    middle = step.float()
    scale, zero = middle.clone(), torch.zeros_like(middle)
    right = torch.zeros_like(middle, dtype=torch.bool)
    for ulps in (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6):
        tried = _next(middle, ulps)
        at = (code - value / tried.double()).float()
        for more in (0, 1, -1):
            offset = _next(at, more)
            fits = _gives(v, codes.float() - offset[:, None], tried, noise, dtype, exact) & ~right
            scale, zero, right = torch.where(fits, tried, scale), torch.where(fits, offset, zero), right | fits
        if bool(right.all()):
            break
    return scale, zero, right


def _gives(v: Tensor, m: Tensor, scale: Tensor, noise: Tensor, dtype: torch.dtype, exact: bool) -> Tensor:
    """Whether m * scale, as dequantize computes it, is v: [G]."""
    made = (m.float() * scale[:, None]).to(dtype).double()
    close = (made == v) if exact else ((made - v).abs() <= noise[:, None])
    return close.all(1) & (scale > 0)


def _next(x: Tensor, ulps: int) -> Tensor:
    """The fp32 number so many above x, or below it."""
    towards = torch.full_like(x, float("inf") if ulps > 0 else -float("inf"))
    for _ in range(abs(ulps)):
        x = torch.nextafter(x, towards)
    return x


# -------------------------------------------------------------------------------------------------------- of the matrix
def _grids(w: Tensor, fit: _Fit, axis: str, size: int, rows: int | None = None) -> GroupwiseWeight:
    """The weight of fitted groups, without codes; rows: of scales along "k"."""
    scale, zero, top = (x if rows is None else x.view(rows, -1) for x in fit[:3])
    least = _widths(top if rows is None else top.amax(0))
    mixed = float(least.max() - least.double().mean()) >= _WORTH_MIXING
    bits = (least if mixed else least.max().expand(least.shape)).to(torch.uint8)
    # Symmetric codes count from the middle, if all groups have room for that.
    middle = 2.0 ** (bits.float() - 1)
    symmetric = bool(fit.whole.all() & (zero <= middle).all() & (top - zero <= middle - 1).all())
    none = torch.empty(0, dtype=torch.uint8, device=w.device)
    return GroupwiseWeight(none, scale, None if symmetric else zero, bits, tuple(w.shape), axis, size)


def _widths(top: Tensor) -> Tensor:
    """The bits that hold codes up to `top`, int64 [G]."""
    return (top[:, None] >= 2 ** torch.tensor(BITS, device=top.device)).sum(1) + BITS[0]


def _codes(made: GroupwiseWeight, w: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their codes, fp32: what `made` rounds w to."""
    scale, zero = (made.spread(values).expand(w.shape) for values in (made.scale, made.zeros()))
    for rows in _blocks(*w.shape):
        yield rows, (w[rows].float() / scale[rows] + zero[rows]).round_()


def _smaller(made: GroupwiseWeight, w: Tensor) -> bool:
    bits = float(made.spread(made.bits.double()).mean())
    return made.nbytes + bits * w.numel() / 8 < w.nbytes


def _holds(made: GroupwiseWeight, w: Tensor, exact: bool) -> bool:
    """Whether the grids of `made` hold w."""
    scale, zero, limit = (
        made.spread(values).expand(w.shape) for values in (made.scale, made.zeros(), 2.0 ** made.bits.float() - 1)
    )
    if not exact:
        shared = made.axis == "k" and made.scale.shape[0] == 1
        noise = made.spread(_noise(*group_ranges(w, made.axis, made.group_size, shared), w.dtype)).expand(w.shape)
    for rows, codes in _codes(made, w):
        inside = (codes >= 0) & (codes <= limit[rows])
        found = ((codes - zero[rows]) * scale[rows]).to(w.dtype)
        close = (found == w[rows]) if exact else ((found - w[rows]).abs() <= noise[rows])
        if not bool((inside & close).all()):
            return False
    return True
