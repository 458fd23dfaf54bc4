"""The weights that modules compute with, whoever keeps them."""

import torch
from torch import Tensor, nn


def effective(module: nn.Module, name: str = "weight") -> Tensor | None:
    """The tensor that `module` computes with: under torch.nn.utils.prune the masked one, as of now.

    Example:
        >>> linear = torch.nn.utils.prune.l1_unstructured(nn.Linear(4, 4), "weight", 8)
        >>> int((effective(linear) == 0).sum())
        8
    """
    original, mask = module._parameters.get(f"{name}_orig"), module._buffers.get(f"{name}_mask")
    with torch.no_grad():
        if original is not None and mask is not None:
            # The attribute is as old as the last forward pass.
            return original.detach() * mask.to(original.dtype)
        tensor = getattr(module, name, None)
    known = isinstance(tensor, Tensor) and not nn.parameter.is_lazy(tensor)
    return tensor.detach() if known else None


def readable(tensor: Tensor) -> bool:
    """Whether the values of `tensor` can be read one by one: not on meta, no subclass, not sparse."""
    return type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type != "meta"
