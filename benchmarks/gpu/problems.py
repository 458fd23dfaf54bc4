"""What the providers of an operator are given: operands, the weight, and the result in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# N x K of the layers, by model.
LARGE = ((1024, 1024), (4096, 1024), (1024, 4096))
BASE = ((768, 768), (3072, 768), (768, 3072))
SEED = 2018


@dataclass(frozen=True)
class Case:
    """A point of an axis.

    Attributes:
        op: gemm, sparse, groupwise, attention or rowwise.
        x: its name on the axis.
        sizes: what `make` takes.
        cold: whether weights rotate.
        compiled: whether torch.compile takes part, which takes its time.
    """

    op: str
    x: str
    sizes: dict[str, Any]
    cold: bool = False
    compiled: bool = False


@dataclass
class Problem:
    """The tensors of a case; `expected` is in float64, `macs` and `bytes` are those of a dense provider."""

    case: Case
    device: str
    given: dict[str, Any]
    expected: Tensor
    macs: float
    bytes: float
    facts: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["given"][name]
        except KeyError:
            raise AttributeError(name) from None


def _linear_of(m: int, n: int, k: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(SEED)
    x = torch.randn(m, k, device=device)
    return x, torch.randn(n, k, device=device) * k**-0.5, torch.randn(n, device=device) * 0.1


def gemm(case: Case, device: str, m: int, n: int, k: int, gelu: bool) -> Problem:
    """x W^T + b, and GELU of it, of fp32 operands that each provider brings into its own type beforehand."""
    x, weight, bias = _linear_of(m, n, k, device)
    expected = F.linear(x.double(), weight.double(), bias.double())
    given = {"x": x, "weight": weight, "bias": bias, "gelu": gelu}
    expected = F.gelu(expected) if gelu else expected
    return Problem(case, device, given, expected, m * n * k, 2 * (m * k + n * k + m * n))


def sparse(case: Case, device: str, m: int, n: int, k: int, block: int, zeros: float) -> Problem:
    """A weight of whole blocks of which a share is zero, in bf16."""
    x, weight, bias = (tensor.bfloat16() for tensor in _linear_of(m, n, k, device))
    grid = (n // block) * (k // block)
    kept = torch.ones(grid, dtype=torch.bool, device=device)
    kept[torch.randperm(grid, device=device)[: round(zeros * grid)]] = False
    kept = kept.view(n // block, k // block)
    weight = weight * kept.repeat_interleave(block, 0).repeat_interleave(block, 1)
    expected = F.linear(x.double(), weight.double(), bias.double())
    given = {"x": x, "weight": weight, "bias": bias, "block": block}
    left = m * n * k * float(kept.float().mean())
    return Problem(case, device, given, expected, m * n * k, 2 * (m * k + n * k + m * n), {"kept_macs": left})


@functools.lru_cache(maxsize=1)
def _low_bits(n: int, k: int, bits: int, group: int, device: str) -> tuple[Any, Tensor]:
    """Codes and what they stand for; kept, for it takes a second and is the same for any number of rows."""
    from bertkern.formats.groupwise import quantize_groupwise

    codes = quantize_groupwise(_linear_of(0, n, k, device)[1].cpu(), bits, group, "k").to(device)
    return codes, codes.dequantize(torch.float32).half()


def groupwise(case: Case, device: str, m: int, n: int, k: int, bits: int, group: int) -> Problem:
    """Codes in groups along K, asymmetric, beside fp16 activations; `weight` is what they stand for."""
    codes, weight = _low_bits(n, k, bits, group, device)
    x, _, bias = _linear_of(m, n, k, device)
    expected = F.linear(x.half().double(), weight.double(), bias.double())
    given = {"x": x.half(), "weight": weight, "bias": bias, "codes": codes, "bits": bits, "group": group}
    return Problem(case, device, given, expected, m * n * k, n * k * bits / 8 + 2 * (m * k + m * n))


def attention(case: Case, device: str, batch: int, length: int, heads: int, head_dim: int) -> Problem:
    """Packed sequences of one length, `heads` of them left; bf16."""
    torch.manual_seed(SEED)
    qkv = torch.randn(batch * length, 3, heads, head_dim, device=device).bfloat16()
    q, k, v = (part.unflatten(0, (batch, length)).transpose(1, 2).double() for part in qkv.unbind(1))
    # A sequence at a time: scores of all of them in float64 are gigabytes.
    parts = [(q[i] @ k[i].mT * head_dim**-0.5).softmax(-1) @ v[i] for i in range(batch)]
    expected = torch.stack(parts).transpose(1, 2).flatten(0, 1)
    ends = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    given = {"qkv": qkv, "ends": ends, "batch": batch, "length": length}
    macs = 2 * batch * heads * length * length * head_dim
    return Problem(case, device, given, expected, macs, 2 * 4 * batch * length * heads * head_dim)


def rowwise(case: Case, device: str, m: int, n: int) -> Problem:
    """LayerNorm of x + residual, bf16."""
    torch.manual_seed(SEED)
    x, residual = (torch.randn(m, n, device=device).bfloat16() for _ in range(2))
    weight, bias = torch.rand(n, device=device) + 0.5, torch.randn(n, device=device)
    expected = F.layer_norm(x.double() + residual.double(), (n,), weight.double(), bias.double(), 1e-12)
    given = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    return Problem(case, device, given, expected, 0.0, 3 * 2 * m * n)


MAKE: dict[str, Callable[..., Problem]] = {
    "gemm": gemm,
    "sparse": sparse,
    "groupwise": groupwise,
    "attention": attention,
    "rowwise": rowwise,
}
AXES = {
    "gemm": "M x N x K, epilogue, weights",
    "sparse": "M x N x K, block@zeros",
    "groupwise": "M x N x K, bits and group, weights",
    "attention": "batch x tokens, heads kept",
    "rowwise": "M x N",
}


def problem(case: Case, device: str) -> Problem:
    """The tensors of a case, the same at every call."""
    return MAKE[case.op](case, device, **case.sizes)


def gemm_cases(
    models: Sequence[tuple[tuple[int, int], ...]] = (LARGE, BASE), rows: Sequence[int] = (4096, 128)
) -> list[Case]:
    """The largest first, so that a budget that ends early ends with the least."""
    made = []
    for m in rows:
        for layers in models:
            for n, k in layers:
                for gelu, cold in ((False, False), (True, False), (False, True)):
                    if (gelu and n <= k) or (cold and m > 128):
                        continue
                    x = f"{m}x{n}x{k} {'gelu' if gelu else 'bias'} {'cold' if cold else 'hot'}"
                    compiled = m == rows[0] and n > k
                    sizes = {"m": m, "n": n, "k": k, "gelu": gelu}
                    made.append(Case("gemm", x, sizes, cold, compiled))
    return made


def sparse_cases(
    shapes: Sequence[tuple[int, tuple[tuple[int, int], ...]]] = ((8192, LARGE[1:]), (4096, BASE[1:])),
    blocks: Sequence[int] = (64, 128, 32),
    zeros: Sequence[float] = (0.9, 0.4, 0.3, 0.0, 0.2, 0.5, 0.6, 0.7, 0.8, 0.95),
) -> list[Case]:
    """All zeros of a layer and a block before the next one."""
    return [
        Case("sparse", f"{m}x{n}x{k} {b}x{b}@{z:g}", {"m": m, "n": n, "k": k, "block": b, "zeros": z})
        for b in blocks
        for m, layers in shapes
        for n, k in layers
        for z in zeros
    ]


def groupwise_cases(
    layers: Sequence[tuple[int, int]] = ((4096, 4096), (8192, 8192), *BASE),
    rows: Sequence[int] = (1, 2, 4, 8, 16),
    bits: int = 4,
    group: int = 64,
) -> list[Case]:
    return [
        Case(
            "groupwise",
            f"{m}x{n}x{k} {bits}k{group} cold",
            {"m": m, "n": n, "k": k, "bits": bits, "group": group},
            cold=True,
        )
        for n, k in layers
        for m in rows
    ]


def attention_cases(batch: int = 64, length: int = 384, heads: Sequence[int] = tuple(range(12, 0, -1))) -> list[Case]:
    return [
        Case("attention", f"{batch}x{length} h{h}", {"batch": batch, "length": length, "heads": h, "head_dim": 64})
        for h in heads
    ]


def rowwise_cases(rows: Sequence[int] = (8192, 128), widths: Sequence[int] = (768, 1024)) -> list[Case]:
    return [Case("rowwise", f"{m}x{n}", {"m": m, "n": n}, compiled=True) for m in rows for n in widths]


CASES: dict[str, Callable[[], list[Case]]] = {
    "gemm": gemm_cases,
    "sparse": sparse_cases,
    "groupwise": groupwise_cases,
    "attention": attention_cases,
    "rowwise": rowwise_cases,
}
