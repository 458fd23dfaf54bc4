"""Attention heads and feed-forward units that change no answer: which they are.

A head may go if its columns of the output projection are zero, or its rows of V and V's bias are: then it adds nothing.
Zeros in Q or K say nothing of the kind: a zero Q attends evenly to everything. A feed-forward unit may go if its column
of the second matrix is zero. If only its row of the first is, it is the constant act(bias), which folds into the second
bias. NaN and Inf are not zero, and what holds one is never removed: 0 x NaN is the answer's NaN.

`find` looks; `shrink` removes what it finds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import plan
from .nn.activations import activation_code
from .nn.encoder import LayerParts, Unfit
from .weights import effective, readable

# Activations of torch that see more than one unit, or that draw random numbers.
_NOT_ELEMENTWISE = (
    nn.Softmax,
    nn.Softmax2d,
    nn.LogSoftmax,
    nn.Softmin,
    nn.GLU,
    nn.RReLU,
    nn.MultiheadAttention,
)


@dataclass(frozen=True)
class Found:
    """What one layer could lose.

    Attributes:
        heads: how many heads it has.
        head_size: their width.
        dead_heads: those that add nothing.
        units: the width of the feed-forward.
        dead_units: units that nothing reads.
        foldable_units: units that are constant, and read.
    """

    heads: int
    head_size: int
    dead_heads: tuple[int, ...]
    units: int
    dead_units: tuple[int, ...]
    foldable_units: tuple[int, ...]

    def kept(self) -> "Kept":
        """What is left when all that may go is gone; a head and a unit stay in any case."""
        gone, folded = {*self.dead_units, *self.foldable_units}, self.foldable_units
        heads = tuple(head for head in range(self.heads) if head not in set(self.dead_heads)) or (0,)
        units = tuple(unit for unit in range(self.units) if unit not in gone)
        if not units:
            units, folded = (self.dead_units[:1], folded) if self.dead_units else (folded[:1], folded[1:])
        return Kept(heads, units, folded)


@dataclass(frozen=True)
class Kept:
    """What a layer keeps.

    Attributes:
        heads: which of its heads, ascending, as counted before.
        units: which of its feed-forward units, ascending, as counted before.
        folded: units, not among the kept ones, whose constant goes into the second bias.
    """

    heads: tuple[int, ...]
    units: tuple[int, ...]
    folded: tuple[int, ...] = ()


def find(model: nn.Module) -> tuple[dict[str, Found], dict[str, str]]:
    """What every layer of a known family could lose without a change of the model's answers. Changes nothing.

    Returns:
        Found by the layer's name, and, by name, why other layers could not be looked into.

    Example:
        >>> find(bert)[0]["encoder.layer.0"].dead_heads
        (3, 7)
    """
    found, left = {}, {}
    for name, layer, family in known_layers(model):
        try:
            parts = family.parts(layer)
            found[name] = _find(parts)
        except Unfit as reason:
            left[name] = str(reason)
        except AttributeError as error:
            left[name] = f"its parts have moved: {error}"
    return found, left


def known_layers(model: nn.Module) -> list[tuple[str, nn.Module, type[Any]]]:
    """The layers of known families in `model`: name, layer and the family's class of layers."""
    made = []
    for prefix, root in plan.pretrained_roots(model).items():
        from .families import layers_of

        made += [(f"{prefix}.{name}" if prefix else name, *rest) for name, *rest in layers_of(root)]
    return made


def sizes_of(parts: LayerParts, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> tuple[int, int, int]:
    """Heads, head size and units of a layer; raises Unfit where its matrices do not fit together."""
    linears = [getattr(*slot) for slot in parts.linears()]
    for linear in linears:
        if not isinstance(linear, kinds) or isinstance(linear, nn.LazyLinear):
            raise Unfit(f"a projection is {type(linear).__name__}")
    query, key, value, out, ffn1, ffn2 = linears
    width, size = query.out_features, round(parts.scaling**-2)
    fits = (
        width > 0
        and size > 0
        and width % size == 0
        and key.out_features == value.out_features == out.in_features == width
        and ffn1.out_features == ffn2.in_features > 0
    )
    if not fits:
        raise Unfit("projections whose shapes do not fit")
    return width // size, size, ffn1.out_features


def _find(parts: LayerParts) -> Found:
    heads, size, units = sizes_of(parts)
    slots = (getattr(*slot) for slot in parts.linears())
    (wq, bq), (wk, bk), (wv, bv), (wo, _), (w1, b1), (w2, _) = ((effective(m), effective(m, "bias")) for m in slots)
    for weight, slot in zip((wq, wk, wv, wo, w1, w2), parts.linears(), strict=True):
        linear = getattr(*slot)
        if not readable(weight) or tuple(weight.shape) != (linear.out_features, linear.in_features):
            raise Unfit("its weights cannot be read")

    unread = ~(wo != 0).any(0).view(heads, size).any(1)
    silent = ~(wv != 0).any(1).view(heads, size).any(1)
    if bv is not None:
        silent &= ~(bv != 0).view(heads, size).any(1)
    dead_heads = []
    for head in _indices(unread | silent):
        rows = slice(head * size, (head + 1) * size)
        if _finite(wq[rows], wk[rows], wv[rows], wo[:, rows], *(b[rows] for b in (bq, bk, bv) if b is not None)):
            dead_heads.append(head)
    if getattr(parts.query[0], "headless", False):
        heads, dead_heads = 0, []  # its only one stands in for none

    if not _elementwise(getattr(*parts.activation)):
        return Found(heads, size, tuple(dead_heads), units, (), ())
    unread = ~(w2 != 0).any(0)
    constant = ~(w1 != 0).any(1) & ~unread
    dead = [u for u in _indices(unread) if _finite(w1[u], *(b[u] for b in (b1,) if b is not None))]
    foldable = [u for u in _indices(constant) if _finite(w2[:, u])]
    if foldable:
        values = torch.isfinite(constants_of(parts, foldable)).tolist()
        foldable = [unit for unit, finite in zip(foldable, values, strict=True) if finite]
    return Found(heads, size, tuple(dead_heads), units, tuple(dead), tuple(foldable))


def constants_of(parts: LayerParts, units: Sequence[int]) -> Tensor:
    """What units whose row of the first matrix is zero always are: act(bias), fp64 [units]."""
    ffn1 = getattr(*parts.ffn1)
    bias = effective(ffn1, "bias")
    with torch.no_grad():
        x = effective(ffn1).new_zeros(len(units)) if bias is None else bias[list(units)]
        return getattr(*parts.activation)(x.double())


def _elementwise(activation: Any) -> bool:
    """Whether an activation computes each unit from itself alone."""
    if activation_code(activation) is not None:
        return True
    if not isinstance(activation, nn.Module) or next(activation.parameters(), None) is not None:
        return False
    known = type(activation).__module__ in ("transformers.activations", "torch.nn.modules.activation")
    return known and not isinstance(activation, _NOT_ELEMENTWISE)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _indices(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()
