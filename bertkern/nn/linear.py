"""nn.Linear by bertkern's fp32 and bf16 kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _ops  # noqa: F401  (loads the operators)
from ..gpu.linears import Dense
from .packing import PackedCache, lean, needs_grad

_linear = lean(torch.ops.bertkern.linear.default)
_linear_from = torch.ops.bertkern.linear_from.default
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class PackedLinear(PackedCache, nn.Linear):
    """An nn.Linear, with the same parameters under the same names, whose eval mode runs bertkern's kernel.

    The result of a row does not depend on the rows beside it nor on the number of threads. Training mode, other
    devices and float64 compute as nn.Linear does.

    Shapes: x [..., K] fp32, bf16 or fp16 -> [..., N], dtype of x. weight [N, K], bias [N].

    Example:
        >>> layer = PackedLinear.from_linear(nn.Linear(3, 2)).eval()
        >>> layer(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "PackedLinear":
        """A PackedLinear over the very parameters of `linear`."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.in_features, made.out_features = linear.in_features, linear.out_features
        made.register_parameter("weight", linear.weight)
        made.register_parameter("bias", linear.bias)
        return made.train(linear.training)

    def _sources(self) -> tuple[Tensor | None, ...]:
        return self._parameters.get("weight"), self._parameters.get("bias")

    def packable(self) -> bool:
        weight = self._sources()[0]
        return weight is not None and weight.dtype in FLOATS

    def _pack(self) -> Tensor:
        weight, bias = self._sources()
        weight = weight.detach()
        # fp16 has no kernel of its own; fp32 holds every one of its values.
        weight = weight.float() if weight.dtype == torch.float16 else weight
        bias = None if bias is None else bias.detach().float()
        return torch.ops.bertkern.pack_linear.default(weight.contiguous(), bias)

    def _make_operand(self) -> Dense:
        weight, bias = self._sources()
        return Dense(weight.detach(), None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        if not self.packable():
            # Pruning hooks and parametrizations compute the weight.
            return F.linear(x, self.weight, self.bias)
        weight, bias = self._sources()
        if self.training or not x.is_cpu or x.dtype not in FLOATS or weight.dtype not in FLOATS:
            return F.linear(x, weight, bias)
        packed = self.packed()
        if needs_grad(weight, bias):
            return _linear_from(x, packed, weight, bias)
        return _linear(x, packed, self.out_features)

    def train(self, mode: bool = True) -> "PackedLinear":
        before = self.training
        super().train(mode)
        if mode:
            self.stale()
        elif before:
            self._repack()
        return self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._repack()
