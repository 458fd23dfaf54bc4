"""Padding left out without a word to the host: how many tokens there are stays on the device.

Shapes are those of the padded batch: of B * L rows the tokens come first, one sequence after another, and the rows past
the last are zeros that nobody reads. So one CUDA graph of a batch and a length serves every mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.rowwise_triton import ALL, NONE, UP_TO_LAST, arrange_cuda, gather_rows_cuda


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the rows of a padded batch [B, L] stand.

    Attributes:
        length: L.
        ends: int32 [B + 1], where each sequence begins.
        source, place: as of `arrange_cuda`; None: every row stays where it is.
        keys: int32 [B], how many of a sequence's rows, the first ones, are keys; None: all.
        live: int32 [1], how many rows there are; None: all.
        silent: bool [B], the sequences without a token that attend evenly to all their positions; None: there are none
            that do.
        shown: bool [B, L], of rows that stay where they are: which come back; the others come back as zeros. None: all.
    """

    length: int
    ends: Tensor
    source: Tensor | None = None
    place: Tensor | None = None
    keys: Tensor | None = None
    live: Tensor | None = None
    silent: Tensor | None = None
    shown: Tensor | None = None

    def pack(self, x: Tensor) -> Tensor:
        """x [B, L, H] as rows [B * L, H]."""
        rows = x.reshape(-1, x.shape[-1])
        return rows if self.source is None else gather_rows_cuda(rows, self.source)

    def pad(self, rows: Tensor) -> Tensor:
        """The inverse of `pack`: [B, L, H], zeros where nothing was computed."""
        if self.place is not None:
            rows = gather_rows_cuda(rows, self.place)
        x = rows.view(-1, self.length, rows.shape[-1])
        return x if self.shown is None else torch.where(self.shown[..., None], x, 0)


def packing_of(
    mask: Tensor | None,
    x: Tensor,
    *,
    keep_padding: bool = False,
    empty_attends: bool = False,
    tokens_alone: bool = False,
) -> Packing:
    """The packing of x [B, L, H] under a bool mask [B, L].

    Args:
        keep_padding: whether all masked positions are computed; else those before a sequence's last token.
        empty_attends: whether a sequence without a token attends evenly to all its positions; else to nothing.
        tokens_alone: whether no masked position is computed.
    """
    if mask is None:
        return in_place(x)
    masked = NONE if tokens_alone else ALL if keep_padding else UP_TO_LAST
    source, place, ends, keys = arrange_cuda(mask, masked, empty_attends)
    silent = ~mask.any(1) if empty_attends else None
    return Packing(x.shape[1], ends, source, place, keys, ends[-1:], silent)


def in_place(x: Tensor, mask: Tensor | None = None, *, keep_padding: bool = False) -> Packing:
    """Every row of x [B, L, H] where it is; a bool mask [B, L] then says what comes back."""
    batch, length = x.shape[:2]
    if length:
        ends = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=x.device)
    else:
        ends = torch.zeros(batch + 1, dtype=torch.int32, device=x.device)
    shown = None
    if mask is not None and not keep_padding:
        # All up to the last token; of a sequence without one, all.
        behind = mask.flip(1).cumsum(1).flip(1) == 0
        shown = ~behind | ~mask.any(1, keepdim=True)
    return Packing(length, ends, shown=shown)
