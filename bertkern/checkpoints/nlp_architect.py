"""Q8BERT checkpoints of NLP Architect: the int8 export and the training checkpoint.

The export, `quant_pytorch_model.bin`, holds for each quantized linear (thresholds are ranges max|x|, scales are
multipliers, code = x * scale):

    quantized_weight int8 [N, K]     _weight_scale fp32 scalar = 127 / max|weight|
    _quantized_bias  int32 [N]       bias_scale = _weight_scale * 127 / input_thresh      (mode "dynamic": fp32 bias)
    input_thresh     fp32 [1]        output_thresh fp32 [1], where the output is requantized

and for each table `quantized_weight`, `_weight_scale`. The training checkpoint (`pytorch_model.bin`, or
`model.safetensors` of a model prepared here) holds the fp32 `weight` and `bias` beside `_step`, `input_thresh` and
`output_thresh`. Both stand beside a config.json that says what is quantized.

Source: Zafrir et al. 2019, Q8BERT, arXiv 1910.06188; IntelLabs/nlp-architect, nlp_architect/nn/torch/quantization.py.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bertkern.compress.q8bert.config import EMBEDDINGS, OPS, OpSettings, Q8BertConfig
from bertkern.compress.q8bert.conversion import Int8Parts, int8_embedding, int8_linear
from bertkern.compress.q8bert.prepare import prepare_qat
from bertkern.compress.q8bert.roles import Role, find_roles

from .checked import CheckedTensors
from .files import WEIGHTS as TRAINING_FILES
from .files import read_config, read_tensors
from .format import CheckpointFormat
from .models import build, by_identity, pass_over_unused

INT8_FILE = "quant_pytorch_model.bin"

# How far bias_scale may lie from the product that it is, in parts of it: it was rounded to fp32 a few times.
SCALE_TOLERANCE = 1e-4


def load_int8(path: Path, *, model_class: type[PreTrainedModel] | None = None) -> nn.Module:
    """The int8 model of an export: a transformers BERT whose linears and tables are bertkern.nn's int8 modules.

    Layers of mode "ema" run with the static ranges of the file. Layers of mode "dynamic" take a symmetric range per
    token, where NLP Architect took one per batch. Layers that were not quantized stay fp32.

    Args:
        path: `quant_pytorch_model.bin`, or its folder.
        model_class: the transformers class, where the file leaves it open (sequence and token classification look
            alike, and only newer files name the class in config.json).
    """
    file, values = _open(path, (INT8_FILE,))
    tensors = read_tensors(file)
    model = _build(values, tensors, model_class)
    checked = CheckedTensors(tensors)
    declared = Q8BertConfig.from_json(values) if any(op in values for op in OPS) else None

    replacements = {}
    for role in find_roles(model):
        settings = _settings(role, declared, checked)
        if settings is None:
            continue
        if settings.mode == "none":
            # An ordinary layer, with counters that never moved.
            checked.pass_over(*(f"{role.name}.{idle}" for idle in ("_step", "input_thresh", "output_thresh")))
            continue
        take = _take_table if role.op in EMBEDDINGS else _take_linear
        replacements[role.name] = take(role, settings, checked)
    floats = {
        name: checked.take(name, parameter.shape)
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in replacements
    }
    pass_over_unused(model, checked)
    checked.finish()

    for name, parts in replacements.items():
        parent, _, leaf = name.rpartition(".")
        module = int8_linear(parts) if isinstance(parts, Int8Parts) else int8_embedding(*parts)
        setattr(model.get_submodule(parent), leaf, module)
    with torch.no_grad():
        for name, tensor in floats.items():
            model.get_parameter(name).copy_(tensor)
    return model.eval()


def load_training(path: Path, *, model_class: type[PreTrainedModel] | None = None) -> nn.Module:
    """The prepared model of a training checkpoint, as `prepare_qat` makes it, with its weights and ranges.

    It simulates int8 in floating point; train it on, or `convert` it.

    Args:
        path: the file of weights, or its folder.
        model_class: the transformers class, where config.json does not name it.
    """
    file, values = _open(path, TRAINING_FILES)
    tensors = read_tensors(file)
    model = _build(values, tensors, model_class)
    prepare_qat(model, Q8BertConfig.from_json(values))
    checked = CheckedTensors(tensors)
    state = {}
    for target in by_identity(model):
        # Tied tensors are written under one of their names, or under all.
        names = [name for name in target if name in checked] or target[:1]
        shape = model.get_parameter(names[0]).shape
        for name in names:
            state[name] = checked.take(name, shape)
    for name, buffer in model.named_buffers():
        if name.endswith(("._step", ".input_thresh", ".output_thresh")):
            state[name] = checked.take(name, buffer.shape, torch.float32)
            if (state[name] < 0).any():
                checked.wrong(f"expected {name} to be at least 0. Got {float(state[name].min())}.")
    pass_over_unused(model, checked)
    checked.finish()
    model.load_state_dict(state, strict=False)
    return model.eval()


def _detect_int8(path: Path) -> bool:
    return (path.is_file() and path.name == INT8_FILE) or (path / INT8_FILE).is_file()


def _detect_training(path: Path) -> bool:
    try:
        _, values = _open(path, TRAINING_FILES)
    except (OSError, ValueError):
        return False
    return "q8bert" in values or any(op in values for op in OPS)


INT8 = CheckpointFormat("nlp-architect-int8", _detect_int8, load_int8)
TRAINING = CheckpointFormat("nlp-architect-training", _detect_training, load_training)


def _open(path: Path, file_names: tuple[str, ...]) -> tuple[Path, dict[str, Any]]:
    """The file of weights and the values of the config.json beside it."""
    file = path
    if path.is_dir():
        present = [path / name for name in file_names if (path / name).is_file()]
        if not present:
            raise FileNotFoundError(
                f"load_checkpoint: expected {' or '.join(file_names)} in {str(path)!r}. Got neither."
            )
        file = present[0]
    return file, read_config(file.parent)


def _build(
    values: dict[str, Any], tensors: dict[str, Tensor], model_class: type[PreTrainedModel] | None
) -> PreTrainedModel:
    if values.get("pruned_heads"):
        raise ValueError(
            f"load_checkpoint: expected a BERT with all of its heads. Got pruned_heads {values['pruned_heads']}."
        )
    return build(values, tensors, model_class, foreign=(*OPS, "q8bert"))


def _settings(role: Role, declared: Q8BertConfig | None, checked: CheckedTensors) -> OpSettings | None:
    """What config.json says of this layer; where it says nothing at all, what the layer's tensors do."""
    if declared is not None:
        return getattr(declared, role.op)
    if f"{role.name}.quantized_weight" not in checked:
        return None
    static = f"{role.name}._quantized_bias" in checked or f"{role.name}.bias" not in checked
    return OpSettings("ema" if static else "dynamic", requantize_output=f"{role.name}.output_thresh" in checked)


def _take_linear(role: Role, settings: OpSettings, checked: CheckedTensors) -> Int8Parts:
    name, n = role.name, role.module.out_features
    codes = checked.take_codes(f"{name}.quantized_weight", role.module.weight.shape, settings.weight_bits)
    weight_multiplier = checked.take(f"{name}._weight_scale", None, torch.float32, positive=True)
    if settings.mode == "dynamic":
        bias = checked.take(f"{name}.bias", [n]).float() if role.module.bias is not None else None
        checked.pass_over(*(f"{name}.{unused}" for unused in ("input_thresh", "output_thresh", "bias_scale")))
        return Int8Parts.dynamic(codes, 1 / weight_multiplier.reshape(1), bias)
    input_range = checked.take(f"{name}.input_thresh", None, torch.float32, positive=True)
    bias = None
    if role.module.bias is not None:
        bias_codes = checked.take(f"{name}._quantized_bias", [n], torch.int32)
        bias_multiplier = checked.take(f"{name}.bias_scale", None, torch.float32, positive=True)
        expected = float(weight_multiplier) * 127 / float(input_range)
        if abs(float(bias_multiplier) - expected) > SCALE_TOLERANCE * expected:
            checked.wrong(
                f"expected {name}.bias_scale to be _weight_scale * 127 / input_thresh = {expected}. "
                f"Got {float(bias_multiplier)}."
            )
        bias = (bias_codes.double() / bias_multiplier.double()).float()
    output_scale = torch.zeros(())
    if settings.requantize_output:
        output_scale = checked.take(f"{name}.output_thresh", None, torch.float32, positive=True) / 127
    return Int8Parts(codes, 1 / weight_multiplier.reshape(1), bias, input_range / 127, output_scale)


def _take_table(role: Role, settings: OpSettings, checked: CheckedTensors) -> tuple[Tensor, Tensor, int | None]:
    codes = checked.take_codes(f"{role.name}.quantized_weight", role.module.weight.shape, settings.weight_bits)
    multiplier = checked.take(f"{role.name}._weight_scale", None, torch.float32, positive=True)
    return codes, 1 / multiplier.reshape(1), role.module.padding_idx
