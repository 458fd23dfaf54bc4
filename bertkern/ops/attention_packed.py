"""Attention of packed sequences of which only the first tokens are keys, for GPUs, without gradients.

    attention_packed_cuda    out = factor * softmax(scale q k^T + bias) v, a sequence and a head at a time

Masked positions whose hidden states are wanted follow a sequence's keys as queries alone. On CUDA it is the kernel
`attend` of kernels/attention_forward.py, or that of csrc/cuda/attention where it was found faster, elsewhere plain
PyTorch; see `attention_triton` for all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import attention_triton, providers
from .arguments import explained
from .block_sparse import _expect

OP = "attention_packed_cuda"


def _asked(
    cu_seqlens: Tensor, head_mask: Tensor | None, bias: Tensor | None, max_length: int, scale: float
) -> attention_triton._Asked:
    return attention_triton._Asked(cu_seqlens, head_mask, bias, None, max_length, False, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, counts: Tensor | None, asked: attention_triton._Asked) -> None:
    attention_triton._check(q, k, v, asked)
    if counts is not None:
        sequences = asked.cu_seqlens.shape[0] - 1
        said = f"{counts.dtype} of shape {list(counts.shape)}"
        fits = counts.dtype == torch.int32 and counts.shape == (sequences,)
        _expect(OP, "counts", f"int32 of shape [sequences] = [{sequences}]", said, fits)
        _expect(OP, "counts", f"on {q.device}", counts.device, counts.device == q.device)


def kind(q: Tensor) -> tuple[int, torch.dtype]:
    """By what a provider is chosen for a q [T, H, d]: d and dtype."""
    return q.shape[-1], q.dtype


def _plain(q: Tensor, k: Tensor, v: Tensor, counts: Tensor | None, asked: attention_triton._Asked) -> Tensor:
    if attention_triton._nothing(q, asked):
        return q.new_zeros(q.shape)
    if counts is not None:
        # What is no key is hidden, and its value zero: 0 x NaN is NaN.
        ends, row = asked.cu_seqlens, torch.arange(q.shape[0], device=q.device)
        sequence = torch.searchsorted(ends[1:].contiguous(), row.int(), right=True).clamp(max=counts.shape[0] - 1)
        key = row - ends[sequence] < counts[sequence]
        k, v = (torch.where(key[:, None, None], x, 0) for x in (k, v))
        position = torch.arange(asked.max_length, device=q.device)
        hidden = torch.zeros(counts.shape[0], asked.max_length, device=q.device)
        hidden = hidden.masked_fill(position >= counts[:, None], -torch.inf)[:, None, None]
        bias = hidden if asked.bias is None else asked.bias.float() + hidden
        asked = asked._replace(bias=bias)
    padded = attention_triton._padded(q, k, v, asked)
    return padded.pack(padded.scaled(padded.weight @ padded.v), q)


@torch.library.custom_op(
    f"bertkern::{OP}",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? counts, Tensor? head_mask, Tensor? bias, "
    "SymInt max_length, float scale) -> Tensor",
)
@attention_triton._as_it_is
def _attention(q, k, v, cu_seqlens, counts, head_mask, bias, max_length, scale):
    asked = _asked(cu_seqlens, head_mask, bias, max_length, scale)
    _check(q, k, v, counts, asked)
    if providers.provider(OP, q.device, kind(q)) == providers.CUDA and attention_triton._cuda_fits(q, scale):
        return attention_triton._cuda_forward(q, k, v, asked, counts)[0]
    found = attention_triton._triton_for(q)
    if found is None:
        return _plain(q, k, v, counts, asked)
    return found.attention(q, k, v, attention_triton._sequences(found, asked)._replace(counts=counts))[0]


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, counts: Tensor | None, *rest: Any) -> Tensor:
    _check(q, k, v, counts, _asked(cu_seqlens, *rest))
    return q.new_empty(q.shape)


@explained
def attention_packed_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    *,
    counts: Tensor | None = None,
    head_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """What `attention_cuda` computes, without gradients, where the first counts[b] tokens of sequence b are its keys.

    Args:
        q, k, v, cu_seqlens, max_length, scale: as of `attention_cuda`.
        counts: int32 [sequences]; None: all tokens are keys. What is no key is not read.
        head_mask: float [sequences, heads].
        bias: [1 or sequences, 1 or heads, max_length, max_length].

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
    """
    scale = max((1, *q.shape[-1:])) ** -0.5 if scale is None else scale
    return torch.ops.bertkern.attention_packed_cuda.default(
        q, k, v, cu_seqlens, counts, head_mask, bias, max_length, scale
    )
