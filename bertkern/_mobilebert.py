"""MobileBERT's operators in plain PyTorch, which a backward pass differentiates; see `_gradients`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._gradients import (
    _ACTIVATIONS,
    _add_layernorm,
    _define_from,
    _differentiable,
    _encoder_attention,
    _Padding,
    _scaled,
    _unpacked,
)

# Linears of a layer but for those of its feed-forwards, by its bottlenecks: none, input, shared, all.
FIXED = (4, 6, 7, 6)
# Norms of a layer but for those of its feed-forwards.
FIXED_NORMS = (1, 3, 4, 3)


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float | None) -> Tensor:
    return x * weight.float() + bias.float() if eps is None else _add_layernorm(x, None, weight, bias, eps)


def _encoder_from(
    x: Tensor,
    mask: Tensor | None,
    linears: Sequence[Tensor],
    norms: Tensor,
    eps: Tensor | None,
    made_from: Sequence[Tensor],
    heads: Sequence[int],
    bottleneck: int,
    activation: int,
    keep_padding: bool,
    all_hidden_states: bool,
    empty_attends: bool,
    exact_attention: bool = False,
    head_mask: Tensor | None = None,
    packed: bool = False,
) -> Tensor:
    x, padding = x.float(), _Padding(mask, keep_padding, empty_attends)
    x, scores = padding.without(x), padding.scores(None)
    count = len(linears) // len(heads)
    floors = [None] * (len(made_from) // len(heads) // 2 - count) if eps is None else eps.tolist()
    each, states = 2 * (count + len(floors)), []
    factors = [None] * len(heads) if head_mask is None else head_mask.split(list(heads), 1)
    for i, heads_here in enumerate(heads):
        tensors = list(made_from[each * i : each * (i + 1)])
        pairs = iter(
            (weight.float(), bias.float() if bias.numel() else None) if weight.numel() else _unpacked(blob)
            for blob, weight, bias in zip(
                linears[count * i : count * (i + 1)],
                tensors[0 : 2 * count : 2],
                tensors[1 : 2 * count : 2],
                strict=True,
            )
        )
        norm = iter(zip(tensors[2 * count :: 2], tensors[2 * count + 1 :: 2], floors, strict=True))
        a = s = x
        if bottleneck:
            a = _norm(F.linear(x, *next(pairs)), *next(norm))
        if bottleneck == 2:
            s = _norm(F.linear(x, *next(pairs)), *next(norm))
        query_key, value = ((x, x), (x, x), (s, x), (a, a))[bottleneck]
        q, k = F.linear(query_key, *next(pairs)), F.linear(query_key, *next(pairs))
        context = _encoder_attention(q, k, F.linear(value, *next(pairs)), heads_here, scores)
        context = _scaled(padding.heard(context), heads_here, factors[i])
        a = _norm(F.linear(context, *next(pairs)) + a, *next(norm))
        for _ in range((count - FIXED[bottleneck]) // 2):
            inner = _ACTIVATIONS[activation](F.linear(a, *next(pairs)))
            a = _norm(F.linear(inner, *next(pairs)) + a, *next(norm))
        x = _norm(F.linear(a, *next(pairs)) + x, *next(norm)) if bottleneck else a
        states.append(x)
    out = torch.stack(states) if all_hidden_states else x
    return padding.packed(out) if packed else padding.without(out)


def _encoder(
    x: Tensor,
    mask: Tensor | None,
    linears: Sequence[Tensor],
    norms: Tensor,
    eps: Tensor | None,
    heads: Sequence[int],
    bottleneck: int,
    activation: int,
    keep_padding: bool = False,
    all_hidden_states: bool = False,
    empty_attends: bool = False,
    exact_attention: bool = False,
    head_mask: Tensor | None = None,
    packed: bool = False,
) -> Tensor:
    nothing, count = torch.empty(0), len(linears) // len(heads)
    inside = FIXED_NORMS[bottleneck] + (count - FIXED[bottleneck]) // 2 - (bottleneck > 0)
    made_from = []
    for row in norms:
        width = (len(row) - 2 * x.shape[-1] * (bottleneck > 0)) // (2 * inside)
        sizes = [width] * (2 * inside) + [x.shape[-1]] * (2 * (bottleneck > 0))
        made_from += [*[nothing] * (2 * count), *row.split(sizes)]
    flags = (keep_padding, all_hidden_states, empty_attends, exact_attention, head_mask, packed)
    return _encoder_from(x, mask, linears, norms, eps, made_from, heads, bottleneck, activation, *flags)


def _trigram_embed_from(
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    scales: Sequence[Tensor],
    packed: Tensor,
    made_from: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float | None,
    trigram: bool,
    out_dtype: torch.dtype | None,
    padding: Sequence[int],
) -> Tensor:
    rows = []
    for index, table, scale, skip in zip(ids, tables, scales, padding, strict=True):
        found = F.embedding(index, table, None if skip < 0 else skip).float()
        rows.append(found * (scale if scale.numel() == 1 else scale[index].unsqueeze(-1)))
    x = rows[0]
    if trigram:
        x = torch.cat([F.pad(x[:, 1:], (0, 0, 0, 1)), x, F.pad(x[:, :-1], (0, 0, 1, 0))], dim=2)
    if packed.numel():
        own = [tensor.float() if tensor.numel() else None for tensor in made_from]
        x = F.linear(x, *(_unpacked(packed) if own[0] is None else own))
    for row in rows[1:]:
        x = x + row
    return _norm(x, weight, bias, eps)


def _trigram_embed(
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    scales: Sequence[Tensor],
    packed: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float | None = None,
    trigram: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    nothing = torch.empty(0)
    linear = (nothing if packed is None else packed, [nothing] * 2)
    return _trigram_embed_from(ids, tables, scales, *linear, weight, bias, eps, trigram, out_dtype, [-1] * len(ids))


def _trigram_embed_fused(ids: Any, tables: Any, scales: Any, packed: Tensor, *others: Any) -> Tensor:
    linear = packed if packed.numel() else None
    return torch.ops.bertkern.trigram_embed.default(ids, tables, scales, linear, *others[1:-1])


_differentiable("mobilebert_encoder", _encoder)
_differentiable("trigram_embed", _trigram_embed)
_define_from(
    "mobilebert_encoder_from",
    "Tensor x, Tensor? mask, Tensor[] linears, Tensor norms, Tensor? eps, Tensor[] made_from, int[] heads, "
    "int bottleneck, int activation, bool keep_padding, bool all_hidden_states, bool empty_attends, "
    "bool exact_attention=False, Tensor? head_mask=None, bool packed=False",
    lambda *arguments: torch.ops.bertkern.mobilebert_encoder.default(*arguments[:5], *arguments[6:]),
    _encoder_from,
    owner="norms",
)
_define_from(
    "trigram_embed_from",
    "Tensor[] ids, Tensor[] tables, Tensor[] scales, Tensor packed, Tensor[] made_from, Tensor weight, Tensor bias, "
    "float? eps, bool trigram, ScalarType? out_dtype, int[] padding",
    _trigram_embed_fused,
    _trigram_embed_from,
    owner="packed",
)
