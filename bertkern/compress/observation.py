"""Running a model over a user's data while the inputs and outputs of chosen modules are watched."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bertkern import plan
from bertkern.nn.int8 import finite
from bertkern.nn.packing import plain_path

from .batches import Batches

# Takes a module's name, and the rows [..., features] of its input and output that stand for real tokens.
See = Callable[[str, Tensor, Tensor], None]


def observe(model: nn.Module, watched: Mapping[str, nn.Module], batches: Batches, see: See, *, progress: bool) -> None:
    """Calls `see` for every run of every module of `watched`, in evaluation mode without gradients.

    Positions that an attention mask marks as padding are left out. The model is left as it was.

    Args:
        watched: modules of one tensor in and one out, by name.
        progress: show a progress bar.

    Raises:
        ValueError: no batch, Inf or NaN among the values, or a module that no batch reached; the text names it.
    """
    reached: set[str] = set()
    mask = CurrentMask()

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x, y = mask.real_tokens(args[0]), mask.real_tokens(output)
            for side, values in (("input", x), ("output", y)):
                if not finite(values):
                    raise ValueError(f"calibrate: expected the {side} of {name} to be finite. Got Inf or NaN.")
            if x.numel():
                see(name, x, y)
            reached.add(name)

        return hook

    # The plain path, because the fused operators run no hooks of the modules that they stand for.
    with evaluating(model), torch.no_grad(), plain_path():
        handles = [module.register_forward_hook(watch(name)) for name, module in watched.items()]
        handles += [
            pretrained.register_forward_pre_hook(mask.remember, with_kwargs=True)
            for pretrained in plan.pretrained_roots(model).values()
        ]
        try:
            count = 0
            for args, kwargs in tqdm(batches, desc="calibrate", unit="batch", disable=not progress):
                model(*args, **kwargs)
                count += 1
        finally:
            for handle in handles:
                handle.remove()
    if not count:
        raise ValueError("calibrate: expected at least one batch. Got none.")
    missed = [name for name in watched if name not in reached]
    if missed:
        raise ValueError(f"calibrate: expected the batches to reach {missed[0]}. Got none that does.")


class CurrentMask:
    """The attention mask of the running forward call, to leave padding out of the ranges."""

    def __init__(self) -> None:
        self._mask: Tensor | None = None

    def remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # All families take (input_ids, attention_mask, ...).
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        # Multiple choice masks [batch, choices, length] run as [batch * choices, length].
        usable = isinstance(mask, Tensor) and mask.dim() in (2, 3)
        self._mask = mask.reshape(-1, mask.shape[-1]).bool() if usable else None

    def real_tokens(self, x: Tensor) -> Tensor:
        """The rows of x [..., features] that stand for real tokens; all of x where it is not laid out as the mask."""
        return x[self._mask] if self._mask is not None and x.shape[:-1] == self._mask.shape else x


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it, `model` is in evaluation mode; afterwards every module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
