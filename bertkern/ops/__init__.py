"""The functional layer: thin functions over `torch.ops.bertkern`.

`packed` is the machine-specific form of one linear layer that `pack_linear`, `pack_qlinear` and `pack_sparse_linear`
make; it is never saved.
All functions raise RuntimeError with the operator's name, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ops  # noqa: F401  (loads the operators)
from .._ops import ACTIVATIONS
from ..formats import BsrWeight, CsrWeight

_op = torch.ops.bertkern

# What the lanes of a sparse product are, as the operator counts them.
FORMS = {"auto": 0, "panels": 1, "tokens": 2}


def _activation(name: str | int) -> int:
    if isinstance(name, int):
        return name  # the operator checks it
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}. Got {name!r}.")
    return ACTIVATIONS[name]


def cpu_isa() -> str:
    """The instruction set in use after BERTKERN_CPU_ISA: "portable", "avx2", "avx512", "avx512vnni" or "avx512bf16"."""
    return ("portable", "avx2", "avx512", "avx512vnni", "avx512bf16")[_op.cpu_isa()]


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Packs weight [N, K] (fp32, bf16; fp16 becomes fp32) and bias [N] into a uint8 tensor."""
    return _op.pack_linear(weight, bias)


def pack_qlinear(
    weight_codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: float = 0.0,
    input_zero_point: int = 0,
    output_scale: float = 0.0,
) -> Tensor:
    """Packs int8 codes [N, K] in [-127, 127] with weight_scale fp32 [N] or [1]: w = code * scale.

    Args:
        input_scale: 0 quantizes each row of the input by its own range; else the static step, x = code * input_scale.
        input_zero_point: 0 for signed codes, else that of unsigned ones, x = (code - zero_point) * input_scale.
        output_scale: 0, or the step to which outputs are rounded before the activation (Q8BERT's requantized output).

    Example:
        >>> codes = torch.randint(-127, 128, (8, 16), dtype=torch.int8)
        >>> linear(torch.randn(3, 16), pack_qlinear(codes, torch.full((8,), 0.01)), 8).shape
        torch.Size([3, 8])
    """
    return _op.pack_qlinear(weight_codes, weight_scale, bias, input_scale, input_zero_point, output_scale)


def pack_sparse_linear(
    weight: BsrWeight | CsrWeight,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    input_scale: float = 0.0,
    input_zero_point: int = 0,
    output_scale: float = 0.0,
    form: str = "auto",
) -> Tensor:
    """Packs a weight of which most is zero: every operator takes it in place of `pack_linear`'s or `pack_qlinear`'s.

    Only what is not zero is stored and multiplied, to the dword: 4 int8 codes, 2 bf16 or 1 fp32 value along K. int8
    results have the bits of the dense weight's. NaN and Inf are kept; but what is not stored is not multiplied either,
    so in float layers an Inf or NaN in a row of x reaches the features whose step of K is stored, maybe not all.

    Args:
        weight: [N, K], fp32, bf16, fp16 (becomes fp32) or int8 codes in [-127, 127]; any block. Values of edge blocks
            that lie outside of [N, K] are left out. K is at most 65536 for fp32, 131072 for bf16, 32768 for int8.
        weight_scale: with int8 codes, fp32 [N] or [1].
        bias: [N] or none.
        input_scale, input_zero_point, output_scale: as in `pack_qlinear`, for int8 codes.
        form: how it is multiplied. "panels": lanes are output features, 16 or 32 that share their nonzero steps of K,
            for blocks of 16 rows and more. "tokens": lanes are rows of x, and 1, 2 or 4 features share them, which
            wastes nothing on small blocks and lone elements, but lanes where x has few rows. "auto": panels where 16
            divides the rows of a block, else tokens.

    Raises:
        RuntimeError: an index out of range, unsorted or of a wrong length, codes without a scale, or what
            `pack_qlinear` refuses.
        ValueError: weight is of another type, or there is no such form.

    Example:
        >>> weight = torch.zeros(64, 48).index_fill_(0, torch.arange(16, 32), 1.0)
        >>> packed = pack_sparse_linear(BsrWeight.from_dense(weight, (16, 4)), bias=torch.zeros(64))
        >>> linear(torch.ones(3, 48), packed, 64).sum(1)
        tensor([768., 768., 768.])

    The two forms and their layouts are described in csrc/cpu/gemm/gemm.h.
    """
    if not isinstance(weight, (BsrWeight, CsrWeight)):
        got = type(weight).__name__
        raise ValueError(f"pack_sparse_linear: expected weight to be a BsrWeight or a CsrWeight. Got {got}.")
    if form not in FORMS:
        raise ValueError(f"pack_sparse_linear: expected form to be one of {', '.join(FORMS)}. Got {form!r}.")
    values = weight.values
    if isinstance(weight, CsrWeight):
        values = values.unsqueeze(-1).unsqueeze(-1)
    return _op.pack_sparse_linear(
        weight.crow,
        weight.col,
        values,
        *weight.shape,
        weight_scale,
        bias,
        input_scale,
        input_zero_point,
        output_scale,
        FORMS[form],
    )


def unpack_linear(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The canonical tensors of `packed`: weight or codes [N, K], weight_scale [N] ([0] for float weights), bias [N]."""
    return _op.unpack_linear(packed)


def linear(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    activation: str | int = "none",
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """activation(x W^T + b) + residual for x [..., K] in fp32, bf16 or fp16; int8 weights quantize x inside.

    A row's result depends on no other row and not on the number of threads. A NaN or Inf in a row of x makes that row
    of an int8 layer's output NaN.
    """
    return _op.linear(x, packed, out_features, _activation(activation), residual, out_dtype)


def quantize_rows(x: Tensor, scale: float = 0.0, zero_point: int = 0, unsigned: bool = False) -> tuple[Tensor, Tensor]:
    """Codes of x [..., K] and their scale fp32 [...]: per row (max|x| / 127) with scale = 0, else static."""
    return _op.quantize_rows(x, scale, zero_point, unsigned)


def qgemm(
    codes: Tensor,
    scale: Tensor,
    zero_point: int,
    packed: Tensor,
    out_features: int,
    activation: str | int = "none",
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """linear() for ready codes [M, K], int8 (zero_point 0) or uint8, and their scale fp32 [M] or [1]."""
    return _op.qgemm(codes, scale, zero_point, packed, out_features, _activation(activation), residual, out_dtype)


def qgemm_requantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: int,
    packed: Tensor,
    out_features: int,
    activation: str | int = "none",
    out_scale: float = 0.0,
    out_zero_point: int = 0,
) -> tuple[Tensor, Tensor]:
    """The product of `qgemm`, quantized for the next layer: codes [M, N] and fp32 scales [M].

    Without `out_scale` each row gets its own scale, as `quantize_rows(qgemm(...))` would give it, in a pass over rows
    that are still in the cache. With it the codes leave the matrix product itself: int8, or uint8 around
    `out_zero_point` where that is not 0. A row that is not finite has a NaN for its scale.
    """
    return _op.qgemm_requantize(
        codes, scale, zero_point, packed, out_features, _activation(activation), out_scale, out_zero_point
    )


def qgemm_seconds(
    codes: Tensor,
    scale: Tensor,
    packed: Sequence[Tensor],
    out_features: int,
    activation: str | int = "none",
    requantize: bool = False,
    out_dtype: torch.dtype = torch.float32,
    calls: int = 1,
) -> list[float]:
    """For benchmarks: the seconds of `calls` products (`qgemm`, or `qgemm_requantize`) into one output.

    The calls take one of the `packed` weights after the other. Packing the operand and writing the result count; the
    call through Python, dispatch and allocation do not.
    """
    return _op.qgemm_seconds(
        codes, scale, list(packed), out_features, _activation(activation), requantize, out_dtype, calls
    ).tolist()


def add_layernorm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-12) -> Tensor:
    """LayerNorm(x + residual) over the last dimension."""
    return _op.add_layernorm(x, residual, weight, bias, eps)


def embed(
    ids: list[Tensor],
    tables: list[Tensor],
    scales: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-12,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm(sum_i tables[i][ids[i]] * scales[i]) in one pass; tables fp32, bf16, fp16 or int8 [rows, H]."""
    return _op.embed(ids, tables, scales, weight, bias, eps, out_dtype)


__all__ = [
    "ACTIVATIONS",
    "FORMS",
    "add_layernorm",
    "cpu_isa",
    "embed",
    "linear",
    "pack_linear",
    "pack_qlinear",
    "pack_sparse_linear",
    "qgemm",
    "qgemm_requantize",
    "quantize_rows",
    "unpack_linear",
]
