"""Fake-quantized weights of a dense model, as group-wise weights that are the same bit for bit."""

from __future__ import annotations

import torch
from torch import nn

from .formats.grids import DTYPES, find_grid
from .formats.groupwise import GroupwiseWeight
from .weights import effective, readable


def grids(model: nn.Module, exact: bool = True) -> dict[str, GroupwiseWeight]:
    """The linear layers and embedding tables of `model` whose weights lie on grids of 2 to 8 bits, by module name.

    Changes nothing. Tied modules share one weight. Weights under torch.nn.utils.prune count with their masks; matrices
    of zeros, and those that packing would not make smaller, are left out.

    Args:
        model: any module.
        exact: only weights that the packed form gives bit for bit; False: those, too, of which `inspect` says "to
            rounding", see `find_grid`.

    Example:
        >>> linear = nn.Linear(48, 64)
        >>> linear.weight.data = quantize_groupwise(linear.weight, 4, 8).dequantize()
        >>> grids(nn.Sequential(linear))
        {'0': GroupwiseWeight((64, 48), 4 bits, 8 groups of 8 along n)}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"grids: expected a torch.nn.Module. Got {type(model).__name__}.")
    made: dict[str, GroupwiseWeight] = {}
    known: dict[int, GroupwiseWeight | None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        own = module._parameters.get("weight")
        identity = id(module) if own is None else id(own)
        if identity not in known:
            weight = effective(module)
            known[identity] = find_grid(weight, exact) if _readable(weight) else None
        if (found := known[identity]) is not None:
            made[name] = found
    return made


def _readable(weight: torch.Tensor | None) -> bool:
    return weight is not None and readable(weight) and weight.dtype in DTYPES and bool(weight.any())
