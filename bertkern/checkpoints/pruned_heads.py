"""Checkpoints of transformers 4 whose attention has lost heads, those of nn_pruning among them.

Their config.json holds `pruned_heads`, {"layer": [heads that are gone]} by the original numbers, and their files hold
narrower matrices: query, key and value lack the rows of a head that is gone, the output projection its columns.
Feed-forward layers keep their width, with zeros in the rows and columns of pruned units. transformers 5 cannot build
such a model. nn_pruning further writes

    layer_norm_type "no_norm"   every LayerNorm is weight * x + bias: the same tensors under the same names
    hidden_act "relu"           as in any model

A model loaded here is written by `save_pretrained` with a record that `from_pretrained` reads.

Source: Lagunas et al. 2021, Block Pruning for Faster Transformers, arXiv 2109.04838; huggingface/nn_pruning,
nn_pruning/inference_model_patcher.py and nn_pruning/modules/nonorm.py; transformers 4, modeling_utils.py.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from bertkern import heads

from .checked import CheckedTensors
from .files import find_weights, read_config, read_weights
from .format import CheckpointFormat
from .models import build, fill

# Families whose attention takes the number of heads from the width of its projections.
FAMILIES = ("bert", "roberta", "xlm-roberta", "electra", "albert", "distilbert", "mobilebert")
NORMS = ("layer_norm", "no_norm")


def load(path: Path, *, model_class: type[PreTrainedModel] | None = None) -> nn.Module:
    """The model with the heads that its files have, and no others; every weight is that of the file, bit for bit.

    `kept_heads` of an attention module holds the original numbers of the heads that it has. A layer that has lost all
    of them gets one of zeros, which adds nothing: transformers' code cannot run without.

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
    norm = values.get("layer_norm_type") or NORMS[0]
    if norm not in NORMS:
        raise ValueError(f"load_checkpoint: expected layer_norm_type to be one of {', '.join(NORMS)}. Got {norm!r}.")
    model = build(values, names, model_class, (*foreign, "pruned_heads", "layer_norm_type"))
    pruned = heads_gone("load_checkpoint", model, values.get("pruned_heads"))
    empty: dict[str, list[int]] = {}
    if pruned:
        heads.narrow_to("load_checkpoint", model, heads.pruned_widths("load_checkpoint", model, pruned))
        paths = {id(module): name for name, module in model.named_modules()}
        for linear, shapes in heads.headless(model):
            # A file of a layer without heads holds matrices without rows or columns.
            empty |= {f"{paths[id(linear)]}.{name}": shape for name, shape in shapes.items()}
    if norm != NORMS[0]:
        heads.remove_norms(model)
    heads.record(model)
    return model, empty


def heads_gone(caller: str, model: PreTrainedModel, given: Any) -> dict[int, list[int]]:
    """`pruned_heads` of a config.json: the heads that are gone, ascending, by layer; layers that kept all are left out.

    Raises:
        ValueError: heads or layers that `model`, which has them all yet, does not have, or one of another family.
    """
    if not given:
        return {}
    if (kind := model.config.model_type) not in FAMILIES:
        raise ValueError(f"{caller}: expected pruned_heads in a model of type {', '.join(FAMILIES)}. Got {kind!r}.")
    layers, count = len(heads.layer_names(model)), model.config.num_attention_heads
    pruned = {}
    for layer, gone in given.items() if isinstance(given, dict) else [(None, None)]:
        right = str(layer).isdecimal() and int(layer) < layers and isinstance(gone, list)
        if not right or not all(type(head) is int and 0 <= head < count for head in gone) or len({*gone}) < len(gone):
            raise ValueError(
                f"{caller}: expected pruned_heads to be lists of heads below {count} by layer below {layers}. "
                f"Got {given!r}."
            )
        if gone:
            pruned[int(layer)] = sorted(gone)
    return dict(sorted(pruned.items()))


def without_norms(config: PretrainedConfig) -> bool:
    """Whether a model's LayerNorms are to be NoNorms; models of other families mean other things by the entry."""
    return config.model_type in FAMILIES and getattr(config, "layer_norm_type", None) == "no_norm"


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
