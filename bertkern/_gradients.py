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

_LIBRARY = torch.library.Library("bertkern", "FRAGMENT")
_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (  # in the order of _ops.ACTIVATIONS
    lambda x: x,
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    F.relu,
    torch.tanh,
    F.silu,
)
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


def _linear_from(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float())


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
        found = F.embedding(index, table, None if skip < 0 else skip).float()
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


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scores: Tensor | None) -> Tensor:
    if not heads:
        return torch.zeros_like(q)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=scores).transpose(1, 2).flatten(2)


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
) -> Tensor:
    x, scores, dropped, silent = x.float(), position_bias, None, None
    if mask is not None:
        real = mask != 0
        empty = ~real.any(1, keepdim=True)
        if not keep_padding:
            # Behind the last token of a sequence that has any.
            dropped = ((real.flip(1).cumsum(1).flip(1) == 0) & ~empty)[..., None]
            x = x.masked_fill(dropped, 0)
        if not empty_attends:
            silent = empty[..., None]
        hidden = torch.zeros(real.shape).masked_fill(~real, torch.finfo(torch.float32).min)[:, None, None]
        scores = hidden if scores is None else scores + hidden
    states = []
    for i, count in enumerate(heads):
        packed, tensors = linears[6 * i : 6 * i + 6], list(made_from[PER_LAYER * i : PER_LAYER * (i + 1)])
        pairs = [
            (weight.float(), bias.float() if bias.numel() else None) if weight.numel() else _unpacked(blob)
            for blob, weight, bias in zip(packed, tensors[0:12:2], tensors[1:12:2], strict=True)
        ]
        norm = tensors[12:]
        context = _attention(*(F.linear(x, *pair) for pair in pairs[:3]), count, scores)
        if silent is not None:
            context = context.masked_fill(silent, 0)
        y = _add_layernorm(F.linear(context, *pairs[3]), x, norm[0], norm[1], eps)
        inner = _ACTIVATIONS[activation](F.linear(y, *pairs[4]))
        x = _add_layernorm(F.linear(inner, *pairs[5]), y, norm[2], norm[3], eps)
        states.append(x)
    out = torch.stack(states) if all_hidden_states else x
    return out if dropped is None else out.masked_fill(dropped, 0)


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
) -> Tensor:
    nothing = torch.empty(0)
    made_from = [tensor for layer in norms for tensor in (*[nothing] * 12, *layer)]
    flags = (keep_padding, all_hidden_states, empty_attends)
    return _encoder_from(x, mask, position_bias, linears, norms, made_from, heads, activation, eps, *flags)


# --- how a gradient is registered --------------------------------------------------------------------------------


class _Backward:
    """The backward pass of one operator: from what its forward pass saved to a gradient for each argument.

    Autograd takes every tensor of a list for an argument of its own, so arguments are flattened and nested again.

    Args:
        name: of the operator, whose schema is known.
        plain: a function of the same arguments that autograd can follow.
        owner: the argument whose owner is told that gradients were taken for more than the first argument.
    """

    def __init__(self, name: str, plain: Callable[..., Tensor], owner: str | None = None) -> None:
        schema = getattr(torch.ops.bertkern, name).default._schema
        inputs = str(schema)[str(schema).index("(") + 1 : str(schema).rindex(") ->")]
        self.name, self.plain = name, plain
        self.lists = [str(argument.type) == "List[Tensor]" for argument in schema.arguments]
        self.owner = [argument.name for argument in schema.arguments].index(owner) if owner else None
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
        if self.owner is not None and list(wanted) != [0]:
            owner = _owners.get(arguments[self.owner].data_ptr())
            if owner is not None:
                owner.stale()
        # Two arguments may have one gradient, but results may not share memory.
        made = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
        return [g.clone(memory_format=torch.contiguous_format) for g in made]

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
_differentiable("encoder", _encoder)
_rounds("quantize_rows")
_rounds("qgemm_requantize")


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
    "Tensor x, Tensor packed, Tensor weight, Tensor? bias",
    lambda x, packed, weight, bias: torch.ops.bertkern.linear.default(x, packed, weight.shape[0]),
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
    "int activation, float eps, bool keep_padding, bool all_hidden_states, bool empty_attends",
    lambda *arguments: torch.ops.bertkern.encoder.default(*arguments[:5], *arguments[6:]),
    _encoder_from,
    owner="norms",
)
