"""Gradients of the operators: a backward pass computes the same in plain PyTorch and differentiates that.

Kernels keep nothing for a backward pass, so a model in eval mode runs fused whether or not gradients are recorded. int8
layers have the gradient of their dequantized weights, as in training mode; rounding an activation counts as identity.

A backward pass is one operator too: torch.compile traces it together with the forward pass, and would be free to move
the second computation there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _lib  # noqa: F401  (registers the operators)
from .formats.groupwise import read_rows

_LIBRARY = torch.library.Library("bertkern", "FRAGMENT")
_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (  # in the order of _ops.ACTIVATIONS
    lambda x: x,
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    F.relu,
    torch.tanh,
    F.silu,
)
# Arguments of operators that no parameter went into.
_INPUTS = ("x", "head_mask")
# Tensors that one layer of the encoder is made from: weight and bias of six linears and of two norms.
PER_LAYER = 16


class Owner(Protocol):
    """Who holds tensors that were made from parameters."""

    def stale(self) -> None:
        """Forgets them."""


# By address, because compiled code hands over other Python objects over the same memory.
_owners: weakref.WeakValueDictionary[int, Owner] = weakref.WeakValueDictionary()
_addresses: weakref.WeakKeyDictionary[Owner, int] = weakref.WeakKeyDictionary()


def own(made: Tensor, owner: Owner) -> None:
    """Has `owner.stale()` called after a backward pass for the parameters that `made` was made from.

    Whoever asks for their gradients is about to change them, and fused optimizers do not count what they change. An
    owner holds one such tensor at a time.
    """
    before = _addresses.get(owner)
    if before is not None and _owners.get(before) is owner:
        _owners.pop(before, None)
    _addresses[owner] = made.data_ptr()
    _owners[made.data_ptr()] = owner


# --- the operators in plain PyTorch ------------------------------------------------------------------------------


def _unpacked(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The weight [N, K] and bias [N] in fp32."""
    weight, scale, bias = torch.ops.bertkern.unpack_linear.default(packed)
    weight = weight.float()
    return (weight * scale[:, None] if scale.numel() else weight), bias


def _linear(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    activation: int = 0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    y = _ACTIVATIONS[activation](F.linear(x.float(), *_unpacked(packed)))
    return y if residual is None else y + residual.float().view_as(y)


def _linear_from(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None, activation: int = 0) -> Tensor:
    return _ACTIVATIONS[activation](F.linear(x.float(), weight.float(), None if bias is None else bias.float()))


def _qgemm(
    codes: Tensor,
    scale: Tensor,
    zero_point: int,
    packed: Tensor,
    out_features: int,
    activation: int = 0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    x = (codes.float() - zero_point) * scale.reshape(-1, 1)
    return _linear(x, packed, out_features, activation, residual)


def _add_layernorm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    x = x.float() if residual is None else x.float() + residual.float()
    return F.layer_norm(x, weight.shape, weight.float(), bias.float(), eps)


def _embed_from(
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    scales: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype | None,
    padding: Sequence[int],
) -> Tensor:
    rows = torch.zeros(())
    for index, table, scale, skip in zip(ids, tables, scales, padding, strict=True):
        found = F.embedding(index, table, None if skip < 0 else skip)
        found = read_rows(found, weight.numel()) if table.dtype == torch.uint8 else found.float()
        rows = rows + found * (scale if scale.numel() == 1 else scale[index].unsqueeze(-1))
    return _add_layernorm(rows, None, weight, bias, eps)


def _embed(
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    scales: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return _embed_from(ids, tables, scales, weight, bias, eps, out_dtype, [-1] * len(ids))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    key_counts: Tensor | None = None,
    bias: Tensor | None = None,
    head_mask: Tensor | None = None,
    scale: float = 0.0,
    causal: bool = False,
) -> Tensor:
    ends, parts = cu_seqlens.tolist(), []
    counts = [None] * (len(ends) - 1) if key_counts is None else key_counts.tolist()
    for i, (begin, end, count) in enumerate(zip(ends[:-1], ends[1:], counts, strict=True)):
        heads = [part[begin:end].float().transpose(0, 1) for part in (q, k, v)]
        length = end - begin
        keys = torch.arange(length) < (length if count is None else count)
        scores = torch.zeros(1, length, length)
        if bias is not None:
            scores = bias[i if bias.shape[0] > 1 else 0, :, :length, :length].float()
        if causal:
            keys = keys & torch.ones(length, length, dtype=torch.bool).tril()
        silent = ~keys.expand(length, length).any(-1, keepdim=True)
        scores = scores.masked_fill(~keys & ~silent, -torch.inf)
        silent = silent | (scores == -torch.inf).all(-1, keepdim=True)
        context = F.scaled_dot_product_attention(
            *heads, attn_mask=scores.masked_fill(silent, 0).expand(len(heads[0]), -1, -1), scale=scale or None
        ).masked_fill(silent, 0)
        if head_mask is not None:
            context = context * head_mask[i, :, None, None]
        parts.append(context.transpose(0, 1))
    return torch.cat(parts) if parts else torch.zeros_like(q, dtype=torch.float32)


def _qattention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    cu_seqlens: Tensor,
    key_counts: Tensor | None = None,
    bias: Tensor | None = None,
    head_mask: Tensor | None = None,
    scale: float = 0.0,
    causal: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    q, k, v = (codes.float() * step.reshape(-1, 1, 1) for codes, step in ((q, q_scale), (k, k_scale), (v, v_scale)))
    return _attention(q, k, v, cu_seqlens, key_counts, bias, head_mask, scale, causal)


def _encoder_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scores: Tensor | None) -> Tensor:
    if not heads:
        return torch.zeros_like(q)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=scores).transpose(1, 2).flatten(2)


class _Padding:
    """What a mask [B, L] means for an encoder; without one nothing is padding."""

    def __init__(self, mask: Tensor | None, keep_padding: bool, empty_attends: bool) -> None:
        self.real = self.dropped = self.silent = None
        if mask is None:
            return
        self.real = mask != 0
        empty = ~self.real.any(1, keepdim=True)
        if not keep_padding:
            # Behind the last token of a sequence that has any.
            self.dropped = ((self.real.flip(1).cumsum(1).flip(1) == 0) & ~empty)[..., None]
        if not empty_attends:
            self.silent = empty[..., None]

    def scores(self, bias: Tensor | None) -> Tensor | None:
        """What is added to attention scores."""
        if self.real is None:
            return bias
        hidden = torch.zeros(self.real.shape).masked_fill(~self.real, torch.finfo(torch.float32).min)[:, None, None]
        return hidden if bias is None else bias + hidden

    def without(self, x: Tensor) -> Tensor:
        """Zeros where nothing is computed."""
        return x if self.dropped is None else x.masked_fill(self.dropped, 0)

    def heard(self, context: Tensor) -> Tensor:
        """Zeros in sequences that attend to nothing."""
        return context if self.silent is None else context.masked_fill(self.silent, 0)

    def packed(self, x: Tensor) -> Tensor:
        """The rows of real tokens."""
        return x.flatten(-3, -2) if self.real is None else x[..., self.real, :]


def _scaled(context: Tensor, heads: int, factors: Tensor | None) -> Tensor:
    if factors is None or not heads:
        return context
    return (context.unflatten(-1, (heads, -1)) * factors[:, None, :, None]).flatten(2)


def _encoder_from(
    x: Tensor,
    mask: Tensor | None,
    position_bias: Tensor | None,
    linears: Sequence[Tensor],
    norms: Tensor,
    made_from: Sequence[Tensor],
    heads: Sequence[int],
    activation: int,
    eps: float,
    keep_padding: bool,
    all_hidden_states: bool,
    empty_attends: bool,
    exact_attention: bool = False,
    head_mask: Tensor | None = None,
    packed: bool = False,
) -> Tensor:
    x, padding = x.float(), _Padding(mask, keep_padding, empty_attends)
    x, scores = padding.without(x), padding.scores(position_bias)
    factors = [None] * len(heads) if head_mask is None else head_mask.split(list(heads), 1)
    states = []
    for i, count in enumerate(heads):
        blobs, tensors = linears[6 * i : 6 * i + 6], list(made_from[PER_LAYER * i : PER_LAYER * (i + 1)])
        pairs = [
            (weight.float(), bias.float() if bias.numel() else None) if weight.numel() else _unpacked(blob)
            for blob, weight, bias in zip(blobs, tensors[0:12:2], tensors[1:12:2], strict=True)
        ]
        norm = tensors[12:]
        context = _encoder_attention(*(F.linear(x, *pair) for pair in pairs[:3]), count, scores)
        context = _scaled(padding.heard(context), count, factors[i])
        y = _add_layernorm(F.linear(context, *pairs[3]), x, norm[0], norm[1], eps)
        inner = _ACTIVATIONS[activation](F.linear(y, *pairs[4]))
        x = _add_layernorm(F.linear(inner, *pairs[5]), y, norm[2], norm[3], eps)
        states.append(x)
    out = torch.stack(states) if all_hidden_states else x
    return padding.packed(out) if packed else padding.without(out)


def _encoder(
    x: Tensor,
    mask: Tensor | None,
    position_bias: Tensor | None,
    linears: Sequence[Tensor],
    norms: Tensor,
    heads: Sequence[int],
    activation: int,
    eps: float,
    keep_padding: bool = False,
    all_hidden_states: bool = False,
    empty_attends: bool = False,
    exact_attention: bool = False,
    head_mask: Tensor | None = None,
    packed: bool = False,
) -> Tensor:
    nothing = torch.empty(0)
    made_from = [tensor for layer in norms for tensor in (*[nothing] * 12, *layer)]
    flags = (keep_padding, all_hidden_states, empty_attends, exact_attention, head_mask, packed)
    return _encoder_from(x, mask, position_bias, linears, norms, made_from, heads, activation, eps, *flags)


# --- how a gradient is registered --------------------------------------------------------------------------------


class _Backward:
    """The backward pass of one operator: from what its forward pass saved to a gradient for each argument.

    Autograd takes every tensor of a list for an argument of its own, so arguments are flattened and nested again.

    Args:
        name: of the operator, whose schema is known.
        plain: a function of the same arguments that autograd can follow.
        owner: the argument whose owner is told that gradients were taken for more than `_INPUTS`.
    """

    def __init__(self, name: str, plain: Callable[..., Tensor], owner: str | None = None) -> None:
        schema = getattr(torch.ops.bertkern, name).default._schema
        inputs = str(schema)[str(schema).index("(") + 1 : str(schema).rindex(") ->")]
        self.name, self.plain = name, plain
        self.lists = [str(argument.type) == "List[Tensor]" for argument in schema.arguments]
        self.names = [argument.name for argument in schema.arguments]
        self.owner = self.names.index(owner) if owner else None
        _LIBRARY.define(f"{name}_backward(Tensor grad, int[] wanted, {inputs}) -> Tensor[]")
        _LIBRARY.impl(f"{name}_backward", self.compute, "CompositeExplicitAutograd")
        torch.library.register_fake(f"bertkern::{name}_backward", self.shapes)
        self.run = getattr(torch.ops.bertkern, f"{name}_backward").default

    def flat(self, arguments: Sequence[Any]) -> list[Any]:
        # Arguments that have their default are not passed at all, where they stand last.
        pairs = zip(arguments, self.lists, strict=False)
        return [item for part, is_list in pairs for item in (part if is_list else (part,))]

    def nested(self, flat: Sequence[Any], like: Sequence[Any]) -> list[Any]:
        """The inverse of `flat`; `like` has the arguments' lists."""
        items, pairs = iter(flat), zip(like, self.lists, strict=False)
        return [[next(items) for _ in part] if is_list else next(items) for part, is_list in pairs]

    def compute(self, grad: Tensor, wanted: Sequence[int], *arguments: Any) -> list[Tensor]:
        """Gradients for those of the flat arguments that are `wanted`."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{self.name}: expected one backward pass. Got a second derivative: see bertkern.restore."
            )
        flat = [item.detach() if isinstance(item, Tensor) else item for item in self.flat(arguments)]
        leaves = [flat[i].requires_grad_() for i in wanted]
        with torch.enable_grad():
            y = self.plain(*self.nested(flat, arguments))
        found = torch.autograd.grad(y, leaves, grad.to(y.dtype), allow_unused=True)
        if self.owner is not None and not set(wanted) <= self.inputs(arguments):
            owner = _owners.get(arguments[self.owner].data_ptr())
            if owner is not None:
                owner.stale()
        # Two arguments may have one gradient, but results may not share memory.
        made = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
        return [g.clone(memory_format=torch.contiguous_format) for g in made]

    def inputs(self, arguments: Sequence[Any]) -> set[int]:
        """The places of `_INPUTS` among the flat arguments."""
        found, place = set(), 0
        for name, part, is_list in zip(self.names, arguments, self.lists, strict=False):
            if name in _INPUTS:
                found.add(place)
            place += len(part) if is_list else 1
        return found

    def shapes(self, grad: Tensor, wanted: Sequence[int], *arguments: Any) -> list[Tensor]:
        flat = self.flat(arguments)
        return [flat[i].new_empty(flat[i].shape) for i in wanted]

    def save(self, ctx: Any, arguments: Sequence[Any]) -> None:
        """Keeps a call's arguments for `gradients`."""
        flat = self.flat(arguments)
        ctx.save_for_backward(*[item if isinstance(item, Tensor) else None for item in flat])
        ctx.others = [None if isinstance(item, Tensor) else item for item in flat]
        ctx.like = [
            (None,) * len(part) if is_list else None for part, is_list in zip(arguments, self.lists, strict=False)
        ]

    def gradients(self, ctx: Any, grad: Tensor) -> list[Tensor | None]:
        """A gradient, or None, for each of the flat arguments."""
        flat = [other if saved is None else saved for saved, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
        wanted = [i for i, item in enumerate(flat) if isinstance(item, Tensor) and item.requires_grad]
        found = dict(zip(wanted, self.run(grad, wanted, *self.nested(flat, ctx.like)), strict=True))
        return [found.get(i) for i in range(len(flat))]


def _differentiable(name: str, plain: Callable[..., Tensor]) -> None:
    """Gives the operator `name` the gradient of `plain`."""
    formula = _Backward(name, plain)

    def setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
        formula.save(ctx, inputs)

    def backward(ctx: Any, grad: Tensor) -> tuple:
        passed = len(ctx.needs_input_grad)
        return tuple(formula.nested(formula.gradients(ctx, grad), ctx.like)[:passed])

    torch.library.register_autograd(f"bertkern::{name}", backward, setup_context=setup)


def _rounds(name: str) -> None:
    """Codes have no gradient, nor do the steps that they were made with."""

    def setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    torch.library.register_autograd(f"bertkern::{name}", lambda ctx, *grads: None, setup_context=setup)


_differentiable("linear", _linear)
_differentiable("qgemm", _qgemm)
_differentiable("add_layernorm", _add_layernorm)
_differentiable("embed", _embed)
_differentiable("attention", _attention)
_differentiable("qattention", _qattention)
_differentiable("encoder", _encoder)
_rounds("quantize_rows")
_rounds("qgemm_requantize")
_rounds("attention_requantize")


# --- operators that are told what their packed weights were made from --------------------------------------------


def _define_from(
    name: str, inputs: str, fused: Callable[..., Tensor], plain: Callable[..., Tensor], owner: str | None = None
) -> None:
    """Defines the operator `name`: `fused` with the gradient of `plain`.

    Composite, that is, tracing sees the operators inside, because torch's own registration of gradients is slow where
    an argument is a list of many tensors.
    """
    _LIBRARY.define(f"{name}({inputs}) -> Tensor")
    formula = _Backward(name, plain, owner)

    class Recomputed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, arguments: Sequence[Any], *flat: Any) -> Tensor:
            formula.save(ctx, arguments)
            return fused(*arguments)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple:
            return None, *formula.gradients(ctx, grad)

    def kernel(*arguments: Any) -> Tensor:
        return Recomputed.apply(arguments, *formula.flat(arguments))

    _LIBRARY.impl(name, kernel, "CompositeImplicitAutograd")


_define_from(
    "linear_from",
    "Tensor x, Tensor packed, Tensor weight, Tensor? bias, int activation=0",
    lambda x, packed, weight, bias, activation=0: torch.ops.bertkern.linear.default(
        x, packed, weight.shape[0], activation
    ),
    _linear_from,
    owner="packed",
)
_define_from(
    "embed_from",
    "Tensor[] ids, Tensor[] tables, Tensor[] scales, Tensor weight, Tensor bias, float eps, ScalarType? out_dtype, "
    "int[] padding",
    lambda *arguments: torch.ops.bertkern.embed.default(*arguments[:-1]),
    _embed_from,
)
_define_from(
    "encoder_from",
    "Tensor x, Tensor? mask, Tensor? position_bias, Tensor[] linears, Tensor norms, Tensor[] made_from, int[] heads, "
    "int activation, float eps, bool keep_padding, bool all_hidden_states, bool empty_attends, "
    "bool exact_attention=False, Tensor? head_mask=None, bool packed=False",
    lambda *arguments: torch.ops.bertkern.encoder.default(*arguments[:5], *arguments[6:]),
    _encoder_from,
    owner="norms",
)
