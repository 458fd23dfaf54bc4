"""Which linear layers of a model can be swapped, which cannot and why. Nothing is changed here."""

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils.prune import BasePruningMethod

from .names import fits
from .nn import BlockSparseLinear, PackedLinear, SparseLinear
from .nn.int8 import finite
from .nn.linear import FLOATS
from .schemes import Scheme, scheme_of

# Modules that read the weights of their linears instead of calling them.
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass(frozen=True)
class Choice:
    """What becomes of one linear layer.

    Attributes:
        name: its path in the model.
        action: "quantized", "packed" (the same weights by bertkern's kernel) or "left".
        reason: why the layer was not quantized, or why it was left to torch; else empty.
    """

    name: str
    module: nn.Linear
    action: str
    reason: str = ""


def pretrained_roots(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost transformers models inside `model`, by name; `model` itself has the name ""."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return {}
    roots: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(root == "" or name.startswith(root + ".") for root in roots)
        if isinstance(module, modeling.PreTrainedModel) and not inside:
            roots[name] = module
    return roots


def role(name: str, roots: dict[str, nn.Module]) -> str:
    """Where the module `name` stands: in the "body", "pooler" or "head" of a transformers model, or "outside"."""
    for prefix, root in roots.items():
        if prefix and not name.startswith(prefix + "."):
            continue
        inner = name[len(prefix) + 1 :] if prefix else name
        base = root.base_model_prefix
        if root.base_model is root:
            pass
        elif base and inner.startswith(base + "."):
            inner = inner[len(base) + 1 :]
        else:
            return "head"
        return "pooler" if "pooler" in inner.split(".") else "body"
    return "outside" if roots else "body"


def aliases(name: str, roots: dict[str, nn.Module]) -> list[str]:
    """The names by which patterns may know the module `name`: its own first."""
    names = [name]
    for prefix, root in roots.items():
        # A base model is part of many models with a head; a name recorded there has the prefix of the base.
        if root.base_model is root and root.base_model_prefix and (not prefix or name.startswith(prefix + ".")):
            names.append(f"{root.base_model_prefix}.{name[len(prefix) + 1 :] if prefix else name}")
    return names


def skipped(name: str, patterns: tuple[str, ...], roots: dict[str, nn.Module]) -> bool:
    """Whether one of `patterns` names `name`, something above it, or a suffix of either."""
    names = aliases(name, roots)
    return any(fits(pattern, names) for pattern in patterns)


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear, str]]:
    """Every linear layer, with its name and the reason why it must be left to torch, or "". One in blocks counts if
    others can stand in for it."""
    parents = dict(model.named_modules())
    for name, module in parents.items():
        if not isinstance(module, nn.Linear) and not (name and only_blocks(module)):
            continue
        above = [parents[".".join(name.split(".")[:depth])] for depth in range(name.count(".") + 1)] if name else []
        yield name, module, _obstacle(module, above)


def choose(model: nn.Module, config: Any, given: Collection[str] = ()) -> list[Choice]:
    """What becomes of every linear layer under `config`; None asks for no quantization.

    Args:
        config: of a scheme.
        given: names of layers that become quantized whatever the config says of them.
    """
    roots = pretrained_roots(model)
    choices = []
    for name, module, obstacle in linears(model):
        if obstacle:
            choices.append(Choice(name, module, "left", obstacle))
            continue
        reason = "" if config is None else _kept(name, module, config, roots, name in given)
        choices.append(Choice(name, module, "packed" if reason or config is None else "quantized", reason))
    return choices


def _kept(name: str, module: nn.Linear, config: Any, roots: dict[str, nn.Module], given: bool) -> str:
    """Why the weights of a layer stay float, or ""."""
    reason = "" if given else excluded(name, config, roots)
    if reason:
        return reason
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if any(not isinstance(hook, BasePruningMethod) for hook in hooks):
        return "it has hooks"
    return ""


def excluded(name: str, config: Any, roots: dict[str, nn.Module]) -> str:
    """Why `config` wants the linear `name` to stay float, or ""."""
    if skipped(name, config.skip, roots):
        return "skipped by the config"
    kind = role(name, roots)
    if (kind == "pooler" and not config.pooler) or (kind == "head" and not config.head):
        return leaves(kind)
    # Such as the Dense of a SentenceTransformer, which its own file format has to load.
    return "it stands outside the transformers model" if kind == "outside" else ""


def leaves(kind: str) -> str:
    """The reason of a layer whose role is not to be quantized."""
    return f"the config leaves the {kind}"


def pruned_by_hook(module: nn.Module) -> bool:
    """Whether torch.nn.utils.prune computes a tensor of `module`."""
    return any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values())


def only_masked(module: nn.Module) -> bool:
    """Whether `module` is an nn.Linear whose weight torch.nn.utils.prune computes, and that no other hook sees."""
    hooks = _hooks(module)
    return type(module) is nn.Linear and bool(hooks) and all(isinstance(hook, BasePruningMethod) for hook in hooks)


def only_blocks(module: nn.Module) -> bool:
    """Whether `module` is a BlockSparseLinear that the other kernels can stand in for, and that no hook sees."""
    return type(module) is BlockSparseLinear and module.values.dtype in FLOATS and not _hooks(module)


def _hooks(module: nn.Module) -> list[Any]:
    every = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return [hook for hooks in every for hook in hooks.values()]


def _obstacle(module: nn.Linear, above: list[nn.Module]) -> str:
    if type(module) not in (nn.Linear, PackedLinear, SparseLinear, BlockSparseLinear):
        return f"it is a {type(module).__name__}"
    # A plain layer takes the place of a masked one, and of blocks; a layer without a parent has none.
    replaceable = isinstance(module, (SparseLinear, BlockSparseLinear)) or (above and only_masked(module))
    if "weight" not in module._parameters and not replaceable:
        return "its weight is computed by a hook"
    for parent in above:
        if isinstance(parent, _READS_WEIGHTS):
            return f"{type(parent).__name__} reads its weight"
        if type(parent).__module__.split(".")[0] == "peft":
            return "it is under an adapter"
    weight = module.weight
    if weight.dtype not in FLOATS:
        return f"no kernel for {str(weight.dtype).removeprefix('torch.')}"
    if weight.device.type not in ("cpu", "meta", "cuda"):
        return f"no kernel for {weight.device.type}"
    if weight.numel() == 0:
        return "its weight is empty"
    return ""


def check_finite(choices: list[Choice]) -> None:
    """Raises ValueError, naming the layer, if a weight or bias that is to be quantized holds Inf or NaN."""
    for choice in choices:
        for tensor_name, tensor in choice.module.named_parameters(recurse=False):
            if choice.action == "quantized" and not finite(tensor):
                raise ValueError(f"quantize_: expected {choice.name}.{tensor_name} to be finite. Got Inf or NaN.")


def quantized_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The quantized linears and tables inside `model`, by name."""
    return {name: module for name, module in model.named_modules() if scheme_of(module) is not None}


def quantized_as(model: nn.Module) -> str:
    """In a word, what a model with quantized modules is; empty for a float one."""
    first = next(iter(quantized_modules(model).values()), None)
    return "" if first is None else scheme_of(first).name


def scheme_in(model: nn.Module) -> Scheme | None:
    """The scheme of the quantized modules inside `model`, if there are any.

    Raises:
        ValueError: there are modules of two schemes, which no record tells of.
    """
    found = {scheme_of(module): name for name, module in quantized_modules(model).items()}
    if len(found) > 1:
        each = " and ".join(f"{scheme.name} ({name})" for scheme, name in found.items())
        raise ValueError(f"expected quantized modules of one kind in a model. Got {each}.")
    return next(iter(found), None)
