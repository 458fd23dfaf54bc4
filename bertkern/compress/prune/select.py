"""Exactly as many of the smallest as asked, ties by position: a threshold alone would take too many or too few."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def ranks(scores: Tensor, gone: Tensor | None) -> Tensor:
    """Integers in the order of `scores`; what is `gone` already comes before all others.

    Args:
        scores: fp32, none below +0.0, no NaN; written over.
        gone: bool of the same shape.

    Returns:
        int32 of the same shape, from 0.
    """
    # Floats that are not negative are ordered as their bits are.
    keys = scores.view(torch.int32).add_(1)
    return keys if gone is None else keys.masked_fill_(gone, 0)


def smallest(keys: Sequence[Tensor], count: int) -> list[Tensor]:
    """Marks the `count` smallest of all `keys` together; of equal ones the first by tensor and position.

    Args:
        keys: int32 of any shapes, none negative.
        count: from 0 to the number of keys.

    Returns:
        A bool tensor for each of `keys`.

    Example:
        >>> smallest([torch.tensor([5, 2, 5, 1], dtype=torch.int32)], 3)[0].tolist()
        [True, True, False, True]
    """
    if count == 0:
        return [torch.zeros_like(k, dtype=torch.bool) for k in keys]
    last = _order_statistic(keys, count)
    marked = [k < last for k in keys]
    ties = count - sum(int(mark.sum()) for mark in marked)
    for key, mark in zip(keys, marked, strict=True):
        if ties > 0:
            positions = (key.flatten() == last).nonzero().flatten()[:ties]
            mark.view(-1)[positions] = True
            ties -= len(positions)
    return marked


def smallest_in_groups(keys: Tensor, group: int, count: int) -> Tensor:
    """Marks the `count` smallest of each `group` neighbours in a row of `keys`, of equal ones the first.

    Args:
        keys: int32 [N, K], none negative. A last group that is shorter counts as filled up with marked ones.

    Returns:
        bool [N, K].
    """
    n, k = keys.shape
    groups = F.pad(keys, (0, -k % group), value=-1).view(n, -1, group)
    order = groups.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).view(n, -1)[:, :k].contiguous()


def _order_statistic(keys: Sequence[Tensor], count: int) -> int:
    """The `count`-th smallest of all keys, by two histograms: no copy of all keys, and no sorting."""
    high = sum(torch.bincount((k >> 16).flatten(), minlength=1 << 15).cpu() for k in keys)
    bin_, below = _bin_of(high, count)
    low = sum(torch.bincount(k[(k >> 16) == bin_] & 0xFFFF, minlength=1 << 16).cpu() for k in keys)
    return bin_ << 16 | _bin_of(low, count - below)[0]


def _bin_of(counts: Tensor, rank: int) -> tuple[int, int]:
    """(the bin that holds the element of `rank`, from 1; how many lie in the bins before)."""
    up_to = counts.cumsum(0)
    bin_ = int(torch.searchsorted(up_to, rank))
    return bin_, int(up_to[bin_] - counts[bin_])
