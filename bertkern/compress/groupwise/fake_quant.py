"""Rounding that gradients pass straight through, by the formulas of the kernels."""

import torch
from torch import Tensor

from bertkern.formats.int8 import SIGNED, static_step

from .grids import Grids


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of x, also where x lies outside of the range.

    >>> x = torch.tensor([0.4], requires_grad=True)
    >>> straight_through(x, x.detach().round()).backward()
    >>> x.grad
    tensor([1.])
    """
    return _StraightThrough.apply(x, rounded.to(x.dtype))


def fake_weight(weight: Tensor, grids: Grids) -> Tensor:
    """weight [N, K] at the nearest points of its groups' grids."""
    with torch.no_grad():
        rounded = grids.rounded(weight.float())
    return straight_through(weight, rounded)


def fake_tokens(x: Tensor) -> Tensor:
    """x [..., K] as dynamic int8 activations have it: 256 steps from each token's lowest value to its highest."""
    with torch.no_grad():
        rows = x.float()
        low, high = rows.amin(-1, keepdim=True).clamp_(max=0), rows.amax(-1, keepdim=True).clamp_(min=0)
        step = high * (1 / 255) - low * (1 / 255)
        step = torch.where(step > 0, step, 1.0)
        zero = (-low / step).round_().clamp_(max=255)
        rounded = rows.div(step).round_().add_(zero).clamp_(0, 255).sub_(zero).mul_(step)
    return straight_through(x, rounded)


def fake_static(x: Tensor, low: float, high: float, unsigned: bool) -> Tensor:
    """x as static int8 activations of this range have it, see `static_step`."""
    step, zero = static_step(low, high, unsigned)
    least, most = (-zero, 255 - zero) if zero and zero != SIGNED else (-127, 127)
    with torch.no_grad():
        rounded = x.float().div(step).round_().clamp_(least, most).mul_(step)
    return straight_through(x, rounded)
