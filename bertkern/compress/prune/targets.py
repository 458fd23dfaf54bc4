"""Which matrices of a model a config prunes, and which models cannot be pruned."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bertkern import plan
from bertkern.nn import PackedLinear
from bertkern.record import RECORD

from .config import NmPruneConfig, PruneConfig, RowColumnPruneConfig

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class Target:
    """One matrix that is pruned.

    Attributes:
        name: of the tensor in the model's state dict.
        module: whose it is, the first of several that share it.
        key: the name of its parameter there; "weight_orig" under torch.nn.utils.prune.
        final: the sparsity that it ends with.
        own: whether it gets that sparsity by itself also where the scope is global.
    """

    name: str
    module: nn.Module
    key: str
    final: float
    own: bool

    def stored(self) -> nn.Parameter:
        """The parameter, which zeros are written to."""
        return self.module._parameters[self.key]

    def weight(self) -> Tensor:
        """The weight [N, K] that the module computes with."""
        stored = self.stored().detach()
        if self.key == "weight":
            return stored
        return stored.masked_fill(self.module.weight_mask == 0, 0)


def find_targets(model: nn.Module, config: PruneConfig) -> list[Target]:
    """The matrices of `model` that `config` prunes, in the order of the model; a shared tensor once.

    Raises:
        TypeError, ValueError: as `prune_` does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"prune_: expected a torch.nn.Module. Got {type(model).__name__}.")
    if not isinstance(config, PruneConfig):
        raise TypeError(f"prune_: expected a config such as BlockPruneConfig. Got {type(config).__name__}.")
    _refuse_swapped(model)
    roots = plan.pretrained_roots(model)
    targets, taken, patterns = [], set(), dict(getattr(config, "overrides", ()))
    left = _left_parameters(model, config, roots)
    for name, module, wanted in _matrices(model, config, roots):
        if not wanted or plan.skipped(name, config.skip, roots):
            continue
        key = _key(name, module)
        stored = module._parameters[key]
        if stored is not None and (id(stored) in left or id(stored) in taken):
            continue
        _check(name, stored, config)
        if stored.numel() == 0:
            continue

        def names_it(pattern: str, name: str = name) -> bool:
            return plan.skipped(name, (pattern,), roots)

        for pattern in [pattern for pattern in patterns if names_it(pattern)]:
            del patterns[pattern]
        taken.add(id(stored))
        tensor_name = f"{name}.{key}" if name else key
        targets.append(Target(tensor_name, module, key, *config.sparsity_of(names_it)))
    _check_skip(model, config, roots)
    if not targets:
        raise ValueError("prune_: expected at least one matrix to prune. Got none.")
    if patterns:
        raise ValueError(f'prune_: expected overrides to name matrices that are pruned. Got "{next(iter(patterns))}".')
    return targets


def _check_skip(model: nn.Module, config: PruneConfig, roots: dict[str, nn.Module]) -> None:
    """Raises ValueError where a pattern names no matrix, of those that the config leaves anyway neither."""
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    for pattern in config.skip:
        if not any(plan.skipped(name, (pattern,), roots) for name in names):
            raise ValueError(f'prune_: expected skip to name matrices of the model. Got "{pattern}".')


def _refuse_swapped(model: nn.Module) -> None:
    if quantized := list(plan.quantized_modules(model)):
        raise ValueError(
            f"prune_: expected a float model. Got {plan.quantized_as(model)} layers, such as {quantized[0]}: prune "
            "first, then quantize_; bertkern.restore and bertkern.dequantize lead back to floats."
        )
    for name, module in model.named_modules():
        where = f", such as {name}" if name else ""
        if type(module).__module__.split(".")[0] == "peft":
            raise ValueError(
                f"prune_: expected a model without adapters. Got one{where}: what they add would fill the zeros, so "
                "merge them first."
            )
        if RECORD in vars(module) or isinstance(module, PackedLinear):
            raise ValueError(
                f"prune_: expected a plain model. Got one that runs by the kernels{where}: call bertkern.restore on it "
                "first, and bertkern.accelerate again when it is pruned."
            )


def _matrices(
    model: nn.Module, config: PruneConfig, roots: dict[str, nn.Module]
) -> Iterator[tuple[str, nn.Module, bool]]:
    """Linear layers and word tables: name, module, and whether the config wants it, patterns apart."""
    tables = {id(table) for table in map(_word_table, roots.values()) if table is not None}
    wanted = {"body": True, "pooler": config.pooler, "head": config.head, "outside": False}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module, wanted[plan.role(name, roots)]
        elif id(module) in tables:
            yield name, module, config.embeddings


def _left_parameters(model: nn.Module, config: PruneConfig, roots: dict[str, nn.Module]) -> set[int]:
    """Shared tensors that stay, by id: of which any module is skipped, or whose first module is not wanted."""
    left, seen = set(), set()
    for name, module, wanted in _matrices(model, config, roots):
        stored = module._parameters.get("weight", module._parameters.get("weight_orig"))
        if plan.skipped(name, config.skip, roots) or not (wanted or id(stored) in seen):
            left.add(id(stored))
        seen.add(id(stored))
    return left


def _word_table(root: nn.Module) -> nn.Module | None:
    try:
        table = root.get_input_embeddings()
    except NotImplementedError:
        return None
    return table if isinstance(table, nn.Embedding) else None


def _key(name: str, module: nn.Module) -> str:
    if "weight" in module._parameters:
        return "weight"
    if "weight_orig" in module._parameters and "weight_mask" in module._buffers:
        return "weight_orig"
    raise TypeError(
        f"prune_: expected {name or 'the layer'} to hold its weight as a parameter. "
        "Got one that a parametrization or a hook computes: remove it first."
    )


def _check(name: str, stored: nn.Parameter | None, config: PruneConfig) -> None:
    name = f"{name}.weight" if name else "weight"
    # Subclasses are sharded, quantized or not there yet; zeros cannot be written into them alike.
    if type(stored) is not nn.Parameter:
        raise TypeError(f"prune_: expected {name} to be a plain parameter. Got {type(stored).__name__}.")
    if stored.dtype not in FLOATS:
        raise TypeError(f"prune_: expected {name} to be floating point. Got {stored.dtype}.")
    if stored.is_meta:
        raise ValueError(f"prune_: expected weights on a device. Got {name} on meta.")
    if stored.dim() != 2:
        raise ValueError(f"prune_: expected {name} of shape [N, K]. Got {list(stored.shape)}.")
    shape = tuple(stored.shape)
    if stored.numel() == 0 or isinstance(config, RowColumnPruneConfig):
        return
    if isinstance(config, NmPruneConfig):
        if config.m > shape[1]:
            raise ValueError(
                f"prune_: expected groups of at most {shape[1]}, the columns of {name}. Got {config.m}: "
                "skip the matrix."
            )
        return
    block = config.block_of(shape)
    if block[0] > shape[0] or block[1] > shape[1]:
        raise ValueError(
            f"prune_: expected blocks that fit into {name} of shape {list(shape)}. Got {list(block)}: skip the matrix."
        )
