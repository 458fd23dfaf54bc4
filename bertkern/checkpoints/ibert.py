"""I-BERT checkpoints: a RoBERTa trained with int8 weights and static int8 activations.

Under the name of each linear layer [N, K] of the encoder there stand, beside `weight` and `bias`,

    weight_integer         fp32 [N, K]   codes, whole numbers in [-127, 126]
    fc_scaling_factor      fp32 [N]      of each output: max|w| / 127
    bias_integer           fp32 [N]      round(bias / (fc_scaling_factor * the input's factor)); transformers takes for
                                         queries, keys and values of all layers the factor of the embeddings

under that of each table `weight_integer` and `weight_scaling_factor` [1], and under that of each place where
activations are rounded (`query_activation`, `pre_intermediate_act`, ...) `x_min`, `x_max` and `act_scaling_factor`,
max(|x_min|, |x_max|) / 127, each [1]. The integers are made anew from weights and ranges at every run, so those count
where the file has them; the integers, where it lacks the weights. `quant_mode` of config.json says whether the model
computes so.

Loaded as a RoBERTa whose linears and tables are bertkern.nn's int8 modules: the same codes, the same steps, and
queries, keys and values rounded to 8 bits. GELU, softmax and LayerNorm are the exact ones, not I-BERT's polynomials on
integers; what goes into residual sums is not rounded to 8 bits. A decoder keeps the float weight, as in I-BERT.

Source: Kim et al. 2021, I-BERT, arXiv 2101.01321; transformers, models/ibert.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from bertkern.compress.q8bert.conversion import Int8Parts, int8_embedding, int8_linear

from .checked import CheckedTensors
from .files import find_weights, names_of, read_config, read_weights
from .format import CheckpointFormat
from .models import build, by_identity, named_class, pass_over_unused

# Codes stop one short of the highest.
LOWEST, HIGHEST = -127, 126
TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
# The linears of a layer, and where in it their inputs and outputs are rounded; None: where the layer before ends.
LINEARS: dict[str, tuple[str | None, str | None]] = {
    "attention.self.query": (None, "attention.self.query_activation"),
    "attention.self.key": (None, "attention.self.key_activation"),
    "attention.self.value": (None, "attention.self.value_activation"),
    "attention.output.dense": ("attention.self.output_activation", None),
    "intermediate.dense": ("pre_intermediate_act", None),
    "output.dense": ("pre_output_act", None),
}
_BUFFERS = (
    "weight_integer",
    "fc_scaling_factor",
    "weight_scaling_factor",
    "bias_integer",
    "act_scaling_factor",
    "x_min",
    "x_max",
    "shift",
)
_HEADS = {
    "classifier.out_proj.weight": "SequenceClassification",
    "classifier.weight": "TokenClassification",
    "qa_outputs.weight": "QuestionAnswering",
    "lm_head.dense.weight": "MaskedLM",
}
# Ranges start at this size, and have seen nothing while they are no larger.
_UNSEEN = 1.1e-5
# How far stored codes may lie from those of the weights: a step of training may have come between.
_STALE = 2


def ibert_codes(weight: Tensor, per_channel: bool = True) -> tuple[Tensor, Tensor]:
    """(codes int8 [N, K], scale fp32 [N] or [1]) of weight fp32 [N, K], as I-BERT rounds it.

    Example:
        >>> ibert_codes(torch.tensor([[1.0, -0.5]]))[0]
        tensor([[126, -64]], dtype=torch.int8)
    """
    top = weight.abs().amax(1) if per_channel else weight.abs().amax().reshape(1)
    scale = torch.clamp(top, min=1e-8) / 127
    codes = torch.round(1.0 / scale[:, None] * weight).clamp_(LOWEST, HIGHEST)
    return codes.to(torch.int8), scale


def load(path: Path, *, model_class: type[PreTrainedModel] | None = None, quantize: bool | None = None) -> nn.Module:
    """The int8 RoBERTa of a checkpoint, or the float one where the file's model is float.

    Layers whose inputs' ranges the file lacks, or that never saw any, take each token's own, with a warning.

    Args:
        path: the folder, or the file of weights in it.
        model_class: the transformers class, a Roberta one, where config.json does not name it.
        quantize: whether to load int8 layers; None: as `quant_mode` of config.json says, or if there are no others.
    """
    tensors, folder = read_weights(path)
    tensors = {_renamed(name): tensor for name, tensor in tensors.items()}
    values = read_config(folder)
    compact = any(name.endswith(".weight_integer") and name.removesuffix("_integer") not in tensors for name in tensors)
    quantize = bool(values.get("quant_mode")) or compact if quantize is None else quantize
    if compact and not quantize:
        raise ValueError("load_checkpoint: expected weights beside their integers with quantize=False. Got none.")
    model = build(*_roberta(values, tensors, model_class), foreign=("quant_mode", "force_dequant"))
    base = f"{model.base_model_prefix}." if model.base_model is not model else ""
    checked = CheckedTensors(tensors)
    linears: dict[str, Int8Parts] = {}
    tables: dict[str, tuple[Tensor, Tensor, int | None]] = {}
    unseen: list[str] = []
    if quantize:
        for name in (f"{base}embeddings.{table}" for table in TABLES):
            module = model.get_submodule(name)
            codes, scale = _codes(checked, name, module, "weight_scaling_factor")
            tables[name] = codes, scale, module.padding_idx
        first = before = f"{base}embeddings.output_activation"
        steps: dict[str, Tensor | None] = {}
        for layer in range(model.config.num_hidden_layers):
            prefix = f"{base}encoder.layer.{layer}."
            for name, (source, target) in LINEARS.items():
                places = (before, first) if source is None else (prefix + source,) * 2
                places = (*places, None if target is None else prefix + target)
                for place in {*places} - {*steps}:
                    steps[place] = None if place is None else _step(checked, place)
                step, of_bias, out = (steps[place] for place in places)
                if step is None:
                    unseen.append(prefix + name)
                module = model.get_submodule(prefix + name)
                linears[prefix + name] = _linear(checked, prefix + name, module, step, of_bias, out)
            before = f"{prefix}output.output_activation"
    floats = _floats(model, checked, tables, {*linears, *tables})
    checked.pass_over(*(name for name in checked.names() if name.endswith(_BUFFERS)))
    pass_over_unused(model, checked)
    checked.finish()
    if unseen:
        warnings.warn(
            f"load_checkpoint: {len(unseen)} layers have no range of their inputs and take each token's own, "
            f"{unseen[0]} among them.",
            stacklevel=3,
        )
    for name, parts in {**linears, **tables}.items():
        parent, _, leaf = name.rpartition(".")
        made = int8_linear(parts) if isinstance(parts, Int8Parts) else int8_embedding(*parts)
        setattr(model.get_submodule(parent), leaf, made)
    with torch.no_grad():
        for name, tensor in floats.items():
            model.get_parameter(name).copy_(tensor)
    if tables:
        model.config.tie_word_embeddings = False
    return model.eval()


def _renamed(name: str) -> str:
    return f"roberta.{name.removeprefix('ibert.')}" if name.startswith("ibert.") else name


def _roberta(
    values: dict[str, Any], tensors: Mapping[str, Tensor], model_class: type[PreTrainedModel] | None
) -> tuple[dict[str, Any], Mapping[str, Tensor], type[PreTrainedModel]]:
    """What `build` takes for the RoBERTa that an I-BERT is."""
    names = values.get("architectures")
    names = [str(name).replace("IBert", "Roberta") for name in names] if isinstance(names, list) else []
    values = {**values, "model_type": "roberta", "architectures": names}
    head = next((f"For{head}" for name, head in _HEADS.items() if name in tensors), "Model")
    return values, tensors, model_class or named_class(values) or getattr(transformers, f"Roberta{head}")


def _floats(
    model: PreTrainedModel, checked: CheckedTensors, tables: Mapping[str, tuple[Tensor, Tensor, Any]], made: set[str]
) -> dict[str, Tensor]:
    """The parameters of all modules that are not among those made."""
    state: dict[str, Tensor] = {}
    for tied in by_identity(model):
        inside = next((name for name in tied if name.rpartition(".")[0] in made), None)
        others = [name for name in tied if name.rpartition(".")[0] not in made]
        if inside is None or others:
            given = [name for name in tied if name in checked] or tied[:1]
            if inside is not None and given[0] not in checked:
                codes, scale, _ = tables[inside.rpartition(".")[0]]
                state |= dict.fromkeys(others, codes.float() * scale)
                continue
            for name in given:
                state |= dict.fromkeys(others, checked.take(name, model.get_parameter(name).shape))
    checked.pass_over(*(f"{name}.weight" for name in made), *(f"{name}.bias" for name in made))
    return state


def _codes(checked: CheckedTensors, name: str, module: nn.Module, factor: str) -> tuple[Tensor, Tensor]:
    """int8 codes and scales of a linear or table."""
    shape, per_channel = tuple(module.weight.shape), isinstance(module, nn.Linear)
    held = None
    if f"{name}.weight_integer" in checked:
        held = checked.take(f"{name}.weight_integer", shape, (torch.float32, torch.int8))
        held = held.float().nan_to_num(0.0)
    if f"{name}.weight" in checked:
        weight = checked.look(f"{name}.weight", shape).float().nan_to_num(0.0)
        codes, scale = ibert_codes(weight, per_channel)
        # All zeros: made, and never filled.
        if held is not None and bool(held.any()) and float((held - codes.float()).abs().max()) > _STALE:
            checked.wrong(f"expected {name}.weight_integer to be the codes of {name}.weight. Got others.")
        return codes, scale
    if held is None:
        checked.wrong(f"expected {name}.weight or {name}.weight_integer. Got neither.")
        held = torch.zeros(shape)
    scale = checked.take(f"{name}.{factor}", [shape[0] if per_channel else 1], torch.float32, positive=True)
    if bool((held != held.round()).any()) or float(held.min()) < LOWEST or float(held.max()) > HIGHEST:
        low, high = float(held.min()), float(held.max())
        checked.wrong(
            f"expected {name}.weight_integer to hold whole numbers in [{LOWEST}, {HIGHEST}]. Got {low} to {high}."
        )
    return held.to(torch.int8), scale


def _linear(
    checked: CheckedTensors,
    name: str,
    module: nn.Linear,
    step: Tensor | None,
    of_bias: Tensor | None,
    out: Tensor | None,
) -> Int8Parts:
    """A linear whose input, bias and output are rounded in these steps; None: not at all."""
    codes, scale = _codes(checked, name, module, "fc_scaling_factor")
    unit = None if of_bias is None else scale.double() * of_bias.double()
    if f"{name}.bias" in checked:
        bias = checked.take(f"{name}.bias", [module.out_features]).float()
        if unit is not None:
            bias = ((bias.double() / unit).round() * unit).float()
    else:
        whole = checked.take(f"{name}.bias_integer", [module.out_features], torch.float32)
        if unit is None:
            checked.wrong(f"expected {name}.bias, or a range of its inputs beside bias_integer. Got neither.")
            unit = scale.double()
        bias = (whole.double() * unit).float()
    zero = torch.zeros(())
    return Int8Parts(codes, scale, bias, zero if step is None else step, zero if out is None else out)


def _step(checked: CheckedTensors, name: str) -> Tensor | None:
    """The step of a place where activations are rounded, fp32 scalar; None if it is not known."""
    if f"{name}.x_min" in checked or f"{name}.x_max" in checked:
        low, high = (checked.look(f"{name}.{part}", None, torch.float32) for part in ("x_min", "x_max"))
        if bool(low > high):
            checked.wrong(f"expected {name}.x_min of at most x_max. Got {float(low)} and {float(high)}.")
            return None
        top = torch.maximum(low.abs(), high.abs())
        if float(top) > _UNSEEN:
            return top / 127
    if f"{name}.act_scaling_factor" not in checked:
        return None
    step = checked.look(f"{name}.act_scaling_factor", None, torch.float32)
    if float(step) < 0:
        checked.wrong(f"expected {name}.act_scaling_factor to be at least 0. Got {float(step)}.")
    # It is made of the ranges, too: that of none is one of 1e-5.
    return step if float(step) > _UNSEEN / 127 else None


def _detect(path: Path) -> bool:
    try:
        values = read_config(find_weights(path)[0].parent)
    except (OSError, ValueError):
        return False
    if values.get("model_type") == "ibert":
        return True
    return any(name.endswith(".fc_scaling_factor") for name in names_of(path))


IBERT = CheckpointFormat("i-bert", _detect, load)
