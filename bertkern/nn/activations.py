"""Which activation a module or function computes, as the operators number them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

NONE, GELU, GELU_TANH, RELU, TANH, SILU = range(6)

# By class name, because the classes of transformers need not be importable here.
_MODULES = {
    "GELUActivation": GELU,
    "NewGELUActivation": GELU_TANH,
    "FastGELUActivation": GELU_TANH,
    "AccurateGELUActivation": GELU_TANH,
    "GELUTanh": GELU_TANH,
    "SiLUActivation": SILU,
}
_TORCH_MODULES = {nn.ReLU: RELU, nn.Tanh: TANH, nn.SiLU: SILU}
_FUNCTIONS = {F.gelu: GELU, F.relu: RELU, torch.relu: RELU, torch.tanh: TANH, F.silu: SILU}


def activation_code(activation: Callable) -> int | None:
    """The operators' number of an activation, or None if no kernel computes it.

    Example:
        >>> activation_code(nn.GELU(approximate="tanh")) == GELU_TANH
        True
    """
    if type(activation) is nn.GELU:
        return GELU_TANH if activation.approximate == "tanh" else GELU
    if type(activation) in _TORCH_MODULES:
        return _TORCH_MODULES[type(activation)]
    if isinstance(activation, nn.Module):
        ours = type(activation).__module__ == "transformers.activations"
        return _MODULES.get(type(activation).__name__) if ours else None
    try:
        return _FUNCTIONS.get(activation)
    except TypeError:
        return None
