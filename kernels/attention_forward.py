"""The forward kernel of attention.py, and what the kernels of its gradients have in common with it.

    attend        softmax(scores) v of a block of queries, and what the gradients need of its rows

Where a program stands in the packed sequences, how it reads and writes rows of heads, and what a score is, is said here
once for all of them.
"""

import triton
import triton.language as tl

from .table import PRECISION

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def place_of(cu_seqlens, numbers, factors, T, H, max_length, factors_b, factors_h, ROWS: tl.constexpr):
    """What a program works on: its first row, sequence, head, the head's original number, begin and length of the
    sequence, where its tokens end together with those of no sequence, and the head's factor.

    The length is 0 where there is nothing to compute, because the head is skipped.
    """
    blocks = tl.cdiv(max_length, ROWS)
    first = tl.program_id(0) % blocks * ROWS
    head = tl.program_id(0) // blocks % H
    sequence = tl.program_id(0) // blocks // H
    number = head if numbers is None else tl.load(numbers + head)
    begin, length, stop = extent_of(cu_seqlens, sequence, tl.num_programs(0) // blocks // H, T, max_length)
    factor = 1.0
    if factors is not None:
        factor = tl.load(factors + sequence.to(tl.int64) * factors_b + number * factors_h).to(tl.float32)
        length = tl.where(factor == 0, 0, length)
    return first, sequence, head, number, begin, length, stop, factor


@triton.jit
def extent_of(cu_seqlens, sequence, sequences, T, max_length):
    """Begin, length and stop of a sequence; the last one's stop is T. Within the tensors whatever cu_seqlens says."""
    begin = tl.where(sequence == 0, 0, tl.load(cu_seqlens + sequence))
    end = tl.load(cu_seqlens + sequence + 1)
    begin, end = tl.minimum(tl.maximum(begin, 0), T), tl.minimum(tl.maximum(end, 0), T)
    length = tl.maximum(tl.minimum(end - begin, max_length), 0)
    return begin, length, tl.where(sequence == sequences - 1, T, end)


@triton.jit
def clear(x, begin, stop, x_t, first, max_length, column, ROWS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Zeros x[begin .. stop], whose blocks the programs of a sequence share; nearly always there are none."""
    step = tl.cdiv(max_length, ROWS) * ROWS
    for start in range(begin + first, stop, step):
        store_rows(x, start, stop, x_t, column, tl.zeros((ROWS, WIDTH), tl.float32), ROWS, WIDTH, D)


@triton.jit
def at(x, head, x_h, token, x_t, ALIGN: tl.constexpr):
    """Where a head of a token begins, for strides in units of ALIGN elements; 64 bits wide."""
    return x + (head.to(tl.int64) * x_h + token.to(tl.int64) * x_t) * ALIGN


@triton.jit
def read_rows(
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
def store_rows(
    x, start, length, x_t, column, value, ROWS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    rows, columns = start + tl.arange(0, ROWS), column + tl.arange(0, WIDTH)
    inside = (rows < length)[:, None] & (columns < D)[None, :]
    tl.store(x + rows.to(tl.int64)[:, None] * x_t + columns[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def products(
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
        left = read_rows(a, a_start, length, a_t, column, A_ROWS, CHUNK, D, ALIGN, UPCAST)
        right = read_rows(b, b_start, length, b_t, column, B_ROWS, CHUNK, D, ALIGN, UPCAST)
        total = tl.dot(left, right.T, total, input_precision=PRECISION)
    return total


@triton.jit
def scores(
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
def power(difference, bias):
    """exp of a difference of scores, in the units of `scores`."""
    if bias is not None:
        difference = difference * LOG2E
    return tl.exp2(difference)


@triton.jit
def raised_peak(peak, score):
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
    first, sequence, head, number, begin, length, stop, factor = place_of(
        cu_seqlens, numbers, factors, T, H, max_length, factors_b, factors_h, BQ
    )
    column = tl.program_id(1) * SLICE
    clear(out + head.to(tl.int64) * D, begin + length, stop, H * D, first, max_length, column, BQ, SLICE, D)
    if first >= length:
        return
    token = begin.to(tl.int64)
    q = at(q, head, q_h, token, q_t, ALIGN)
    k = at(k, head, k_h, token, k_t, ALIGN)
    v = at(v, head, v_h, token, v_t, ALIGN)
    if bias is not None:
        bias = at(bias, number, bias_h, sequence, bias_b, BIAS_ALIGN)
    rows = first + tl.arange(0, BQ)
    if CHUNK >= D:
        queries = read_rows(q, first, length, q_t, 0, BQ, CHUNK, D, ALIGN, UPCAST)
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
            keys = read_rows(k, start, last, k_t, 0, BK, CHUNK, D, ALIGN, UPCAST)
            product = tl.dot(queries, keys.T, input_precision=PRECISION)
        else:
            # Rows of k past its last key count for nothing below.
            product = products(q, first, q_t, k, start, k_t, length, BQ, BK, CHUNK, D, ALIGN, UPCAST)
        score = scores(product, first, start, length, scale, bias, bias_q, BQ, BK, CAUSAL, BIAS_ALIGN, False)
        if counts is not None:
            score = tl.where((start + tl.arange(0, BK) < last)[None, :], score, float("-inf"))
        raised, base = raised_peak(peak, score)
        shrink = power(peak - base, bias)
        weight = power(score - base[:, None], bias)
        peak, total = raised, total * shrink + tl.sum(weight, 1)
        values = read_rows(v, start, last, v_t, column, BK, SLICE, D, ALIGN, UPCAST)
        context = tl.dot(weight.to(values.dtype), values, context * shrink[:, None], input_precision=PRECISION)
    inverse = tl.where(total == 0, 0.0, 1 / total)
    context = context * (inverse * factor)[:, None]
    store_rows(at(out, head, D, token, H * D, 1), first, length, H * D, column, context, BQ, SLICE, D)
    statistics = at(statistics, head, T, token, 1, 1)
    live = rows < length
    tl.store(statistics + rows, tl.where(peak == float("-inf"), 0.0, peak), mask=live)
    tl.store(statistics + H.to(tl.int64) * T + rows, inverse, mask=live)
