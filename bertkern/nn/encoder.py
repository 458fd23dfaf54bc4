"""A stack of post-LayerNorm transformer layers as one operator call."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter, getitem
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from .. import _ops  # noqa: F401  (loads the operators)
from .activations import activation_code
from .groupwise import GroupwiseLinear
from .int8 import Int8Linear
from .linear import FLOATS, PackedLinear
from .packing import Epoch, lean, needs_grad, version
from .sparse import SparseLinear

_encoder = lean(torch.ops.bertkern.encoder.default)
_encoder_from = torch.ops.bertkern.encoder_from.default
# Stands for a tensor that is no parameter.
_NOTHING = torch.empty(0, device="cpu")
LEAVES = (GroupwiseLinear, Int8Linear, PackedLinear, SparseLinear)


class Unfit(Exception):
    """Why something cannot run fused; the text stands in the report."""


@dataclass(frozen=True)
class LayerParts:
    """Where one layer keeps what the encoder operator needs: x1 = norm(x + out(attention(q, k, v))),
    x2 = norm(x1 + ffn2(activation(ffn1(x1)))).

    Each part is the pair (module that holds it, name of the attribute), so that an exchange is noticed. The scaling is
    what products of queries and keys are multiplied with.
    """

    query: tuple[nn.Module, str]
    key: tuple[nn.Module, str]
    value: tuple[nn.Module, str]
    out: tuple[nn.Module, str]
    attention_norm: tuple[nn.Module, str]
    ffn1: tuple[nn.Module, str]
    ffn2: tuple[nn.Module, str]
    output_norm: tuple[nn.Module, str]
    activation: tuple[nn.Module, str]
    scaling: float

    def linears(self) -> list[tuple[nn.Module, str]]:
        """In the operator's order."""
        return [self.query, self.key, self.value, self.out, self.ffn1, self.ffn2]

    def norms(self) -> list[tuple[nn.Module, str]]:
        """In the operator's order."""
        return [self.attention_norm, self.output_norm]


class Stack:
    """The arguments of the encoder operator for some layers, and what they were made from.

    A layer that stands there several times runs as often, and is packed and looked after once.

    Attributes:
        device: where it runs.

    Raises:
        Unfit: the layers are not what the operator computes.
    """

    device = torch.device("cpu")

    def __init__(self, layers: Sequence[nn.Module], parts: Sequence[LayerParts], watched: Sequence[nn.Module]) -> None:
        if not layers:
            raise Unfit("no layers")
        self.layers = list(layers)
        once = list(dict(zip(self.layers, parts, strict=True)).values())
        slots = [slot for part in once for slot in (*part.linears(), *part.norms(), part.activation)]
        leaves = [getattr(*slot) for slot in slots]
        linears = [getattr(*slot) for part in once for slot in part.linears()]
        norms = [getattr(*slot) for part in once for slot in part.norms()]
        for leaf in linears:
            if type(leaf) not in LEAVES or not leaf.packable():
                raise Unfit(f"a projection is {type(leaf).__name__}")
        self.eps = _common("LayerNorm eps", [_norm_eps(norm) for norm in norms])
        self.activation = _common("activation", [_activation(getattr(*part.activation)) for part in once])
        self.heads = [_check_shapes(part) for part in parts]
        self.attentions, self.outs = [part.query[0] for part in parts], [getattr(*part.out) for part in parts]
        self._take(parts, linears)
        self._follow(slots, leaves, linears, norms, watched)

    def _take(self, parts: Sequence[LayerParts], linears: Sequence[Any]) -> None:
        """Makes the arguments of the layers' parts; `linears` are theirs, once each."""
        for leaf in linears:
            leaf.packed()
        # Read before the tensors: a change by another thread from here on is then noticed.
        self._epoch = Epoch.now
        self.linears = [getattr(*slot).packed() for part in parts for slot in part.linears()]
        every = [getattr(*slot) for part in parts for slot in part.norms()]
        with torch.no_grad():
            flat = torch.stack([tensor.detach().float() for norm in every for tensor in (norm.weight, norm.bias)])
        # [layers, 4, H]: weight and bias of the attention norm, weight and bias of the output norm.
        self.norms = flat.view(len(parts), 4, -1)
        # In the order of encoder_from: weight and bias of the layer's six linears, then of its two norms.
        self._made_from = [_NOTHING if tensor is None else tensor for part in parts for tensor in _made_from(part)]

    def _follow(
        self,
        slots: Sequence[tuple[nn.Module, str]],
        leaves: Sequence[Any],
        linears: Sequence[nn.Module],
        norms: Sequence[nn.Module],
        watched: Sequence[nn.Module],
    ) -> None:
        """Has `current` look after `leaves`, the modules in `slots`, among them `linears` and `norms`."""
        tensors = [(norm.weight, norm.bias) for norm in norms]
        # What `current` compares. Lists and C loops, because this runs at every call.
        # An activation may be a function.
        self._slot_dicts = [holder._modules if name in holder._modules else holder.__dict__ for holder, name in slots]
        self._slot_names = [name for _, name in slots]
        self._leaves, self._types = leaves, [type(leaf) for leaf in leaves]
        norm_dicts = [norm._parameters for norm in norms for _ in range(2)]
        self._norm_dicts, self._norm_names = norm_dicts, ["weight", "bias"] * len(norms)
        self._norm_tensors = [tensor for pair in tensors for tensor in pair]
        self._norm_ids = list(map(id, self._norm_tensors))
        self._tensors = [tensor for leaf in linears for tensor in leaf.weights()] + self._norm_tensors
        counted = not any(tensor.is_inference() for tensor in self._tensors)
        self._version_of = attrgetter("_version") if counted else version
        self._versions = list(map(self._version_of, self._tensors))
        hooks = [hooks for module in watched for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._hooks = [*hooks, _global_forward_hooks, _global_forward_pre_hooks]

    def current(self) -> bool:
        """Whether the layers still are what the arguments were made from."""
        try:
            return self._unchanged()
        except KeyError:
            return False

    def _unchanged(self) -> bool:
        return (
            self._epoch == Epoch.now
            and list(map(getitem, self._slot_dicts, self._slot_names)) == self._leaves
            and list(map(type, self._leaves)) == self._types
            and list(map(id, map(getitem, self._norm_dicts, self._norm_names))) == self._norm_ids
            and list(map(self._version_of, self._tensors)) == self._versions
        )

    def hooked(self) -> list[Any]:
        """The hooks on watched modules."""
        return [hook for hooks in self._hooks for hook in hooks.values()] if any(self._hooks) else []

    def run(
        self,
        x: Tensor,
        mask: Tensor | None,
        position_bias: Tensor | None = None,
        keep_padding: bool = False,
        all_hidden_states: bool = False,
        empty_attends: bool = False,
        exact_attention: bool = False,
        head_mask: Tensor | None = None,
        packed: bool = False,
    ) -> Tensor:
        """The encoder operator: x [B, L, H], mask [B, L] -> [B, L, H], or [layers, B, L, H] after every layer.

        Args:
            head_mask: fp32 [1 or B, heads of all layers]: what each head's context is multiplied by. Heads with 0 are
                not computed.
            packed: whether real tokens alone come back, one after another: [tokens, H] or [layers, tokens, H].
        """
        flags = (keep_padding, all_hidden_states, empty_attends, exact_attention, head_mask, packed)
        options = (self.heads, self.activation, self.eps, *flags)
        if needs_grad(x, position_bias, head_mask, *self._made_from):
            return _encoder_from(x, mask, position_bias, self.linears, self.norms, self._made_from, *options)
        return _encoder(x, mask, position_bias, self.linears, self.norms, *options)


def key_mask(mask: Tensor | None, batch: int, length: int, empty_attends: bool) -> tuple[Tensor | None, bool]:
    """The [B, L] mask of keys that `mask` amounts to, and whether a sequence without keys attends evenly to all.

    Args:
        mask: None, [B, L] bool, or [B or 1, 1, L or 1, L], bool (True = attend) or additive (0 = attend, the lowest
            value of its dtype or -inf = do not).
        empty_attends: the answer for [B, L]. Of the others, the lowest value makes all scores of a row equal, and
            scaled_dot_product_attention gives zeros for a row of False.

    Raises:
        Unfit: the mask says something else, such as keys that differ from query to query.
    """
    if mask is None:
        return None, False
    if of_keys(mask, batch):
        mask, empty_attends = mask[:, 0, 0], False
    if mask.dim() == 2:
        if mask.dtype != torch.bool or mask.shape[0] != batch or mask.shape[1] != length:
            raise Unfit("a mask of another shape or dtype")
        return mask, empty_attends
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or mask.shape[3] != length:
        raise Unfit("a mask of another shape or dtype")
    if torch.compiler.is_compiling():
        raise Unfit("a 4-D mask while tracing")
    first = mask[:, 0, 0]
    if (
        mask.shape[2] > 1
        and mask.stride(2) != 0
        and not torch.equal(mask[:, 0], first[:, None].expand(mask[:, 0].shape))
    ):
        raise Unfit("a mask that differs from query to query")
    if mask.dtype == torch.bool:
        return first.expand(batch, length), False
    if not mask.is_floating_point():
        raise Unfit("a mask of another shape or dtype")
    attend = first == 0
    if not bool((attend | (first <= torch.finfo(first.dtype).min)).all()):
        raise Unfit("a mask with weights")
    if bool((first == -torch.inf).all(dim=1).any()):
        raise Unfit("a mask of -inf alone")
    return attend.expand(batch, length), True


def of_keys(mask: Tensor, batch: int) -> bool:
    """Whether a mask says by its shape, bool [B, 1, 1, L], that keys are masked for all queries alike."""
    return mask.dim() == 4 and mask.dtype == torch.bool and mask.shape[:3] == (batch, 1, 1)


def usable(x: Tensor) -> str | None:
    """Why the operators cannot take `x`, if they cannot."""
    if not x.is_cpu:
        return "another device"
    return None if x.dtype in FLOATS else "another dtype"


def _made_from(part: LayerParts) -> list[Tensor | None]:
    """Weight and bias of the layer's linears, None where they have no gradient, and of its norms."""
    tensors: list[Tensor | None] = []
    for leaf in (getattr(*slot) for slot in part.linears()):
        tensors += (leaf.weight, leaf.bias) if isinstance(leaf, PackedLinear) else (None, None)
    for norm in (getattr(*slot) for slot in part.norms()):
        tensors += (norm.weight, norm.bias)
    return tensors


def _common(what: str, values: list) -> Any:
    if any(value != values[0] for value in values):
        raise Unfit(f"layers differ in {what}")
    return values[0]


def _activation(activation: Any) -> int:
    code = activation_code(activation)
    if code is None:
        name = type(activation).__name__ if isinstance(activation, nn.Module) else getattr(activation, "__name__", "?")
        raise Unfit(f"no kernel for the activation {name}")
    return code


def _norm_eps(norm: nn.Module) -> float:
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None or len(norm.normalized_shape) != 1:
        raise Unfit(f"a norm is {type(norm).__name__} without weight and bias of one dimension")
    return norm.eps


def _check_shapes(part: LayerParts) -> int:
    """The number of heads, by the widths as they are: pruned layers have fewer than their config says."""
    query, key, value, out, ffn1, ffn2 = (getattr(*slot) for slot in part.linears())
    hidden = ffn2.out_features
    width, size = query.out_features, round(part.scaling**-2)
    if abs(part.scaling * size**0.5 - 1) > 1e-6:
        raise Unfit("scores are not scaled by the root of the head size")
    fits = (
        width > 0
        and width % size == 0
        and key.out_features == value.out_features == out.in_features == width
        and query.in_features == key.in_features == value.in_features == out.out_features == hidden
        and ffn1.in_features == hidden
        and ffn2.in_features == ffn1.out_features
    )
    if not fits:
        raise Unfit("projections whose shapes do not fit")
    return width // size
