"""What kernels of linear layers share beside their products: which rows are wanted, partial sums, activations, and how
sums of 8-bit codes become results.

A tile of sums is [features, tokens] = [BN, BT]. Partial sums are [slots, T, N]: a program leaves those of its run of
columns in a slot, and a second kernel adds the slots in their order.
"""

import triton
import triton.language as tl

from .row_grid import nearest


@triton.jit
def rows_wanted(T, count):
    """How many of T rows are wanted: as many as the int32 at `count` says, all where it is None."""
    if count is not None:
        T = tl.minimum(T, tl.load(count))
    return T


@triton.jit
def store_partial(total, y, slot, rows, columns, live, inside, T, N):
    """y[slot] of the sums [BN, BT]; y [slots, T, N]."""
    out = y + slot.to(tl.int64) * T * N + rows.to(tl.int64)[None, :] * N + columns[:, None]
    tl.store(out, total, mask=inside[:, None] & live[None, :])


@triton.jit
def add_partials(partial, slots, rows, columns, live, inside, T, N, BT: tl.constexpr, BN: tl.constexpr):
    """The sums [BN, BT] of partial [slots, T, N], one slot after the other."""
    place = partial + rows.to(tl.int64)[None, :] * N + columns[:, None]
    total = tl.zeros((BN, BT), partial.dtype.element_ty)
    for _ in range(slots):
        total += tl.load(place, mask=inside[:, None] & live[None, :], other=0)
        place += T.to(tl.int64) * N
    return total


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -size, size)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Numbered as in bertkern.nn.activations: none, gelu, gelu_tanh, relu, tanh, silu."""
    if ACTIVATION == 1:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == 2:
        x = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == 3:
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == 4:
        x = tl.where(x != x, x, _tanh(x))
    elif ACTIVATION == 5:
        x = x / (1.0 + tl.exp(-x))
    return x


@triton.jit
def _clamp(x, low, high):
    """Of numbers; NaN becomes the lowest."""
    x = tl.where(x > low, x, low)
    return tl.where(x < high, x, high)


@triton.jit
def finish_8bit(
    total, rows, live, columns, inside, tile, x_scale, x_zero, weight_scale, weight_sums, bias, residual, y, steps,
    scale_step, zero_step, weight_step, residual_stride, y_stride, output_scale, out_scale, out_zero,
    ACTIVATION: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Stores y of the sums [BN, BT], as the head of int8_gemm.py says; the first tile of these rows stores the steps of
    codes too.
    """
    if x_zero is not None:
        zero = tl.load(x_zero + rows * zero_step, mask=live, other=0)
        total -= tl.load(weight_sums + columns, mask=inside, other=0)[:, None] * zero[None, :]
    of_row = tl.load(x_scale + rows * scale_step, mask=live, other=0)
    of_feature = tl.load(weight_scale + columns * weight_step, mask=inside, other=0)
    result = total.to(tl.float32) * (of_row[None, :] * of_feature[:, None])
    if bias is not None:
        result += tl.load(bias + columns, mask=inside, other=0)[:, None]
    if ROUND:
        whole = result * tl.div_rn(1.0, output_scale)
        # A NaN stays one.
        whole = tl.where(whole < -127.0, -127.0, tl.where(whole > 127.0, 127.0, whole))
        result = nearest(whole) * output_scale
    result = activate(result, ACTIVATION)
    stored = inside[:, None] & live[None, :]
    row = rows.to(tl.int64)[None, :]
    if residual is not None:
        result += tl.load(residual + row * residual_stride + columns[:, None], mask=stored, other=0).to(tl.float32)
    if steps is not None:
        SIGNED: tl.constexpr = y.dtype.element_ty == tl.int8
        # Without a zero point signed codes lie around it.
        low = (tl.where(out_zero == 0, -127, -128) if SIGNED else 0) - out_zero
        high = (127 if SIGNED else 255) - out_zero
        whole = _clamp(result * tl.div_rn(1.0, out_scale), low - 1.0, high + 1.0)
        whole = _clamp(nearest(whole), low.to(tl.float32), high.to(tl.float32))
        tl.store(
            y + row * y_stride + columns[:, None], (whole.to(tl.int32) + out_zero).to(y.dtype.element_ty), mask=stored
        )
        # A code cannot say NaN: the row's step does.
        if tile == 0:
            fine = tl.abs(of_row) < float("inf")
            tl.store(steps + rows, tl.where(fine, out_scale, float("nan")), mask=live)
    else:
        tl.store(y + row * y_stride + columns[:, None], result.to(y.dtype.element_ty), mask=stored)
