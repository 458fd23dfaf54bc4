"""What an example input tells of a model: how many rows each of its linear layers gets."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .nn.packing import plain_path

# Of torch.nn.Linear and of the modules that take its place.
_WIDTH = "in_features"


def rows_seen(model: nn.Module, sample: Any) -> dict[str, int]:
    """The most rows x [..., K] that each linear layer of `model` gets while it runs over `sample`, by its name.

    The model runs once, in eval mode and without gradients, and is left as it was.

    Args:
        sample: a tensor, a tuple or list of positional arguments, or a mapping of keywords such as a tokenizer's.

    Raises:
        TypeError: a sample of another type. What the model raises passes through.

    Example:
        >>> rows_seen(nn.Sequential(nn.Linear(8, 4)), torch.zeros(2, 5, 8))
        {'0': 10}
    """
    if isinstance(sample, Mapping):
        args, kwargs = (), dict(sample)
    elif isinstance(sample, Tensor):
        args, kwargs = (sample,), {}
    elif isinstance(sample, (tuple, list)):
        args, kwargs = tuple(sample), {}
    else:
        raise TypeError(
            f"accelerate: expected sample to be a tensor, a tuple of arguments or a mapping of keywords. "
            f"Got {type(sample).__name__}."
        )
    seen: dict[str, int] = {}
    modes = {module: module.training for module in model.modules()}
    hooks = []
    for name, module in model.named_modules():
        if hasattr(module, _WIDTH):

            def note(module: nn.Module, given: tuple[Any, ...], name: str = name) -> None:
                if given and isinstance(given[0], Tensor):
                    rows = given[0].numel() // max(1, given[0].shape[-1]) if given[0].dim() else 0
                    seen[name] = max(seen.get(name, 0), rows)

            hooks.append(module.register_forward_pre_hook(note))
    try:
        for module in modes:
            module.training = False
        with torch.no_grad(), plain_path():
            model(*args, **kwargs)
    finally:
        for module, training in modes.items():
            module.training = training
        for hook in hooks:
            hook.remove()
    return seen
