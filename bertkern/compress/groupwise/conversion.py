"""From layers that train under quantization to the low-bit layers of the kernels."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from bertkern.nn.int8 import finite
from bertkern.quantizing import quantize_

from ..static import Calibration
from .modules import FakeQuantGroupwiseLinear
from .prepare import KINDS


def convert(model: nn.Module, **options: Any) -> nn.Module:
    """Exchanges every layer that `prepare_qat` prepared for its low-bit one, in place, and returns the model.

    Codes, scales and zero points are those that evaluation saw, and static ranges those that training found, so that a
    layer gives what it gave before but for the order of sums; where that moves an input over the border of two codes,
    by a code of it. The model then runs by the kernels, as after `quantize_`: with exact_attention=True nothing else
    differs, else attention rounds its operands to bf16 where the processor has that.

    Args:
        model: trained after `prepare_qat`.
        options: keep_padding, exact_attention, plan, measure, sample and progress of `quantize_`.

    Raises:
        ValueError: before the first change: no prepared layer, static activations without a range yet, or a weight with
            Inf or NaN; the text names the layer.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, KINDS)}
    if not layers:
        raise ValueError("convert: expected a model prepared by prepare_qat. Got no fake-quantized layer.")
    for name, layer in layers.items():
        _apply_pruning(layer)
        _check(name, layer)
    config = next(iter(layers.values())).settings.config
    linears = {name: layer for name, layer in layers.items() if isinstance(layer, FakeQuantGroupwiseLinear)}
    tables = {id(layer.weight) for name, layer in layers.items() if name not in linears}
    with torch.no_grad():
        # A decoder that has a table's weight has its codes, too.
        weights = {
            name: layer.groupwise_weight()
            for name, layer in layers.items()
            if name not in linears or id(layer.weight) not in tables
        }
    static = {name: layer.input_range() for name, layer in linears.items() if layer.settings.activation == "static"}
    with _released(layers):
        calibration = Calibration(static) if config.activation == "static" else None
        return quantize_(model, config, weights=weights, calibration=calibration, **options)


@contextmanager
def _released(layers: dict[str, nn.Module]) -> Iterator[None]:
    """Within it the layers are plain ones; where it is left by an error, they are what they were again."""
    kept = []
    for layer in layers.values():
        kept.append((layer, type(layer), layer.settings, {name: layer._buffers[name] for name in layer._ranges()}))
        layer.release()
    try:
        yield
    except BaseException:
        for layer, kind, settings, buffers in kept:
            kind.adopt(layer, settings)
            layer._buffers.update(buffers)
        raise


def _apply_pruning(layer: nn.Module) -> None:
    """Masks the weight anew under torch.nn.utils.prune, which does so only before a forward call."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            hook(layer, ())


def _check(name: str, layer: nn.Module) -> None:
    for tensor in ("weight", "bias"):
        value = getattr(layer, tensor, None)
        if value is not None and not finite(value):
            raise ValueError(f"convert: expected {name}.{tensor} to be finite. Got Inf or NaN.")
    if isinstance(layer, FakeQuantGroupwiseLinear) and not layer.has_range():
        raise ValueError(f"convert: expected {name} to have a range of its inputs: train past start_step. Got none.")
