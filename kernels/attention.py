"""Attention over packed sequences, forward and backward: heads and tokens that do not exist are not computed.

Sequence b is the tokens cu_seqlens[b] .. cu_seqlens[b + 1] of q, k and v [T, H, d], views of any strides whose last one
is 1, so that they are read where one projection wrote them. For a query i and the keys j of its sequence:

    s_ij = scale * q_i . k_j + bias[b, n, i, j]        i, j counted from the sequence's first token; causal: j <= i
    out_i = factor[b, n] * sum_j softmax_j(s_ij) v_j

H counts the heads that are there, whose original numbers are n = numbers[h]: bias and factor stay in that numbering. A
factor of 0 skips the head, which reads nothing; -inf in the bias hides a key; a query whose keys are all hidden gets
zeros. cu_seqlens stays on the device: grids are sized for sequences x max_length, and programs past the end of their
sequence leave. Whatever it says, nothing outside of the tensors is touched, cu_seqlens[0] counts as 0, and tokens past
max_length in their sequence, or in none, get zeros.

Numerics: scores, softmax and sums are fp32, weights are rounded to v's dtype before they multiply v. fp32 operands are
multiplied as three TF32 products ("tf32x3"), which keeps fp32's accuracy. Keys are summed from the sequence's first
token on, in steps that depend on dtype and d alone, so a sequence's result has the same bits in any batch. No atomics:
the gradients, too, have the same bits at every run.

d is 1 to 128. One that is no power of two is padded in registers to the next one, 16 at least, or for fp32 to a
multiple of 32; an odd one is copied first. Rows should begin at multiples of 16 bytes: those of d = 26 do not, and are
read in pieces of 4. A bias is copied where its rows do not.

Known of these kernels is what Triton's interpreter and the machine code say; no card has run them yet.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from .table import PRECISION, Entry

MAX_HEAD_DIM = 128
LOG2E = tl.constexpr(1.4426950408889634)
# The interpreter multiplies the bit patterns of bf16, silently: there, operands become fp32 first.
INTERPRETED = bool(knobs.runtime.interpret)


# --- kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _place(cu_seqlens, numbers, factors, T, H, max_length, factors_b, factors_h, ROWS: tl.constexpr):
    """What a program works on: its first row, sequence, head, the head's original number, begin and length of the
    sequence, where its tokens end together with those of no sequence, and the head's factor.

    The length is 0 where there is nothing to compute, because the head is skipped.
    """
    blocks = tl.cdiv(max_length, ROWS)
    first = tl.program_id(0) % blocks * ROWS
    head = tl.program_id(0) // blocks % H
    sequence = tl.program_id(0) // blocks // H
    number = head if numbers is None else tl.load(numbers + head)
    begin, length, stop = _extent(cu_seqlens, sequence, tl.num_programs(0) // blocks // H, T, max_length)
    factor = 1.0
    if factors is not None:
        factor = tl.load(factors + sequence.to(tl.int64) * factors_b + number * factors_h).to(tl.float32)
        length = tl.where(factor == 0, 0, length)
    return first, sequence, head, number, begin, length, stop, factor


@triton.jit
def _extent(cu_seqlens, sequence, sequences, T, max_length):
    """Begin, length and stop of a sequence; the last one's stop is T. Within the tensors whatever cu_seqlens says."""
    begin = tl.where(sequence == 0, 0, tl.load(cu_seqlens + sequence))
    end = tl.load(cu_seqlens + sequence + 1)
    begin, end = tl.minimum(tl.maximum(begin, 0), T), tl.minimum(tl.maximum(end, 0), T)
    length = tl.maximum(tl.minimum(end - begin, max_length), 0)
    return begin, length, tl.where(sequence == sequences - 1, T, end)


@triton.jit
def _clear(x, begin, stop, x_t, first, max_length, column, ROWS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Zeros x[begin .. stop], whose blocks the programs of a sequence share; nearly always there are none."""
    step = tl.cdiv(max_length, ROWS) * ROWS
    for start in range(begin + first, stop, step):
        _store_rows(x, start, stop, x_t, column, tl.zeros((ROWS, WIDTH), tl.float32), ROWS, WIDTH, D)


@triton.jit
def _at(x, head, x_h, token, x_t, ALIGN: tl.constexpr):
    """Where a head of a token begins, for strides in units of ALIGN elements; 64 bits wide."""
    return x + (head.to(tl.int64) * x_h + token.to(tl.int64) * x_t) * ALIGN


@triton.jit
def _rows(
    x, start, length, x_t, column, ROWS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """x[start .. start + ROWS, column .. column + WIDTH], zero past length and D; x_t in units of ALIGN elements."""
    rows, columns = start + tl.arange(0, ROWS), column + tl.arange(0, WIDTH)
    inside = (rows < length)[:, None]
    if D % WIDTH != 0:
        inside = inside & (columns < D)[None, :]
    found = tl.load(x + (rows.to(tl.int64) * x_t * ALIGN)[:, None] + columns[None, :], mask=inside, other=0)
    if UPCAST:
        found = found.to(tl.float32)
    return found


@triton.jit
def _store_rows(
    x, start, length, x_t, column, value, ROWS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    rows, columns = start + tl.arange(0, ROWS), column + tl.arange(0, WIDTH)
    inside = (rows < length)[:, None] & (columns < D)[None, :]
    tl.store(x + rows.to(tl.int64)[:, None] * x_t + columns[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _products(
    a, a_start, a_t, b, b_start, b_t, length,
    A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """a[rows] b[rows]^T, [A_ROWS, B_ROWS], CHUNK of D at a time.

    fp32 holds its operands twice, as the two numbers of TF32 that are multiplied: of a whole head, more than there are
    registers.
    """
    total = tl.zeros((A_ROWS, B_ROWS), tl.float32)
    for column in range(0, D, CHUNK):
        left = _rows(a, a_start, length, a_t, column, A_ROWS, CHUNK, D, ALIGN, UPCAST)
        right = _rows(b, b_start, length, b_t, column, B_ROWS, CHUNK, D, ALIGN, UPCAST)
        total = tl.dot(left, right.T, total, input_precision=PRECISION)
    return total


@triton.jit
def _scores(
    product, q_start, k_start, length, scale, bias, bias_q,
    BQ: tl.constexpr, BK: tl.constexpr, CAUSAL: tl.constexpr, BIAS_ALIGN: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Scores of BQ queries x BK keys (TRANSPOSED: keys x queries) from q_start and k_start on; -inf past the last key.

    In units of log2, which scale is given in. With a bias in natural ones: finfo.min, which hides keys in many a mask,
    must not become -inf.
    """
    query, key = q_start + tl.arange(0, BQ), k_start + tl.arange(0, BK)
    query = query[None, :] if TRANSPOSED else query[:, None]
    key = key[:, None] if TRANSPOSED else key[None, :]
    score = product * scale
    if bias is not None:
        # BIAS_ALIGN neighbours at a time, which its rows are padded to.
        inside = (query < length) & (key // BIAS_ALIGN * BIAS_ALIGN < length)
        score += tl.load(bias + query.to(tl.int64) * bias_q * BIAS_ALIGN + key, mask=inside, other=0).to(tl.float32)
    seen = key < length
    if CAUSAL:
        seen = seen & (key <= query)
    return tl.where(seen, score, float("-inf"))


@triton.jit
def _power(difference, bias):
    """exp of a difference of scores, in the units of `_scores`."""
    if bias is not None:
        difference = difference * LOG2E
    return tl.exp2(difference)


@triton.jit
def _raise(peak, score):
    """The rows' new maximum; 0 where all keys were hidden so far: -inf less -inf is NaN."""
    peak = tl.maximum(peak, tl.max(score, 1))
    return peak, tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit(
    do_not_specialize=["T", "H", "max_length"],
    do_not_specialize_on_alignment=["cu_seqlens", "counts", "numbers", "factors"],
)
def attend(
    q, k, v, cu_seqlens, counts, numbers, factors, bias, out, statistics, T, H, max_length, scale,
    q_t, q_h, k_t, k_h, v_t, v_h, factors_b, factors_h, bias_b, bias_h, bias_q,
    D: tl.constexpr, CHUNK: tl.constexpr, SLICE: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, CAUSAL: tl.constexpr,
    ALIGN: tl.constexpr, BIAS_ALIGN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out [T, H, D], and of each row's scores the maximum and the inverse of the sum of powers, statistics [2, H, T].

    One program BQ queries of a head of a sequence, whose first counts[sequence] tokens are its keys.
    """
    first, sequence, head, number, begin, length, stop, factor = _place(
        cu_seqlens, numbers, factors, T, H, max_length, factors_b, factors_h, BQ
    )
    column = tl.program_id(1) * SLICE
    _clear(out + head.to(tl.int64) * D, begin + length, stop, H * D, first, max_length, column, BQ, SLICE, D)
    if first >= length:
        return
    token = begin.to(tl.int64)
    q = _at(q, head, q_h, token, q_t, ALIGN)
    k = _at(k, head, k_h, token, k_t, ALIGN)
    v = _at(v, head, v_h, token, v_t, ALIGN)
    if bias is not None:
        bias = _at(bias, number, bias_h, sequence, bias_b, BIAS_ALIGN)
    rows = first + tl.arange(0, BQ)
    if CHUNK >= D:
        queries = _rows(q, first, length, q_t, 0, BQ, CHUNK, D, ALIGN, UPCAST)
    peak = tl.full((BQ,), float("-inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    context = tl.zeros((BQ, SLICE), tl.float32)
    last = length
    if counts is not None:
        last = tl.minimum(length, tl.load(counts + sequence))
    end = last
    if CAUSAL:
        end = tl.minimum(last, first + BQ)
    for start in range(0, end, BK):
        if CHUNK >= D:
            keys = _rows(k, start, last, k_t, 0, BK, CHUNK, D, ALIGN, UPCAST)
            product = tl.dot(queries, keys.T, input_precision=PRECISION)
        else:
            # Rows of k past its last key count for nothing below.
            product = _products(q, first, q_t, k, start, k_t, length, BQ, BK, CHUNK, D, ALIGN, UPCAST)
        score = _scores(product, first, start, length, scale, bias, bias_q, BQ, BK, CAUSAL, BIAS_ALIGN, False)
        if counts is not None:
            score = tl.where((start + tl.arange(0, BK) < last)[None, :], score, float("-inf"))
        raised, base = _raise(peak, score)
        shrink = _power(peak - base, bias)
        weight = _power(score - base[:, None], bias)
        peak, total = raised, total * shrink + tl.sum(weight, 1)
        values = _rows(v, start, last, v_t, column, BK, SLICE, D, ALIGN, UPCAST)
        context = tl.dot(weight.to(values.dtype), values, context * shrink[:, None], input_precision=PRECISION)
    inverse = tl.where(total == 0, 0.0, 1 / total)
    context = context * (inverse * factor)[:, None]
    _store_rows(_at(out, head, D, token, H * D, 1), first, length, H * D, column, context, BQ, SLICE, D)
    statistics = _at(statistics, head, T, token, 1, 1)
    live = rows < length
    tl.store(statistics + rows, tl.where(peak == float("-inf"), 0.0, peak), mask=live)
    tl.store(statistics + H.to(tl.int64) * T + rows, inverse, mask=live)


@triton.jit(
    do_not_specialize=["T", "H", "max_length"], do_not_specialize_on_alignment=["cu_seqlens", "numbers", "factors"]
)
def attend_queries(
    grad, q, k, v, cu_seqlens, numbers, factors, bias, out, statistics, delta, dq, T, H, max_length, scale, unit,
    grad_t, grad_h, q_t, q_h, k_t, k_h, v_t, v_h, factors_b, factors_h, bias_b, bias_h, bias_q,
    D: tl.constexpr, CHUNK: tl.constexpr, SLICE: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, CAUSAL: tl.constexpr,
    ALIGN: tl.constexpr, BIAS_ALIGN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq [T, H, D], and delta [H, T], each row's grad . out; scale as `_scores` takes it, unit as it was.

    One program BQ queries of a head of a sequence.
    """
    first, sequence, head, number, begin, length, stop, factor = _place(
        cu_seqlens, numbers, factors, T, H, max_length, factors_b, factors_h, BQ
    )
    column = tl.program_id(1) * SLICE
    _clear(dq + head.to(tl.int64) * D, begin + length, stop, H * D, first, max_length, column, BQ, SLICE, D)
    if first >= length:
        return
    token = begin.to(tl.int64)
    grad = _at(grad, head, grad_h, token, grad_t, ALIGN)
    out = _at(out, head, D // ALIGN, token, H * (D // ALIGN), ALIGN)
    q = _at(q, head, q_h, token, q_t, ALIGN)
    k = _at(k, head, k_h, token, k_t, ALIGN)
    v = _at(v, head, v_h, token, v_t, ALIGN)
    statistics = _at(statistics, head, T, token, 1, 1)
    if bias is not None:
        bias = _at(bias, number, bias_h, sequence, bias_b, BIAS_ALIGN)
    rows = first + tl.arange(0, BQ)
    live = rows < length
    along = tl.zeros((BQ,), tl.float32)
    for chunk in tl.static_range(0, D, CHUNK):
        dout = _rows(grad, first, length, grad_t, chunk, BQ, CHUNK, D, ALIGN, UPCAST)
        context = _rows(out, first, length, H * (D // ALIGN), chunk, BQ, CHUNK, D, ALIGN, UPCAST)
        along += tl.sum(dout.to(tl.float32) * context.to(tl.float32), 1)
    tl.store(_at(delta, head, T, token, 1, 1) + rows, along, mask=live)
    peak = tl.load(statistics + rows, mask=live, other=0)
    inverse = tl.load(statistics + H.to(tl.int64) * T + rows, mask=live, other=0)
    if CHUNK >= D:
        queries = _rows(q, first, length, q_t, 0, BQ, CHUNK, D, ALIGN, UPCAST)
    total = tl.zeros((BQ, SLICE), tl.float32)
    end = length
    if CAUSAL:
        end = tl.minimum(length, first + BQ)
    for start in range(0, end, BK):
        keys = _rows(k, start, length, k_t, column, BK, SLICE, D, ALIGN, UPCAST)
        if CHUNK >= D:
            values = _rows(v, start, length, v_t, 0, BK, CHUNK, D, ALIGN, UPCAST)
            product = tl.dot(queries, keys.T, input_precision=PRECISION)
            dweight = tl.dot(dout, values.T, input_precision=PRECISION)
        else:
            product = _products(q, first, q_t, k, start, k_t, length, BQ, BK, CHUNK, D, ALIGN, UPCAST)
            dweight = _products(grad, first, grad_t, v, start, v_t, length, BQ, BK, CHUNK, D, ALIGN, UPCAST)
        score = _scores(product, first, start, length, scale, bias, bias_q, BQ, BK, CAUSAL, BIAS_ALIGN, False)
        weight = _power(score - peak[:, None], bias) * inverse[:, None]
        dscore = weight * (dweight * factor - along[:, None])
        total = tl.dot(dscore.to(keys.dtype), keys, total, input_precision=PRECISION)
    _store_rows(_at(dq, head, D, token, H * D, 1), first, length, H * D, column, total * unit, BQ, SLICE, D)


@triton.jit(
    do_not_specialize=["T", "H", "max_length"], do_not_specialize_on_alignment=["cu_seqlens", "numbers", "factors"]
)
def attend_keys(
    grad, q, k, v, cu_seqlens, numbers, factors, bias, statistics, delta, dk, dv, T, H, max_length, scale, unit,
    grad_t, grad_h, q_t, q_h, k_t, k_h, v_t, v_h, factors_b, factors_h, bias_b, bias_h, bias_q,
    D: tl.constexpr, CHUNK: tl.constexpr, SLICE: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, CAUSAL: tl.constexpr,
    ALIGN: tl.constexpr, BIAS_ALIGN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv [T, H, D], after `attend_queries`; one program BK keys of a head of a sequence."""
    first, sequence, head, number, begin, length, stop, factor = _place(
        cu_seqlens, numbers, factors, T, H, max_length, factors_b, factors_h, BK
    )
    column = tl.program_id(1) * SLICE
    _clear(dk + head.to(tl.int64) * D, begin + length, stop, H * D, first, max_length, column, BK, SLICE, D)
    _clear(dv + head.to(tl.int64) * D, begin + length, stop, H * D, first, max_length, column, BK, SLICE, D)
    if first >= length:
        return
    token = begin.to(tl.int64)
    grad = _at(grad, head, grad_h, token, grad_t, ALIGN)
    q = _at(q, head, q_h, token, q_t, ALIGN)
    k = _at(k, head, k_h, token, k_t, ALIGN)
    v = _at(v, head, v_h, token, v_t, ALIGN)
    statistics = _at(statistics, head, T, token, 1, 1)
    delta = _at(delta, head, T, token, 1, 1)
    if bias is not None:
        bias = _at(bias, number, bias_h, sequence, bias_b, BIAS_ALIGN)
    if CHUNK >= D:
        keys = _rows(k, first, length, k_t, 0, BK, CHUNK, D, ALIGN, UPCAST)
        values = _rows(v, first, length, v_t, 0, BK, CHUNK, D, ALIGN, UPCAST)
    dkeys = tl.zeros((BK, SLICE), tl.float32)
    dvalues = tl.zeros((BK, SLICE), tl.float32)
    # The first block of queries that sees a key of these.
    for start in range(first // BQ * BQ if CAUSAL else 0, length, BQ):
        rows = start + tl.arange(0, BQ)
        live = rows < length
        queries = _rows(q, start, length, q_t, column, BQ, SLICE, D, ALIGN, UPCAST)
        dout = _rows(grad, start, length, grad_t, column, BQ, SLICE, D, ALIGN, UPCAST)
        peak = tl.load(statistics + rows, mask=live, other=0)
        inverse = tl.load(statistics + H.to(tl.int64) * T + rows, mask=live, other=0)
        along = tl.load(delta + rows, mask=live, other=0)
        # All transposed: keys x queries.
        if CHUNK >= D:
            product = tl.dot(keys, queries.T, input_precision=PRECISION)
            dweight = tl.dot(values, dout.T, input_precision=PRECISION)
        else:
            product = _products(k, first, k_t, q, start, q_t, length, BK, BQ, CHUNK, D, ALIGN, UPCAST)
            dweight = _products(v, first, v_t, grad, start, grad_t, length, BK, BQ, CHUNK, D, ALIGN, UPCAST)
        score = _scores(product, start, first, length, scale, bias, bias_q, BQ, BK, CAUSAL, BIAS_ALIGN, True)
        weight = _power(score - peak[None, :], bias) * inverse[None, :]
        dvalues = tl.dot(weight.to(dout.dtype), dout, dvalues, input_precision=PRECISION)
        dscore = weight * (dweight * factor - along[None, :])
        dkeys = tl.dot(dscore.to(queries.dtype), queries, dkeys, input_precision=PRECISION)
    _store_rows(_at(dk, head, D, token, H * D, 1), first, length, H * D, column, dkeys * unit, BK, SLICE, D)
    _store_rows(_at(dv, head, D, token, H * D, 1), first, length, H * D, column, dvalues * factor, BK, SLICE, D)


@triton.jit(
    do_not_specialize=["T", "H", "max_length", "count"],
    do_not_specialize_on_alignment=["cu_seqlens", "numbers", "factors"],
)
def attend_bias(
    grad, q, k, v, cu_seqlens, numbers, factors, bias, statistics, delta, dbias, T, H, max_length, count, scale,
    grad_t, grad_h, q_t, q_h, k_t, k_h, v_t, v_h, factors_b, factors_h, bias_b, bias_h, bias_q,
    dbias_b, dbias_h,
    D: tl.constexpr, CHUNK: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, CAUSAL: tl.constexpr,
    ALIGN: tl.constexpr, BIAS_ALIGN: tl.constexpr, UPCAST: tl.constexpr,
    ALL_SEQUENCES: tl.constexpr, ALL_HEADS: tl.constexpr,
):  # fmt: skip
    """dbias [1 or sequences, 1 or heads, max_length, max_length], after `attend_queries`; where it is 1, the sum over
    all, in their order.

    One program a tile of BQ x BK; heads that are not there are left alone.
    """
    across, down = tl.cdiv(max_length, BK), tl.cdiv(max_length, BQ)
    tile, place = tl.program_id(0) % (across * down), tl.program_id(0) // (across * down)
    query, key = tile // across * BQ, tile % across * BK
    rows, columns = query + tl.arange(0, BQ), key + tl.arange(0, BK)
    # What dbias has once for all is summed here, from its first one on.
    first_head = place % (1 if ALL_HEADS else H)
    first_sequence = place // (1 if ALL_HEADS else H)
    head_count = H if ALL_HEADS else 1
    sequence_count = count if ALL_SEQUENCES else 1
    slot = first_head if ALL_HEADS or numbers is None else tl.load(numbers + first_head)
    total = tl.zeros((BQ, BK), tl.float32)
    for pair in range(head_count * sequence_count):
        sequence, head = first_sequence + pair // head_count, first_head + pair % head_count
        number = head if numbers is None else tl.load(numbers + head)
        begin, length, _ = _extent(cu_seqlens, sequence, count, T, max_length)
        factor = 1.0
        if factors is not None:
            factor = tl.load(factors + sequence.to(tl.int64) * factors_b + number * factors_h).to(tl.float32)
            length = tl.where(factor == 0, 0, length)
        reached = (query < length) & (key < length)
        if CAUSAL:
            reached = reached & (key < query + BQ)
        if reached:
            token = begin.to(tl.int64)
            own_q, own_k = _at(q, head, q_h, token, q_t, ALIGN), _at(k, head, k_h, token, k_t, ALIGN)
            own_grad, own_v = _at(grad, head, grad_h, token, grad_t, ALIGN), _at(v, head, v_h, token, v_t, ALIGN)
            if CHUNK >= D:
                queries = _rows(own_q, query, length, q_t, 0, BQ, CHUNK, D, ALIGN, UPCAST)
                keys = _rows(own_k, key, length, k_t, 0, BK, CHUNK, D, ALIGN, UPCAST)
                values = _rows(own_v, key, length, v_t, 0, BK, CHUNK, D, ALIGN, UPCAST)
                dout = _rows(own_grad, query, length, grad_t, 0, BQ, CHUNK, D, ALIGN, UPCAST)
                product = tl.dot(queries, keys.T, input_precision=PRECISION)
                dweight = tl.dot(dout, values.T, input_precision=PRECISION)
            else:
                product = _products(own_q, query, q_t, own_k, key, k_t, length, BQ, BK, CHUNK, D, ALIGN, UPCAST)
                dweight = _products(own_grad, query, grad_t, own_v, key, v_t, length, BQ, BK, CHUNK, D, ALIGN, UPCAST)
            live = query + tl.arange(0, BQ) < length
            found = _at(statistics, head, T, token, 1, 1) + query + tl.arange(0, BQ)
            peak = tl.load(found, mask=live, other=0)
            inverse = tl.load(found + H.to(tl.int64) * T, mask=live, other=0)
            along = tl.load(_at(delta, head, T, token, 1, 1) + query + tl.arange(0, BQ), mask=live, other=0)
            own = _at(bias, number, bias_h, sequence, bias_b, BIAS_ALIGN)
            score = _scores(product, query, key, length, scale, own, bias_q, BQ, BK, CAUSAL, BIAS_ALIGN, False)
            weight = _power(score - peak[:, None], own) * inverse[:, None]
            dscore = weight * (dweight * factor - along[:, None])
            # 0 x NaN of a pair that is not there is NaN.
            total += tl.where(live[:, None] & (score != float("-inf")), dscore, 0.0)
    out_tile = _at(dbias, slot, dbias_h, first_sequence, dbias_b, 1)
    out_tile += rows.to(tl.int64)[:, None] * max_length + columns[None, :]
    inside = (rows < max_length)[:, None] & (columns < max_length)[None, :]
    tl.store(out_tile, total.to(dbias.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "H", "max_length"], do_not_specialize_on_alignment=["cu_seqlens", "numbers"])
def attend_factors(
    grad, q, k, v, cu_seqlens, numbers, bias, partial, T, H, max_length, scale,
    grad_t, grad_h, q_t, q_h, k_t, k_h, v_t, v_h, bias_b, bias_h, bias_q,
    D: tl.constexpr, CHUNK: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, CAUSAL: tl.constexpr,
    ALIGN: tl.constexpr, BIAS_ALIGN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """partial [sequences, H, blocks]: grad . out of BQ queries for a factor of 1, skipped heads included.

    From the scores again, not from out / factor: out is rounded, and zero where the head was skipped.
    """
    first, sequence, head, number, begin, length, _, _ = _place(cu_seqlens, numbers, None, T, H, max_length, 0, 0, BQ)
    if first >= length:
        tl.store(partial + tl.program_id(0), 0.0)
        return
    token = begin.to(tl.int64)
    grad = _at(grad, head, grad_h, token, grad_t, ALIGN)
    q = _at(q, head, q_h, token, q_t, ALIGN)
    k = _at(k, head, k_h, token, k_t, ALIGN)
    v = _at(v, head, v_h, token, v_t, ALIGN)
    if bias is not None:
        bias = _at(bias, number, bias_h, sequence, bias_b, BIAS_ALIGN)
    rows = first + tl.arange(0, BQ)
    if CHUNK >= D:
        queries = _rows(q, first, length, q_t, 0, BQ, CHUNK, D, ALIGN, UPCAST)
        dout = _rows(grad, first, length, grad_t, 0, BQ, CHUNK, D, ALIGN, UPCAST)
    peak = tl.full((BQ,), float("-inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    along = tl.zeros((BQ,), tl.float32)
    end = length
    if CAUSAL:
        end = tl.minimum(length, first + BQ)
    for start in range(0, end, BK):
        if CHUNK >= D:
            keys = _rows(k, start, length, k_t, 0, BK, CHUNK, D, ALIGN, UPCAST)
            values = _rows(v, start, length, v_t, 0, BK, CHUNK, D, ALIGN, UPCAST)
            product = tl.dot(queries, keys.T, input_precision=PRECISION)
            dweight = tl.dot(dout, values.T, input_precision=PRECISION)
        else:
            product = _products(q, first, q_t, k, start, k_t, length, BQ, BK, CHUNK, D, ALIGN, UPCAST)
            dweight = _products(grad, first, grad_t, v, start, v_t, length, BQ, BK, CHUNK, D, ALIGN, UPCAST)
        score = _scores(product, first, start, length, scale, bias, bias_q, BQ, BK, CAUSAL, BIAS_ALIGN, False)
        raised, base = _raise(peak, score)
        shrink = _power(peak - base, bias)
        weight = _power(score - base[:, None], bias)
        peak, total = raised, total * shrink + tl.sum(weight, 1)
        along = along * shrink + tl.sum(weight * dweight, 1)
    along = tl.where((rows < length) & (total != 0), along / total, 0.0)
    tl.store(partial + tl.program_id(0), tl.sum(along, 0))


# --- which tile ----------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Queries x keys that a program takes at a time, warps and pipeline stages, and how much of a head: `chunk` of it
    at a time for what is summed over it, `slice` of it for its result.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    chunk: int
    slice: int

    @property
    def options(self) -> dict[str, Any]:
        # Stated, because Triton's default for fp fusion differs between its versions, and because ptxas would rather
        # spill than have fewer programs at a time.
        most = {} if torch.version.hip else {"maxnreg": 255}
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True, **most}


def padded_head_dim(d: int) -> int:
    """The width of a head's rows in registers."""
    return max(16, triton.next_power_of_2(d))


def tile_of(kernel: Any, dtype: torch.dtype, d: int) -> Tile:
    """The tile of a kernel for a dtype and a head dimension: of neither lengths nor batch, so that no bits depend on
    them.

    64 rows, which Hopper's instruction takes, and as much of the rest as leaves ptxas registers on every card: it has
    the least where the kernel holds the most, in `attend_keys`, and for fp32. A slice of a result costs all of the
    scores again. fp32 stays with 4 warps: of 8, Triton lays out the three products differently.
    """
    whole = padded_head_dim(d)
    if dtype == torch.float32:
        large, chunk = whole > 32, min(whole, 32)
        if kernel is attend_keys:
            return Tile(16, 64, 4, 1 if large else 2, chunk, chunk)
        if kernel is attend_bias:
            return Tile(64, 16, 4, 2, chunk if large else 16, chunk)
        wide = kernel is attend_factors or (kernel is attend and not large)
        return Tile(64, 32 if wide else 16, 4, 2, chunk, min(whole, 64))
    large = whole > 64
    if kernel is attend_keys:
        return Tile(32, 64, 8 if large else 4, 2, whole, whole)
    if kernel is attend_bias:
        return Tile(64, 32, 8 if large else 4, 1, min(whole, 64), whole)
    narrow = large or kernel in (attend_queries, attend_factors)
    return Tile(64, 32 if narrow else 64, 4, 2, whole, whole)


# --- launchers -----------------------------------------------------------------------------------------------------


class Sequences(NamedTuple):
    """What attention is asked for beside q, k and v; all tensors on the GPU.

    Attributes:
        cu_seqlens: int32 [sequences + 1].
        max_length: of a sequence.
        scale: of the scores.
        causal: whether a query sees no later keys.
        numbers: int32 [H], the original numbers of the heads that are there; None: 0, 1, 2, ...
        factors: [sequences, original heads] float, or None: all 1.
        bias: [1 or sequences, 1 or original heads, max_length, max_length] float, or None.
        counts: int32 [sequences], how many of a sequence's tokens, the first ones, are keys; None: all. Of the forward
            pass alone.
    """

    cu_seqlens: Tensor
    max_length: int
    scale: float
    causal: bool = False
    numbers: Tensor | None = None
    factors: Tensor | None = None
    bias: Tensor | None = None
    counts: Tensor | None = None

    @property
    def count(self) -> int:
        return self.cu_seqlens.numel() - 1


def supported(d: int, dtype: torch.dtype) -> bool:
    """Whether there are kernels for heads of this dimension and tensors of this dtype."""
    return 1 <= d <= MAX_HEAD_DIM and dtype in (torch.float16, torch.bfloat16, torch.float32)


def _alignment(dtype: torch.dtype, d: int | None = None) -> int:
    """How many elements are read at a time: 16 bytes, or less where the heads' rows begin at no multiples of it."""
    most = 16 // dtype.itemsize
    return most if d is None else math.gcd(most, d)


def _aligned(x: Tensor, align: int) -> bool:
    """Whether rows of x are dense and begin at multiples of `align` elements, x itself at one of 16 bytes."""
    strides = (stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1)
    dense = x.stride(-1) == 1 or x.shape[-1] == 1
    return dense and x.data_ptr() % 16 == 0 and all(stride % align == 0 for stride in strides)


def _readable(x: Tensor) -> Tensor:
    """x [T, H, d] where the kernels can read it; a copy only where it lies askew."""
    return x if _aligned(x, _alignment(x.dtype, x.shape[2])) else x.clone(memory_format=torch.contiguous_format)


def _readable_bias(bias: Tensor) -> Tensor:
    """A bias whose rows are whole groups of 16 bytes; a copy where they are not, as of 127 keys."""
    align, length = _alignment(bias.dtype), bias.shape[-1]
    if length % align == 0 and _aligned(bias, align):
        return bias
    # A row that stands for all is padded once.
    rows = bias[:, :, :1] if bias.stride(2) == 0 else bias
    padded = bias.new_zeros(*rows.shape[:3], length + -length % align)
    padded[..., :length] = rows
    return padded[..., :length].expand(bias.shape)


def _on(x: Tensor) -> Any:
    """Launches go to the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _constants(tile: Tile, dtype: torch.dtype, d: int, causal: bool, bias: torch.dtype | None) -> dict[str, Any]:
    return {
        "D": d,
        "CHUNK": tile.chunk,
        "SLICE": tile.slice,
        "BQ": tile.queries,
        "BK": tile.keys,
        "CAUSAL": causal,
        "ALIGN": _alignment(dtype, d),
        "BIAS_ALIGN": 1 if bias is None else _alignment(bias),
        "UPCAST": INTERPRETED and dtype == torch.bfloat16,
    }


def _launch(
    kernel: Any, sequences: Sequences, views: dict[str, Tensor], programs: int | None = None, **others: Any
) -> None:
    """Runs `kernel` on `views`, q, k, v and maybe grad, and `others`; by default a program a block of each head."""
    q, bias = views["q"], sequences.bias
    (tokens, heads, d), factors = q.shape, sequences.factors
    tile = tile_of(kernel, q.dtype, d)
    views = {name: _readable(x) for name, x in views.items()}
    bias = None if bias is None else _readable_bias(bias)
    constants = _constants(tile, q.dtype, d, sequences.causal, None if bias is None else bias.dtype)
    # One of a dimension stands for all; strides are in units of what is read at a time.
    of_bias = [0, 0, 0] if bias is None else [bias.stride(i) if bias.shape[i] > 1 else 0 for i in range(3)]
    of_factors = (0, 0) if factors is None else factors.stride()
    arguments = {
        "cu_seqlens": sequences.cu_seqlens,
        "counts": sequences.counts,
        "numbers": sequences.numbers,
        "factors": factors,
        "bias": bias,
        "T": tokens,
        "H": heads,
        "max_length": sequences.max_length,
        "unit": sequences.scale,
        "scale": sequences.scale * (LOG2E.value if bias is None else 1.0),
        **views,
        **{f"{name}_t": x.stride(0) // constants["ALIGN"] for name, x in views.items()},
        **{f"{name}_h": x.stride(1) // constants["ALIGN"] for name, x in views.items()},
        **dict(zip(("factors_b", "factors_h"), of_factors, strict=True)),
        **{name: n // constants["BIAS_ALIGN"] for name, n in zip(("bias_b", "bias_h", "bias_q"), of_bias, strict=True)},
        **constants,
        **others,
    }
    if programs is None:
        programs = blocks_of(kernel, tile, sequences.max_length) * heads * sequences.count
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        # Launches go to the current device, which need not be the tensor's.
        slices = triton.cdiv(d, tile.slice) if "SLICE" in kernel.arg_names else 1
        kernel[(programs, slices)](**{name: arguments[name] for name in kernel.arg_names}, **tile.options)


def blocks_of(kernel: Any, tile: Tile, max_length: int) -> int:
    """How many programs a head of a sequence takes."""
    return triton.cdiv(max_length, tile.keys if kernel is attend_keys else tile.queries)


def _even(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Heads of an odd dimension with zeros up to whole 16 bytes, which change no product: nothing could be read of them
    but single elements. Others as they are.
    """
    d = tensors[0].shape[2]
    if d % 2 == 0:
        return tensors
    return tuple(torch.nn.functional.pad(x, (0, -d % _alignment(x.dtype))) for x in tensors)


def _nothing(q: Tensor, sequences: Sequences) -> bool:
    return q.numel() == 0 or sequences.count == 0 or sequences.max_length == 0


def attention(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """out [T, H, d] in q's dtype, and what the gradients need of the rows, fp32 [2, H, T]."""
    statistics = q.new_empty(2, q.shape[1], q.shape[0], dtype=torch.float32)
    if _nothing(q, sequences):
        return q.new_zeros(q.shape), statistics.zero_()
    d = q.shape[2]
    q, k, v = _even(q, k, v)
    out = q.new_empty(q.shape)
    _launch(attend, sequences, {"q": q, "k": k, "v": v}, out=out, statistics=statistics)
    return out[..., :d].contiguous(), statistics


def attention_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, sequences: Sequences
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv [T, H, d] of a grad [T, H, d] and what `attention` gave; delta, fp32 [H, T]: each row's grad . out."""
    delta = torch.empty_like(statistics[0])
    if _nothing(q, sequences):
        return q.new_zeros(q.shape), q.new_zeros(q.shape), q.new_zeros(q.shape), delta.zero_()
    d = q.shape[2]
    grad, q, k, v, out = _even(grad, q, k, v, out)
    views = {"q": q, "k": k, "v": v, "grad": grad}
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    _launch(attend_queries, sequences, views, out=out, statistics=statistics, delta=delta, dq=dq)
    _launch(attend_keys, sequences, views, statistics=statistics, delta=delta, dk=dk, dv=dv)
    return dq[..., :d].contiguous(), dk[..., :d].contiguous(), dv[..., :d].contiguous(), delta


def attention_bias_gradient(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, statistics: Tensor, delta: Tensor, sequences: Sequences
) -> Tensor:
    """dbias, after `attention_gradients`, in the shape and dtype of the bias; zero for heads that are not there."""
    bias, length = sequences.bias, sequences.max_length
    assert bias is not None
    if _nothing(q, sequences):
        return bias.new_zeros(bias.shape)
    all_sequences, all_heads = bias.shape[0] == 1, bias.shape[1] == 1
    grad, q, k, v = _even(grad, q, k, v)
    dbias = bias.new_empty(bias.shape) if sequences.numbers is None or all_heads else bias.new_zeros(bias.shape)
    tile = tile_of(attend_bias, q.dtype, q.shape[2])
    tiles = triton.cdiv(length, tile.queries) * triton.cdiv(length, tile.keys)
    _launch(
        attend_bias, sequences, {"q": q, "k": k, "v": v, "grad": grad},
        tiles * (1 if all_sequences else sequences.count) * (1 if all_heads else q.shape[1]),
        statistics=statistics, delta=delta, dbias=dbias, count=sequences.count,
        dbias_b=dbias.stride(0), dbias_h=dbias.stride(1), ALL_SEQUENCES=all_sequences, ALL_HEADS=all_heads,
    )  # fmt: skip
    return dbias


def attention_factors_gradient(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    """dfactors [sequences, original heads] in the factors' dtype, right also where they are 0; zero for heads that are
    not there.
    """
    factors, numbers = sequences.factors, sequences.numbers
    assert factors is not None
    if _nothing(q, sequences):
        return factors.new_zeros(factors.shape)
    grad, q, k, v = _even(grad, q, k, v)
    tile = tile_of(attend_factors, q.dtype, q.shape[2])
    blocks = blocks_of(attend_factors, tile, sequences.max_length)
    partial = q.new_empty(sequences.count, q.shape[1], blocks, dtype=torch.float32)
    _launch(attend_factors, sequences, {"q": q, "k": k, "v": v, "grad": grad}, partial=partial)
    found = partial.sum(2).to(factors.dtype)
    return found if numbers is None else factors.new_zeros(factors.shape).index_copy_(1, numbers.long(), found)


# --- what is compiled ---------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """One use of the kernels, as the launchers make it of q's dtype, a head dimension and what else is asked for.

    `some` stands for heads that were removed and factors of those left: numbers and factors.
    """

    dtype: torch.dtype
    d: int
    bias: torch.dtype | None = None
    causal: bool = False
    some: bool = False
    counts: bool = False

    @property
    def name(self) -> str:
        parts = [TYPES[self.dtype], str(self.d)]
        parts += [f"bias_{TYPES[self.bias]}"] if self.bias is not None else []
        return "-".join(parts + ["causal"] * self.causal + ["some"] * self.some + ["counts"] * self.counts)


TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# The multiplying instruction of sm_80 and what it takes along the sum; sm_90's names begin with 64 x columns.
_MMA = {
    torch.float16: ("HMMA.16816.F32", 16, ".F32"),
    torch.bfloat16: ("HMMA.16816.F32.BF16", 16, ".F32.BF16"),
    torch.float32: ("HMMA.1688.F32.TF32", 8, ".F32.TF32"),
}


def _opcodes(kernel: Any, dtype: torch.dtype, tile: Tile) -> dict[int, frozenset[str]]:
    """What each generation multiplies with: tiles of fewer than 64 rows take sm_80's instruction everywhere."""
    mma, depth, operands = _MMA[dtype]
    rows, across = (tile.keys, tile.queries) if kernel is attend_keys else (tile.queries, tile.keys)
    if rows < 64:
        return dict.fromkeys((80, 90, 100), frozenset({mma}))
    # Scores are `across` wide, what is summed of them is as wide as its slice; 8 warps halve that.
    widths = {across} if kernel in (attend_bias, attend_factors) else {across, tile.slice}
    hopper = frozenset(f"HGMMA.64x{width * 4 // tile.warps}x{depth}{operands}" for width in widths)
    return {80: frozenset({mma}), 90: hopper, 100: frozenset({"UTCHMMA"})}


# Lengths for the interpreter: tokens less than, as many as and more than a tile has, one alone, and none.
_LENGTHS = ((1,), (64, 0, 16), (131, 3, 77))
_SCALARS = {"scale": "fp32", "unit": "fp32"}


def _entry(kernel: Any, form: Form) -> Entry:
    kind, tile = f"*{TYPES[form.dtype]}", tile_of(kernel, form.dtype, form.d)
    pointers = {
        **dict.fromkeys(("q", "k", "v", "grad", "out", "dq", "dk", "dv"), kind),
        **dict.fromkeys(("statistics", "delta", "partial"), "*fp32"),
        **{name: f"*{TYPES[form.bias]}" for name in ("bias", "dbias") if form.bias is not None},
        **({"factors": "*fp32", "numbers": "*i32"} if form.some else {}),
        **({"counts": "*i32"} if form.counts else {}),
        "cu_seqlens": "*i32",
    }
    constexprs = {
        **_constants(tile, form.dtype, form.d, form.causal, form.bias),
        # The sum over a batch, as of relative positions.
        **({"ALL_SEQUENCES": True, "ALL_HEADS": False} if kernel is attend_bias else {}),
        **({} if form.some else {"factors": None, "numbers": None}),
        **({} if form.bias is not None else {"bias": None}),
        **({} if form.counts else {"counts": None}),
    }
    names = kernel.arg_names
    signature = {name: pointers.get(name, _SCALARS.get(name, "i32")) for name in names if name not in constexprs}
    return Entry(
        name=f"{kernel.__name__}-{form.name}",
        function=kernel,
        signature=signature,
        constexprs={name: value for name, value in constexprs.items() if name in names},
        options=tile.options,
        aligned=tuple(name for name in signature if name in pointers and name not in _UNALIGNED),
        opcodes=_opcodes(kernel, form.dtype, tile),
        shapes=_LENGTHS,
        fetches_ahead=tile.stages > 1 and _alignment(form.dtype, form.d) * form.dtype.itemsize == 16,
    )


_UNALIGNED = ("cu_seqlens", "counts", "numbers", "factors")


def _kernels_of(form: Form) -> tuple[Any, ...]:
    if form.counts:
        return (attend,)
    more = (attend_bias,) if form.bias is not None else ()
    return (attend, attend_queries, attend_keys, *more, *((attend_factors,) if form.some else ()))


FORMS = (
    Form(torch.float16, 64),
    Form(torch.bfloat16, 64, torch.float32, causal=True, some=True),
    Form(torch.float16, 128, torch.float16, some=True),
    Form(torch.float16, 80, torch.float32, causal=True),
    Form(torch.float16, 32),
    Form(torch.float16, 16, torch.float16),
    Form(torch.float16, 26, torch.float32, some=True),
    Form(torch.float32, 64, some=True),
    Form(torch.float32, 128, torch.float32, causal=True, some=True),
    Form(torch.float32, 32),
    Form(torch.float32, 26, torch.float32, causal=True),
    Form(torch.float16, 64, counts=True),
    Form(torch.bfloat16, 32, some=True, counts=True),
    Form(torch.float32, 64, counts=True),
)
# Each kernel's forms as the launchers choose them: common head dimensions plain, awkward ones with all options.
TABLE = tuple(_entry(kernel, form) for form in FORMS for kernel in _kernels_of(form))
