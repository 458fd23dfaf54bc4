"""Codes that keep a layer's outputs, not its weights, near: GPTQ, then descent.

Of inputs x with second moments M = E[x x'] the outputs' squared error is tr((W - Q) M (W - Q)'). GPTQ rounds column by
column and lets the columns still to come make up for each error. Two steps then lessen what is left, in turn: the best
scales and zero points of the codes (least squares), and the best code of each element, all others fixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bertkern.formats.groupwise import GroupwiseWeight, expect_bits, grid, group_count
from bertkern.formats.rounding import METHODS, Grid, find_ranges

from .grids import Grids
from .least_squares import refit
from .ranges import weighted_ends

OUTPUTS = "outputs"
# Columns whose errors are carried on to the columns after them together.
BLOCK = 128


def compensated(
    weight: Tensor,
    moments: Tensor,
    bits: Tensor | Sequence[int] | int,
    group_size: int,
    axis: str = "n",
    *,
    method: str = OUTPUTS,
    symmetric: bool = False,
    shared: bool = False,
    damp: float = 0.01,
    ordered: bool = True,
    rounds: int = 4,
) -> GroupwiseWeight:
    """The low-bit form of weight [N, K] for inputs with second moments `moments` [K, K].

    The error of the outputs is at most that of the nearest codes on the grids of `method`.

    Args:
        bits: of each group, or of all.
        method: how ranges are found: "outputs": of the least error where columns count by the mean square of their
            inputs; or as in `GroupwiseConfig`. Along "n" of the weights, along "k" of what GPTQ has made of them when
            it reaches the first column of the group.
        damp: share of the mean of the diagonal that is added to it. Inputs that were never other than zero have no
            more than that: their weights become the nearest codes.
        ordered: columns of large inputs are rounded first; along "k" group by group.
        rounds: of least squares and descent after GPTQ.

    Raises:
        ValueError: shapes that do not fit, or moments or a weight that are not finite.

    Source: arXiv 2210.17323 (GPTQ), 2309.01885 (coordinate descent).
    """
    n, k = weight.shape
    if list(moments.shape) != [k, k]:
        raise ValueError(f"compensated: expected moments of shape [K, K] = {[k, k]}. Got {list(moments.shape)}.")
    w = weight.detach().float()
    if not bool(torch.isfinite(w).all()) or not bool(torch.isfinite(moments).all()):
        raise ValueError("compensated: expected a finite weight and finite moments. Got NaN or Inf.")
    each = expect_bits("compensated", bits, group_count((n, k), axis, group_size)).to(w.device)
    how = {"axis": axis, "symmetric": symmetric, "shared": shared}
    moments = _damped(moments, damp)
    scale, zero = _ends(method, w, moments.diagonal().float(), each, group_size, how)
    plain = Grids(scale, zero, each, (n, k), axis, group_size, symmetric)
    codes, grids = _swept(w, moments, plain, method, how, ordered)
    moments = moments.float()
    nearest = plain.nearest(w)
    if output_error(w, plain.values(nearest), moments) <= output_error(w, grids.values(codes), moments):
        codes, grids = nearest, plain
    for _ in range(rounds):
        grids = refit(w, codes, grids, moments, shared)
        codes = descended(w, codes, grids, moments)
    return grids.pack(codes)


def output_error(weight: Tensor, rounded: Tensor, moments: Tensor) -> float:
    """tr((W - Q) M (W - Q)'): the mean squared error of a token's outputs, summed over them."""
    error = weight - rounded
    return float(((error @ moments) * error).sum(dtype=torch.float64))


def descended(weight: Tensor, codes: Tensor, grids: Grids, moments: Tensor) -> Tensor:
    """Codes [N, K] after each, column by column, took the value that is best beside all others of its row."""
    k = weight.shape[1]
    scale, zero, top = grids.columns()
    # Transposed, so that what is read and written a column at a time lies together.
    codes = codes.T.contiguous()
    values = (codes - zero) * scale
    pull = moments @ (weight.T - values)
    for start in range(0, k, BLOCK):
        stop = min(k, start + BLOCK)
        near, part = moments[start:stop, start:stop], pull[start:stop]
        steps = torch.empty_like(part)
        for at in range(stop - start):
            j = start + at
            wanted = values[j] + part[at] / near[at, at]
            best = torch.minimum(torch.round(wanted / scale[j] + zero[j]).clamp_(min=grids.lowest), top[j])
            steps[at] = (best - codes[j]) * scale[j]
            codes[j] = best
            part.addr_(near[at], steps[at], alpha=-1)
        if stop < k:
            pull[stop:].addmm_(moments[stop:, start:stop], steps, alpha=-1)
    return codes.T.contiguous()


def _swept(
    weight: Tensor, moments: Tensor, grids: Grids, method: str, how: dict[str, object], ordered: bool
) -> tuple[Tensor, Grids]:
    """GPTQ: codes fp32 [N, K] and their grids."""
    n, k = weight.shape
    places, blocks = _order(moments.diagonal(), grids, ordered)
    # Row j of this factor, divided by its diagonal element, says how later columns make up for an error in column j.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments[places][:, places]))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    left = weight[:, places].T.contiguous()
    codes = torch.empty_like(left)
    if grids.axis == "n":
        scale, zero, top = (values[0] for values in grids.columns())
    else:
        grids = grids.moved(grids.scale.clone(), grids.zero.clone())
    for start, stop in blocks:
        part, near = left[start:stop], factor[start:stop, start:stop]
        if grids.axis == "k":
            group = int(places[start]) // grids.group_size
            one = slice(group, group + 1)
            importance = moments.diagonal().float()[places[start:stop]]
            scale, zero = _ends(method, part.T, importance, grids.bits[one], stop - start, how)
            grids.scale[:, one], grids.zero[:, one] = scale, zero
            scale, zero, top = scale[:, 0], zero[:, 0], grids.top[group]
        errors = torch.empty_like(part)
        for at in range(stop - start):
            code = torch.minimum(torch.round(part[at] / scale + zero).clamp_(min=grids.lowest), top)
            codes[start + at] = code
            errors[at] = (part[at] - (code - zero) * scale) / near[at, at]
            part[at:].addr_(near[at, at:], errors[at], alpha=-1)
        if stop < k:
            left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    found = torch.empty(n, k, device=weight.device)
    found[:, places] = codes.T
    return found, grids


def _order(sizes: Tensor, grids: Grids, ordered: bool) -> tuple[Tensor, list[tuple[int, int]]]:
    """The columns in the order of rounding, and the blocks [start, stop) of it: along "k" a group each."""
    k = len(sizes)
    if grids.axis == "n":
        places = sizes.argsort(descending=True) if ordered else torch.arange(k, device=sizes.device)
        return places, [(start, min(k, start + BLOCK)) for start in range(0, k, BLOCK)]
    groups = torch.arange(k, device=sizes.device).split(grids.group_size)
    if ordered:
        groups = [group[sizes[group].argsort(descending=True)] for group in groups]
        groups = sorted(groups, key=lambda group: -float(sizes[group].mean()))
    return torch.cat(groups), list(_consecutive(map(len, groups)))


def _consecutive(lengths: Iterator[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for length in lengths:
        yield start, start + length
        start += length


def _ends(
    method: str, weight: Tensor, importance: Tensor, bits: Tensor, group_size: int, how: dict[str, object]
) -> tuple[Tensor, Tensor]:
    """(scale, zero) of the groups of `weight` by a method."""
    if method == OUTPUTS:
        return weighted_ends(weight, importance, bits, group_size, **how)
    symmetric = bool(how["symmetric"])
    low, high = find_ranges(
        METHODS[method], weight, bits, group_size, how["axis"], Grid(symmetric, False), how["shared"]
    )
    return grid(low, high, bits, symmetric)


def _damped(moments: Tensor, damp: float) -> Tensor:
    """Positive definite, in float64."""
    made = moments.double().clone()
    mean = float(made.diagonal().mean())
    # Inputs that are all zero weigh all alike: every weight becomes its nearest code.
    made.diagonal().add_(damp * mean if mean > 0 else 1.0)
    return made
