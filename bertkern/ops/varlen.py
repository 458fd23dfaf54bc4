"""Attention over packed sequences by the argument names that flash-attn made usual, on a CPU and on a GPU."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .. import _ops  # noqa: F401  (loads the operators)
from .arguments import explained
from .attention_triton import attention_cuda
from .block_sparse import FLOATS, _expect

OP = "attention_varlen"


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: dict[str, Tensor],
    tables: dict[str, Tensor | None],
    lengths: dict[str, int],
) -> None:
    """Shapes, dtypes and devices; never the data of a tensor."""
    _expect(OP, "q", "of shape [total_q, heads, head_dim]", list(q.shape), q.dim() == 3 and q.shape[2] > 0)
    _expect(OP, "q", f"of dtype {', '.join(map(str, FLOATS))}", q.dtype, q.dtype in FLOATS)
    for name, x in {"k": k, "v": v}.items():
        expected = f"of q's shape {list(q.shape)}, as there is no attention to other sequences or by grouped queries"
        _expect(OP, name, expected, list(x.shape), x.shape == q.shape)
        _expect(OP, name, f"of q's dtype {q.dtype}", x.dtype, x.dtype == q.dtype)
    for name, x in {"k": k, "v": v, **ends, **{name: x for name, x in tables.items() if x is not None}}.items():
        _expect(OP, name, f"on q's device {q.device}", x.device, x.device == q.device)
    sequences = ends["cu_seqlens_q"].numel() - 1
    for name, x in ends.items():
        said = f"{x.dtype} of shape {list(x.shape)}"
        _expect(
            OP, name, "int32 of shape [sequences + 1]", said, x.dtype == torch.int32 and x.dim() == 1 and len(x) > 0
        )
        _expect(OP, name, f"of as many sequences as cu_seqlens_q, {sequences}", len(x) - 1, len(x) - 1 == sequences)
    for name, length in lengths.items():
        _expect(OP, name, "0 or more", length, length >= 0)
    heads, (longest, also) = q.shape[1], lengths.values()
    _expect(OP, "max_seqlen_k", f"as max_seqlen_q, {longest}", also, also == longest)
    counts, mask, bias = tables["seqused_k"], tables["head_mask"], tables["bias"]
    if counts is not None:
        said = f"{counts.dtype} of shape {list(counts.shape)}"
        fits = counts.dtype == torch.int32 and list(counts.shape) == [sequences]
        _expect(OP, "seqused_k", f"int32 of shape [sequences] = [{sequences}]", said, fits)
    if mask is not None:
        expected = f"of dtype torch.bool, {', '.join(map(str, FLOATS[:3]))} or q's"
        _expect(OP, "head_mask", expected, mask.dtype, mask.dtype in (torch.bool, *FLOATS[:3], q.dtype))
        got, expected = list(mask.shape), f"of shape [sequences, heads] = [{sequences}, {heads}] or [{heads}]"
        _expect(OP, "head_mask", expected, got, got in ([sequences, heads], [heads]))
    if bias is not None:
        expected = f"of dtype {', '.join(map(str, FLOATS[:3]))} or q's"
        _expect(OP, "bias", expected, bias.dtype, bias.dtype in (*FLOATS[:3], q.dtype))
        got, whole = list(bias.shape), [sequences, heads, longest, longest]
        fits = len(got) == 4 and all(size in (1, full) for size, full in zip(got, whole, strict=True))
        expected = f"that broadcasts to [sequences, heads, max_seqlen_q, max_seqlen_k] = {whole}"
        _expect(OP, "bias", expected, f"shape {got}", fits)


def _check_values(q: Tensor, ends: Tensor, others: Tensor, counts: Tensor | None, longest: int) -> None:
    """What the tables say: on a CPU, where looking costs nothing."""
    said, also = ends.tolist(), others.tolist()
    lengths = [end - begin for begin, end in pairwise(said)]
    fits = said[0] == 0 and min(lengths, default=0) >= 0 and said[-1] == q.shape[0]
    _expect(OP, "cu_seqlens_q", f"to rise from 0 to q's {q.shape[0]} tokens", said, fits)
    expected = f"as cu_seqlens_q, {said}, as queries and keys are of the same tokens"
    _expect(OP, "cu_seqlens_k", expected, also, also == said)
    most = max(lengths, default=0)
    _expect(OP, "max_seqlen_q", f"{most} or more, as the longest sequence has", longest, longest >= most)
    if counts is not None:
        used = counts.tolist()
        fits = all(0 <= count <= length for count, length in zip(used, lengths, strict=True))
        _expect(OP, "seqused_k", f"from 0 to the sequences' lengths {lengths}", used, fits)


@explained
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = True,
    *,
    seqused_k: Tensor | None = None,
    head_mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(softmax_scale q k^T + bias) v of each sequence, for sequences packed one after another.

    Takes what `flash_attn_varlen_func` takes, where a sequence attends to itself by as many key as query heads, and
    head masks and biases beside it. On a CPU it is `attention`, on a GPU `attention_cuda`: heads that a mask hides are
    not computed, nobody asks the GPU for lengths, a sequence's result does not depend on the others, and gradients
    reach q, k, v, head_mask and bias, the same at every run.

    Args:
        q, k, v: [total, heads, head_dim], fp32, bf16 or fp16 (fp64 in plain PyTorch); any strides, so views of one
            projection are taken as they are.
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], equal: sequence b is the tokens cu_seqlens_q[b] ..
            cu_seqlens_q[b + 1], of which the last end at `total`.
        max_seqlen_q, max_seqlen_k: equal; no sequence is longer.
        dropout_p, window_size, softcap: at their defaults alone: there is no dropout, no window and no cap.
        softmax_scale: 1 / sqrt(head_dim) by default.
        causal: whether a query sees no keys after its own position.
        deterministic: taken for flash-attn's sake; gradients have the same bits at every run, whatever it says.
        seqused_k: int32 [sequences]: only so many first tokens of a sequence are keys. On a GPU they become a bias.
        head_mask: [sequences, heads] or [heads], float or bool: 0 skips a head, which gives zeros; another factor
            scales what it gives.
        bias: float, added to the scores by the positions in a sequence; broadcasts to [sequences, heads, max_seqlen_q,
            max_seqlen_k]. -inf hides a key.

    Returns:
        [total, heads, head_dim] in q's dtype. A query that sees no key gives zeros.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, keys of other sequences than the queries', what is
            not supported. On a CPU also what the tables say; on a GPU, where looking would be waiting, sequences that
            do not rise give numbers of no meaning, tokens of none give zeros, and only cu_seqlens_q is read.

    Example:
        >>> q, k, v = torch.randn(3, 7, 12, 64).unbind()
        >>> ends = torch.tensor([0, 4, 7], dtype=torch.int32)
        >>> attention_varlen(q, k, v, ends, ends, 4, 4).shape
        torch.Size([7, 12, 64])
    """
    _expect(OP, "dropout_p", "0", dropout_p, dropout_p == 0)
    fits = isinstance(window_size, (tuple, list)) and tuple(window_size) == (-1, -1)
    _expect(OP, "window_size", "(-1, -1), no window", window_size, fits)
    _expect(OP, "softcap", "0, no cap", softcap, softcap == 0)
    fits = softmax_scale is None or 0 < softmax_scale < float("inf")
    _expect(OP, "softmax_scale", "above 0, or None for 1 / sqrt(head_dim)", softmax_scale, fits)
    ends = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    tables = {"seqused_k": seqused_k, "head_mask": head_mask, "bias": bias}
    _check(q, k, v, ends, tables, {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k})
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(q, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q)
    if q.device.type != "cpu" or q.dtype == torch.float64:
        bias = _hiding(bias, seqused_k, max_seqlen_k)
        return attention_cuda(
            q, k, v, cu_seqlens_q, max_seqlen_q, head_mask=head_mask, bias=bias, causal=causal, scale=softmax_scale
        )
    sequences = cu_seqlens_q.shape[0] - 1
    if head_mask is not None:
        head_mask = head_mask.float().expand(sequences, -1)
    if bias is not None:
        bias = bias.float().expand(-1, -1, max_seqlen_q, max_seqlen_k)
    scale = 0.0 if softmax_scale is None else softmax_scale
    return torch.ops.bertkern.attention(q, k, v, cu_seqlens_q, seqused_k, bias, head_mask, scale, causal)


def _hiding(bias: Tensor | None, counts: Tensor | None, length: int) -> Tensor | None:
    """The bias with -inf at the keys from each sequence's count on."""
    if counts is None:
        return bias
    late = torch.arange(length, device=counts.device) >= counts[:, None]
    hidden = torch.zeros_like(late, dtype=torch.float32).masked_fill(late, -torch.inf)[:, None, None]
    return hidden if bias is None else bias + hidden.to(bias.dtype)
