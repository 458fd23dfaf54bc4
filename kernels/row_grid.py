"""What kernels that quantize rows share: the grid of a row, as on the CPU (csrc/cpu/rowwise/rowwise.h)."""

import triton
import triton.language as tl


@triton.jit
def nearest(x):
    # To even, for |x| below 2^22.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def row_step(lowest, highest, step, OWN: tl.constexpr, STATIC: tl.constexpr):
    """The step between codes of values from `lowest` <= 0 to `highest` >= 0.

    STATIC: `step`. OWN: 255 of them from end to end. Else 127 to either side.
    """
    if STATIC:
        size = step
    elif OWN:
        size = highest * (1 / 255) - lowest * (1 / 255)
    else:
        size = tl.maximum(-lowest, highest) * (1 / 127)
    # Zeros, or a range below the normal numbers.
    return tl.where(size < 1.1754943508222875e-38, 1.0, size)


@triton.jit
def own_zero(lowest, inverse):
    """The int8 code of 0 where `lowest` is -128; `inverse`: of the step."""
    return tl.minimum(nearest(-lowest * inverse), 255.0) - 128.0
