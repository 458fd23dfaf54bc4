"""GPTQ checkpoints: codes of 2 to 8 bits in groups of input features, packed into words.

For each linear layer [N, K] in groups of g columns, G = ceil(K / g), there stand under its name

    qweight   int32 [K * bits / 32, N]   the codes of an output, down its column: a bit stream, the lowest bits first
    qzeros    int32 [G, N * bits / 32]   zero points, along the row; in files of the older format, "gptq", less 1
    scales    fp16, bf16 or fp32 [G, N]
    g_idx     int32 [K]                  the group of each column; may be missing
    bias      [N], of layers that have one

and config.json, or quantize_config.json beside it, holds bits, group_size (-1: K), checkpoint_format ("gptq" or
"gptq_v2") and more that says how they were made. w = (q - zero) * scale; activations stay float. transformers reads
these files only with the packages optimum and gptqmodel.

Where columns were sorted before they were cut into groups (desc_act), see `low_bit.grouped_by_index`.

Source: Frantar et al. 2022, GPTQ, arXiv 2210.17323; AutoGPTQ/AutoGPTQ, nn_modules/qlinear/qlinear_cuda_old.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bertkern.formats.groupwise import GroupwiseWeight

from .checked import FLOATS, CheckedTensors
from .files import find_weights, names_of, read_config, read_json, read_weights
from .format import CheckpointFormat
from .low_bit import finish, grouped_by_index, unpack_words, words_of
from .models import build

FORMATS = {"gptq": 1, "gptq_v2": 0}
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def gptq_weight(
    tensors: Mapping[str, Tensor],
    shape: tuple[int, int],
    bits: int,
    group_size: int = -1,
    prefix: str = "",
    less: int = 1,
) -> GroupwiseWeight | Tensor:
    """The weight of one layer; dense, fp32 [N, K], where its groups are out of order.

    Args:
        tensors: `<prefix>qweight`, `qzeros`, `scales` and, if it is there, `g_idx`; others are passed over.
        shape: (N, K).
        bits: 2 to 8.
        group_size: columns in a group; -1: all.
        prefix: of the names, its dot included.
        less: what zero points are stored less: 1 in the format "gptq", 0 in "gptq_v2".

    Raises:
        ValueError: tensors that are missing, of a wrong dtype, shape or value.
    """
    (n, k), size = shape, shape[1] if group_size == -1 else group_size
    groups = -(-k // size)
    checked = CheckedTensors({prefix + part: tensors[prefix + part] for part in PARTS if prefix + part in tensors})
    words = checked.take(f"{prefix}qweight", [words_of(k, bits), n], torch.int32)
    scale = checked.take(f"{prefix}scales", [groups, n], FLOATS, positive=True)
    zeros = checked.take(f"{prefix}qzeros", [groups, words_of(n, bits)], torch.int32)
    index = None
    if f"{prefix}g_idx" in checked:
        index = checked.take(f"{prefix}g_idx", [k], (torch.int32, torch.int64)).long()
        if not bool(((index >= 0) & (index < groups)).all()):
            checked.wrong(f"expected {prefix}g_idx in [0, {groups}). Got {int(index.min())} to {int(index.max())}.")
    checked.finish()
    codes = unpack_words(words.T, bits, k)
    # A zero point of 0 is stored as the highest code.
    zero = (unpack_words(zeros, bits, n).int() + less) % 2**bits
    return grouped_by_index(
        prefix.removesuffix("."), codes, scale.T.float().contiguous(), zero.T.float().contiguous(), bits, size, index
    )


def load(path: Path, *, model_class: type[PreTrainedModel] | None = None) -> nn.Module:
    """The model with low-bit linear layers, whose activations stay float; all else is as in the file.

    Args:
        path: the folder, or a file of weights in it.
        model_class: the transformers class, where config.json does not name it.
    """
    tensors, folder = read_weights(path)
    values = read_config(folder)
    bits, size, less = _settings(_quantization(folder))
    model = build(values, tensors, model_class, foreign=("quantization_config",))
    modules, problems = dict(model.named_modules()), []
    weights: dict[str, GroupwiseWeight] = {}
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        module = modules.get(name)
        parts = {f"{name}.{part}": tensors.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in tensors}
        if not isinstance(module, nn.Linear):
            problems.append(f"expected {name} to be a linear layer of the model. Got none of that name.")
            continue
        if f"{name}.weight" in tensors:
            problems.append(f"expected {name}.weight once. Got it both dense and packed.")
        try:
            made = gptq_weight(parts, tuple(module.weight.shape), bits, size, f"{name}.", less)
        except ValueError as error:
            problems.append(str(error).removeprefix("load_checkpoint: "))
            tensors[f"{name}.weight"] = module.weight.detach()
            continue
        if isinstance(made, Tensor):
            tensors[f"{name}.weight"] = made
        else:
            weights[name] = made
    return finish(model, tensors, weights, problems, "float")


def _quantization(folder: Path) -> dict[str, Any]:
    """The record of how a checkpoint was quantized."""
    found = read_config(folder).get("quantization_config")
    beside = folder / "quantize_config.json"
    if found is None and beside.is_file():
        found = read_json(beside)
    return found if isinstance(found, dict) else {}


def _settings(record: dict[str, Any]) -> tuple[int, int, int]:
    """(bits, group_size, less)."""
    bits, size = record.get("bits"), record.get("group_size", -1)
    layout = record.get("checkpoint_format", "gptq")
    this = "load_checkpoint: expected "
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ValueError(f"{this}quantization_config to give bits from 2 to 8. Got {bits!r}.")
    if type(size) is not int or (size < 1 and size != -1):
        raise ValueError(f"{this}quantization_config to give a group_size above 0, or -1. Got {size!r}.")
    if layout not in FORMATS:
        raise ValueError(f"{this}checkpoint_format to be one of {', '.join(FORMATS)}. Got {layout!r}.")
    return bits, size, FORMATS[layout]


def _detect(path: Path) -> bool:
    try:
        record = _quantization(find_weights(path)[0].parent)
    except (OSError, ValueError):
        return False
    return record.get("quant_method", "gptq") == "gptq" and any(name.endswith(".qweight") for name in names_of(path))


GPTQ = CheckpointFormat("gptq", _detect, load)
