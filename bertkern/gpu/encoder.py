"""A stack of post-LayerNorm transformer layers over packed rows: the formula is that of csrc/cpu/encoder/encoder.h.

    c = factor softmax(q k^T / sqrt(d) + bias) v      q, k, v = x Wq^T + bq, ...      per head of each sequence
    y = LayerNorm(c Wo^T + bo + x)
    x = LayerNorm(act(y W1^T + b1) W2^T + b2 + y)

Hidden states have the dtype of x between the layers; LayerNorm, softmax and sums are fp32. Seven operators a
layer where its weights are int8: the codes of what comes next are made where a row is complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.attention_packed import attention_packed_cuda
from .linears import Linear, joined
from .packing import Packing
from .rows import Grid, Norm, Rows


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's weights.

    Attributes:
        projections: of queries, keys and values, or one of all three, side by side.
        heads: how many there are.
    """

    projections: tuple[Linear, ...]
    out: Linear
    ffn1: Linear
    ffn2: Linear
    attention_norm: Norm
    output_norm: Norm
    heads: int

    @classmethod
    def of(cls, linears: Sequence[Linear], norms: Sequence[Norm], heads: int) -> Layer:
        """Of query, key, value, out, ffn1 and ffn2, and of the attention's and the output's norm."""
        together = joined(linears[:3])
        projections = tuple(linears[:3]) if together is None else (together,)
        return cls(projections, *linears[3:], *norms, heads)

    @property
    def grid(self) -> Grid | None:
        """The grid on which its rows are wanted."""
        return self.projections[0].grid

    def attention_dtype(self, dtype: torch.dtype, exact: bool) -> torch.dtype:
        """In which dtype attention computes: beside fp32 hidden states in bf16, as on the CPU, where no projection is
        more exact itself."""
        if dtype != torch.float32 or exact or any(linear.exact for linear in self.projections):
            return dtype
        return torch.bfloat16

    def project(self, x: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [T, heads, d]."""
        made = [linear(x, dtype) for linear in self.projections]
        q, k, v = made[0].chunk(3, dim=1) if len(made) == 1 else made
        return tuple(part.unflatten(1, (self.heads, -1)) for part in (q, k, v))


def encode(
    layers: Sequence[Layer],
    activation: int,
    x: Tensor,
    packing: Packing,
    *,
    bias: Tensor | None = None,
    head_mask: Tensor | None = None,
    exact_attention: bool = False,
    every: bool = False,
) -> list[Tensor]:
    """The packed rows after the last layer, or after each, [B * L, H].

    Args:
        activation: of the feed-forward layers, see bertkern.nn.activations.
        x: hidden states [B, L, H], fp32, bf16 or fp16.
        bias: added to scores, [1 or B, 1 or heads, L, L]; only where `packing` leaves every row in its place.
        head_mask: fp32 [1 or B, heads of all layers]; heads with 0 are not computed.
        exact_attention: whether attention is never computed in less than x's dtype.
        every: whether the rows after each layer are wanted.
    """
    batch, dtype, live = x.shape[0], x.dtype, packing.live
    rows = Rows(packing.pack(x), live)
    factors = [None] * len(layers)
    if head_mask is not None:
        factors = head_mask.expand(batch, -1).split([layer.heads for layer in layers], 1)
    quiet = None if packing.silent is None else _rows_of_sequences(packing, packing.silent, rows.values.shape[0])
    made = []
    for number, layer in enumerate(layers):
        q, k, v = layer.project(rows, layer.attention_dtype(dtype, exact_attention))
        if quiet is not None:
            # Queries of zeros attend evenly.
            q = torch.where(quiet[:, None, None], 0, q)
        context = attention_packed_cuda(
            q, k, v, packing.ends, packing.length, counts=packing.keys, head_mask=factors[number], bias=bias
        )
        y = layer.out(Rows(context.flatten(1), live), dtype)
        rows = layer.attention_norm(y, rows.values, live, layer.ffn1.grid)
        inner = layer.ffn1.chained(rows, dtype, activation, layer.ffn2)
        y = layer.ffn2(inner, dtype)
        grid = layers[number + 1].grid if number + 1 < len(layers) else None
        rows = layer.output_norm(y, rows.values, live, grid)
        if every or number + 1 == len(layers):
            made.append(rows.values)
    return made


def _rows_of_sequences(packing: Packing, chosen: Tensor, rows: int) -> Tensor:
    """bool [rows]: which packed rows belong to the chosen sequences, bool [B]."""
    row = torch.arange(rows, dtype=torch.int32, device=chosen.device)
    sequence = torch.searchsorted(packing.ends[1:].contiguous(), row, right=True)
    return chosen[sequence.clamp(max=chosen.shape[0] - 1)]
