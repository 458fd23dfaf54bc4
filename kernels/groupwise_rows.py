"""The kernels of groupwise.py that pass over the rows of x.

    quantize      int8 codes of x, and their sums over groups
    sum_groups    sums over groups of x as it is

Where groups of weights run along N, all columns are a single one here.
"""

import triton
import triton.language as tl

from .row_grid import code_of, row_codes, row_step


@triton.jit(do_not_specialize=["T"])
def quantize(
    x, codes, scale, zero, sums, T, K, groups, group, x_stride, code_stride, step, static_zero,
    BLOCK: tl.constexpr, OWN: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """int8 codes a of x [T, K] = (a - zero) * scale and sums [groups, T] of a - zero; one program a row.

    OWN: from a row's lowest value to its highest, zero int32 [T]. Else symmetric, zero None, or STATIC: `step` for all
    and, where zero is not None, static_zero. A row that is not finite has a NaN for its scale, and codes of zero.
    """
    row = tl.program_id(0)
    place = x + row.to(tl.int64) * x_stride
    lane = tl.arange(0, BLOCK)
    low, high, strange = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.int32)
    for first in range(0, K, BLOCK):
        a = tl.load(place + first + lane, mask=first + lane < K, other=0).to(tl.float32)
        fine = tl.abs(a) < float("inf")
        strange = tl.where(fine, strange, 1)
        low, high = tl.minimum(low, tl.where(fine, a, 0.0)), tl.maximum(high, tl.where(fine, a, 0.0))
    bad = tl.max(strange, 0) > 0
    lowest, highest = tl.min(low, 0), tl.max(high, 0)
    size = row_step(lowest, highest, step, OWN, STATIC)
    inverse = tl.div_rn(1.0, size)
    offset, least, most = row_codes(lowest, inverse, zero, static_zero, OWN)
    if zero is not None:
        tl.store(zero + row, offset.to(tl.int32))
    tl.store(scale + row, tl.where(bad, float("nan"), size))
    sum_place = sums + row if sums is not None else None
    for number in range(groups):
        total = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, group, BLOCK):
            k = number * group + first + lane
            there = (first + lane < group) & (k < K)
            a = tl.load(place + k, mask=there, other=0).to(tl.float32)
            a = code_of(tl.where(bad, 0.0, a), inverse, least, most)
            total += a
            tl.store(codes + row.to(tl.int64) * code_stride + k, (a + offset).to(tl.int8), mask=there)
        if sums is not None:
            tl.store(sum_place, tl.sum(total, 0))
            sum_place += T


@triton.jit(do_not_specialize=["T"])
def sum_groups(x, sums, T, K, group, x_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """sums [groups, T] of the columns of each group of x [T, K]; a program takes ROWS rows of a group."""
    rows, number = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    place = x + rows.to(tl.int64)[:, None] * x_stride
    live = rows < T
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, group, BLOCK):
        k = number * group + first + lane
        there = (first + lane < group) & (k < K)
        total += tl.load(place + k[None, :], mask=live[:, None] & there[None, :], other=0).to(tl.float32)
    tl.store(sums + number.to(tl.int64) * T + rows, tl.sum(total, 1), mask=live)
