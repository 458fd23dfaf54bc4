"""Symmetric int8 weights: w = code * scale, codes in [-127, 127], one scale a tensor or an output channel.
Static activations: x = code * step, or x = (u - zero point) * step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Int8Weight:
    """codes int8 [N, K] and scale fp32 [N] (per output channel) or [1] (per tensor)."""

    codes: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """fp32 [N, K]."""
        return self.codes.float() * self.scale[:, None]


def quantize_weight(weight: Tensor, per_channel: bool = True) -> Int8Weight:
    """Rounds weight [N, K] to the nearest codes; scale = max|w| / 127 (a row of zeros gets scale 1).

    Raises:
        ValueError: where weight is not a matrix or holds NaN or Inf.

    Example:
        >>> quantize_weight(torch.eye(2)).codes
        tensor([[127,   0],
                [  0, 127]], dtype=torch.int8)
    """
    if weight.dim() != 2:
        raise ValueError(f"quantize_weight: expected weight of shape [N, K]. Got {list(weight.shape)}.")
    w = weight.detach().float()
    top = w.abs().amax(1) if per_channel else w.abs().amax().reshape(1)
    if not bool(torch.isfinite(top).all()):
        raise ValueError("quantize_weight: expected finite weights. Got NaN or Inf.")
    scale = top / 127
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    codes = (w / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return Int8Weight(codes, scale)


# The zero point that the kernels keep for signed codes, stored as u8; 0 stands for them in the files.
SIGNED = 128


def static_step(low: float, high: float, unsigned: bool = False) -> tuple[float, int]:
    """(step, zero point) of int8 or uint8 activations that reach from `low` to `high`.

    Signed: step = max(-low, high) / 127, zero point 0, codes in [-127, 127]. Unsigned: x = (u - zero point) * step, the
    smallest step at which [low, high] fits [0, 255], with a zero point from 1 to 254 other than 128: 0 and 128 mean
    signed codes in the files and in the kernels, and going without them costs less than 1 % of the step.

    Raises:
        ValueError: not low <= 0 <= high with low < high.

    Example:
        >>> static_step(-127.0, 64.0), static_step(-1.0, 254.0, unsigned=True)
        ((1.0, 0), (1.0, 1))
    """
    if not low <= 0 <= high or not low < high:
        raise ValueError(f"static_step: expected low <= 0 <= high, not both 0. Got {low} and {high}.")
    if not unsigned:
        return max(-low, high) / 127, 0

    def step(zero: int) -> float:
        return max(-low / zero, high / (255 - zero))

    nearest = min(254, max(1, round(255 * -low / (high - low))))
    zero = min((z for z in (nearest - 1, nearest, nearest + 1) if 1 <= z <= 254 and z != SIGNED), key=step)
    return step(zero), zero
