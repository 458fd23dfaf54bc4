"""From fake-quantized layers to the int8 layers of the kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from bertkern.formats.int8 import SIGNED

from .fake_quant import rounded_bias, step_of
from .modules import FakeQuantEmbedding, FakeQuantLinear
from .roles import pretrained_models

# The activation width that the kernels run.
ACTIVATION_BITS = 8


@dataclass(frozen=True)
class Int8Parts:
    """The tensors of an int8 linear, as bertkern.nn.Int8Linear stores them: scales are steps, w = code * scale.

    weight_codes int8 [N, K] in [-127, 127]; weight_scale fp32 [1]; bias fp32 [N] or None; input_scale fp32 scalar
    (0 = dynamic per token); input_zero_point (with dynamic ranges 128: they are symmetric, as the simulated ones);
    output_scale fp32 scalar (0 = the output is not requantized).
    """

    weight_codes: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor
    output_scale: Tensor
    input_zero_point: int = 0

    @classmethod
    def dynamic(cls, weight_codes: Tensor, weight_scale: Tensor, bias: Tensor | None) -> "Int8Parts":
        """Of mode "dynamic": ranges per token, symmetric."""
        zero = torch.zeros((), device=weight_codes.device)
        return cls(weight_codes, weight_scale, bias, zero, zero.clone(), input_zero_point=SIGNED)


def convert(model: nn.Module) -> nn.Module:
    """Exchanges every fake-quantized layer of `model` for its int8 layer, in place, and returns the model.

    The codes of weights and tables are those that training saw, static ranges become static input and output steps, and
    biases keep the rounding to 32 bits that the simulation gave them. So each layer, and a model of them, gives the
    bits of the simulated one while sums of products stay below 2^24; else each layer is within one code. Mode "dynamic"
    becomes dynamic per token, symmetric, without requantized outputs: the simulation takes the range of the whole batch
    instead, which is coarser and depends on the company a sequence stands in. Layers of mode "none" become plain ones
    again. Tied tables and decoders share their codes.

    The layers run on the kernels one by one; `bertkern.accelerate(model)` then fuses the encoder, whose LayerNorm and
    attention differ from torch's in last bits. Where that moves a value across the border of two codes, what follows is
    rounded anew, as it is when torch runs on another instruction set. all-MiniLM-L6-v2 trained on film reviews, logits
    of 1,000 others: 94.7 % agree to 40 dB and more, all together to 34.0 dB, 99.6 % in their answer; torch without its
    vector instructions has 96.0 %, 35.0 dB and 99.9 %. Trained without requantized outputs: 96.6 %, 43.3 dB, 100 %;
    torch 96.3 %, 41.7 dB, 99.9 %. (benchmarks/q8bert.py)

    Args:
        model: trained after `prepare_qat`, calibrated by `calibrate`, or a single fake-quantized layer.

    Raises:
        ValueError: before the first change: no fake-quantized layer, a layer without a range yet, a range or weight
            that is not finite, or activations of a width that the kernels do not run; the text names the layer.
    """
    groups = _layers(model)
    if not groups:
        raise ValueError("convert: expected a model prepared by prepare_qat or calibrate. Got no fake-quantized layer.")
    for names in groups:
        layer = model.get_submodule(names[0])
        _apply_pruning(layer)
        _check(names[0] or type(model).__name__, layer)
    if groups[0] == [""]:
        return _converted(model)
    ties = _ties(model, [names[0] for names in groups])
    # One by one and by name, so that each float weight is freed as its codes take its place.
    for names in groups:
        converted = _converted(model.get_submodule(names[0]))
        for name in names:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, converted)
    for linear, table in ties.items():
        model.get_submodule(linear).share(model.get_submodule(table))
    for _, pretrained in pretrained_models(model):
        if hasattr(pretrained.config, "q8bert"):
            del pretrained.config.q8bert
    return model


def linear_parts(layer: FakeQuantLinear) -> Int8Parts:
    """The int8 form of one layer whose ranges are known."""
    weight_codes, weight_scale = _codes(layer)
    bias = None if layer.bias is None else layer.bias.detach().float().clone()
    if layer.settings.mode == "dynamic":
        return Int8Parts.dynamic(weight_codes, weight_scale, bias)
    input_scale = _step(layer.input_thresh)
    if bias is not None:
        bias = rounded_bias(bias, input_scale * weight_scale)
    output_scale = _step(layer.output_thresh) if layer.settings.requantize_output else torch.zeros_like(input_scale)
    return Int8Parts(weight_codes, weight_scale, bias, input_scale, output_scale)


def int8_linear(parts: Int8Parts) -> nn.Module:
    """The kernels' layer made of `parts`."""
    from bertkern.nn import Int8Linear

    return Int8Linear.from_codes(
        parts.weight_codes,
        parts.weight_scale,
        parts.bias,
        input_scale=parts.input_scale,
        input_zero_point=parts.input_zero_point,
        output_scale=parts.output_scale,
    )


def int8_embedding(codes: Tensor, scale: Tensor, padding_idx: int | None) -> nn.Module:
    """The kernels' table of codes int8 [rows, features] and step fp32 [1]."""
    from bertkern.nn import Int8Embedding

    return Int8Embedding.from_codes(codes, scale, padding_idx=padding_idx)


def _layers(model: nn.Module) -> list[list[str]]:
    """The names of each fake-quantized layer, several where one layer stands in several places."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (FakeQuantLinear, FakeQuantEmbedding)):
            names.setdefault(id(module), []).append(name)
    return list(names.values())


def _ties(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Of linears whose weight, and so whose codes, are a table's: the linear's name -> the table's."""
    layers = {name: model.get_submodule(name) for name in names}
    layers = {name: layer for name, layer in layers.items() if layer.settings.mode != "none"}
    tables = {(id(t.weight), t.settings.weight_bits): n for n, t in layers.items() if isinstance(t, FakeQuantEmbedding)}
    sources = {
        n: tables.get((id(m.weight), m.settings.weight_bits)) for n, m in layers.items() if n not in tables.values()
    }
    return {name: source for name, source in sources.items() if source is not None}


def _codes(layer: FakeQuantLinear | FakeQuantEmbedding) -> tuple[Tensor, Tensor]:
    """(codes int8, step fp32 [1]) of the weight."""
    return layer.weight_codes().to(torch.int8), layer.weight_step().reshape(1)


def _converted(layer: FakeQuantLinear | FakeQuantEmbedding) -> nn.Module:
    if layer.settings.mode == "none":
        return layer.release()
    if isinstance(layer, FakeQuantEmbedding):
        return int8_embedding(*_codes(layer), layer.padding_idx).train(layer.training)
    return int8_linear(linear_parts(layer)).train(layer.training)


def _step(threshold: Tensor) -> Tensor:
    return step_of(threshold, ACTIVATION_BITS).reshape(())


def _apply_pruning(layer: nn.Module) -> None:
    """Masks the weight anew under torch.nn.utils.prune, which does so only before a forward call."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            hook(layer, ())


def _check(name: str, layer: FakeQuantLinear | FakeQuantEmbedding) -> None:
    if layer.settings.mode == "none":
        return
    if not torch.isfinite(layer.weight).all():
        raise ValueError(f"convert: expected {name}.weight to be finite. Got Inf or NaN.")
    if isinstance(layer, FakeQuantEmbedding):
        return
    bits = layer.settings.activation_bits
    if bits != ACTIVATION_BITS:
        raise ValueError(f"convert: expected {name} to have activations of {ACTIVATION_BITS} bits. Got {bits}.")
    if layer.bias is not None and not torch.isfinite(layer.bias).all():
        raise ValueError(f"convert: expected {name}.bias to be finite. Got Inf or NaN.")
    if layer.settings.mode == "ema":
        for range_name in ("input_thresh", "output_thresh")[: 1 + layer.settings.requantize_output]:
            value = float(getattr(layer, range_name))
            if not 0 < value < float("inf"):
                raise ValueError(
                    f"convert: expected {name}.{range_name} to be positive and finite (train past start_step, or "
                    f"calibrate). Got {value}."
                )
