"""Models whose layers have lost heads: removed by number, and recorded so that transformers builds them again.

Heads are numbered as the model was built, however many are gone: `kept_heads` of an attention module says which ones
its projections hold. transformers knows of none of this, so the config of such a model carries the record where
bertkern's quantizer finds it when the model is loaded: as its `quantization_config`.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import nn

from . import plan, pruned, shrink, surgery, swap
from .nn import SparseLinear
from .nn.encoder import Unfit
from .nn.norms import NoNorm
from .ragged import RaggedConfig, is_record
from .record import RECORD


def prune_heads(model: nn.Module, heads: Mapping[int, Iterable[int]]) -> nn.Module:
    """Removes attention heads, in place: their rows of query, key and value with the biases, their output columns.

    The model then computes what it would with the context of these heads set to zero. Layers and heads have the numbers
    that they have in the whole model, also where others are gone; naming one that is gone already changes nothing. A
    layer may lose all of its heads: its attention then is the bias of the output projection. (One head of zeros stands
    in, as neither transformers' code nor the kernels run without.) What is left is recorded in the config, so
    `save_pretrained` and `from_pretrained` keep it.

    Parameters are exchanged for smaller ones with their dtype, device and `requires_grad`; make an optimizer
    afterwards. An accelerated model is restored, cut and accelerated anew in the forms that it had.

    Args:
        model: a transformers model of a known family, or a module with one inside. Of ALBERT, whose layers run several
            times each, the layers count that it has, not their runs: mostly there is but layer 0.
        heads: heads to remove by layer, from 0.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: layers or heads that do not exist or are named twice or by no ints, a model without
            known layers, an int8 one, projections that are shared or replaced; the model is unchanged then.

    Example:
        >>> model = prune_heads(bert, {0: [2, 5], 11: range(12)})
        >>> model.encoder.layer[0].attention.self.kept_heads
        (0, 1, 3, 4, 6, 7, 8, 9, 10, 11)

    Source: arXiv 1905.10650; transformers 4, PreTrainedModel.prune_heads.
    """
    _, root = root_of("prune_heads", model)
    count = len(layer_names(root))
    gone = _gone(heads, count, root.config.num_attention_heads)
    if not any(gone.values()):
        return model
    with restored("prune_heads", model):
        layers = _parts("prune_heads: expected", root)
        kept = {}
        for index, (name, parts) in enumerate(layers.items()):
            numbers = shrink.numbers(parts)
            left = tuple(place for place, head in enumerate(numbers) if head not in gone.get(index, ()))
            if len(left) < len(numbers):
                kept[name] = left
        shrink.take_heads(root, kept)
        record(root)
    return model


def record(root: nn.Module) -> None:
    """Writes what layers of a float transformers model have lost into its config, or takes the record away.

    Args:
        root: not accelerated: that removes heads, too, and puts them back.
    """
    widths = base_widths(root)
    made = {"quant_method": RaggedConfig.quant_method, **RaggedConfig(widths).to_dict()}
    for module in pretrained(root):
        config = module.config
        # What it says is in the record now.
        config.__dict__.pop("pruned_heads", None)
        if widths or getattr(config, "layer_norm_type", None) == "no_norm":
            config.quantization_config = made
        elif is_record(getattr(config, "quantization_config", None)):
            del config.quantization_config


def base_widths(root: nn.Module) -> dict[str, dict[str, Any]]:
    """`shrink.ragged` with the names that layers have in the base model."""
    return {name.removeprefix(f"{root.base_model_prefix}."): width for name, width in shrink.ragged(root).items()}


def pruned_widths(caller: str, root: nn.Module, pruned: Mapping[int, Iterable[int]]) -> dict[str, dict[str, Any]]:
    """The widths, by names in the base model, of one that lost heads by number; `root` has them all yet.

    Args:
        pruned: lists of heads by layer, right for this model.

    Raises:
        ValueError: no encoder of a known family.
    """
    parts = _parts(f"{caller}: expected pruned_heads in", root)
    names = [name.removeprefix(f"{root.base_model_prefix}.") for name in parts]
    heads = range(root.config.num_attention_heads)
    return {names[layer]: {"heads": [h for h in heads if h not in set(gone)]} for layer, gone in pruned.items() if gone}


def narrow_to(caller: str, root: nn.Module, widths: Mapping[str, Any]) -> None:
    """Cuts a transformers model, which may be on meta, to widths by the names that layers have in the base model.

    Raises:
        ValueError: widths that the model cannot have.
    """
    if widths:
        own = root.base_model is root or not root.base_model_prefix
        start = "" if own else f"{root.base_model_prefix}."
        # transformers builds models under the meta device; what stays is counted on a real one.
        with torch.device("cpu"):
            shrink.narrow(root, {start + str(name): width for name, width in widths.items()}, caller)


def remove_norms(root: nn.Module) -> None:
    """Makes every LayerNorm a NoNorm with its tensors, as nn_pruning does, and has the config say so."""
    for parent in list(root.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.LayerNorm:
                setattr(parent, name, NoNorm.from_layer_norm(child))
    root.config.layer_norm_type = "no_norm"


def headless(root: nn.Module) -> Iterator[tuple[nn.Module, dict[str, list[int]]]]:
    """The projections of heads of zeros that stand in for none, and the shapes that their tensors have without them."""
    from .families import layers_of

    for _, layer, family in layers_of(root):
        try:
            parts = family.parts(layer)
        except (Unfit, AttributeError):
            continue
        if getattr(parts.query[0], "headless", False):
            for linear in (getattr(*slot) for slot in (parts.query, parts.key, parts.value)):
                yield linear, {"weight": [0, linear.in_features], **({} if linear.bias is None else {"bias": [0]})}
            out = getattr(*parts.out)
            yield out, {"weight": [out.out_features, 0]}


def pretrained(model: nn.Module) -> list[nn.Module]:
    """The transformers models in `model`, itself and inner ones included."""
    from transformers import PreTrainedModel

    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def root_of(function: str, model: nn.Module) -> tuple[str, nn.Module]:
    """The name and the transformers model in `model` whose layers are meant; raises TypeError or ValueError."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: expected a torch.nn.Module. Got {type(model).__name__}.")
    roots = plan.pretrained_roots(model)
    if len(roots) != 1:
        names = f": {', '.join(roots)}; name one of them" if roots else ""
        raise ValueError(f"{function}: expected one transformers model. Got {len(roots)}{names}.")
    ((prefix, root),) = roots.items()
    if not layer_names(root):
        raise ValueError(f"{function}: expected a model of a known family. Got {type(root).__name__}.")
    if kind := plan.quantized_as(model):
        raise ValueError(
            f"{function}: expected a float model. Got one that is {kind}: call it before quantize_, or after "
            "restore or dequantize."
        )
    _parts(f"{function}: expected", root)
    return prefix, root


def expect_prunable(function: str, model: nn.Module) -> None:
    """Raises TypeError or ValueError where no head of `model` can be removed, whichever it is."""
    root_of(function, model)
    if not any(RECORD in module.__dict__ for module in model.modules()):
        _expect_plain(function, model)


@contextmanager
def restored(function: str, model: nn.Module, renamed: Mapping[str, str | None] | None = None) -> Iterator[None]:
    """Within it, `model` is what it was before `accelerate`, which is then applied anew, in the forms of before.

    Args:
        renamed: beginnings of names of modules that get others meanwhile, or go (None).

    Raises:
        ValueError: a part of a model that was accelerated as a whole.
    """
    made = []
    holders = [(name, module) for name, module in model.named_modules() if RECORD in module.__dict__]
    for name, holder in holders:
        flags = {
            flag: any(getattr(module, flag, False) for module in holder.modules())
            for flag in ("keep_padding", "exact_attention")
        }
        made.append((holder, _renamed(name, swap.plan_of(holder), renamed or {}), flags))
    try:
        for _, holder in holders:
            swap.restore(holder)
        _expect_plain(function, model)
        yield
    finally:
        for holder, known, flags in reversed(made):
            swap.accelerate(holder, plan=known, **flags)


def layer_names(root: nn.Module) -> list[str]:
    """The names of the layers of a known family, in their order; those of ALBERT once, however often they run."""
    from .families import layers_of

    return [name for name, _, _ in layers_of(root)]


def _parts(expected: str, root: nn.Module) -> dict[str, Any]:
    """The LayerParts of every layer by its name; raises ValueError, which begins as `expected`, where one has none."""
    from .families import layers_of

    try:
        return {name: family.parts(layer) for name, layer, family in layers_of(root)}
    except Unfit as reason:
        raise ValueError(f"{expected} an encoder. Got {reason}.") from None


def _gone(heads: Any, layers: int, count: int) -> dict[int, set[int]]:
    """The heads to remove by layer, all of them found right."""
    if not isinstance(heads, Mapping):
        raise TypeError(f"prune_heads: expected heads by layer, such as {{0: [2, 5]}}. Got {type(heads).__name__}.")
    gone: dict[int, set[int]] = {}
    for layer, given in heads.items():
        if not _whole(layer) or not 0 <= layer < layers:
            raise ValueError(f"prune_heads: expected layers from 0 to {layers - 1}. Got {layer!r}.")
        if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
            raise TypeError(f"prune_heads: expected a list of heads for layer {layer}. Got {given!r}.")
        given = list(given)
        for head in given:
            if not _whole(head) or not 0 <= head < count:
                raise ValueError(f"prune_heads: expected heads of layer {layer} from 0 to {count - 1}. Got {head!r}.")
        if len(set(given)) < len(given):
            raise ValueError(f"prune_heads: expected each head of layer {layer} once. Got {given}.")
        gone[int(layer)] = {int(head) for head in given}
    return gone


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _expect_plain(function: str, model: nn.Module) -> None:
    """Raises ValueError where `accelerate` was at work from further out."""
    fused = surgery.fused_class()
    for name, module in model.named_modules():
        found = isinstance(module, SparseLinear) or pruned.SHRUNK in module.__dict__
        if found or (fused is not None and isinstance(module, fused)):
            raise ValueError(
                f"{function}: expected the module that was accelerated. Got a part of it, where {name or 'the model'} "
                "runs by the kernels."
            )


def _renamed(prefix: str, known: Any, renamed: Mapping[str, str | None]) -> Any:
    """A plan under the names that modules get."""
    layers = {}
    for name, choice in known.layers.items():
        full = f"{prefix}.{name}" if prefix else name
        old = next((start for start in renamed if full.startswith(start + ".")), None)
        # The form stays, whatever becomes of the weight.
        choice = replace(choice, weight="")
        if old is None:
            layers[name] = choice
        elif renamed[old] is not None:
            new = renamed[old] + full.removeprefix(old)
            layers[new.removeprefix(f"{prefix}.") if prefix else new] = choice
    return type(known)(layers, known.machine)
