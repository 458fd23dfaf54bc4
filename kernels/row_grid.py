"""The grid of a row, as on the CPU (csrc/cpu/rowwise/rowwise.h): what kernels that quantize rows share.

A code is a signed one, 128 less than the unsigned code of the CPU's kernels, and so is its zero point:

    own range (OWN)   scale = (hi - lo) / 255, zero = round(-lo / scale) - 128, lo <= 0 <= hi the row's ends
    symmetric         scale = max|x| / 127, zero = 0, codes from -127 to 127
    static (STATIC)   scale = the given step; the given zero point, or none and codes from -127 to 127

A scale below the normal numbers is 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


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


@triton.jit
def row_codes(lowest, inverse, zero, static_zero, OWN: tl.constexpr):
    """The code of 0, and the lowest and the highest code less it; `zero` is None where codes lie around 0."""
    offset = 0.0
    least, most = -127.0, 127.0
    if OWN:
        offset = own_zero(lowest, inverse)
    elif zero is not None:
        offset = static_zero.to(tl.float32)
    if zero is not None:
        least, most = -128.0 - offset, 127.0 - offset
    return offset, least, most


@triton.jit
def code_of(x, inverse, least, most):
    """The nearest code of x less that of 0."""
    # Clamped first: what is larger would wrap.
    x = tl.minimum(tl.maximum(x * inverse, least - 1.0), most + 1.0)
    return tl.minimum(tl.maximum(nearest(x), least), most)


class Codes(NamedTuple):
    """int8 activations [rows, width] = (codes - zero) * scale; scale fp32 [rows], zero int32 [rows] or None (0)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def symmetric(step: float, zero_point: int) -> bool:
    """Whether codes of this step and zero point (as of `bertkern.ops.pack_qlinear`) have no zero points."""
    return zero_point == 128 or (step > 0 and zero_point == 0)


def empty_codes(x: Tensor, step: float, zero_point: int) -> Codes:
    """Memory for the codes of x [rows, width], whose rows begin at multiples of 16 bytes."""
    rows, width = x.shape
    codes = x.new_empty(rows, width + -width % 16, dtype=torch.int8)[:, :width]
    zero = None if symmetric(step, zero_point) else x.new_empty(rows, dtype=torch.int32)
    return Codes(codes, x.new_empty(rows, dtype=torch.float32), zero)


def code_arguments(made: Codes | None, step: float, zero_point: int) -> dict[str, Any]:
    """What a kernel that quantizes rows is told of their codes; None: that there are none."""
    if made is None:
        nothing = dict.fromkeys(("codes", "scale", "zero"))
        return {**nothing, "code_stride": 0, "step": 1.0, "static_zero": 0, "OWN": False, "STATIC": True}
    return {
        "codes": made.codes,
        "scale": made.scale,
        "zero": made.zero,
        "code_stride": made.codes.stride(0),
        "step": float(step),
        "static_zero": zero_point - 128,
        "OWN": made.zero is not None and step == 0,
        "STATIC": step > 0,
    }
