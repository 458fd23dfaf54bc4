"""Q-BERT checkpoints of its authors: fp32 weights beside the ranges that training rounded them in.

For each linear layer [N, K] of the encoder, and each embedding table, there stand under its name

    weight          fp32 [N, K]       as training left it: not rounded
    x_min, x_max    fp32 [K] or [1]   of each input feature: equal for those of a group, and for all outputs. [1] and 0:
                                      the layer never ran, and its first run would take the ranges of the weight

and config.json holds, or the other JSON file that their training was given (--config_dir)

    layer_bits            {"layer.0.attention.self.query": 4, ...}: 2 to 8, or 32 of layers that stay fp32
    emb_bits, embed_bits  {"word_embeddings": 8, ...}
    quantize_activation   whether activations have 8 bits; in later files activation_bits, 8 or 32
    quant_group_number    groups of K neighbours, of layers without ranges yet

Nowhere in it is the width of the head. What the authors' code computes with is (q + p) / s with s = (2^bits - 1) /
(x_max - x_min), p = round(s * x_min), q = round(s * weight - p). Codes that leave [0, 2^bits - 1], as averaged ranges
let a few do, are clamped here. The ranges of activations were not saved: they are taken anew, token by token.

Source: Shen et al. 2019, Q-BERT, arXiv 1909.05840; sIncerass/QBERT, quant_modules.py and
quantization_utils/quant_utils.py; BohanZhai/zero_shot_quant, config/quant_bert_base.json.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bertkern.formats.groupwise import GroupwiseWeight, group_ranges, group_size_of

from .files import find_weights, names_of, read_config, read_json, read_weights
from .format import CheckpointFormat
from .low_bit import finish, grouped, run_of
from .models import build

LAYERS, TABLES = ("layer_bits",), ("emb_bits", "embed_bits")
_KEYS = (
    *LAYERS,
    *TABLES,
    "quantize_activation",
    "activation_bits",
    "quant_group_number",
    "layer_requires_grad",
    "freeze_embedding",
    "eval-blending-alpha",
)
# Of modules that are not quantized.
FLOAT = 32


def qbert_weight(weight: Tensor, x_min: Tensor, x_max: Tensor, bits: int) -> GroupwiseWeight:
    """The weight that the authors' code rounds fp32 [N, K] to, in groups of columns that all rows share.

    Args:
        weight: finite.
        x_min, x_max: fp32 [K] or [1], x_min <= x_max.
        bits: 2 to 8.

    Returns:
        Groups along "k" of the neighbours that share their ranges; where all do, one group along "n". Zero points are
        whole, and scales are 1 / s, so values are those of (q + p) / s to two roundings.

    Example:
        >>> qbert_weight(torch.tensor([[0.0, 1.1, 3.0]]), torch.tensor([0.0]), torch.tensor([3.0]), 2).dequantize()
        tensor([[0., 1., 3.]])
    """
    most = 2**bits - 1
    times = most / torch.clamp(x_max - x_min, min=1e-10)
    shift = torch.round(times * x_min)
    codes = torch.round(times * weight - shift).clamp_(0, most).to(torch.uint8)
    size = weight.shape[1] if x_min.numel() == 1 else run_of(torch.stack([x_min, x_max], 1))
    scale = (1 / times.double()).float()
    return grouped(codes, scale[None, ::size].contiguous(), -shift[None, ::size].contiguous(), bits, size)


def load(
    path: Path,
    *,
    model_class: type[PreTrainedModel] | None = None,
    activation: str | None = None,
    bits: str | os.PathLike[str] | Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model with low-bit weights as training saw them; layers of 32 bits, pooler and head stay fp32.

    Args:
        path: the folder, or the file of weights in it.
        model_class: the transformers class; where the file has a classifier, config.json seldom names it.
        activation: "dynamic" or "float", of the low-bit layers' inputs; None: what the file of the bits says.
        bits: the JSON file with `layer_bits` and the other keys above, or its values. None: config.json, or where that
            has none of them the one JSON file beside it that has.
    """
    tensors, folder = read_weights(path)
    values = read_config(folder)
    values |= _given(bits, folder, values)
    activation = _activation(values, activation)
    if "classifier.weight" in tensors and not {"num_labels", "id2label"} & set(values):
        values["num_labels"] = len(tensors["classifier.weight"])
    model = build(values, tensors, model_class, foreign=_KEYS)
    problems: list[str] = []
    weights: dict[str, GroupwiseWeight] = {}
    modules = dict(model.named_modules())
    asked = _bits(values, model, problems)
    for name, bits in asked.items():
        module = modules.get(name)
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            problems.append(f"expected bits to be of layers of the model. Got {name}.")
        elif bits != FLOAT:
            found = _weight(tensors, name, module, bits, values, problems)
            if found is not None:
                weights[name] = found
    # Layers that stay float have ranges, too.
    rest = {name: tensor for name, tensor in tensors.items() if not _range_of(name, modules)}
    return finish(model, rest, weights, problems, activation)


def _given(
    bits: str | os.PathLike[str] | Mapping[str, Any] | None, folder: Path, config: Mapping[str, Any]
) -> dict[str, Any]:
    """What is said about bits outside of config.json, which `bits` replaces.

    Raises:
        FileNotFoundError, ValueError: no file, or none that says anything, or several.
    """
    if bits is not None:
        if not isinstance(bits, Mapping) and not Path(bits).is_file():
            raise FileNotFoundError(f"load_checkpoint: expected bits to be a JSON file. Got {str(bits)!r}, no file.")
        values = bits if isinstance(bits, Mapping) else read_json(Path(bits))
        if not _says(values):
            raise ValueError(
                f"load_checkpoint: expected bits to hold {', '.join((*LAYERS, *TABLES))}. Got {', '.join(values)}."
            )
        return {key: None for key in _KEYS if key in config} | _about_bits(values)
    if _says(config):
        return {}
    found = _beside(folder)
    if len(found) != 1:
        got = " and ".join(sorted(found)) or "none"
        raise ValueError(
            f"load_checkpoint: expected {LAYERS[0]} in config.json, in one JSON file beside it, or in a file bits=. "
            f"Got {got}."
        )
    return _about_bits(next(iter(found.values())))


def _beside(folder: Path) -> dict[str, dict[str, Any]]:
    """The JSON files in `folder` that say something about bits."""
    found = {}
    for path in folder.glob("*.json"):
        with suppress(ValueError, OSError):
            values = read_json(path)
            if _says(values):
                found[path.name] = values
    return found


def _says(values: Mapping[str, Any]) -> bool:
    return any(isinstance(values.get(key), Mapping) for key in (*LAYERS, *TABLES))


def _about_bits(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: values[key] for key in _KEYS if key in values}


def _range_of(name: str, modules: Mapping[str, nn.Module]) -> bool:
    layer, _, leaf = name.rpartition(".")
    return leaf in ("x_min", "x_max") and isinstance(modules.get(layer), (nn.Linear, nn.Embedding))


def _bits(values: dict[str, Any], model: PreTrainedModel, problems: list[str]) -> dict[str, int]:
    """What is given bits, by the names of modules."""
    base = f"{model.base_model_prefix}." if model.base_model is not model else ""
    found: dict[str, int] = {}
    for keys, part in ((LAYERS, "encoder"), (TABLES, "embeddings")):
        for key in keys:
            given = values.get(key) or {}
            if not isinstance(given, dict):
                problems.append(f"expected {key} to be bits by name. Got {given!r}.")
                continue
            for name, bits in given.items():
                if type(bits) is not int or (bits != FLOAT and not 2 <= bits <= 8):
                    problems.append(f"expected {key} of {name} to be 2 to 8 bits, or 32. Got {bits!r}.")
                else:
                    found[f"{base}{part}.{name}"] = bits
    return found


def _activation(values: dict[str, Any], asked: str | None) -> str:
    if asked is not None:
        if asked not in ("dynamic", "float"):
            raise ValueError(
                f'load_checkpoint: expected activation "dynamic" or "float": files hold no ranges. Got {asked!r}.'
            )
        return asked
    bits = values.get("activation_bits")
    bits = (8 if values.get("quantize_activation") else FLOAT) if bits is None else bits
    if bits not in (8, FLOAT):
        raise ValueError(
            f"load_checkpoint: expected activation_bits of 8 or 32, or activation= to say otherwise. Got {bits!r}."
        )
    return "dynamic" if bits == 8 else "float"


def _weight(
    tensors: Mapping[str, Tensor],
    name: str,
    module: nn.Module,
    bits: int,
    values: dict[str, Any],
    problems: list[str],
) -> GroupwiseWeight | None:
    """The low-bit weight of one module, or None with what is wrong among `problems`."""
    n, k = module.weight.shape
    for part, shapes in (("weight", [[n, k]]), ("x_min", [[k], [1], []]), ("x_max", [[k], [1], []])):
        tensor = tensors.get(f"{name}.{part}")
        wanted = " or ".join(map(str, shapes[:2]))
        if tensor is None or list(tensor.shape) not in shapes or tensor.dtype != torch.float32:
            got = "no such tensor" if tensor is None else f"{str(tensor.dtype)[6:]} of shape {list(tensor.shape)}"
            problems.append(f"expected {name}.{part}, float32 of shape {wanted}. Got {got}.")
            return None
        if not bool(torch.isfinite(tensor).all()):
            problems.append(f"expected {name}.{part} to be finite. Got Inf or NaN.")
            return None
    weight, low, high = (tensors[f"{name}.{part}"] for part in ("weight", "x_min", "x_max"))
    low, high = low.reshape(-1), high.reshape(-1)
    if low.shape != high.shape:
        problems.append(f"expected {name}.x_max of the shape of x_min, {list(low.shape)}. Got {list(high.shape)}.")
        return None
    if bool((low > high).any()):
        at = int((low > high).nonzero()[0])
        problems.append(f"expected {name}.x_min of at most x_max. Got {float(low[at])} and {float(high[at])}.")
        return None
    if low.numel() == 1 and float(low) == float(high) == 0:
        groups = values.get("quant_group_number")
        groups = 1 if groups is None else groups
        try:
            size = group_size_of(k, groups if type(groups) is int else 0)
        except ValueError:
            problems.append(f"expected quant_group_number to cut {k} columns of {name} into groups. Got {groups!r}.")
            return None
        low, high = (end[0].repeat_interleave(size)[:k] for end in group_ranges(weight, "k", size, shared=True))
    return qbert_weight(weight, low, high, bits)


def _detect(path: Path) -> bool:
    try:
        if _says(read_config(find_weights(path)[0].parent)):
            return True
    except (OSError, ValueError):
        return False
    # I-BERT has ranges, too, but of activations.
    names = set(names_of(path))
    return any(f"{name.removesuffix('.x_min')}.weight" in names for name in names if name.endswith(".x_min"))


QBERT = CheckpointFormat("q-bert", _detect, load)
