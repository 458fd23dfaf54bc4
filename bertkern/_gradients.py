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


_owners: weakref.WeakValueDictionary[int, Owner] = weakref.WeakValueDictionary()


def own(made: Tensor, owner: Owner) -> None:
    """Has `owner.stale()` called after a backward pass for the parameters that `made` was made from.

    Whoever asks for their gradients is about to change them, and fused optimizers do not count what they change.
    """
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


def _counts(arguments: Sequence[Any]) -> list[int | None]:
    """The lengths of those arguments that are lists of tensors; autograd wants a gradient for each of their tensors."""
    return [
        len(part) if isinstance(part, (list, tuple)) and all(isinstance(item, Tensor) for item in part) else None
        for part in arguments
    ]


def _flat(arguments: Sequence[Any]) -> list[Any]:
    pairs = zip(arguments, _counts(arguments), strict=True)
    return [item for part, count in pairs for item in ((part,) if count is None else part)]


def _nested(flat: Sequence[Any], counts: Sequence[int | None]) -> list[Any]:
    """The inverse of `_flat`."""
    items = iter(flat)
    return [next(items) if count is None else [next(items) for _ in range(count)] for count in counts]


def _differentiable(name: str, plain: Callable[..., Tensor], owner: str | None = None) -> None:
    """Gives the operator `name` the gradient of `plain`, a function of the same arguments.

    Args:
        owner: the argument whose owner is told that gradients were taken for more than the first argument.
    """
    schema = getattr(torch.ops.bertkern, name).default._schema
    inputs = str(schema)[str(schema).index("(") + 1 : str(schema).rindex(") ->")]
    key = [argument.name for argument in schema.arguments].index(owner) if owner else None
    _LIBRARY.define(f"{name}_backward(Tensor grad, int[] wanted, {inputs}) -> Tensor[]")

    def compute(grad: Tensor, wanted: Sequence[int], *arguments: Any) -> list[Tensor]:
        if torch.is_grad_enabled():
            raise RuntimeError(f"{name}: expected one backward pass. Got a second derivative: see bertkern.restore.")
        flat = [item.detach() if isinstance(item, Tensor) else item for item in _flat(arguments)]
        leaves = [flat[i].requires_grad_() for i in wanted]
        with torch.enable_grad():
            y = plain(*_nested(flat, _counts(arguments)))
        found = torch.autograd.grad(y, leaves, grad.to(y.dtype), allow_unused=True)
        if key is not None and list(wanted) != [0]:
            holder = _owners.get(arguments[key].data_ptr())
            if holder is not None:
                holder.stale()
        # Two arguments may have one gradient, but results may not share memory.
        made = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
        return [g.clone(memory_format=torch.contiguous_format) for g in made]

    def shapes(grad: Tensor, wanted: Sequence[int], *arguments: Any) -> list[Tensor]:
        flat = _flat(arguments)
        return [flat[i].new_empty(flat[i].shape) for i in wanted]

    _LIBRARY.impl(f"{name}_backward", compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bertkern::{name}_backward", shapes)
    run = getattr(torch.ops.bertkern, f"{name}_backward").default

    def setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
        flat, ctx.counts = _flat(inputs), _counts(inputs)
        ctx.save_for_backward(*[item if isinstance(item, Tensor) else None for item in flat])
        ctx.others = [None if isinstance(item, Tensor) else item for item in flat]

    def backward(ctx: Any, grad: Tensor) -> tuple:
        flat = [other if saved is None else saved for saved, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
        wanted = [i for i, item in enumerate(flat) if isinstance(item, Tensor) and item.requires_grad]
        found = dict(zip(wanted, run(grad, wanted, *_nested(flat, ctx.counts)), strict=True))
        # Arguments at their defaults were not passed at all, where they stand last.
        return tuple(_nested([found.get(i) for i in range(len(flat))], ctx.counts)[: len(ctx.needs_input_grad)])

    torch.library.register_autograd(f"bertkern::{name}", backward, setup_context=setup)


# --- operators that are told what their packed weights were made from --------------------------------------------


def _define(name: str, inputs: str, fused: Callable[..., Tensor], shape: Callable[..., Tensor]) -> None:
    _LIBRARY.define(f"{name}({inputs}) -> Tensor")
    _LIBRARY.impl(name, fused, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bertkern::{name}", shape)


def _fused_encoder(
    x: Tensor,
    mask: Tensor | None,
    position_bias: Tensor | None,
    linears: Sequence[Tensor],
    norms: Tensor,
    made_from: Sequence[Tensor],
    *rest: Any,
) -> Tensor:
    return torch.ops.bertkern.encoder.default(x, mask, position_bias, linears, norms, *rest)


_define(
    "linear_from",
    "Tensor x, Tensor packed, Tensor weight, Tensor? bias",
    lambda x, packed, weight, bias: torch.ops.bertkern.linear.default(x, packed, weight.shape[0]),
    lambda x, packed, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
_define(
    "embed_from",
    "Tensor[] ids, Tensor[] tables, Tensor[] scales, Tensor weight, Tensor bias, float eps, ScalarType? out_dtype, "
    "int[] padding",
    lambda *arguments: torch.ops.bertkern.embed.default(*arguments[:-1]),
    lambda *arguments: torch.ops.bertkern.embed.default(*arguments[:-1]),
)
_define(
    "encoder_from",
    "Tensor x, Tensor? mask, Tensor? position_bias, Tensor[] linears, Tensor norms, Tensor[] made_from, int[] heads, "
    "int activation, float eps, bool keep_padding, bool all_hidden_states, bool empty_attends",
    _fused_encoder,
    _fused_encoder,
)

_differentiable("linear", _linear)
_differentiable("qgemm", _qgemm)
_differentiable("add_layernorm", _add_layernorm)
_differentiable("embed", _embed)
_differentiable("encoder", _encoder)
_differentiable("linear_from", _linear_from, owner="packed")
_differentiable("embed_from", _embed_from)
_differentiable("encoder_from", _encoder_from, owner="norms")


def _rounds(name: str) -> None:
    """Codes have no gradient, nor do the steps that they were made with."""

    def setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    torch.library.register_autograd(f"bertkern::{name}", lambda ctx, *grads: None, setup_context=setup)


_rounds("quantize_rows")
_rounds("qgemm_requantize")
