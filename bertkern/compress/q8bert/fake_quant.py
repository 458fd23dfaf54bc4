"""The arithmetic of symmetric fake quantization: codes in [-M, M], a multiplier as scale, straight-through gradients.

    codes = clamp(round(x * scale), -M, M)        scale = M / max|x|        M = 2^(bits - 1) - 1

The scale is a multiplier here, as in Q8BERT; bertkern's int8 formats store its inverse, the step between two codes.
Rounding is to nearest, ties to even. Zero points there are none, and the code -128 is never used.

Multiplications stand in the place of divisions as they do in the kernels, operation by operation: a value on the border
of two codes falls to the same side in both.
"""

import torch
from torch import Tensor

# The range of a tensor that holds nothing but zeros: any positive number keeps its codes at 0 and its scale finite.
SMALLEST_RANGE = 1e-30
BIAS_BITS = 32


def largest_code(bits: int) -> int:
    """M, the largest code of a symmetric integer of `bits` bits."""
    return 2 ** (bits - 1) - 1


def max_abs(x: Tensor) -> Tensor:
    """max|x| as an fp32 scalar without gradient (0 for an empty tensor)."""
    with torch.no_grad():
        return x.abs().amax().float() if x.numel() else torch.zeros((), device=x.device)


def scale_of(threshold: Tensor, bits: int) -> Tensor:
    """The multiplier M / threshold that maps [-threshold, threshold] onto the codes, in the shape of `threshold`."""
    return largest_code(bits) / threshold.clamp_min(SMALLEST_RANGE)


def step_of(threshold: Tensor, bits: int) -> Tensor:
    """The step threshold / M between two codes, in the shape of `threshold`."""
    return threshold.clamp_min(SMALLEST_RANGE) / largest_code(bits)


def quantize(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes of x as floating-point numbers, in at least fp32."""
    limit = largest_code(bits)
    return (_at_least_fp32(x) * scale).round().clamp(-limit, limit)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, scale: Tensor, bits: int) -> Tensor:
        return (quantize(x, scale, bits) * (1 / scale)).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def fake_quantize(x: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    """x rounded to the nearest value that its codes can express, in x's dtype.

    The gradient passes straight through, also where x lies outside the range (Q8BERT does not clip it).

    Args:
        x: floating-point tensor of any shape.
        scale: fp32 multiplier, one element.
        bits: width of the codes.

    >>> fake_quantize(torch.tensor([0.5, 3.0]), torch.tensor(127.0))
    tensor([0.5039, 1.0000])
    """
    return _FakeQuantize.apply(x, scale, bits)


def rounded_bias(bias: Tensor, step: Tensor) -> Tensor:
    """`bias` [N] as integers of 32 bits hold it that count in `step` = step of the inputs * step of the weights."""
    return quantize(bias, 1 / step, BIAS_BITS) * step


def multiply_add(x: Tensor, factor: Tensor, addend: Tensor | int) -> Tensor:
    """x * factor + addend in x's dtype, rounded once, as processors with a fused multiply-add compute it."""
    if x.device.type == "mps":
        return x * factor + addend  # knows no float64
    # The product of two fp32 is exact in float64.
    return (x.double() * factor.double() + addend).to(x.dtype)


def _at_least_fp32(x: Tensor) -> Tensor:
    # bf16 and fp16 would round the product before the rounding to codes does.
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
