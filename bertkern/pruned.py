"""Models that were pruned: masks and blocks become zeros, dead heads and units go, and come back.

What went is still in the state dict of the model, and what is loaded into it may hold it.
"""

from typing import Any

from torch import nn

from . import plan as layers
from . import shrink
from .nn import PackedLinear, SparseLinear
from .nn.sparse import densify
from .surgery import put
from .weights import effective

# The attribute of a transformers model that holds what `shrink` removed from it.
SHRUNK = "_bertkern_shrunk"


def unmask(model: nn.Module, masked: dict[str, nn.Module]) -> None:
    """Puts plain linears in the place of those under torch.nn.utils.prune, and of BlockSparseLinears, with the weights
    that these compute.

    Args:
        masked: takes those in, by name.
    """
    for name, module in list(model.named_modules()):
        if name and layers.only_blocks(module):
            put(model, name, module.to_linear())
            masked[name] = module
        elif name and layers.only_masked(module):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            plain.weight = nn.Parameter(effective(module), module.weight.requires_grad)
            if module.bias is not None:
                plain.bias = nn.Parameter(effective(module, "bias").clone(), module.bias.requires_grad)
            put(model, name, plain.train(module.training))
            masked[name] = module


def drop_dead(model: nn.Module) -> None:
    """Removes dead heads and units from the transformers models in `model`, whose state dicts stay what they were."""
    for root in layers.pretrained_roots(model).values():
        if SHRUNK not in root.__dict__ and (removed := shrink.shrink(root)):
            root.__dict__[SHRUNK] = removed
            root.register_state_dict_post_hook(_write_full)
            root.register_load_state_dict_pre_hook(_grow_for)


def grow(root: nn.Module) -> None:
    """Undoes `drop_dead`; the model's linears are float."""
    if SHRUNK in root.__dict__:
        shrink.unshrink(root, root.__dict__[SHRUNK])
        del root.__dict__[SHRUNK]
        for hooks, function in (
            (root._state_dict_hooks, _write_full),
            (root._load_state_dict_pre_hooks, _grow_for),
        ):
            for key, hook in list(hooks.items()):
                if getattr(hook, "hook", hook) is function:
                    del hooks[key]


def _write_full(root: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Makes the state dict of a shrunk model that of the whole one; quantized ones record their widths instead."""
    removed = root.__dict__.get(SHRUNK)
    if removed is None or layers.quantized_modules(root):
        return
    for name, tensor in shrink.full_tensors(root, removed).items():
        if tensor is None:
            state.pop(prefix + name, None)
        else:
            state[prefix + name] = tensor


def _grow_for(root: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Makes a shrunk model whole again when tensors of the whole one are about to be loaded."""
    removed = root.__dict__.get(SHRUNK)
    if removed is None or layers.quantized_modules(root):
        return
    names = [f"{cut.module}.{cut.tensor}" for layer in removed.layers.values() for cut in layer.cuts]
    if any(prefix + name in state for name in names):
        for module in root.modules():
            if isinstance(module, SparseLinear):
                densify(module).__class__ = PackedLinear
        grow(root)
