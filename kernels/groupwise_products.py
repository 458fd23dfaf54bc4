"""The kernels of groupwise.py that multiply.

    multiply        y, or the sums of one run of columns, of a tile of features x tokens
    add_in_order    y of such sums, added one after the other

How codes lie in planes and strips is said there. They are decoded in registers, 32 columns of a tile of features at a
time, just before tensor cores take them.
"""

import triton
import triton.language as tl

from .epilogue import activate, add_partials, store_partial


@triton.jit
def _bytes(plane, tile, pitch, feature):
    """Bytes [features, 32] of a plane, as int32."""
    place = plane + tile * pitch.to(tl.int64)
    return tl.load(place + feature[:, None] * 32 + tl.arange(0, 32)[None, :]).to(tl.int32)


@triton.jit
def _operand(code, DTYPE: tl.constexpr, BYTES: tl.constexpr, BITS: tl.constexpr):
    """Codes less their middle, exactly: whole numbers below 2^23 are the low bits of an fp32 of 2^23 and more."""
    if BYTES:
        return (code - (1 << (BITS - 1))).to(tl.int8)
    whole = (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + (1 << (BITS - 1)))
    return whole.to(DTYPE)


@triton.jit
def _dot(w, a, total):
    if total.dtype == tl.int32:
        total = tl.dot(w, a, total, out_dtype=tl.int32)
    else:
        # Said, though it is of operands in fp32 alone, which only the interpreter has here.
        total = tl.dot(w, a, total, input_precision="ieee")
    return total


@triton.jit
def _sum_of_strips(
    x, x_stride, rows, live, K, codes, members, held, scale, N, strips, pitch, feature, column, inside, begin, end,
    BT: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """[BN, BT] over strips begin .. end, multiples of 4: of c x (GROUP 0), or of that times the scales of groups."""
    EIGHT: tl.constexpr = BITS == 8
    FOUR: tl.constexpr = BITS >= 4 and BITS < 8
    TWO: tl.constexpr = BITS == 2 or BITS == 3 or BITS == 6 or BITS == 7
    ONE: tl.constexpr = BITS % 2 == 1
    INT8: tl.constexpr = x.dtype.element_ty == tl.int8
    SUM: tl.constexpr = tl.int32 if INT8 else tl.float32
    OPERAND: tl.constexpr = tl.float32 if UPCAST else x.dtype.element_ty
    EACH: tl.constexpr = (GROUP + 31) // 32 if GROUP else 1  # strips of a group
    TOGETHER: tl.constexpr = 2 if EACH % 2 == 0 else 1  # strips that a scale multiplies at once
    twos = codes + (strips // 2 * pitch.to(tl.int64) if FOUR else 0)
    ones = twos + (strips // 4 * pitch.to(tl.int64) if TWO else 0)
    lane = tl.arange(0, 32)
    x_rows = x + rows.to(tl.int64)[None, :] * x_stride
    total = tl.zeros((BN, BT), tl.float32 if GROUP else SUM)
    part = tl.zeros((BN, BT), SUM)
    for first in range(begin, end, STEP):
        if TWO:
            two = _bytes(twos, first // 4, pitch, feature)
        if ONE:
            one = _bytes(ones, first // 8, pitch, feature)
        for j in tl.static_range(STEP):
            strip = first + j
            if EIGHT:
                code = _bytes(codes, strip, pitch, feature)
            if FOUR and j % 2 == 0:
                four = _bytes(codes, strip // 2, pitch, feature)
            if FOUR:
                code = four >> 4 * (j % 2) & 15
            if TWO:
                # A step of 4 strips takes all of a byte.
                bits = (two >> 2 * j if STEP == 4 else two >> 2 * (strip % 4)) & 3
                code = code | bits << 4 if FOUR else bits
            if ONE:
                code = code | (one >> strip % 8 & 1) << (BITS - 1)
            w = _operand(code, OPERAND, INT8, BITS)
            if GROUP:
                place = strip // EACH
                k = strip % EACH * 32 + lane
                group = place
                if members is not None:
                    group = tl.load(members + place, mask=place < held, other=0)
                at = group * GROUP + k
                # What fills the last strips up belongs to no group.
                there = (k < GROUP) & (at < tl.where(place < held, K, 0))
            else:
                at = strip * 32 + lane
                there = at < K
            a = tl.load(x_rows + at[:, None], mask=there[:, None] & live[None, :], other=0)
            if UPCAST:
                a = a.to(tl.float32)
            if GROUP:
                if j % TOGETHER == 0:
                    part = tl.zeros((BN, BT), SUM)
                part = _dot(w, a, part)
                if j % TOGETHER == TOGETHER - 1:
                    scaled = inside & (column < tl.where(place < held, N, 0))
                    of_group = tl.load(scale + group * N + column, mask=scaled, other=0)
                    total += part.to(tl.float32) * of_group[:, None]
            else:
                total = _dot(w, a, total)
    return total


@triton.jit
def _finish(
    total, rows, live, column, inside, T, N, groups, scale, shift, sums, x_scale, x_zero, column_sum, bias,
    residual, residual_stride, y, y_stride,
    GROUP: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Stores y of the sums [BN, BT]."""
    result = total.to(tl.float32)
    if not GROUP:
        result = result * tl.load(scale + column, mask=inside, other=0)[:, None]
    if shift is not None:
        of_feature, of_row = shift + column, sums + rows
        for _ in range(groups):
            off = tl.load(of_feature, mask=inside, other=0)[:, None]
            result -= off * tl.load(of_row, mask=live, other=0)[None, :]
            of_feature += N
            of_row += T
    if x_zero is not None:
        zero = tl.load(x_zero + rows, mask=live, other=0).to(tl.float32)
        result -= tl.load(column_sum + column, mask=inside, other=0)[:, None] * zero[None, :]
    if x_scale is not None:
        result = result * tl.load(x_scale + rows, mask=live, other=0)[None, :]
    if bias is not None:
        result += tl.load(bias + column, mask=inside, other=0)[:, None]
    result = activate(result, ACTIVATION)
    stored = inside[:, None] & live[None, :]
    row = rows.to(tl.int64)[None, :]
    if residual is not None:
        result += tl.load(residual + row * residual_stride + column[:, None], mask=stored, other=0).to(tl.float32)
    tl.store(y + row * y_stride + column[:, None], result.to(y.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["T", "slot", "splits"], do_not_specialize_on_alignment=["members"])
def multiply(
    x, codes, members, scale, shift, sums, x_scale, x_zero, column_sum, bias, residual, y,
    T, N, K, groups, features, held, strips, pitch, run, splits, slot, x_stride, residual_stride, y_stride,
    BT: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ORDERED: tl.constexpr, PARTIAL: tl.constexpr, ACTIVATION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y[T, N] of x fp16, bf16 or int8 [T, K] and one part's codes; a program is a tile of BN features x BT tokens.

    PARTIAL: y is [slots, T, N], int32 or fp32; a program sums one run of strips, and slot + its number gets the sums.
    Else all, run by run where ORDERED. `features` and `held` count the part's features, and its groups along K.
    """
    tiles = tl.cdiv(features, BN)
    feature = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    above = tl.program_id(0) // tiles
    tokens = tl.cdiv(T, BT)
    rows = above % tokens * BT + tl.arange(0, BT)
    live, inside, column = rows < T, feature < features, feature
    if members is not None and not GROUP:
        column = tl.load(members + feature, mask=inside, other=0)
    if PARTIAL or not ORDERED:
        begin = above // tokens * run if PARTIAL else 0
        end = tl.minimum(begin + run, strips) if PARTIAL else strips
        total = _sum_of_strips(
            x, x_stride, rows, live, K, codes, members, held, scale, N, strips, pitch, feature, column, inside,
            begin, end, BT, BN, STEP, BITS, GROUP, UPCAST,
        )  # fmt: skip
    else:
        total = tl.zeros((BN, BT), tl.float32)
        for split in range(splits):
            total += _sum_of_strips(
                x, x_stride, rows, live, K, codes, members, held, scale, N, strips, pitch, feature, column, inside,
                split * run, tl.minimum(split * run + run, strips), BT, BN, STEP, BITS, GROUP, UPCAST,
            )  # fmt: skip
    if PARTIAL:
        store_partial(total, y, slot + above // tokens, rows, column, live, inside, T, N)
    else:
        _finish(
            total, rows, live, column, inside, T, N, groups, scale, shift, sums, x_scale, x_zero, column_sum, bias,
            residual, residual_stride, y, y_stride, GROUP, ACTIVATION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "slots"])
def add_in_order(
    partial, scale, shift, sums, x_scale, x_zero, column_sum, bias, residual, y,
    T, N, groups, slots, residual_stride, y_stride,
    BT: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y[T, N] of partial [slots, T, N], added one slot after the other."""
    tiles = tl.cdiv(N, BN)
    column = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    rows = tl.program_id(0) // tiles * BT + tl.arange(0, BT)
    live, inside = rows < T, column < N
    total = add_partials(partial, slots, rows, column, live, inside, T, N, BT, BN)
    _finish(
        total, rows, live, column, inside, T, N, groups, scale, shift, sums, x_scale, x_zero, column_sum, bias,
        residual, residual_stride, y, y_stride, GROUP, ACTIVATION,
    )  # fmt: skip
