"""What stands where a LayerNorm stood."""

import torch
from torch import Tensor, nn


class NoNorm(nn.Module):
    """y = weight * x + bias, in place of a LayerNorm whose mean and variance became constants.

    Shapes: x [..., H], weight [H], bias [H] -> [..., H].

    Example:
        >>> NoNorm(3)(torch.ones(3))
        tensor([1., 1., 1.], grad_fn=<AddBackward0>)

    Source: arXiv 2004.02984 (NoNorm), 2109.04838 (in pruned models).
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))

    @classmethod
    def from_layer_norm(cls, norm: nn.LayerNorm) -> "NoNorm":
        """A NoNorm over the very parameters of `norm`.

        Raises:
            ValueError: norm has no weight or bias, or more than one dimension.
        """
        if norm.weight is None or norm.bias is None or norm.weight.dim() != 1:
            raise ValueError(f"NoNorm: expected a LayerNorm with weight and bias of shape [H]. Got {norm}.")
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.weight, made.bias = norm.weight, norm.bias
        return made.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x + self.bias

    def extra_repr(self) -> str:
        return str(self.weight.shape[0])
