"""Checkpoints of compressed-tensors in its layout "pack-quantized": integer weights of 2 to 8 bits, packed into words.

For each linear layer [N, K] that is stored so there stand under its name

    weight_packed       int32 [N, K * bits / 32]   codes plus 2^(bits - 1), along the row: a bit stream, the lowest bits
                                                   first. Older files of other than 2, 4 and 8 bits leave the highest
                                                   bits of each word free instead
    weight_shape        int64 [2]                  N and K
    weight_scale        fp16, bf16 or fp32         [N, G] of groups of columns, [N, 1] of rows, [1] of the matrix
    weight_zero_point   int32 [N * bits / 32, G]   packed likewise, down the column; or int8 [N, G], [N, 1] or [1]; not
                                                   there where grids are symmetric
    weight_g_idx        int32 [K]                  the group of each column, where they are out of order

and config.json tells under quantization_config, in its config_groups, which layers have how many bits. w = (q - zero)
* scale. Activations stay float, or are int8 with ranges of their own for each token; static ones are not read.
transformers reads these files only with the package compressed-tensors.

Source: vllm-project/compressed-tensors, compressors/pack_quantized.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bertkern.formats.groupwise import GroupwiseWeight

from .checked import FLOATS, CheckedTensors
from .files import names_of, read_config, read_weights
from .format import CheckpointFormat
from .low_bit import finish, grouped_by_index, unpack_words, words_of
from .models import build

PARTS = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx")


def packed_weight(tensors: Mapping[str, Tensor], bits: int, prefix: str = "") -> GroupwiseWeight | Tensor:
    """The weight of one layer; dense, fp32 [N, K], where its groups are out of order.

    Args:
        tensors: `<prefix>weight_packed`, `weight_shape`, `weight_scale` and, if they are there, `weight_zero_point` and
            `weight_g_idx`; others are passed over.
        bits: 2 to 8.
        prefix: of the names, its dot included.

    Raises:
        ValueError: tensors that are missing, of a wrong dtype, shape or value.
    """
    given = {part: tensors[prefix + part] for part in PARTS if prefix + part in tensors}
    checked = CheckedTensors({prefix + part: tensor for part, tensor in given.items()})
    n, k = checked.take(f"{prefix}weight_shape", [2], (torch.int64, torch.int32)).tolist()
    if n < 1 or k < 1:
        checked.wrong(f"expected {prefix}weight_shape to hold two sizes. Got {[n, k]}.")
        checked.pass_over(*(prefix + part for part in PARTS))
        checked.finish()
    # In older files a word holds whole codes only.
    whole, each = list(given.get("weight_packed", torch.empty(0)).shape), 32 // bits
    loose = whole != [n, words_of(k, bits)] and whole == [n, -(-k // each)]
    words = checked.take(f"{prefix}weight_packed", [n, -(-k // each) if loose else words_of(k, bits)], torch.int32)
    shape = list(given.get("weight_scale", torch.empty(0)).shape)
    groups = shape[1] if len(shape) == 2 and 1 <= shape[1] <= k else 1
    one = shape in ([], [1], [1, 1])
    scale = checked.take(f"{prefix}weight_scale", shape if one else [n, groups], FLOATS, positive=True)
    zero = _zeros(checked, given, prefix, n, groups, bits, one, loose)
    size, index = -(-k // groups), None
    if -(-k // size) != groups:
        checked.wrong(f"expected {prefix}weight_scale to have groups of equal size. Got {groups} of {k} columns.")
    if "weight_g_idx" in given:
        index = checked.take(f"{prefix}weight_g_idx", [k], (torch.int32, torch.int64)).long()
        if bool((index == -1).all()):
            index = None
        elif not bool(((index >= 0) & (index < groups)).all()):
            low, high = int(index.min()), int(index.max())
            checked.wrong(f"expected {prefix}weight_g_idx in [0, {groups}). Got {low} to {high}.")
    checked.finish()
    codes = _unpacked(words, bits, k, loose)
    scale = scale.float().reshape(1, 1) if one else scale.float()
    name = prefix.removesuffix(".")
    return grouped_by_index(name, codes, scale.contiguous(), zero.reshape(scale.shape), bits, size, index)


def load(path: Path, *, model_class: type[PreTrainedModel] | None = None) -> nn.Module:
    """The model with low-bit linear layers; all else is as in the file.

    Args:
        path: the folder, or a file of weights in it.
        model_class: the transformers class, where config.json does not name it.
    """
    tensors, folder = read_weights(path)
    values = read_config(folder)
    record = values.get("quantization_config") or values.get("compression_config")
    model = build(values, tensors, model_class, foreign=("quantization_config", "compression_config"))
    modules, problems, activations = dict(model.named_modules()), [], set()
    weights: dict[str, GroupwiseWeight] = {}
    for name in [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]:
        parts = {f"{name}.{part}": tensors.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in tensors}
        if not isinstance(modules.get(name), nn.Linear):
            problems.append(f"expected {name} to be a linear layer of the model. Got none of that name.")
            continue
        if f"{name}.weight" in tensors:
            problems.append(f"expected {name}.weight once. Got it both dense and packed.")
        try:
            about, activation = _scheme(name, record)
            _agree(name, parts, about)
            made = packed_weight(parts, about["num_bits"], f"{name}.")
        except ValueError as error:
            problems.append(str(error).removeprefix("load_checkpoint: "))
            tensors[f"{name}.weight"] = modules[name].weight.detach()
            continue
        activations.add(activation)
        if isinstance(made, Tensor):
            tensors[f"{name}.weight"] = made
        else:
            weights[name] = made
    if len(activations) > 1:
        problems.append("expected activations to be int8 in all layers or in none. Got both.")
    return finish(model, tensors, weights, problems, activations.pop() if activations else "float")


def _unpacked(words: Tensor, bits: int, count: int, loose: bool) -> Tensor:
    if not loose:
        return unpack_words(words, bits, count)
    each = 32 // bits
    flat = unpack_words(words.reshape(-1, 1), bits, each)
    return flat.reshape(len(words), -1)[:, :count].contiguous()


def _zeros(
    checked: CheckedTensors,
    given: Mapping[str, Tensor],
    prefix: str,
    n: int,
    groups: int,
    bits: int,
    one: bool,
    loose: bool,
) -> Tensor:
    """Zero points of unsigned codes, fp32 [N, G], or one element."""
    middle = 2 ** (bits - 1)
    if "weight_zero_point" not in given:
        return torch.full([1] if one else [n, groups], float(middle))
    name, held = f"{prefix}weight_zero_point", given["weight_zero_point"]
    if held.dtype == torch.int8:
        shape = list(held.shape) if one and held.numel() == 1 else [n, groups]
        signed = checked.take(name, shape, torch.int8).int()
        if not bool(((signed >= -middle) & (signed < middle)).all()):
            checked.wrong(f"expected {name} in [{-middle}, {middle}). Got {int(signed.min())} to {int(signed.max())}.")
        return signed.float() + middle
    rows = -(-n // (32 // bits)) if loose else words_of(n, bits)
    words = checked.take(name, [rows, groups], torch.int32)
    return _unpacked(words.T, bits, n, loose).T.float()


def _scheme(name: str, record: Any) -> tuple[dict[str, Any], str]:
    """(record of the weights, activation) of a layer, as the groups of config.json have them."""
    groups = record.get("config_groups") if isinstance(record, dict) else None
    schemes = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    # One that names the layer comes before one that names its class.
    for exact in (True, False):
        for scheme in schemes:
            targets = scheme.get("targets")
            if not any(_names(target, name, exact) for target in targets if isinstance(targets, list)):
                continue
            weights, inputs = scheme.get("weights"), scheme.get("input_activations")
            bits = weights.get("num_bits") if isinstance(weights, dict) else None
            if type(bits) is not int or not 2 <= bits <= 8 or weights.get("type", "int") != "int":
                raise ValueError(f"expected {name} to have integers of 2 to 8 bits. Got {weights!r}.")
            if inputs is None:
                return weights, "float"
            dynamic = isinstance(inputs, dict) and inputs.get("dynamic") is True and inputs.get("type", "int") == "int"
            if not dynamic or inputs.get("num_bits") != 8:
                raise ValueError(f"expected activations of {name} to be float, or dynamic int8. Got {inputs!r}.")
            return weights, "dynamic"
    raise ValueError(f"expected config_groups of config.json to name {name}. Got none that does.")


def _agree(name: str, parts: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Raises ValueError where the tensors of a layer are not as its record says of groups and zero points."""
    shape, scale = parts.get(f"{name}.weight_shape"), parts.get(f"{name}.weight_scale")
    size, strategy = about.get("group_size"), about.get("strategy")
    if type(size) is int and size > 0 and strategy in (None, "group") and shape is not None and scale is not None:
        columns = -(-int(shape.reshape(-1)[-1]) // size) if shape.numel() else 0
        if scale.dim() == 2 and scale.shape[1] != columns:
            raise ValueError(
                f"expected {name}.weight_scale of {columns} groups, as config.json says with group_size {size}. "
                f"Got {scale.shape[1]}."
            )
    if about.get("symmetric") is False and f"{name}.weight_zero_point" not in parts:
        raise ValueError(f"expected {name}.weight_zero_point, as config.json says that grids have some. Got none.")


def _names(target: Any, name: str, exact: bool) -> bool:
    if not isinstance(target, str):
        return False
    if not exact:
        return target == "Linear"
    if not target.startswith("re:"):
        return target == name
    try:
        return re.match(target[3:], name) is not None
    except re.error:
        return False


def _detect(path: Path) -> bool:
    return any(name.endswith(".weight_packed") for name in names_of(path))


PACK_QUANTIZED = CheckpointFormat("compressed-tensors-packed", _detect, load)
