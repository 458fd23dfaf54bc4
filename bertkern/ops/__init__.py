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
from ..formats import BsrWeight, CsrWeight, GroupwiseWeight
from ..formats.groupwise import AXES
from .arguments import explained
from .varlen import attention_varlen

_op = torch.ops.bertkern

# What the lanes of a sparse product are, as the operator counts them.
FORMS = {"auto": 0, "panels": 1, "tokens": 2}


def _activation(op: str, name: str | int) -> int:
    if isinstance(name, int):
        return name  # the operator checks it
    if name not in ACTIVATIONS:
        raise ValueError(f"{op}: expected activation to be one of {', '.join(ACTIVATIONS)}. Got {name!r}.")
    return ACTIVATIONS[name]


def cpu_isa() -> str:
    """The instruction set in use after BERTKERN_CPU_ISA: "portable", "avx2", "avx512", "avx512vnni", "avx512bf16" or
    "amx".
    """
    return ("portable", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx")[_op.cpu_isa()]


@explained
def pack_linear(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Packs weight [N, K] (fp32, bf16; fp16 becomes fp32) and bias [N] into a uint8 tensor."""
    return _op.pack_linear(weight, bias)


@explained
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
        input_zero_point: beside a static step 0 for signed codes, else that of unsigned ones, x = (code - zero_point) *
            input_scale. Else 0: rows range from their lowest to their highest value; 128: symmetrically about 0.
        output_scale: 0, or the step to which outputs are rounded before the activation (Q8BERT's requantized output).

    Example:
        >>> codes = torch.randint(-127, 128, (8, 16), dtype=torch.int8)
        >>> linear(torch.randn(3, 16), pack_qlinear(codes, torch.full((8,), 0.01)), 8).shape
        torch.Size([3, 8])
    """
    return _op.pack_qlinear(weight_codes, weight_scale, bias, input_scale, input_zero_point, output_scale)


@explained
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
        ValueError: weight is of another type, its shape is no pair of sizes, or there is no such form.

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
    if len(weight.shape) != 2 or not all(isinstance(size, int) for size in weight.shape):
        raise ValueError(f"pack_sparse_linear: expected shape to be two sizes (N, K). Got {weight.shape}.")
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


@explained
def pack_groupwise(
    weight: GroupwiseWeight,
    bias: Tensor | None = None,
    *,
    operand: torch.dtype = torch.int8,
    input_scale: float = 0.0,
    input_zero_point: int = 0,
) -> Tensor:
    """Low-bit weights laid out for `linear`: a uint8 tensor, of this machine, about as long as the codes.

    Args:
        weight: [N, K], see `GroupwiseWeight`.
        bias: [N], any float dtype.
        operand: int8: activations are rounded as for `pack_qlinear`; float32 or bfloat16: they stay so, and the weight
            is dequantized a panel at a time.
        input_scale, input_zero_point: of int8, see `pack_qlinear`.

    Raises:
        RuntimeError: a tensor that does not fit, scales that are not above 0, K beyond 32768 with int8.

    Example:
        >>> weight = quantize_groupwise(torch.ones(64, 48), bits=4, group_size=8)
        >>> linear(torch.ones(3, 48), pack_groupwise(weight), 64).shape
        torch.Size([3, 64])

    The planes and the sums are described in csrc/cpu/gemm/gemm.h.
    """
    if not isinstance(weight, GroupwiseWeight):
        raise ValueError(f"pack_groupwise: expected weight to be a GroupwiseWeight. Got {type(weight).__name__}.")
    return _op.pack_groupwise(
        weight.codes,
        weight.scale,
        weight.zero,
        weight.bits,
        *weight.shape,
        AXES.index(weight.axis),
        weight.group_size,
        bias,
        operand,
        input_scale,
        input_zero_point,
    )


@explained
def unpack_groupwise(packed: Tensor, bits: Tensor) -> Tensor:
    """The codes of `GroupwiseWeight` again, of what `pack_groupwise` made; bits as they were, uint8 [G]."""
    return _op.unpack_groupwise(packed, bits)


@explained
def unpack_linear(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The canonical tensors of `packed`: weight or codes [N, K], weight_scale [N], bias [N].

    weight_scale is [0] for float weights, and for group-wise ones, which come back dequantized.
    """
    return _op.unpack_linear(packed)


@explained
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
    return _op.linear(x, packed, out_features, _activation("linear", activation), residual, out_dtype)


@explained
def quantize_rows(x: Tensor, scale: float = 0.0, zero_point: int = 0, unsigned: bool = False) -> tuple[Tensor, Tensor]:
    """Codes of x [..., K] and their scale fp32 [...]: per row (max|x| / 127) with scale = 0, else static."""
    return _op.quantize_rows(x, scale, zero_point, unsigned)


@explained
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
    return _op.qgemm(
        codes, scale, zero_point, packed, out_features, _activation("qgemm", activation), residual, out_dtype
    )


@explained
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
        codes,
        scale,
        zero_point,
        packed,
        out_features,
        _activation("qgemm_requantize", activation),
        out_scale,
        out_zero_point,
    )


@explained
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
        codes, scale, list(packed), out_features, _activation("qgemm_seconds", activation), requantize, out_dtype, calls
    ).tolist()


@explained
def add_layernorm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-12) -> Tensor:
    """LayerNorm(x + residual) over the last dimension."""
    return _op.add_layernorm(x, residual, weight, bias, eps)


@explained
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


@explained
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    key_counts: Tensor | None = None,
    bias: Tensor | None = None,
    head_mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(scale q k^T + bias) v per head, over sequences that lie packed one after another: [T, H, d].

    No matrix of scores is made: keys are taken by the chunk (Milakov and Gimelshein, "Online normalizer calculation for
    softmax", 2018; Dao et al., "FlashAttention", 2022). A sequence's bits depend on no other one.

    bf16 tensors are multiplied in bf16 where the processor has AVX-512 BF16: the probabilities too are rounded to bf16
    then, sums stay fp32. All else computes in fp32, with a relative error of exp below 3e-7.

    Args:
        q, k, v: [T, H, d] of one dtype, fp32, bf16 or fp16; any strides, so slices of a joint projection are read where
            they lie, if only the features of a head lie side by side.
        cu_seqlens: int32 or int64 [B + 1], where each sequence begins: 0, ..., T.
        key_counts: int32 or int64 [B]: only so many first tokens of a sequence are keys. None: all.
        bias: fp32 [1 or B, 1 or H, L, L], added to the scaled scores, L at least the longest sequence. -inf masks.
        head_mask: fp32 [B, H], scales each head's output; a head with 0 is not computed.
        scale: of the scores; None: 1 / sqrt(d).
        causal: a token attends to itself and those before it.

    A token that attends to nothing, because there are no keys or all its scores are -inf, gives zeros.

    Raises:
        RuntimeError: shapes or dtypes that do not fit, cu_seqlens that do not rise from 0 to T.

    Example:
        >>> q, k, v = torch.randn(3, 7, 12, 64).unbind()
        >>> attention(q, k, v, torch.tensor([0, 4, 7])).shape
        torch.Size([7, 12, 64])
    """
    return _op.attention(q, k, v, cu_seqlens, key_counts, bias, head_mask, scale or 0.0, causal)


@explained
def qattention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: Sequence[Tensor],
    cu_seqlens: Tensor,
    *,
    key_counts: Tensor | None = None,
    bias: Tensor | None = None,
    head_mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`attention` over int8 codes of q, k and v, read where they lie: [T, H, d] in fp32 or `out_dtype`.

    Where the processor has AVX-512 VNNI, products of queries and keys are exact integers (to d = 1024). Where it has
    AVX-512 BF16, probabilities times the scales of v are rounded to bf16; v's codes are not. All else computes in fp32.

    Args:
        q, k, v: int8 [T, H, d]; any strides, if only the features of a head lie side by side.
        scales: of q, of k and of v, x = code * scale, each fp32 [T], a scale for every token as `quantize_rows` and
            `qgemm_requantize` give it, or [], one for all. A token whose scale is NaN counts as a row of NaN.
        cu_seqlens, key_counts, bias, head_mask, scale, causal: as for `attention`.
        out_dtype: fp32, bf16 or fp16.

    Codes have no gradient; scales, bias and head_mask have that of the attention over code * scale.

    Raises:
        RuntimeError: what `attention` refuses, other than int8 codes, scales of another shape or below 0.
        ValueError: not three scales.

    Example:
        >>> codes, steps = zip(*(quantize_rows(part) for part in torch.randn(3, 7, 12 * 64)))
        >>> q, k, v = (part.view(7, 12, 64) for part in codes)
        >>> qattention(q, k, v, steps, torch.tensor([0, 4, 7])).shape
        torch.Size([7, 12, 64])
    """
    q_scale, k_scale, v_scale = _three("qattention", scales)
    return _op.qattention(
        q, k, v, q_scale, k_scale, v_scale, cu_seqlens, key_counts, bias, head_mask, scale or 0.0, causal, out_dtype
    )


@explained
def attention_requantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scales: Sequence[Tensor] | None = None,
    key_counts: Tensor | None = None,
    bias: Tensor | None = None,
    head_mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    out_scale: float = 0.0,
    out_zero_point: int = 0,
) -> tuple[Tensor, Tensor]:
    """`attention`, or with `scales` `qattention`, quantized for the next layer: codes [T, H, d] and fp32 scales [T].

    Without `out_scale` each token gets its own scale, of all its heads together, as `quantize_rows` of [T, H * d] would
    give it, in a pass over rows that are still in the cache. With it the codes are made head by head: int8, or uint8
    around `out_zero_point` where that is not 0. A row that is not finite has a NaN for its scale.

    Args:
        q, k, v: [T, H, d], fp32, bf16 or fp16, or int8 codes beside `scales`.
        out_scale: 0, or the step of all codes.
        out_zero_point: 0 for int8 codes in [-127, 127], else that of uint8 ones, x = (code - zero point) * scale.
        All others: as for `attention` and `qattention`.

    Results have no gradient: codes are not differentiable.

    Raises:
        RuntimeError: what `attention` and `qattention` refuse; out_zero_point without out_scale or outside of [0, 255].
        ValueError: not three scales.

    Example:
        >>> q, k, v = torch.randn(3, 7, 12, 64).unbind()
        >>> codes, steps = attention_requantize(q, k, v, torch.tensor([0, 4, 7]))
        >>> codes.dtype, codes.shape, steps.shape
        (torch.int8, torch.Size([7, 12, 64]), torch.Size([7]))
    """
    three = (None, None, None) if scales is None else _three("attention_requantize", scales)
    return _op.attention_requantize(
        q,
        k,
        v,
        *three,
        cu_seqlens,
        key_counts,
        bias,
        head_mask,
        scale or 0.0,
        causal,
        out_scale,
        out_zero_point,
    )


def _three(op: str, scales: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(scales, (tuple, list)) or len(scales) != 3:
        got = f"{len(scales)} of them" if isinstance(scales, (tuple, list)) else type(scales).__name__
        raise ValueError(f"{op}: expected the scales of q, k and v. Got {got}.")
    return tuple(scales)


__all__ = [
    "ACTIVATIONS",
    "FORMS",
    "add_layernorm",
    "attention",
    "attention_requantize",
    "attention_varlen",
    "cpu_isa",
    "embed",
    "linear",
    "pack_groupwise",
    "pack_linear",
    "pack_qlinear",
    "pack_sparse_linear",
    "qattention",
    "qgemm",
    "qgemm_requantize",
    "quantize_rows",
    "unpack_groupwise",
    "unpack_linear",
]
