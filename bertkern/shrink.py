"""Encoder layers cut to some of their attention heads and feed-forward units, and made whole again.

`shrink` removes what changes no answer (`dead`) and returns a record, `unshrink` undoes it bit for bit,
`full_state_dict` writes the checkpoint as if nothing had been removed, `narrow` cuts a model without values to the
widths of a ragged checkpoint, and `take_heads` removes heads whatever they add.

A layer that is to lose all its heads keeps one of zeros, which adds nothing: neither transformers' code nor the kernels
run without. Its attention has `headless` set, and where heads are listed it has none.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from . import plan
from .dead import Found, Kept, constants_of, find, known_layers, sizes_of
from .nn import PackedLinear, SparseLinear
from .nn.encoder import LayerParts, Unfit
from .schemes import SCHEMES
from .weights import effective

_TENSORS = {"weight": ("weight", "weight_orig", "weight_mask"), "bias": ("bias", "bias_orig", "bias_mask")}


@dataclass
class Cut:
    """One tensor's loss.

    Attributes:
        module, tensor: where it is.
        dim: along which it was cut.
        kept: indices of what is left, int64.
        removed: the rest, in order.
    """

    module: str
    tensor: str
    dim: int
    kept: Tensor
    removed: Tensor


@dataclass
class Fold:
    """A bias that took constants up.

    Attributes:
        module: whose bias.
        before: its values; None where there was no bias.
        after: its values with the constants.
    """

    module: str
    before: Tensor | None
    after: Tensor


@dataclass
class LayerCut:
    """What one layer lost.

    Attributes:
        kept: what is left, as counted before.
        heads, units: how many it had.
        numbers: the `kept_heads` that its attention had: of an earlier cut, or None.
        cuts: of its tensors.
        fold: of the second bias, if any.
    """

    kept: Kept
    heads: int
    units: int
    numbers: tuple[int, ...] | None
    cuts: list[Cut]
    fold: Fold | None = None


@dataclass
class Shrunk:
    """What `shrink` or `narrow` removed from a model, for `unshrink`; holds the removed values and nothing else.

    Names are relative to the model that was shrunk, so the record may be copied and pickled beside it.

    Attributes:
        layers: what each layer lost, by its name; layers that lost nothing are not there.
        left: why layers with something to remove, or that could not be looked into, were left alone, by name.
    """

    layers: dict[str, LayerCut] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the removed values."""
        return sum(cut.removed.nbytes for layer in self.layers.values() for cut in layer.cuts)

    def widths(self) -> dict[str, dict[str, Any]]:
        """What is left as JSON values, for a config: {layer: {"heads": [...], "units": n, "bias": true}}.

        "bias" stands where the second feed-forward matrix has a bias only for the constants that it took up. `narrow`
        takes this.
        """
        made = {}
        for name, layer in self.layers.items():
            numbers = layer.numbers or range(layer.heads)
            made[name] = {"heads": [numbers[i] for i in layer.kept.heads], "units": len(layer.kept.units)}
            if layer.fold is not None and layer.fold.before is None:
                made[name]["bias"] = True
        return made


def shrink(model: nn.Module) -> Shrunk:
    """Removes dead heads and feed-forward units from the layers of known families, in place.

    Rows of Q, K and V and columns of the output projection go with a head; rows of the first and columns of the second
    feed-forward matrix with a unit; act(bias) of constant units goes into the second bias. Answers differ by rounding
    alone. Modules stay, their parameters are exchanged for narrower ones; under torch.nn.utils.prune, originals and
    masks are cut alike. A layer always keeps one head and one unit, be they dead: transformers' own code cannot run
    without. Attention weights, where asked for, are those of the heads that are left.

    Layers are left alone, with the reason in the record, if their weights are shared or computed, or if hooks see them.

    Returns:
        What was removed, for `unshrink`, `full_tensors` and `full_state_dict`.

    Example:
        >>> record = shrink(model)
        >>> model = accelerate(model)  # its kernels read the widths from the projections
        >>> unshrink(restore(model), record)

    Source: arXiv 1905.10650 (heads), 1910.06360 (heads and units).
    """
    found, left = find(model)
    record = _narrow(model, {name: layer.kept() for name, layer in found.items()})
    record.left = {**left, **record.left}
    return record


def narrow(model: nn.Module, widths: Mapping[str, Mapping[str, Any]], caller: str = "narrow") -> Shrunk:
    """Cuts layers to given heads and numbers of units, whatever their values; also on the meta device.

    For models that a ragged checkpoint is about to be loaded into.

    Args:
        widths: as of `Shrunk.widths`: by name of the layer, "heads" to keep and the number of "units", where left out
            all of them; "bias": whether the second feed-forward matrix gets a bias that it does not have.
        caller: what errors name.

    Raises:
        ValueError: names, heads or numbers that the model does not have, or layers that cannot be cut; the model is
            unchanged then.

    Example:
        >>> narrow(model, {"encoder.layer.0": {"heads": [0, 5], "units": 717}}).widths()
        {'encoder.layer.0': {'heads': [0, 5], 'units': 717}}
    """
    layers = {name: (layer, family) for name, layer, family in known_layers(model)}
    wanted: dict[str, Kept] = {}
    empty: list[str] = []
    for name, width in widths.items():
        if name not in layers:
            raise ValueError(f"{caller}: expected layers of a known family. Got {name!r}.")
        layer, family = layers[name]
        try:
            heads, _, units = sizes_of(family.parts(layer))
        except (Unfit, AttributeError) as reason:
            raise ValueError(f"{caller}: expected {name} to be a layer that can be cut. Got {reason}.") from None
        heads_left = _heads_of(caller, name, width, heads)
        wanted[name] = Kept(heads_left or (0,), tuple(range(_units_of(caller, name, width, units))))
        if not heads_left:
            empty.append(name)
    obstacles = _obstacles(model, wanted)
    for name, reason in obstacles.items():
        raise ValueError(f"{caller}: expected {name} to be a layer that can be cut. Got one that cannot: {reason}.")
    record = _narrow(model, wanted)
    for name, width in widths.items():
        layer, family = layers[name]
        ffn2 = getattr(*family.parts(layer).ffn2)
        if width.get("bias") and ffn2.bias is None and name in record.layers:
            ffn2.bias = nn.Parameter(ffn2.weight.new_zeros(ffn2.out_features), ffn2.weight.requires_grad)
            record.layers[name].fold = Fold(_slot_names(model, name, family)["ffn2"], None, ffn2.bias.detach().clone())
    for name in empty:
        _empty(*layers[name])
        if name in record.layers:
            record.layers[name].kept = replace(record.layers[name].kept, heads=())
    return record


def take_heads(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
    """Cuts the attention of layers to some of its heads, in place, whatever the others add; not to be undone.

    Hooks on projections stay where they are, and see narrower tensors.

    Args:
        model: with float modules.
        kept: by name of the layer, which of the heads that it has now are left, ascending; maybe none.

    Raises:
        ValueError: layers that cannot be cut; the model is unchanged then.
    """
    layers = {name: (layer, family) for name, layer, family in known_layers(model)}
    wanted = {}
    for name, heads in kept.items():
        layer, family = layers[name]
        wanted[name] = Kept(tuple(heads) or (0,), tuple(range(sizes_of(family.parts(layer))[2])))
    for name, reason in _obstacles(model, wanted, hooks=False).items():
        raise ValueError(f"prune_heads: expected {name} to be a layer that can be cut. Got one that cannot: {reason}.")
    _narrow(model, wanted, hooks=False)
    for name, heads in kept.items():
        if not heads:
            _empty(*layers[name])


def unshrink(model: nn.Module, record: Shrunk) -> nn.Module:
    """Puts back what `shrink` removed, in place: every tensor has its shape and, unless changed since, its bits again.

    What was changed since, such as by an optimizer or a cast, stays as changed; the removed part follows in dtype and
    device.

    Args:
        model: the one that was shrunk, with its float modules (after int8 ones were taken out).

    Raises:
        RuntimeError: tensors that are not those which were cut; the model is unchanged then.
    """
    tensors = _full(model, record)
    layers = {name: (layer, family) for name, layer, family in known_layers(model)}
    for name in record.layers:
        if name not in layers:
            raise RuntimeError(f"unshrink: expected the layer {name} that was shrunk. Got none.")
    for name, layer in record.layers.items():
        for cut in layer.cuts:
            _put(model.get_submodule(cut.module), cut.tensor, tensors.pop(f"{cut.module}.{cut.tensor}"))
        for module in {cut.module: None for cut in layer.cuts}:
            _settle(model.get_submodule(module))
        if layer.fold is not None:
            _put(model.get_submodule(layer.fold.module), "bias", tensors.pop(f"{layer.fold.module}.bias"))
        module, family = layers[name]
        family.set_heads(module, layer.numbers, layer.heads)
        if layer.heads > 1:
            family.parts(module).query[0].__dict__.pop("headless", None)
    return model


def full_tensors(model: nn.Module, record: Shrunk, prefix: str = "") -> dict[str, Tensor | None]:
    """The tensors that `shrink` cut or changed as `unshrink` would put them back, by their names in the state dict.

    The model stays as it is. A bias that exists only for folded constants is None here: it had no place before.

    Args:
        prefix: of a module inside `model`: only what is below it is given, by the names it has there.

    Raises:
        RuntimeError: tensors that are not those which were cut.
    """
    start = f"{prefix}." if prefix else ""
    full = _full(model, record)
    return {name.removeprefix(start): tensor for name, tensor in full.items() if name.startswith(start)}


def full_state_dict(model: nn.Module, record: Shrunk) -> dict[str, Tensor]:
    """`model.state_dict()` as if nothing had been removed: the plain dense checkpoint.

    Raises:
        RuntimeError: tensors that are not those which were cut.
    """
    state = dict(model.state_dict())
    for name, tensor in full_tensors(model, record).items():
        if tensor is None:
            state.pop(name, None)
        else:
            state[name] = tensor
    return state


def ragged(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The widths of layers that are narrower than their model's config says, as `narrow` takes them; int8 ones, too.

    Example:
        >>> ragged(load_checkpoint("bert-with-pruned-heads"))["encoder.layer.3"]
        {'heads': [0, 5, 7], 'units': 3072}
    """
    made: dict[str, dict[str, Any]] = {}
    for prefix, root in plan.pretrained_roots(model).items():
        heads = getattr(root.config, "num_attention_heads", None)
        units = getattr(root.config, "intermediate_size", None) or getattr(root.config, "hidden_dim", None)
        for name, layer, family in known_layers(root):
            try:
                parts = family.parts(layer)
                _, _, wide = sizes_of(parts, (nn.Linear, *(scheme.linear for scheme in SCHEMES)))
            except (Unfit, AttributeError):
                continue
            kept = numbers(parts)
            if heads and units and (len(kept) < heads or wide < units):
                made[f"{prefix}.{name}" if prefix else name] = {"heads": list(kept), "units": wide}
    return made


def numbers(parts: LayerParts) -> tuple[int, ...]:
    """Which of the heads that it was built with a layer still has, ascending; none where one of zeros stands in."""
    attention = parts.query[0]
    if getattr(attention, "headless", False):
        return ()
    kept = getattr(attention, "kept_heads", None)
    return tuple(range(getattr(*parts.query).out_features // round(parts.scaling**-2))) if kept is None else kept


def slices(model: nn.Module, found: Mapping[str, Found]) -> dict[str, tuple[int, Tensor]]:
    """Of the linears that `shrink` would cut, by name: the dimension, and the indices that stay."""
    made: dict[str, tuple[int, Tensor]] = {}
    for name, _, family in known_layers(model):
        if name in found:
            layer = found[name]
            names = _slot_names(model, name, family)
            cut = _slices(layer.kept(), layer.heads, layer.head_size, layer.units)
            made |= {names[slot]: how for slot, how in cut.items()}
    return made


def _narrow(model: nn.Module, wanted: Mapping[str, Kept], hooks: bool = True) -> Shrunk:
    """Cuts the layers to what is wanted; what cannot be cut stays, with its reason in the record.

    Args:
        hooks: see `_obstacles`.
    """
    layers = {name: (layer, family) for name, layer, family in known_layers(model)}
    record = Shrunk()
    wanted = {name: kept for name, kept in wanted.items() if _loses(kept, *layers[name])}
    record.left = _obstacles(model, wanted, hooks)
    for name, kept in wanted.items():
        if name in record.left:
            continue
        layer, family = layers[name]
        parts = family.parts(layer)
        heads, size, units = sizes_of(parts)
        numbers = getattr(parts.query[0], "kept_heads", None)
        names = _slot_names(model, name, family)
        headless = getattr(parts.query[0], "headless", False)
        entry = LayerCut(replace(kept, heads=()) if headless else kept, heads, units, numbers, [])
        if kept.folded:
            entry.fold = _fold(parts, kept.folded, names["ffn2"])
        for slot, (dim, indices) in _slices(kept, heads, size, units).items():
            entry.cuts += _cut(getattr(*getattr(parts, slot)), names[slot], dim, indices)
        if len(kept.heads) < heads:
            before = numbers or tuple(range(heads))
            family.set_heads(layer, tuple(before[head] for head in kept.heads), len(kept.heads))
        record.layers[name] = entry
    return record


def _slices(kept: Kept, heads: int, size: int, units: int) -> dict[str, tuple[int, Tensor]]:
    """Of the linears that lose something, by their field of LayerParts: the dimension and the indices that stay."""
    slices = {}
    if len(kept.heads) < heads:
        rows = torch.tensor([head * size + i for head in kept.heads for i in range(size)])
        slices |= {"query": (0, rows), "key": (0, rows), "value": (0, rows), "out": (1, rows)}
    if len(kept.units) < units:
        rows = torch.tensor(kept.units)
        slices |= {"ffn1": (0, rows), "ffn2": (1, rows)}
    return slices


def _loses(kept: Kept, layer: nn.Module, family: type[Any]) -> bool:
    heads, _, units = sizes_of(family.parts(layer))
    return len(kept.heads) < heads or len(kept.units) < units


def _obstacles(model: nn.Module, wanted: Mapping[str, Kept], hooks: bool = True) -> dict[str, str]:
    """Why layers among the wanted ones cannot be cut, by name.

    Args:
        hooks: whether a hook on a projection is such a reason, as where nobody has asked for the cut.
    """
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    held = Counter(id(child) for module in model.modules() for child in module._modules.values())
    obstacles = {}
    for name, layer, family in known_layers(model):
        if name not in wanted:
            continue
        parts = family.parts(layer)
        linears = [getattr(*slot) for slot in parts.linears()]
        reasons = [_obstacle(linear, hooks) for linear in linears]
        twice = [module for module in layer.modules() if module is not layer and held[id(module)] > 1]
        if any(linear in module.modules() for module in twice for linear in linears):
            reasons.append("its projections are shared")
        if any(uses[id(p)] > 1 for linear in linears for p in linear._parameters.values() if p is not None):
            reasons.append("its weights are shared")
        if wanted[name].folded and "bias_mask" in getattr(*parts.ffn2)._buffers:
            reasons.append("a mask lies over the bias that would take constants up")
        if any(reasons):
            obstacles[name] = next(filter(None, reasons))
    return obstacles


def _obstacle(linear: nn.Linear, hooks: bool) -> str:
    if type(linear) not in (nn.Linear, PackedLinear):
        return f"a projection is {type(linear).__name__}"
    before = linear._forward_pre_hooks.values()
    if hooks and (linear._forward_hooks or any(not isinstance(hook, BasePruningMethod) for hook in before)):
        return "a projection has hooks"
    masked = "weight_orig" in linear._parameters and "weight_mask" in linear._buffers
    return "" if masked or "weight" in linear._parameters else "a weight is computed"


def _slot_names(model: nn.Module, layer: str, family: type[Any]) -> dict[str, str]:
    """The names in `model` of the layer's linears, by their field of LayerParts."""
    module = model.get_submodule(layer)
    parts, names = family.parts(module), {id(m): n for n, m in module.named_modules(prefix=layer)}
    slots = ("query", "key", "value", "out", "ffn1", "ffn2")
    return {slot: names[id(getattr(*getattr(parts, slot)))] for slot in slots}


def _cut(linear: nn.Linear, name: str, dim: int, kept: Tensor) -> list[Cut]:
    """Cuts the weight of `linear` along `dim`, its bias too if that is rows, and what masks them."""
    size = linear.out_features if dim == 0 else linear.in_features
    rest = torch.ones(size, dtype=torch.bool)
    rest[kept] = False
    rest = rest.nonzero().flatten()
    cuts = []
    for tensor_name in (*_TENSORS["weight"], *(_TENSORS["bias"] if dim == 0 else ())):
        tensor = linear._parameters.get(tensor_name)
        tensor = linear._buffers.get(tensor_name) if tensor is None else tensor
        if tensor is None:
            continue
        with torch.no_grad():
            part = tensor.detach()
            cuts.append(Cut(name, tensor_name, dim, kept, part.index_select(dim, rest.to(part.device))))
            _put(linear, tensor_name, part.index_select(dim, kept.to(part.device)))
    _settle(linear)
    return cuts


def _empty(layer: nn.Module, family: type[Any]) -> None:
    """Makes the only head of a layer one of zeros, which stands in for none."""
    parts = family.parts(layer)
    for slot in (parts.query, parts.key, parts.value, parts.out):
        linear = getattr(*slot)
        for name in ("weight", "weight_orig", *(() if slot is parts.out else ("bias", "bias_orig"))):
            if linear._parameters.get(name) is not None:
                _put(linear, name, torch.zeros_like(linear._parameters[name]))
        _settle(linear)
    family.set_heads(layer, (0,), 1)
    parts.query[0].headless = True


def _fold(parts: LayerParts, units: Sequence[int], name: str) -> Fold | None:
    """Adds the constants of `units` to the second bias, in fp64 before it is rounded once; None: they are zero."""
    ffn2 = getattr(*parts.ffn2)
    weight, before = effective(ffn2), ffn2.bias
    with torch.no_grad():
        constant = weight[:, list(units)].double() @ constants_of(parts, units).to(weight.device)
        if not bool(constant.any()):
            return None
        start = 0.0 if before is None else before.detach().double()
        after = (start + constant).to(weight.dtype if before is None else before.dtype)
    _put(ffn2, "bias", after)
    return Fold(name, None if before is None else before.detach().clone(), after.clone())


def _full(model: nn.Module, record: Shrunk) -> dict[str, Tensor | None]:
    """Every cut or folded tensor as it was, by name; raises RuntimeError where the model does not fit the record."""
    full: dict[str, Tensor | None] = {}
    for layer in record.layers.values():
        for cut in layer.cuts:
            name = f"{cut.module}.{cut.tensor}"
            # A matrix is cut once: heads and units lie in different ones.
            full[name] = _joined(_tensor(model, cut.module, cut.tensor), cut, name)
        if layer.fold is not None:
            full[f"{layer.fold.module}.bias"] = _unfolded(_tensor(model, layer.fold.module, "bias"), layer.fold)
    return full


def _tensor(model: nn.Module, module: str, name: str) -> Tensor | None:
    try:
        holder = model.get_submodule(module)
    except AttributeError:
        return None
    if isinstance(holder, SparseLinear) and name == "weight":
        return holder.weight
    tensor = holder._parameters.get(name)
    return holder._buffers.get(name) if tensor is None else tensor


def _joined(tensor: Tensor | None, cut: Cut, name: str) -> Tensor:
    expected = list(cut.removed.shape)
    expected[cut.dim] = len(cut.kept)
    if tensor is None or list(tensor.shape) != expected:
        got = "none" if tensor is None else list(tensor.shape)
        raise RuntimeError(f"unshrink: expected {name} of shape {expected}, as it was left. Got {got}.")
    with torch.no_grad():
        shape = list(expected)
        shape[cut.dim] += cut.removed.shape[cut.dim]
        full = tensor.new_empty(shape)
        rest = torch.ones(shape[cut.dim], dtype=torch.bool)
        rest[cut.kept] = False
        removed = cut.removed.to(tensor.device, tensor.dtype)
        full.index_copy_(cut.dim, rest.nonzero().flatten().to(tensor.device), removed)
        return full.index_copy_(cut.dim, cut.kept.to(tensor.device), tensor.detach())


def _unfolded(bias: Tensor | None, fold: Fold) -> Tensor | None:
    if bias is None or bias.shape != fold.after.shape:
        got = "none" if bias is None else list(bias.shape)
        raise RuntimeError(f"unshrink: expected {fold.module}.bias of shape {list(fold.after.shape)}. Got {got}.")
    with torch.no_grad():
        before, after = fold.before, fold.after.to(bias.device, bias.dtype)
        if bias.device.type == "meta" or torch.equal(bias, after):
            return None if before is None else before.to(bias.device, bias.dtype, copy=True)
        # Changed since: the constants go, the change stays.
        old = 0.0 if before is None else before.to(bias.device).double()
        return (bias.double() - (fold.after.to(bias.device).double() - old)).to(bias.dtype)


def _put(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Exchanges a parameter or buffer of a linear for another, of another shape maybe."""
    if name in module._buffers:
        module._buffers[name] = tensor
        return
    old = module._parameters.get(name)
    gradient = (module.weight if old is None else old).requires_grad
    setattr(module, name, None if tensor is None else nn.Parameter(tensor, requires_grad=gradient))


def _settle(linear: nn.Linear) -> None:
    """Makes what depends on the shape of the tensors follow them."""
    weight = linear._parameters.get("weight")
    weight = linear._parameters["weight_orig"] if weight is None else weight
    linear.out_features, linear.in_features = weight.shape
    for hook in linear._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            hook(linear, None)


def _heads_of(caller: str, name: str, width: Mapping[str, Any], count: int) -> tuple[int, ...]:
    heads = width.get("heads", range(count))
    right = isinstance(heads, (list, tuple, range)) and all(type(head) is int for head in heads)
    if not right or list(heads) != sorted(set(heads)) or not set(heads) <= set(range(count)):
        raise ValueError(f"{caller}: expected heads of {name} to be ascending, from 0 to {count - 1}. Got {heads!r}.")
    return tuple(heads)


def _units_of(caller: str, name: str, width: Mapping[str, Any], count: int) -> int:
    units = width.get("units", count)
    if type(units) is not int or not 1 <= units <= count:
        raise ValueError(f"{caller}: expected units of {name} to be from 1 to {count}. Got {units!r}.")
    return units
