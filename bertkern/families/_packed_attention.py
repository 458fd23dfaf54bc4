"""The attention kernel behind transformers' attention interface: batches as packed sequences, masks of every form."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _ops  # noqa: F401  (loads the operators)
from ..nn.head_masks import check_batch
from ..nn.linear import FLOATS
from ..nn.packing import lean

_attention = lean(torch.ops.bertkern.attention.default)
# The kernel scales a bias; beside this one every score vanishes, and it stays finite.
_LOWEST = torch.finfo(torch.float32).min / 2


class _Keys(NamedTuple):
    """Which positions of a batch are keys.

    Attributes:
        counts: int64 [B], how many each sequence has.
        order: int64 [B * L], positions with each sequence's keys first; None: they are.
        back: the inverse of `order`.
    """

    counts: Tensor
    order: Tensor | None = None
    back: Tensor | None = None


def takes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    options: Mapping[str, Any],
) -> bool:
    """Whether the kernel computes this: self-attention on the CPU, without dropout, of as many key heads as heads.

    Args:
        query, key, value: [B, heads, L, d].
        mask: None, bool [B, L], or bool or additive [1 or B, 1 or heads, 1 or L, L].
        options: further keywords of transformers' attention functions.
    """
    if not (query.is_cpu and key.is_cpu and value.is_cpu) or torch.jit.is_tracing():
        return False
    same = query.shape == key.shape == value.shape and query.dtype == key.dtype == value.dtype
    if not same or query.dtype not in FLOATS or dropout:
        return False
    if scaling is not None and (not isinstance(scaling, (int, float)) or not scaling > 0):
        return False
    if any(options.get(name) is not None for name in ("cache", "softcap", "s_aux")):
        return False
    batch, heads, length, _ = query.shape
    tables = [table for table in (mask, options.get("position_bias")) if table is not None]
    return all(_fits(table, batch, heads, length) for table in tables)


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    position_bias: Tensor | None,
    factors: Tensor | None,
    scaling: float | None,
    causal: bool,
) -> Tensor:
    """Attention of what `takes` lets pass: [B, L, heads, d].

    A query that may attend to nothing gets zeros; one all of whose keys have the lowest value attends evenly to them.

    Args:
        factors: of the heads, [1 or B, heads]; one with 0 is not computed.
    """
    batch, heads, length, size = query.shape
    keys, bias = None, None
    if mask is not None and position_bias is None:
        padding = _padding(mask, batch)
        if padding is None:
            bias = _bias(mask, length)
        else:
            keys = _keys(padding)
    elif position_bias is not None:
        bias = _bias(position_bias if mask is None else _both(mask, position_bias), length)
    q, k, v = (x.transpose(1, 2).reshape(batch * length, heads, size) for x in (query, key, value))
    if keys is not None and keys.order is not None:
        q, k, v = (x.index_select(0, keys.order) for x in (q, k, v))
    if factors is not None:
        check_batch(factors, batch)
        factors = factors.to("cpu", torch.float32).expand(batch, heads)
    starts = torch.arange(batch + 1) * length
    counts = None if keys is None else keys.counts
    y = _attention(q, k, v, starts, counts, bias, factors, 0.0 if scaling is None else float(scaling), causal)
    if keys is not None and keys.back is not None:
        y = y.index_select(0, keys.back)
    return y.view(batch, length, heads, size)


def _fits(table: Tensor, batch: int, heads: int, length: int) -> bool:
    if not table.is_cpu:
        return False
    if table.dim() == 2:
        return table.dtype == torch.bool and table.shape[0] == batch and table.shape[1] == length
    return (
        table.dim() == 4
        and (table.dtype == torch.bool or table.is_floating_point())
        and table.shape[0] in (1, batch)
        and table.shape[1] in (1, heads)
        and table.shape[2] in (1, length)
        and table.shape[3] == length
    )


def _padding(mask: Tensor, batch: int) -> Tensor | None:
    """The keys, bool [B, L], if `mask` is bool and the same for all heads and queries."""
    if mask.dim() == 2:
        return mask
    same = mask.shape[1] == 1 and (mask.shape[2] == 1 or mask.stride(2) == 0)
    return mask[:, 0, 0].expand(batch, -1) if same and mask.dtype == torch.bool else None


def _keys(padding: Tensor) -> _Keys | None:
    """Where the keys of bool [B, L] are; None: everywhere."""
    if torch.compiler.is_compiling():
        return _reordered(padding)
    if bool(padding.all()):
        return None
    counts = padding.sum(1)
    first = torch.arange(padding.shape[1]) < counts[:, None]
    return _Keys(counts) if torch.equal(first, padding) else _reordered(padding)


def _reordered(padding: Tensor) -> _Keys:
    batch, length = padding.shape
    starts = torch.arange(batch)[:, None] * length
    # Stable: a sequence's keys keep their order, and its sums theirs.
    order = ((~padding).to(torch.uint8).argsort(dim=1, stable=True) + starts).flatten()
    back = torch.empty_like(order).scatter(0, order, torch.arange(batch * length))
    return _Keys(padding.sum(1), order, back)


def _both(mask: Tensor, position_bias: Tensor) -> Tensor:
    mask = mask[:, None, None] if mask.dim() == 2 else mask
    if mask.dtype != torch.bool:
        return mask + position_bias
    return torch.where(mask, position_bias, torch.finfo(position_bias.dtype).min)


def _bias(mask: Tensor, length: int) -> Tensor:
    """What is added to the scores, fp32 [1 or B, 1 or heads, L, L]."""
    if mask.dtype == torch.bool:
        made = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    else:
        mask = mask.float()
        made = torch.where(mask == -torch.inf, mask, mask.clamp(min=_LOWEST))
    return made.expand(-1, -1, length, length)
