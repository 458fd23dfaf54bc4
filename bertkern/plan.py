"""Which linear layers of a model can be swapped, which cannot and why. Nothing is changed here."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils.prune import BasePruningMethod

from .config import Int8Config
from .nn import Int8Embedding, Int8Linear, PackedLinear, SparseLinear
from .nn.int8 import finite
from .nn.linear import FLOATS

# Modules that read the weights of their linears instead of calling them.
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass(frozen=True)
class Choice:
    """What becomes of one linear layer.

    Attributes:
        name: its path in the model.
        action: "int8", "packed" (the same weights by bertkern's kernel) or "left".
        reason: why an int8 layer was not made, or why the layer was left to torch; else empty.
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


def skipped(name: str, patterns: tuple[str, ...], roots: dict[str, nn.Module]) -> bool:
    """Whether one of `patterns` names `name`, something above it, or a suffix of either."""
    names = [name]
    for prefix, root in roots.items():
        # A base model is part of many models with a head; a name recorded there has the prefix of the base.
        if root.base_model is root and root.base_model_prefix and (not prefix or name.startswith(prefix + ".")):
            names.append(f"{root.base_model_prefix}.{name[len(prefix) + 1 :] if prefix else name}")
    return any(
        fnmatchcase(n, form)
        for n in names
        for pattern in patterns
        for form in (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
    )


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear, str]]:
    """Every layer that is an nn.Linear, with its name and the reason why it must be left to torch, or ""."""
    parents = dict(model.named_modules())
    for name, module in parents.items():
        if not isinstance(module, nn.Linear):
            continue
        above = [parents[".".join(name.split(".")[:depth])] for depth in range(name.count(".") + 1)] if name else []
        yield name, module, _obstacle(module, above)


def choose(model: nn.Module, config: Int8Config | None) -> list[Choice]:
    """What becomes of every linear layer under `config`; None asks for no int8."""
    roots = pretrained_roots(model)
    choices = []
    for name, module, obstacle in linears(model):
        if obstacle:
            choices.append(Choice(name, module, "left", obstacle))
            continue
        reason = "" if config is None else _not_int8(name, module, config, roots)
        choices.append(Choice(name, module, "packed" if reason or config is None else "int8", reason))
    return choices


def _not_int8(name: str, module: nn.Linear, config: Int8Config, roots: dict[str, nn.Module]) -> str:
    if skipped(name, config.skip, roots):
        return "skipped by the config"
    kind = role(name, roots)
    if (kind == "pooler" and not config.pooler) or (kind == "head" and not config.head):
        return f"the config leaves the {kind}"
    if kind == "outside":
        # Such as the Dense of a SentenceTransformer, which its own file format has to load.
        return "it stands outside the transformers model"
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if any(not isinstance(hook, BasePruningMethod) for hook in hooks):
        return "it has hooks"
    return ""


def pruned_by_hook(module: nn.Module) -> bool:
    """Whether torch.nn.utils.prune computes a tensor of `module`."""
    return any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values())


def only_masked(module: nn.Module) -> bool:
    """Whether `module` is an nn.Linear whose weight torch.nn.utils.prune computes, and that no other hook sees."""
    hooks = [
        hook
        for hooks in (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._backward_pre_hooks,
            module._backward_hooks,
        )
        for hook in hooks.values()
    ]
    return type(module) is nn.Linear and bool(hooks) and all(isinstance(hook, BasePruningMethod) for hook in hooks)


def _obstacle(module: nn.Linear, above: list[nn.Module]) -> str:
    if type(module) not in (nn.Linear, PackedLinear, SparseLinear):
        return f"it is a {type(module).__name__}"
    # A plain layer takes the place of a masked one; a layer without a parent has none.
    replaceable = isinstance(module, SparseLinear) or (above and only_masked(module))
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
    if weight.device.type not in ("cpu", "meta"):
        return f"no kernel for {weight.device.type}"
    if weight.numel() == 0:
        return "its weight is empty"
    return ""


def check_finite(choices: list[Choice]) -> None:
    """Raises ValueError, naming the layer, if a weight or bias that is to become int8 holds Inf or NaN."""
    for choice in choices:
        for tensor_name, tensor in choice.module.named_parameters(recurse=False):
            if choice.action == "int8" and not finite(tensor):
                raise ValueError(f"quantize_: expected {choice.name}.{tensor_name} to be finite. Got Inf or NaN.")


def int8_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The int8 linears and tables inside `model`, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (Int8Linear, Int8Embedding))}
