"""How far two results lie apart."""

import math

from torch import Tensor


def sqnr(got: Tensor, expected: Tensor) -> float:
    """The signal to the noise, in decibels; Inf where they are equal."""
    assert got.shape == expected.shape
    noise = (got.double() - expected.double()).square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(expected.double().square().sum().item() / noise)
