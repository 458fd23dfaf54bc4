"""The scales and zero points that fit given codes best."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .grids import Grids

# Of the diagonal: where all codes of a group are equal, its scale and its offset do the same.
RIDGE = 1e-4
# A scale that would shrink to less than this share of what it was belongs to codes that say little: it stays.
LEAST = 0.1


def refit(weight: Tensor, codes: Tensor, grids: Grids, moments: Tensor, shared: bool = False) -> Grids:
    """Grids of the least tr((W - Q) M (W - Q)') for the codes: a linear problem in scale and offset of the groups.

    Args:
        weight, codes: fp32 [N, K].
        moments: M, fp32 [K, K].
        shared: along "k": one grid a group for all rows.
    """
    n, k = weight.shape
    along_k = grids.axis == "k"
    size = grids.group_size if along_k else k
    # Codes about their middle, so that a group's scale and offset have little to do with each other.
    centred = codes - grids.spread(grids.zero if grids.symmetric else grids.top / 2)
    pull = (weight - grids.values(codes)) @ moments
    normal = torch.stack([_sums(part, size) for part in _products(centred, moments, size)], 1)
    right = _sums(pull * centred, size)
    if not grids.symmetric:
        ones = _sums(moments, size)
        cross = torch.einsum("ngs,gsh->ngh", _cut(centred, size), _cut(ones.T, size).permute(1, 2, 0))
        both = _sums(ones.T, size).expand(n, -1, -1)
        normal = torch.cat([torch.cat([normal, cross], 2), torch.cat([cross.transpose(1, 2), both], 2)], 1)
        right = torch.cat([right, _sums(pull, size)], 1)
    if not along_k:
        short = len(grids.scale) * grids.group_size - n
        normal = F.pad(normal, (0, 0, 0, 0, 0, short)).unflatten(0, (-1, grids.group_size)).sum(1)
        right = F.pad(right, (0, 0, 0, short)).unflatten(0, (-1, grids.group_size)).sum(1)
    elif shared:
        normal, right = normal.sum(0, keepdim=True), right.sum(0, keepdim=True)
    return _moved(grids, _solved(normal.double(), right.double()).float())


def _moved(grids: Grids, steps: Tensor) -> Grids:
    """The grids after steps [..., scales, and offsets beside them] of least squares."""
    # Along "n" a group stands in a row of its own, along "k" a row has them all.
    shape = (-1, 1) if grids.axis == "n" else grids.scale.shape
    scale, zero, middle = grids.scale.view(shape), grids.zero.view(shape), grids.top / 2
    middle = middle.view(-1, 1) if grids.axis == "n" else middle
    count = scale.shape[1]
    wanted = scale + steps[:, :count]
    moved = zero
    if not grids.symmetric:
        moved = middle - (scale * (middle - zero) + steps[:, count:]) / wanted
    # The solution is one of all groups of a row together.
    sound = (wanted > LEAST * scale).all(1, keepdim=True) & torch.isfinite(moved).all(1, keepdim=True)
    return grids.moved(
        torch.where(sound, wanted, scale).view(grids.scale.shape),
        torch.where(sound, moved, zero).view(grids.zero.shape),
    )


def _solved(normal: Tensor, right: Tensor) -> Tensor:
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    ridge = RIDGE * diagonal + torch.finfo(torch.float32).eps * diagonal.amax(-1, keepdim=True)
    ridge = ridge.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.linalg.solve(normal + torch.diag_embed(ridge), right.unsqueeze(-1)).squeeze(-1)


def _cut(x: Tensor, size: int) -> Tensor:
    """[..., K] as [..., G, size], zeros after its end."""
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def _sums(x: Tensor, size: int) -> Tensor:
    """The sum of each group: [..., K] to [..., G]."""
    return _cut(x, size).sum(-1)


def _products(codes: Tensor, moments: Tensor, size: int) -> Iterator[Tensor]:
    """For each group: codes [N, K] times their products with the group's own codes by way of M."""
    for start in range(0, codes.shape[1], size):
        here = slice(start, start + size)
        yield codes[:, here] @ moments[here] * codes
