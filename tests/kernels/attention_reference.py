"""The plain formula of attention over packed sequences, in float64, one sequence at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    *,
    head_mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    heads: Sequence[int] | None = None,
) -> Tensor:
    """[T, H, d] in float64; autograd gives its gradients. Tokens after the last sequence get zeros."""
    tokens, here, d = q.shape
    numbers = list(range(here)) if heads is None else list(heads)
    scale = d**-0.5 if scale is None else scale
    parts, begin = [], 0
    for number, length in enumerate(lengths):
        rows = slice(begin, begin + length)
        begin += length
        queries, keys, values = (x[rows].double().transpose(0, 1) for x in (q, k, v))
        score = queries @ keys.transpose(-1, -2) * scale
        if bias is not None:
            own = bias[min(number, bias.shape[0] - 1)].double()
            score = score + own[[min(n, bias.shape[1] - 1) for n in numbers], :length, :length]
        if causal:
            score = score.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        hidden = (score == float("-inf")).all(-1, keepdim=True)
        weight = score.masked_fill(hidden, 0).softmax(-1).masked_fill(hidden, 0)
        context = weight @ values
        if head_mask is not None:
            own = head_mask[number] if head_mask.dim() == 2 else head_mask
            context = context * own[numbers].double()[:, None, None]
        parts.append(context.transpose(0, 1))
    parts.append(torch.zeros(tokens - begin, here, d, dtype=torch.float64))
    return torch.cat(parts)
