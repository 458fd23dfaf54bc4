"""The kernels of attention.py's gradients.

    attend_queries    dq, and each row's grad . out
    attend_keys       dk and dv
    attend_bias       dbias
    attend_factors    the gradient of the heads' factors

No weights are kept between the passes: scores are computed again, and made weights by the statistics that `attend`
left. `attend_queries` runs first; what it finds of each row, the other gradients of the scores need, too.
"""

import triton
import triton.language as tl

from .attention_forward import (
    at,
    clear,
    extent_of,
    place_of,
    power,
    products,
    raised_peak,
    read_rows,
    scores,
    store_rows,
)
from .table import PRECISION


@triton.jit(
    do_not_specialize=["T", "H", "max_length"], do_not_specialize_on_alignment=["cu_seqlens", "numbers", "factors"]
)
def attend_queries(
    grad, q, k, v, cu_seqlens, numbers, factors, bias, out, statistics, delta, dq, T, H, max_length, scale, unit,
    grad_t, grad_h, q_t, q_h, k_t, k_h, v_t, v_h, factors_b, factors_h, bias_b, bias_h, bias_q,
    D: tl.constexpr, CHUNK: tl.constexpr, SLICE: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, CAUSAL: tl.constexpr,
    ALIGN: tl.constexpr, BIAS_ALIGN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq [T, H, D], and delta [H, T], each row's grad . out; scale as `scores` takes it, unit as it was.

    One program BQ queries of a head of a sequence.
    """
    first, sequence, head, number, begin, length, stop, factor = place_of(
        cu_seqlens, numbers, factors, T, H, max_length, factors_b, factors_h, BQ
    )
    column = tl.program_id(1) * SLICE
    clear(dq + head.to(tl.int64) * D, begin + length, stop, H * D, first, max_length, column, BQ, SLICE, D)
    if first >= length:
        return
    token = begin.to(tl.int64)
    grad = at(grad, head, grad_h, token, grad_t, ALIGN)
    out = at(out, head, D // ALIGN, token, H * (D // ALIGN), ALIGN)
    q = at(q, head, q_h, token, q_t, ALIGN)
    k = at(k, head, k_h, token, k_t, ALIGN)
    v = at(v, head, v_h, token, v_t, ALIGN)
    statistics = at(statistics, head, T, token, 1, 1)
    if bias is not None:
        bias = at(bias, number, bias_h, sequence, bias_b, BIAS_ALIGN)
    rows = first + tl.arange(0, BQ)
    live = rows < length
    along = tl.zeros((BQ,), tl.float32)
    for chunk in tl.static_range(0, D, CHUNK):
        dout = read_rows(grad, first, length, grad_t, chunk, BQ, CHUNK, D, ALIGN, UPCAST)
        context = read_rows(out, first, length, H * (D // ALIGN), chunk, BQ, CHUNK, D, ALIGN, UPCAST)
        along += tl.sum(dout.to(tl.float32) * context.to(tl.float32), 1)
    tl.store(at(delta, head, T, token, 1, 1) + rows, along, mask=live)
    peak = tl.load(statistics + rows, mask=live, other=0)
    inverse = tl.load(statistics + H.to(tl.int64) * T + rows, mask=live, other=0)
    if CHUNK >= D:
        queries = read_rows(q, first, length, q_t, 0, BQ, CHUNK, D, ALIGN, UPCAST)
    total = tl.zeros((BQ, SLICE), tl.float32)
    end = length
    if CAUSAL:
        end = tl.minimum(length, first + BQ)
    for start in range(0, end, BK):
        keys = read_rows(k, start, length, k_t, column, BK, SLICE, D, ALIGN, UPCAST)
        if CHUNK >= D:
            values = read_rows(v, start, length, v_t, 0, BK, CHUNK, D, ALIGN, UPCAST)
            product = tl.dot(queries, keys.T, input_precision=PRECISION)
            dweight = tl.dot(dout, values.T, input_precision=PRECISION)
        else:
            product = products(q, first, q_t, k, start, k_t, length, BQ, BK, CHUNK, D, ALIGN, UPCAST)
            dweight = products(grad, first, grad_t, v, start, v_t, length, BQ, BK, CHUNK, D, ALIGN, UPCAST)
        score = scores(product, first, start, length, scale, bias, bias_q, BQ, BK, CAUSAL, BIAS_ALIGN, False)
        weight = power(score - peak[:, None], bias) * inverse[:, None]
        dscore = weight * (dweight * factor - along[:, None])
        total = tl.dot(dscore.to(keys.dtype), keys, total, input_precision=PRECISION)
    store_rows(at(dq, head, D, token, H * D, 1), first, length, H * D, column, total * unit, BQ, SLICE, D)


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
    first, sequence, head, number, begin, length, stop, factor = place_of(
        cu_seqlens, numbers, factors, T, H, max_length, factors_b, factors_h, BK
    )
    column = tl.program_id(1) * SLICE
    clear(dk + head.to(tl.int64) * D, begin + length, stop, H * D, first, max_length, column, BK, SLICE, D)
    clear(dv + head.to(tl.int64) * D, begin + length, stop, H * D, first, max_length, column, BK, SLICE, D)
    if first >= length:
        return
    token = begin.to(tl.int64)
    grad = at(grad, head, grad_h, token, grad_t, ALIGN)
    q = at(q, head, q_h, token, q_t, ALIGN)
    k = at(k, head, k_h, token, k_t, ALIGN)
    v = at(v, head, v_h, token, v_t, ALIGN)
    statistics = at(statistics, head, T, token, 1, 1)
    delta = at(delta, head, T, token, 1, 1)
    if bias is not None:
        bias = at(bias, number, bias_h, sequence, bias_b, BIAS_ALIGN)
    if CHUNK >= D:
        keys = read_rows(k, first, length, k_t, 0, BK, CHUNK, D, ALIGN, UPCAST)
        values = read_rows(v, first, length, v_t, 0, BK, CHUNK, D, ALIGN, UPCAST)
    dkeys = tl.zeros((BK, SLICE), tl.float32)
    dvalues = tl.zeros((BK, SLICE), tl.float32)
    # The first block of queries that sees a key of these.
    for start in range(first // BQ * BQ if CAUSAL else 0, length, BQ):
        rows = start + tl.arange(0, BQ)
        live = rows < length
        queries = read_rows(q, start, length, q_t, column, BQ, SLICE, D, ALIGN, UPCAST)
        dout = read_rows(grad, start, length, grad_t, column, BQ, SLICE, D, ALIGN, UPCAST)
        peak = tl.load(statistics + rows, mask=live, other=0)
        inverse = tl.load(statistics + H.to(tl.int64) * T + rows, mask=live, other=0)
        along = tl.load(delta + rows, mask=live, other=0)
        # All transposed: keys x queries.
        if CHUNK >= D:
            product = tl.dot(keys, queries.T, input_precision=PRECISION)
            dweight = tl.dot(values, dout.T, input_precision=PRECISION)
        else:
            product = products(k, first, k_t, q, start, q_t, length, BK, BQ, CHUNK, D, ALIGN, UPCAST)
            dweight = products(v, first, v_t, grad, start, grad_t, length, BK, BQ, CHUNK, D, ALIGN, UPCAST)
        score = scores(product, start, first, length, scale, bias, bias_q, BQ, BK, CAUSAL, BIAS_ALIGN, True)
        weight = power(score - peak[None, :], bias) * inverse[None, :]
        dvalues = tl.dot(weight.to(dout.dtype), dout, dvalues, input_precision=PRECISION)
        dscore = weight * (dweight * factor - along[None, :])
        dkeys = tl.dot(dscore.to(queries.dtype), queries, dkeys, input_precision=PRECISION)
    store_rows(at(dk, head, D, token, H * D, 1), first, length, H * D, column, dkeys * unit, BK, SLICE, D)
    store_rows(at(dv, head, D, token, H * D, 1), first, length, H * D, column, dvalues * factor, BK, SLICE, D)


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
        begin, length, _ = extent_of(cu_seqlens, sequence, count, T, max_length)
        factor = 1.0
        if factors is not None:
            factor = tl.load(factors + sequence.to(tl.int64) * factors_b + number * factors_h).to(tl.float32)
            length = tl.where(factor == 0, 0, length)
        reached = (query < length) & (key < length)
        if CAUSAL:
            reached = reached & (key < query + BQ)
        if reached:
            token = begin.to(tl.int64)
            own_q, own_k = at(q, head, q_h, token, q_t, ALIGN), at(k, head, k_h, token, k_t, ALIGN)
            own_grad, own_v = at(grad, head, grad_h, token, grad_t, ALIGN), at(v, head, v_h, token, v_t, ALIGN)
            if CHUNK >= D:
                queries = read_rows(own_q, query, length, q_t, 0, BQ, CHUNK, D, ALIGN, UPCAST)
                keys = read_rows(own_k, key, length, k_t, 0, BK, CHUNK, D, ALIGN, UPCAST)
                values = read_rows(own_v, key, length, v_t, 0, BK, CHUNK, D, ALIGN, UPCAST)
                dout = read_rows(own_grad, query, length, grad_t, 0, BQ, CHUNK, D, ALIGN, UPCAST)
                product = tl.dot(queries, keys.T, input_precision=PRECISION)
                dweight = tl.dot(dout, values.T, input_precision=PRECISION)
            else:
                product = products(own_q, query, q_t, own_k, key, k_t, length, BQ, BK, CHUNK, D, ALIGN, UPCAST)
                dweight = products(own_grad, query, grad_t, own_v, key, v_t, length, BQ, BK, CHUNK, D, ALIGN, UPCAST)
            live = query + tl.arange(0, BQ) < length
            found = at(statistics, head, T, token, 1, 1) + query + tl.arange(0, BQ)
            peak = tl.load(found, mask=live, other=0)
            inverse = tl.load(found + H.to(tl.int64) * T, mask=live, other=0)
            along = tl.load(at(delta, head, T, token, 1, 1) + query + tl.arange(0, BQ), mask=live, other=0)
            own = at(bias, number, bias_h, sequence, bias_b, BIAS_ALIGN)
            score = scores(product, query, key, length, scale, own, bias_q, BQ, BK, CAUSAL, BIAS_ALIGN, False)
            weight = power(score - peak[:, None], own) * inverse[:, None]
            dscore = weight * (dweight * factor - along[:, None])
            # 0 x NaN of a pair that is not there is NaN.
            total += tl.where(live[:, None] & (score != float("-inf")), dscore, 0.0)
    out_tile = at(dbias, slot, dbias_h, first_sequence, dbias_b, 1)
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
    first, sequence, head, number, begin, length, _, _ = place_of(cu_seqlens, numbers, None, T, H, max_length, 0, 0, BQ)
    if first >= length:
        tl.store(partial + tl.program_id(0), 0.0)
        return
    token = begin.to(tl.int64)
    grad = at(grad, head, grad_h, token, grad_t, ALIGN)
    q = at(q, head, q_h, token, q_t, ALIGN)
    k = at(k, head, k_h, token, k_t, ALIGN)
    v = at(v, head, v_h, token, v_t, ALIGN)
    if bias is not None:
        bias = at(bias, number, bias_h, sequence, bias_b, BIAS_ALIGN)
    rows = first + tl.arange(0, BQ)
    if CHUNK >= D:
        queries = read_rows(q, first, length, q_t, 0, BQ, CHUNK, D, ALIGN, UPCAST)
        dout = read_rows(grad, first, length, grad_t, 0, BQ, CHUNK, D, ALIGN, UPCAST)
    peak = tl.full((BQ,), float("-inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    along = tl.zeros((BQ,), tl.float32)
    end = length
    if CAUSAL:
        end = tl.minimum(length, first + BQ)
    for start in range(0, end, BK):
        if CHUNK >= D:
            keys = read_rows(k, start, length, k_t, 0, BK, CHUNK, D, ALIGN, UPCAST)
            values = read_rows(v, start, length, v_t, 0, BK, CHUNK, D, ALIGN, UPCAST)
            product = tl.dot(queries, keys.T, input_precision=PRECISION)
            dweight = tl.dot(dout, values.T, input_precision=PRECISION)
        else:
            product = products(q, first, q_t, k, start, k_t, length, BQ, BK, CHUNK, D, ALIGN, UPCAST)
            dweight = products(grad, first, grad_t, v, start, v_t, length, BQ, BK, CHUNK, D, ALIGN, UPCAST)
        score = scores(product, first, start, length, scale, bias, bias_q, BQ, BK, CAUSAL, BIAS_ALIGN, False)
        raised, base = raised_peak(peak, score)
        shrink = power(peak - base, bias)
        weight = power(score - base[:, None], bias)
        peak, total = raised, total * shrink + tl.sum(weight, 1)
        along = along * shrink + tl.sum(weight * dweight, 1)
    along = tl.where((rows < length) & (total != 0), along / total, 0.0)
    tl.store(partial + tl.program_id(0), tl.sum(along, 0))
