"""Modules of a model run by the kernels: exchanged for others, or of another class, which they can be given back."""

import sys
from typing import Any

from torch import nn

from . import mapped
from . import plan as layers
from .nn import PackedLinear, SparseLinear
from .nn.encoder import Unfit
from .nn.sparse import DENSE, Form, densify, sparsify
from .record import RECORD, Record


def put(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts `new` where the module `name` stands, there and wherever else the same module does."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = new


def pack(linear: nn.Linear, form: Form) -> None:
    """Makes a float linear layer run by the kernels in `form`."""
    if isinstance(linear, SparseLinear):
        if linear.form == form:
            return
        densify(linear)
    if form != DENSE:
        weight = linear.weight
        sparsify(linear, form)
        mapped.release(weight)
        return
    linear.__class__ = PackedLinear
    if linear.weight.device.type == "cpu":
        linear.packed()


def fuse(model: nn.Module, record: Record, keep_padding: bool, exact_attention: bool) -> None:
    """Makes modules of known families run as one operator; what cannot is told to `record`."""
    for prefix, root in layers.pretrained_roots(model).items():
        from .families._attention import NAMES

        fused_encoder = False
        attention = record.attention.get(prefix, root.config._attn_implementation)
        # Layers before the encoder that holds them: it asks them for their parts.
        found = sorted(_family_modules(root), key=lambda item: -item[0].count("."))
        for name, module, fused_class in found:
            path = ".".join(part for part in (prefix, name) if part)
            module.__class__ = fused_class
            try:
                module.fuse()
            except Unfit as reason:
                module.unfuse()
                module.__class__ = fused_class.unfused()
                record.left[path] = str(reason)
                continue
            record.left.pop(path, None)
            if keep_padding:
                module.keep_padding = True
            if exact_attention:
                module.exact_attention = True
            if attention == "eager":
                module.empty_attends = True
            fused_encoder = fused_encoder or hasattr(module, "layers")
        _heed_head_masks(root)
        wants_attentions = getattr(root.config, "output_attentions", False)
        if fused_encoder and not wants_attentions and root.config._attn_implementation in NAMES:
            ours = NAMES[root.config._attn_implementation]
            for name, config in _configs(root).items():
                if config._attn_implementation in NAMES:
                    record.attention[".".join(part for part in (prefix, name) if part)] = config._attn_implementation
                    config._attn_implementation_internal = ours


def unfuse(model: nn.Module) -> None:
    """Gives fused modules and packed layers their classes back."""
    fused = fused_class()
    for root in layers.pretrained_roots(model).values():
        _forget_head_masks(root)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.__dict__.pop("_packed", None)
            module.__class__ = nn.Linear
        elif isinstance(module, SparseLinear):
            densify(module)
        elif fused is not None and isinstance(module, fused):
            module.unfuse()
            module.__class__ = module.unfused()
    record = getattr(model, RECORD, None)
    if record is None:
        return
    if record.attention:
        from .families._attention import NAMES

        for name, module in model.named_modules():
            if name in record.attention and module.config._attn_implementation in NAMES.values():
                module.config._attn_implementation_internal = record.attention[name]
    delattr(model, RECORD)


def _heed_head_masks(root: nn.Module) -> None:
    """Has calls with a `head_mask` that would be dropped on its way raise."""
    from .families import drops_head_mask
    from .families._head_masks import refuse

    if drops_head_mask(getattr(root.config, "model_type", "") or ""):
        _forget_head_masks(root)
        for model in {root, root.base_model}:
            model.register_forward_pre_hook(refuse, with_kwargs=True)


def _forget_head_masks(root: nn.Module) -> None:
    from .families._head_masks import refuse

    for model in {root, root.base_model}:
        for key in [key for key, hook in model._forward_pre_hooks.items() if hook is refuse]:
            del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]


def _configs(root: nn.Module) -> dict[str, Any]:
    """The configs at which `root` and its modules look, by the first module that has them: one mostly, but transformers
    may exchange that of a model alone, as EncoderDecoderModel does with its encoder's.
    """
    found: dict[int, tuple[str, Any]] = {}
    for name, module in root.named_modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            found.setdefault(id(config), (name, config))
    return dict(found.values())


def family_tables(model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Embedding,)) -> list[str]:
    """The names of the embedding tables, of one of these classes, that known families sum up in their embeddings."""
    names = []
    for prefix, root in layers.pretrained_roots(model).items():
        for name, module, fused_class in _family_modules(root):
            for table in getattr(fused_class, "TABLES", ()):
                if type(getattr(module, table)) in kinds:
                    names.append(".".join(part for part in (prefix, name, table) if part))
    return names


def _family_modules(root: nn.Module) -> list[tuple[str, nn.Module, type[nn.Module]]]:
    """The modules of `root` that have a fused class, fused or not: name, module and that class."""
    from .families import classes_of

    classes = classes_of(getattr(root.config, "model_type", "") or "")
    fused = set(classes.values())
    return [
        (name, module, classes.get(type(module), type(module)))
        for name, module in root.named_modules()
        if type(module) in classes or type(module) in fused
    ]


def fused_class() -> type | None:
    families = sys.modules.get("bertkern.families._fused")
    return None if families is None else families.Fused
