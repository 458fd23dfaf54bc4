"""The structure that pruning left in a model: what is zero, in which pattern, what may go, and what that could gain."""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from . import dead, plan, shrink
from .config import Int8Config
from .formats.grids import DTYPES as GRID_DTYPES
from .formats.grids import grid_of
from .inspection import Grid, Inspection, Layer, Matrix, Totals
from .nn.int8 import finite
from .reports import float_name
from .schemes import scheme_of
from .structure import BLOCKS, Blocks, Structure, structure
from .surgery import family_tables
from .tuning import MARGIN, cost
from .weights import effective, readable

__all__ = ["BLOCKS", "Grid", "Inspection", "Layer", "Matrix", "Totals", "estimate", "inspect"]


def inspect(model: nn.Module) -> Inspection:
    """The structure of `model`: zeros of every linear layer and embedding table, dead heads and units, and the gain.

    Also says which matrices lie on grids of few bits, as fake-quantized ones do (`bertkern.grids` packs them), and what
    `quantize_` would make of each linear layer. Changes nothing. A dead row is an output that is always its bias, a
    dead column an input that is never read. Under torch.nn.utils.prune, the masked weights are looked at.

    Args:
        model: any module; dead heads and units are found in transformers models of known families.

    Example:
        >>> found = inspect(nn.Sequential(nn.Linear(4, 2)))
        >>> found.rows[0].runs, found.rows[0].structure
        ('int8', 'dense')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"inspect: expected a torch.nn.Module. Got {type(model).__name__}.")
    choices = {choice.name: choice for choice in plan.choose(model, Int8Config())}
    tables = set(family_tables(model))
    found, left = dead.find(model)
    slices = shrink.slices(model, found)
    rows: list[Matrix] = []
    counted: dict[Any, tuple[str, Structure, Grid | None]] = {}
    odd, zeros, weights = [], 0, 0
    for name, module in model.named_modules():
        scheme = scheme_of(module)
        if name in choices:
            choice = choices[name]
            runs, why = (
                {"quantized": "int8", "packed": float_name(module), "left": "torch"}[choice.action],
                choice.reason,
            )
        elif scheme is not None:
            runs, why = f"{scheme.stored(module)} already", ""
        elif isinstance(module, nn.Embedding):
            runs, why = "int8" if name in tables else "torch", ""
        else:
            continue
        weight = effective(module) if scheme is None else scheme.values(module)
        about = (name, type(module).__name__, () if weight is None else tuple(weight.shape), runs, why)
        if weight is None or not readable(weight) or weight.numel() == 0 or weight.dim() != 2:
            rows.append(Matrix(*about))
            continue
        linear = not isinstance(module, nn.Embedding if scheme is None else scheme.table)
        identity, same_as = _identity(module), ""
        if identity in counted:
            same_as, pattern, grid = counted[identity]
        else:
            pattern, grid = structure(weight), None if scheme is not None else _grid(weight)
            counted[identity] = name, pattern, grid
            weights, zeros = weights + weight.numel(), zeros + round(pattern.zeros * weight.numel())
            if scheme is None and not finite(weight):
                odd.append(name)
        times = _times(weight, pattern.densities, slices.get(name)) if linear else None
        pruned = plan.pruned_by_hook(module)
        rows.append(Matrix(*about, **pattern._asdict(), pruned=pruned, same_as=same_as, times=times, grid=grid))
    layers = [
        Layer(n, f.heads, f.dead_heads, f.units, len(f.dead_units), len(f.foldable_units)) for n, f in found.items()
    ]
    layers += [Layer(name, why=why) for name, why in left.items()]
    return Inspection(
        "What could run how",
        tuple(rows),
        notes=_notes(rows, layers, odd),
        layers=tuple(layers),
        totals=_totals(rows, layers, weights, zeros, slices),
    )


def estimate(densities: Mapping[str, float], dtype: str) -> float:
    """The time of a linear layer by the best of bertkern's kernels, as a share of its dense one: 1 where dense is best.

    The cost model of `tuning`, which `accelerate` replaces by measurement.

    Args:
        densities: of blocks "16x4", "1x4" and "1x1", as in `Matrix.densities`.
        dtype: "fp32" or "int8".

    Example:
        >>> estimate({"16x4": 0.2, "1x4": 0.2, "1x1": 0.2}, "int8")  # 0.7 with AMX, whose dense kernel is faster
        0.24
    """
    if dtype not in ("fp32", "int8"):
        raise ValueError(f"estimate: expected dtype fp32 or int8. Got {dtype!r}.")
    single = densities["1x4" if dtype == "int8" else "1x1"]
    kind = torch.int8 if dtype == "int8" else torch.float32
    best = min(cost("panels", 16, densities["16x4"], kind), cost("tokens", 1, single, kind))
    return best if best < MARGIN else 1.0


def _times(weight: Tensor, densities: Mapping[str, float], cut: tuple[int, Tensor] | None) -> dict[str, float]:
    """The estimate by dtype; `cut`: the dimension and the indices that dead heads and units leave."""
    share = 1.0
    if cut is not None:
        dim, kept = cut
        share = len(kept) / weight.shape[dim]
        left = weight.index_select(dim, kept.to(weight.device))
        densities = Blocks((left != 0).view(torch.uint8)).densities([(1, 1), (1, 4), (16, 4)])
    return {dtype: share * estimate(densities, dtype) for dtype in ("fp32", "int8")}


def _grid(weight: Tensor) -> Grid | None:
    """The grids that `weight` lies on; zeros alone are none."""
    if weight.dtype not in GRID_DTYPES or not bool(weight.any()):
        return None
    exact = grid_of(weight)
    kept = grid_of(weight, exact=False) if exact is None else exact
    if kept is None:
        return None
    shared = kept.axis == "k" and kept.scale.shape[0] == 1
    widths = tuple(sorted(set(kept.bits.tolist())))
    return Grid(widths, kept.axis, kept.groups, kept.group_size, shared, exact is not None)


def _identity(module: nn.Module) -> Any:
    """What is the same for modules whose weights are the same tensor."""
    if scheme_of(module) is not None:
        table = getattr(module, "table", None)
        codes = module._buffers.get("weight_codes")
        return id(table[0] if table else module) if codes is None else id(codes)
    own = module._parameters.get("weight")
    return id(module) if own is None else id(own)


def _totals(
    rows: Iterable[Matrix],
    layers: Iterable[Layer],
    weights: int,
    zeros: int,
    slices: Mapping[str, tuple[int, Tensor]],
) -> Totals:
    linears = [row for row in rows if row.times is not None]
    products = {row.name: row.shape[0] * row.shape[1] for row in linears}
    every, kept = sum(products.values()), 0.0
    for row in linears:
        dim, left = slices.get(row.name, (0, range(row.shape[0])))
        kept += products[row.name] * len(left) / row.shape[dim]
    speedup = {}
    for dtype in ("fp32", "int8") if every else ():
        time = sum(products[row.name] * row.times[dtype] for row in linears)
        speedup[dtype] = every / time
    return Totals(
        weights,
        zeros,
        sum(layer.heads for layer in layers),
        sum(len(layer.dead_heads) for layer in layers),
        sum(layer.units for layer in layers),
        sum(layer.dead_units for layer in layers),
        sum(layer.foldable_units for layer in layers),
        kept / every if every else 1.0,
        speedup,
    )


def _notes(rows: Iterable[Matrix], layers: Iterable[Layer], odd: list[str]) -> tuple[str, ...]:
    notes = []
    if odd:
        notes.append(f"NaN or Inf, neither of which is zero, in: {', '.join(odd)}")
    if any(row.pruned for row in rows):
        notes.append("Masked by torch.nn.utils.prune: counted are the weights with their masks.")
    reasons = Counter(layer.why for layer in layers if layer.why)
    notes += [f"{count} layers not looked into for heads and units: {why}" for why, count in reasons.items()]
    return tuple(notes)


class _Callable(ModuleType):
    """`import bertkern.inspect` puts this module where the package has the function: both do the same."""

    def __call__(self, model: nn.Module) -> Inspection:
        return inspect(model)


sys.modules[__name__].__class__ = _Callable
