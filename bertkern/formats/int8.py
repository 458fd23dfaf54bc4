"""Symmetric int8 weights: w = code * scale, codes in [-127, 127], one scale a tensor or an output channel."""

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
