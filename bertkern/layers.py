"""Models with fewer layers than they were trained with, as LayerDrop allows for."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import nn

from . import heads


def keep_layers(model: nn.Module, layers: Sequence[int]) -> nn.Module:
    """Keeps these layers of the encoder and drops the others, in place.

    What is left is an ordinary model with fewer layers, which `save_pretrained` writes and transformers loads with or
    without bertkern. Its layers are numbered anew from 0; `config.kept_layers` says which of the first model's they
    are, also after several calls. Trained with LayerDrop, a model stands this well if the kept ones are evenly spread.

    An accelerated model is restored, cut and accelerated anew in the forms that it had.

    Args:
        model: a transformers model of a known family, or a module with one inside. ALBERT's layers are runs of the same
            few: as many are left as are kept. Of a model with several groups of layers, what is left has to go
            through the groups in equal parts, for transformers knows no other way.
        layers: which of the layers that it has now to keep, ascending.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: layers that do not exist, are named twice, in another order or by no ints, or none at
            all; a model without known layers, or an int8 one; the model is unchanged then.

    Example:
        >>> keep_layers(bert, range(0, 12, 2)).config.num_hidden_layers
        6

    Source: arXiv 1909.11556.
    """
    prefix, root = heads.root_of("keep_layers", model)
    albert = root.config.model_type == "albert"
    count = root.config.num_hidden_layers if albert else len(heads.layer_names(root))
    kept = _checked(layers, count)
    if len(kept) == count:
        return model
    if albert:
        groups = _groups(root.config, kept)
        path, stay = "encoder.albert_layer_groups", sorted(set(groups))
    else:
        path, stay = heads.layer_names(root)[0].rpartition(".")[0], kept
    if albert and root.base_model is not root:
        path = f"{root.base_model_prefix}.{path}"
    start = f"{prefix}.{path}" if prefix else path
    container = root.get_submodule(path)
    renamed = {f"{start}.{old}": f"{start}.{stay.index(old)}" if old in stay else None for old in range(len(container))}
    with heads.restored("keep_layers", model, renamed):
        for index in reversed(range(len(container))):
            if index not in stay:
                del container[index]
        for config in _configs(root):
            if albert:
                config.num_hidden_groups = len(stay)
            else:
                before = getattr(config, "kept_layers", None) or range(count)
                config.kept_layers = [before[layer] for layer in kept]
            config.num_hidden_layers = len(kept)
        for index, layer in enumerate(container):
            for module in layer.modules():
                # Where a cache keeps the layer's keys and values.
                if getattr(module, "layer_idx", None) is not None:
                    module.layer_idx = index
        holder = root.get_submodule(path.rpartition(".")[0])
        if hasattr(holder, "n_layers"):
            holder.n_layers = len(kept)
        heads.record(root)
    return model


def _checked(layers: Any, count: int) -> list[int]:
    if isinstance(layers, (str, bytes, Mapping)) or not isinstance(layers, Sequence):
        raise TypeError(f"keep_layers: expected a list of layers, such as [0, 2, 4]. Got {type(layers).__name__}.")
    for layer in layers:
        if not isinstance(layer, Integral) or isinstance(layer, bool) or not 0 <= layer < count:
            raise ValueError(f"keep_layers: expected layers from 0 to {count - 1}. Got {layer!r}.")
    kept = [int(layer) for layer in layers]
    if not kept:
        raise ValueError("keep_layers: expected at least one layer. Got none.")
    if kept != sorted(set(kept)):
        raise ValueError(f"keep_layers: expected layers in ascending order, each once. Got {kept}.")
    return kept


def _groups(config: Any, kept: list[int]) -> list[int]:
    """Which group of ALBERT's layers each kept run goes through; raises ValueError where a config cannot say so."""

    def group(run: int, runs: int, groups: int) -> int:
        return int(run / (runs / groups))  # transformers' own division

    groups = [group(run, config.num_hidden_layers, config.num_hidden_groups) for run in kept]
    stay = sorted(set(groups))
    if [stay[group(run, len(kept), len(stay))] for run in range(len(kept))] != groups:
        raise ValueError(
            "keep_layers: expected runs that go through the groups of an ALBERT in equal parts. "
            f"Got {kept}, which are of the groups {groups}."
        )
    return groups


def _configs(root: nn.Module) -> list[Any]:
    """The configs that the modules of a model look at, mostly but one."""
    configs = [module.config for module in root.modules() if hasattr(module, "config")]
    return list({id(config): config for config in configs}.values())
