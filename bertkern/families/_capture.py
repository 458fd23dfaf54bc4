"""What transformers' capture of hidden states and attentions asks of a forward pass: it listens by hooks on layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import output_capturing

_collector = output_capturing._active_collector


def wants(key: str) -> bool:
    """Whether the model call in progress collects `key`: "hidden_states", "attentions" or "cross_attentions"."""
    # The collector is a context variable, which cannot be traced; transformers keeps a plain one while compiling.
    if torch.compiler.is_compiling() and not _collector.compiling:
        return False
    collected = _collector.get()
    return bool(collected) and key in collected


def is_capture(hook: Any) -> bool:
    """Whether a forward hook is one of transformers' own, which do nothing but collect."""
    return getattr(hook, "__module__", None) == output_capturing.__name__


def collect(layers: Sequence[nn.Module], x: Tensor, outputs: Sequence[Tensor]) -> None:
    """Gives the hooks on `layers` what they would have seen: layer i turns outputs[i - 1], or x, into outputs[i]."""
    for layer, before, after in zip(layers, [x, *outputs], outputs, strict=False):
        for hook in layer._forward_hooks.values():
            if is_capture(hook):
                hook(layer, (before,), after)


def active() -> bool:
    """Whether a model call in progress collects anything."""
    return not torch.compiler.is_compiling() and _collector.get() is not None
