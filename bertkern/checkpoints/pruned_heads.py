"""Checkpoints of transformers 4 whose attention has lost heads, those of nn_pruning among them.

Their config.json holds `pruned_heads`, {"layer": [heads that are gone]} by the original numbers, and their files hold
narrower matrices: query, key and value lack the rows of a head that is gone, the output projection its columns.
Feed-forward layers keep their width, with zeros in the rows and columns of pruned units. transformers 5 cannot build
such a model. nn_pruning further writes

    layer_norm_type "no_norm"   every LayerNorm is weight * x + bias: the same tensors under the same names
    hidden_act "relu"           as in any model

A model loaded here is written by `save_pretrained` with the same entries in config.json, so it loads here again.

Source: Lagunas et al. 2021, Block Pruning for Faster Transformers, arXiv 2109.04838; huggingface/nn_pruning,
nn_pruning/inference_model_patcher.py and nn_pruning/modules/nonorm.py; transformers 4, modeling_utils.py.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bertkern.families import classes_of
from bertkern.nn.encoder import LayerParts, Unfit
from bertkern.nn.norms import NoNorm

from .checked import CheckedTensors
from .files import find_weights, read_config, read_weights
from .format import CheckpointFormat
from .models import build, fill

# Families whose attention takes the number of heads from the width of its projections.
FAMILIES = ("bert", "roberta", "xlm-roberta", "electra", "distilbert")
NORMS = ("layer_norm", "no_norm")


def load(path: Path, *, model_class: type[PreTrainedModel] | None = None) -> nn.Module:
    """The model with the heads that its files have, and no others; every weight is that of the file, bit for bit.

    `model.config.pruned_heads` holds the removed heads by layer, `kept_heads` of an attention module the original
    numbers of those that it has. A layer that has lost all of them gets one of zeros, which adds nothing: transformers'
    code cannot run without.

    Args:
        path: the folder, or a file of weights in it.
        model_class: the transformers class, where config.json does not name it.
    """
    tensors, folder = read_weights(path)
    checked = CheckedTensors(tensors)
    model, empty = shaped(read_config(folder), checked.names(), model_class)
    fill(model, checked, empty)
    return model.eval()


def shaped(
    values: dict[str, Any],
    names: Iterable[str],
    model_class: type[PreTrainedModel] | None = None,
    foreign: Iterable[str] = (),
) -> tuple[PreTrainedModel, dict[str, list[int]]]:
    """The model of a config.json with the heads and norms that it states, its weights still to come.

    Args:
        values, names, model_class, foreign: as of `build`.

    Returns:
        The model, and the shapes that the file gives to parameters of heads that stand in for none.

    Raises:
        ValueError: no such model can be made.
    """
    norm = values.get("layer_norm_type") or "layer_norm"
    if norm not in NORMS:
        raise ValueError(f"load_checkpoint: expected layer_norm_type to be one of {', '.join(NORMS)}. Got {norm!r}.")
    model = build(values, names, model_class, (*foreign, "pruned_heads", "layer_norm_type"))
    pruned = _pruned_heads(values, model)
    empty: dict[str, list[int]] = {}
    if pruned:
        empty = _remove_heads(model, pruned)
        model.config.pruned_heads = pruned
    if norm == "no_norm":
        _remove_norms(model)
        model.config.layer_norm_type = norm
    return model, empty


def _detect(path: Path) -> bool:
    try:
        file = find_weights(path)[0]
        values = read_config(file.parent)
    except (OSError, ValueError):
        return False
    # Models of other families mean other things by it.
    norms = values.get("model_type", "bert") in FAMILIES and (values.get("layer_norm_type") or NORMS[0]) != NORMS[0]
    return (norms or bool(values.get("pruned_heads"))) and "quantization_config" not in values


PRUNED_HEADS = CheckpointFormat("pruned-heads", _detect, load)


def _pruned_heads(values: dict[str, Any], model: PreTrainedModel) -> dict[int, list[int]]:
    """The heads that are gone, ascending, by layer; layers that kept all are left out."""
    given = values.get("pruned_heads") or {}
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    pruned = {}
    for layer, gone in given.items() if isinstance(given, dict) else [(None, None)]:
        right = str(layer).isdecimal() and int(layer) < layers and isinstance(gone, list)
        if not right or not all(type(head) is int and 0 <= head < heads for head in gone) or len({*gone}) < len(gone):
            raise ValueError(
                f"load_checkpoint: expected pruned_heads to be lists of heads below {heads} by layer below {layers}. "
                f"Got {given!r}."
            )
        if gone:
            pruned[int(layer)] = sorted(gone)
    return dict(sorted(pruned.items()))


def _remove_heads(model: PreTrainedModel, pruned: dict[int, list[int]]) -> dict[str, list[int]]:
    """Narrows projections to the heads that are left; `pruned` keeps a head where none is.

    Returns:
        The shapes that a file has for the parameters of heads that stand in for none.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise ValueError(
            f"load_checkpoint: expected pruned_heads in a model of type {', '.join(FAMILIES)}. Got {kind!r}."
        )
    try:
        layers = list(_attention_parts(model))
    except Unfit as reason:
        raise ValueError(f"load_checkpoint: expected pruned_heads in an encoder. Got {reason}.") from None
    names = {id(module): name for name, module in model.named_modules()}
    empty: dict[str, list[int]] = {}
    for index, gone in pruned.items():
        parts = layers[index]
        heads = model.config.num_attention_heads
        size = getattr(*parts.query).out_features // heads
        kept = [head for head in range(heads) if head not in gone]
        slots = dict.fromkeys((parts.query, parts.key, parts.value), 0) | {parts.out: 1}
        for (holder, name), dim in slots.items():
            old = getattr(holder, name)
            # A file of a layer without heads holds matrices without rows or columns.
            width = (len(kept) or 1) * size
            n, k = (width, old.in_features) if dim == 0 else (old.out_features, width)
            with torch.random.fork_rng(devices=[]):
                new = nn.Linear(k, n, bias=old.bias is not None)
            setattr(holder, name, new)
            if not kept:
                path = f"{names[id(holder)]}.{name}"
                nn.init.zeros_(new.weight)
                empty[f"{path}.weight"] = [0, k] if dim == 0 else [n, 0]
                if dim == 0 and new.bias is not None:
                    nn.init.zeros_(new.bias)
                    empty[f"{path}.bias"] = [0]
        if not kept:
            gone.remove(0)
        _set_heads(parts, tuple(kept) or (0,), size)
    return empty


def _attention_parts(model: PreTrainedModel) -> Iterator[LayerParts]:
    """Where each layer of the encoder keeps its projections."""
    classes = classes_of(model.config.model_type)
    for module in model.modules():
        family = classes.get(type(module))
        if hasattr(family, "parts"):
            yield family.parts(module)


def _set_heads(parts: LayerParts, kept: tuple[int, ...], size: int) -> None:
    attention = parts.query[0]
    attention.kept_heads = kept
    for name, value in (
        ("num_attention_heads", len(kept)),
        ("n_heads", len(kept)),
        ("all_head_size", len(kept) * size),
    ):
        if hasattr(attention, name):
            setattr(attention, name, value)


def _remove_norms(model: PreTrainedModel) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.LayerNorm:
                setattr(parent, name, NoNorm.from_layer_norm(child))
