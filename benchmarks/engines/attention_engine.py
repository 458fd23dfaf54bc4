"""Attention alone: bertkern's operator beside torch's fused one and the formula, each on the layout it likes best.

Every provider draws the same q, k, v from a case's shape; they are bf16 numbers, the same in each data type.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from .. import peak
from . import Engine


def draw(lengths: list[int], tokens: int, heads: int, head_dim: int) -> torch.Tensor:
    """q, k and v, normally distributed, zeros after a sequence's end; fp32 [3, B, H, L, d], the same everywhere."""
    shape = (3, len(lengths), heads, tokens, head_dim)
    rng = np.random.default_rng([*lengths, heads, head_dim])
    data = torch.from_numpy(rng.standard_normal(shape, np.float32)).bfloat16().float()
    return data * real(lengths, tokens)[:, None, :, None]


def real(lengths: list[int], tokens: int) -> torch.Tensor:
    """Which positions are tokens; bool [B, L]."""
    return torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]


class Attention(Engine):
    """Base: data and the form of outputs.

    Subclasses define `feed(q, k, v, lengths) -> anything`, done outside the timing, `call(fed) -> context`, and
    `padded(context) -> [B, H, L, d]`.
    """

    packages = ("torch",)
    dtype = torch.float32

    def __init__(self, threads: int):
        super().__init__()
        torch.set_num_threads(threads)

    def prepare(self, lengths: list[int], tokens: int, heads: int, head_dim: int, kept: int, masked: bool) -> None:
        """Sequences of `lengths` in [B, tokens]; the first `kept` of the heads count, others are gone or `masked`."""
        self.all_heads, self.kept, self.masked = heads, kept, masked
        self.real = real(lengths, tokens)
        if masked and not self.masks():
            raise ValueError("has no head masks")
        data = draw(lengths, tokens, heads, head_dim)[:, :, : heads if masked else kept]
        self.fed = self.feed(*(part.to(self.dtype).contiguous() for part in data), lengths)

    def masks(self) -> bool:
        """Whether heads can be masked at run time."""
        return False

    def run(self) -> None:
        with torch.inference_mode():
            self.call(self.fed)

    def outputs(self) -> dict[str, np.ndarray]:
        """[B, L, H * d], zeros for heads that do not count."""
        with torch.inference_mode():
            context = self.padded(self.call(self.fed)).float()
        context = torch.nn.functional.pad(context, (0, 0, 0, 0, 0, self.all_heads - context.shape[1]))
        return {"context": context.transpose(1, 2).flatten(2).numpy(), "mask_context": self.real.numpy()}

    def feed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> Any:
        raise NotImplementedError

    def call(self, fed: Any) -> torch.Tensor:
        raise NotImplementedError

    def padded(self, context: torch.Tensor) -> torch.Tensor:
        return context


class Packed(Attention):
    """bertkern.ops.attention: the tokens of all sequences one after another, no padding."""

    def __init__(self, threads: int):
        super().__init__(threads)
        from bertkern import ops

        self.attention = ops.attention
        self.notes["isa"] = peak.isa()

    def versions(self) -> dict[str, str]:
        import bertkern

        return {"bertkern": bertkern.__version__, **super().versions()}

    def masks(self) -> bool:
        return True

    def feed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> Any:
        packed = [part.transpose(1, 2)[self.real].contiguous() for part in (q, k, v)]
        starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        mask = None
        if self.masked:
            mask = (torch.arange(self.all_heads) < self.kept).float().expand(len(lengths), -1).contiguous()
        return packed, starts, mask

    def call(self, fed: Any) -> torch.Tensor:
        packed, starts, mask = fed
        return self.attention(*packed, starts, head_mask=mask)

    def padded(self, context: torch.Tensor) -> torch.Tensor:
        out = context.new_zeros(*self.real.shape, *context.shape[1:])
        out[self.real] = context
        return out.transpose(1, 2)


class PackedBf16(Packed):
    dtype = torch.bfloat16


class Sdpa(Attention):
    """torch's fused attention on [B, H, L, d]; with a mask of keys only where there is padding."""

    def feed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> Any:
        mask = None if self.real.all() else self.real[:, None, None, :]
        return q, k, v, mask

    def call(self, fed: Any) -> torch.Tensor:
        q, k, v, mask = fed
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)


class SdpaBf16(Sdpa):
    dtype = torch.bfloat16


class Formula(Sdpa):
    """Matrix products and a softmax between, as the eager attention of transformers writes it."""

    def call(self, fed: Any) -> torch.Tensor:
        q, k, v, mask = fed
        scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), v)


class FormulaBf16(Formula):
    dtype = torch.bfloat16


class Reference(Attention):
    """The formula in float64, head by head: that of the tests in a checkout, else this file's own."""

    def __init__(self, threads: int):
        super().__init__(threads)
        self.layer: tuple[Any, ...] | None = None

    def prepare(self, lengths: list[int], tokens: int, heads: int, head_dim: int, kept: int, masked: bool) -> None:
        """All heads are computed, once a layer."""
        layer = (lengths, tokens, heads, head_dim)
        if layer != self.layer:
            super().prepare(*layer, kept=heads, masked=False)
            self.layer, self.context = layer, self.call(self.fed)
        self.kept = kept

    def outputs(self) -> dict[str, np.ndarray]:
        left = (torch.arange(self.all_heads) < self.kept)[:, None, None]
        context = (self.context * left).transpose(1, 2).flatten(2)
        return {"context": context.numpy(), "mask_context": self.real.numpy()}

    def feed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> Any:
        return q, k, v, lengths

    def call(self, fed: Any) -> torch.Tensor:
        q, k, v, lengths = fed
        out, formula = torch.zeros_like(q), _formula()
        for b, length in enumerate(lengths):
            for h in range(q.shape[1]):
                one = (part[b, h, :length, None] for part in (q, k, v))
                out[b, h, :length] = formula(*one, [0, length])[:, 0].float()
        return out


def _formula() -> Any:
    try:
        from tests.reference import packed_attention
    except ImportError:  # an installation has no tests
        return _in_float64
    return packed_attention


def _in_float64(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: list[int]) -> torch.Tensor:
    q, k, v = (part[:, 0].double() for part in (q, k, v))
    return ((q @ k.T * q.shape[-1] ** -0.5).softmax(-1) @ v)[:, None]
