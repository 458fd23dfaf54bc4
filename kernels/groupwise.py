"""Linear layers whose weights are group-wise low-bit codes, times fp16, bf16 or int8 activations.

The weight is W[n, k] = (q[n, k] - zero) * scale of its group, q of b bits (2 to 8), groups of neighbours along N or
along K. With c = q - 2^(b - 1), shift = scale * (zero - 2^(b - 1)) and R[g, t] = sum of x[t, k] over the columns of
group g (a single group along N):

    y[t, n] = sum_g scale[g, n] * (sum_{k in g} c[n, k] x[t, k]) - sum_g shift[g, n] * R[g, t]

Tensor cores multiply c, a small whole number that fp16, bf16 and int8 hold exactly; scales never round a weight. Along
N scale comes in the epilogue; along K it multiplies the sums of 32 or 64 columns inside the loop. R is summed by a pass
over x, only where a shift is not 0. int8 activations are x = (a - z[t]) * s[t]; their codes a are multiplied, and

    y = s[t] * (sum_g scale * (sum c a) - sum_g shift * R' - z[t] * C[n]),  R' = sum of a - z,  C[n] = sum_k scale * c.

Layout. K is cut into strips of 32 columns. Every group along K begins a strip and fills its last one up; along N strip
s is the columns 32 s .. 32 s + 31. There are S strips, a multiple of 4; what fills up is 0 and meets zeros of x. A code
is cut into planes of 8, 4, 2 and 1 bits: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1 (the widest plane has the
lowest bits). A byte of a plane of p bits holds the parts of 8 / p codes of one feature, from strips that follow each
other:

    plane [ceil(S p / 8)][P][32]    byte (i, n, j): bits p r .. p r + p - 1 are of the code (n, strip i * 8 / p + r, j)

P is the number of features, filled up to 128. So a tile of features is one run of bytes, a shift and a mask make a
strip of codes in registers, and no code moves between lanes. The planes of a part follow each other, widest first.
Features (along N) or groups (along K) of equal bits make a part, and a part is a launch; its `members` name them where
there are several parts. Parts along K leave sums to the ordered pass below.

Numerics: a layer's columns are cut into `splits` runs of strips by its shape alone. For few tokens a run is a program
of its own and a second pass adds the runs in order; for many a program takes all runs and adds them in that order. No
atomics: the same sums at every run, and for a row whatever stands beside it.

Rows of the operands should begin at multiples of 16 bytes; elsewhere loads are narrow and slow.

Known of these kernels is what Triton's interpreter and the machine code say; no card has run them yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue import activate, add_partials, store_partial
from .launch import compile_options, on, row_block, rows_of, upcast
from .row_grid import code_arguments, code_of, empty_codes, row_codes, row_step
from .table import NO_PRODUCTS, TYPES, Entry, opcodes

STRIP = 32


# --- kernels -----------------------------------------------------------------------------------------------------


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


# --- which tile ----------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """tokens x features of the result a program computes, strips in a step, warps and pipeline stages."""

    rows: int
    features: int
    step: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        return compile_options(self.warps, self.stages, fuse=True)


SMALL = compile_options(4, 3, fuse=True)  # of passes over rows and partial sums
QUANTIZE = compile_options(4, 3, fuse=False)  # rounded apart, or codes were others than the CPU's
ADD_ROWS, ADD_FEATURES, SUM_ROWS = 16, 64, 8


def tile_of(tokens: int, group: int, narrow: bool = False) -> Tile:
    """The tile of `multiply`; features are the instruction's rows, so that few tokens waste none of it.

    Decoding a weight costs as much as 64 to 128 tokens' products. From 1,024 tokens on 128 share it; 64 beside groups
    along K, whose sums are held three times, and beside `narrow` loads, whose addresses fill the registers. Which tile
    it is changes no sum.
    """
    step, stages = (2, 4) if group else (4, 3)
    if tokens <= 16:
        return Tile(16, 64, step, 4, stages)
    if tokens < 1024:
        return Tile(64, 64, step, 4, 3)
    return Tile(64 if group or narrow else 128, 128, 2, 8, 3)


def runs_of(features: int, strips: int, splits: int | None = None) -> tuple[int, int]:
    """(strips in a run, runs) that a layer's columns are cut into, by its shape alone: so many that 64 features a
    program fill a GPU of 128 multiprocessors, up to 4 and not below 256 columns."""
    if splits is None:
        splits = min(4, 128 // max(1, triton.cdiv(features, 64)), strips // 8)
    run = triton.cdiv(strips // 4, max(1, splits)) * 4
    return run, triton.cdiv(strips, run) if run else 1


# --- launchers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight [n, k] laid out as the head of this file says, on the GPU.

    Attributes:
        codes: uint8, the planes of each part.
        members: int32 of each part: its features (along N) or its groups (along K); None: all, of a lone part.
        bits: of each part.
        scale: fp32 [G, n]; along N [1, n], of the features.
        shift: fp32 of the shape of scale, or None where all are 0.
        column_sum: fp32 [n], needed by activations with zero points.
        shape: (n, k).
        group: columns of a group; 0 where groups run along N.
    """

    codes: Sequence[Tensor]
    members: Sequence[Tensor | None]
    bits: Sequence[int]
    scale: Tensor
    shift: Tensor | None
    column_sum: Tensor | None
    shape: tuple[int, int]
    group: int

    def part(self, number: int) -> dict[str, Any]:
        """The arguments of `multiply` that belong to a part."""
        members, (n, k) = self.members[number], self.shape
        count = None if members is None else members.numel()
        features, held = (n, count or self.scale.shape[0]) if self.group else (count or n, 0)
        wide = held * triton.cdiv(self.group, STRIP) if self.group else triton.cdiv(k, STRIP)
        return {
            "codes": self.codes[number],
            "members": members,
            "features": features,
            "held": held,
            "strips": triton.cdiv(wide, 4) * 4,
            "pitch": triton.cdiv(features, 128) * 128 * STRIP,
            "BITS": self.bits[number],
        }


def supported(dtype: torch.dtype) -> bool:
    """Whether `groupwise_linear` multiplies activations of this dtype as they are."""
    return dtype in (torch.float16, torch.bfloat16)


class Codes(NamedTuple):
    """int8 activations [T, K] = (codes - zero) * scale.

    Attributes:
        scale: fp32 [T].
        zero: int32 [T]; None: 0.
        sums: fp32 [groups, T] of codes - zero; None where they were not asked for.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    sums: Tensor | None


def quantize_activations(x: Tensor, groups: int = 0, group: int = 0, step: float = 0.0, zero_point: int = 0) -> Codes:
    """Codes of x [..., K] in any float dtype, as `bertkern.ops.linear` rounds them.

    Args:
        groups, group: of how many runs of how many columns sums are wanted; 0: none.
        step: of static activations; 0: each row's own.
        zero_point: of static ones, u = code + 128 around it (0: 128); of rows' own ranges 0: a zero point of each, 128:
            symmetric.
    """
    rows = rows_of(x)
    (tokens, k), wanted = rows.shape, groups > 0
    made = empty_codes(rows, step, zero_point)
    sums = x.new_empty(groups, tokens, dtype=torch.float32) if wanted else None
    groups, group = (groups, group) if wanted else (1, k)
    if tokens:
        with on(x):
            quantize[(tokens,)](
                rows, sums=sums, T=tokens, K=k, groups=groups, group=group, x_stride=rows.stride(0),
                **code_arguments(made, step, zero_point), BLOCK=min(1024, row_block(group)), **QUANTIZE,
            )  # fmt: skip
    return Codes(*made, sums)


def groupwise_linear(
    x: Tensor | Codes,
    weight: Weight,
    bias: Tensor | None = None,
    activation: int = 0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    splits: int | None = None,
    apart: bool | None = None,
) -> Tensor:
    """activation(x W^T + bias) + residual, [T, N], for x [T, K] fp16, bf16 or codes.

    Args:
        bias: fp32 [N].
        residual: [T, N] in any float dtype.
        splits: at most so many runs of columns, which decides the order of sums; None: by the layer's shape.
        apart: whether runs are programs of their own; None: where there are few tokens. It changes no sum.
    """
    (n, k), groups = weight.shape, weight.scale.shape[0]
    coded = isinstance(x, Codes)
    rows = rows_of(x.codes if coded else x)
    tokens = rows.shape[0]
    y = rows.new_empty(tokens, n, dtype=out_dtype)
    if tokens == 0 or n == 0:
        return y
    along_k, parts = weight.group > 0, range(len(weight.codes))
    sums = x.sums if coded else None
    if weight.shift is not None and not coded:
        sums = rows.new_empty(groups, tokens, dtype=torch.float32)
        width = weight.group or k
        with on(rows):
            sum_groups[(triton.cdiv(tokens, SUM_ROWS), groups)](
                rows, sums, tokens, k, width, rows.stride(0), ROWS=SUM_ROWS, BLOCK=min(256, row_block(width)), **SMALL
            )  # fmt: skip
    residual = None if residual is None else rows_of(residual)
    finish = {
        "T": tokens, "N": n, "groups": groups, "scale": weight.scale, "shift": weight.shift, "sums": sums,
        "x_scale": x.scale if coded else None, "x_zero": x.zero if coded else None,
        "column_sum": weight.column_sum if coded and x.zero is not None else None, "bias": bias, "residual": residual,
        "residual_stride": 0 if residual is None else residual.stride(0), "GROUP": weight.group,
        "ACTIVATION": activation,
    }  # fmt: skip
    narrow = k % 16 > 0 or rows.stride(0) % 16 > 0
    tile, exact = tile_of(tokens, weight.group, narrow), coded and not along_k
    options = {"BT": tile.rows, "BN": tile.features, "STEP": tile.step, "UPCAST": upcast(rows.dtype), **tile.options}
    cut = [runs_of(n, weight.part(number)["strips"], splits) for number in parts]
    programs = triton.cdiv(tokens, tile.rows) * triton.cdiv(n, tile.features)
    apart = (programs < 128 if apart is None else apart) and cut[0][1] > 1
    apart = apart or (along_k and len(parts) > 1)
    slots = sum(splits for _, splits in cut) if along_k else cut[0][1]
    partial = rows.new_empty(slots, tokens, n, dtype=torch.int32 if exact else torch.float32) if apart else None
    slot = 0
    with on(rows):
        for number in parts:
            part, (run, splits) = weight.part(number), cut[number]
            tiles = triton.cdiv(tokens, tile.rows) * triton.cdiv(part["features"], tile.features)
            multiply[(tiles * (splits if apart else 1),)](
                x=rows, y=partial if apart else y, K=k, run=run, splits=splits, slot=slot, x_stride=rows.stride(0),
                y_stride=n, ORDERED=splits > 1 and not exact, PARTIAL=apart, **finish, **part, **options,
            )  # fmt: skip
            slot += splits if along_k else 0
        if apart:
            add_in_order[(triton.cdiv(tokens, ADD_ROWS) * triton.cdiv(n, ADD_FEATURES),)](
                partial=partial, y=y, slots=slots, y_stride=n, BT=ADD_ROWS, BN=ADD_FEATURES, **finish, **SMALL
            )  # fmt: skip
    return y


# --- what is compiled ---------------------------------------------------------------------------------------------

_SIZES = (
    "T", "N", "K", "groups", "features", "held", "strips", "pitch", "run", "splits", "slot", "x_stride",
    "residual_stride", "y_stride",
)  # fmt: skip
_OPTIONAL = {
    "shift": "*fp32", "sums": "*fp32", "x_scale": "*fp32", "x_zero": "*i32", "column_sum": "*fp32", "bias": "*fp32",
}  # fmt: skip


def _multiply_entry(
    dtype: torch.dtype,
    bits: int,
    group: int,
    shape: tuple[int, int, int],
    *,
    lacking: tuple[str, ...] = (),
    ordered: bool = False,
    partial: bool = False,
    members: bool = False,
    activation: int = 1,
    out: torch.dtype = torch.float16,
    odd: bool = False,
) -> Entry:
    """`lacking`: the tensors that are None. `shape`: the interpreter's problem, whose T decides the tile."""
    tile, coded = tile_of(shape[0], group, odd), dtype == torch.int8
    if partial:
        out = torch.int32 if coded and not group else torch.float32
    lacking = (*lacking, *(() if coded else ("x_scale", "x_zero", "column_sum")))
    pointers = {name: kind for name, kind in _OPTIONAL.items() if name not in lacking}
    if "residual" not in lacking:
        pointers["residual"] = f"*{TYPES[torch.float16 if partial else out]}"
    pointers |= {"x": f"*{TYPES[dtype]}", "codes": "*u8", "scale": "*fp32", "y": f"*{TYPES[out]}"}
    none = dict.fromkeys(lacking) | ({} if members else {"members": None})
    aligned = ("N", "K", "features", "pitch", "x_stride", "residual_stride", "y_stride")
    return Entry(
        name=f"multiply-{TYPES[dtype]}-{bits}{f'k{group}' if group else 'n'}-{tile.rows}x{tile.features}"
        + "".join(f"-{word}" for word, said in
                  (("ordered", ordered), ("partial", partial), ("members", members), ("odd", odd)) if said),
        function=multiply,
        signature={**pointers, **({"members": "*i32"} if members else {}), **dict.fromkeys(_SIZES, "i32")},
        constexprs={
            **none,
            "BT": tile.rows, "BN": tile.features, "STEP": tile.step, "BITS": bits, "GROUP": group, "ORDERED": ordered,
            "PARTIAL": partial, "ACTIVATION": activation, "UPCAST": upcast(dtype),
        },
        options=tile.options,
        aligned=(*pointers, *(("pitch",) if odd else aligned)),
        opcodes=opcodes(dtype, tile.features, tile.rows),
        shapes=(shape,),
        fetches_ahead=not odd,
    )  # fmt: skip


def _pass_entries() -> list[Entry]:
    """The passes beside the products: nothing in them multiplies on tensor cores."""
    common = {"options": SMALL, "opcodes": NO_PRODUCTS, "shapes": (), "fetches_ahead": False}
    finish = {"scale": "*fp32", **_OPTIONAL, "residual": "*bf16", "y": "*bf16"}
    sizes = dict.fromkeys(("T", "N", "groups", "slots", "residual_stride", "y_stride"), "i32")
    made = [
        Entry(
            name=f"add_in_order-{kind}",
            function=add_in_order,
            signature={**finish, "partial": f"*{kind}", **sizes},
            constexprs={"BT": ADD_ROWS, "BN": ADD_FEATURES, "GROUP": 0 if kind == "i32" else 64, "ACTIVATION": 2},
            aligned=(*finish, "partial", "N", "residual_stride", "y_stride"),
            **common,
        )
        for kind in ("i32", "fp32")
    ]
    sizes = dict.fromkeys(("T", "K", "groups", "group", "x_stride", "code_stride", "static_zero"), "i32")
    rows = {"scale": "*fp32", "zero": "*i32", "sums": "*fp32", "codes": "*i8", "x": "*fp32"}
    made.append(
        Entry(
            name="quantize-fp32",
            function=quantize,
            signature={**rows, **sizes, "step": "fp32"},
            constexprs={"BLOCK": 64, "OWN": True, "STATIC": False},
            aligned=(*rows, "K", "x_stride", "code_stride"),
            **common | {"options": QUANTIZE},
        )
    )
    made.append(
        Entry(
            name="sum_groups-bf16",
            function=sum_groups,
            signature={"x": "*bf16", "sums": "*fp32", **dict.fromkeys(("T", "K", "group", "x_stride"), "i32")},
            constexprs={"ROWS": SUM_ROWS, "BLOCK": 256},
            aligned=("x", "sums", "K", "x_stride"),
            **common,
        )
    )
    return made


def _table() -> tuple[Entry, ...]:
    half, bfloat, codes = torch.float16, torch.bfloat16, torch.int8
    plain = ("shift", "sums", "residual")
    symmetric = (*plain, "x_zero", "column_sum")
    return (
        _multiply_entry(half, 4, 0, (5, 80, 512), lacking=plain, partial=True, activation=0),
        _multiply_entry(half, 4, 0, (1030, 144, 528), ordered=True),
        _multiply_entry(bfloat, 3, 0, (20, 80, 160), out=bfloat),
        _multiply_entry(half, 4, 0, (17, 160, 96), members=True, lacking=("bias", "residual")),
        _multiply_entry(half, 2, 64, (3, 80, 528), partial=True, activation=0),
        _multiply_entry(half, 4, 128, (1025, 80, 640), ordered=True),
        _multiply_entry(bfloat, 7, 24, (33, 80, 96), out=bfloat),
        _multiply_entry(bfloat, 8, 32, (33, 80, 608), members=True, partial=True, activation=0),
        _multiply_entry(codes, 4, 0, (16, 80, 528), partial=True, activation=0, lacking=symmetric),
        _multiply_entry(codes, 3, 0, (1024, 80, 160), activation=4, out=torch.float32),
        _multiply_entry(codes, 2, 64, (19, 80, 1040), ordered=True, activation=3),
        _multiply_entry(codes, 8, 32, (1, 80, 96), out=bfloat, activation=5),
        _multiply_entry(codes, 5, 0, (31, 37, 101), out=torch.float32, odd=True),
        _multiply_entry(bfloat, 6, 37, (1031, 37, 101), out=bfloat, odd=True),
        _multiply_entry(half, 7, 0, (1031, 37, 101), odd=True),
        *_pass_entries(),
    )


# Each kernel's forms as the launchers choose them: all bits, both axes, every tile, runs and parts.
TABLE = _table()
