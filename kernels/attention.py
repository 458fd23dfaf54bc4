"""Attention over packed sequences, forward and backward: heads and tokens that do not exist are not computed.

Sequence b is the tokens cu_seqlens[b] .. cu_seqlens[b + 1] of q, k and v [T, H, d], views of any strides whose last one
is 1, so that they are read where one projection wrote them. For a query i and the keys j of its sequence:

    s_ij = scale * q_i . k_j + bias[b, n, i, j]        i, j counted from the sequence's first token; causal: j <= i
    out_i = factor[b, n] * sum_j softmax_j(s_ij) v_j

H counts the heads that are there, whose original numbers are n = numbers[h]: bias and factor stay in that numbering. A
factor of 0 skips the head, which reads nothing; -inf in the bias hides a key; a query whose keys are all hidden gets
zeros. cu_seqlens stays on the device: grids are sized for sequences x max_length, and programs past the end of their
sequence leave. Whatever it says, nothing outside of the tensors is touched, cu_seqlens[0] counts as 0, and tokens past
max_length in their sequence, or in none, get zeros.

Numerics: scores, softmax and sums are fp32, weights are rounded to v's dtype before they multiply v. fp32 operands are
multiplied as three TF32 products ("tf32x3"), which keeps fp32's accuracy. Keys are summed from the sequence's first
token on, in steps that depend on dtype and d alone, so a sequence's result has the same bits in any batch. No atomics:
the gradients, too, have the same bits at every run.

d is 1 to 128. One that is no power of two is padded in registers to the next one, 16 at least, or for fp32 to a
multiple of 32; an odd one is copied first. Rows should begin at multiples of 16 bytes: those of d = 26 do not, and are
read in pieces of 4. A bias is copied where its rows do not.

The kernels stand in attention_forward.py and attention_gradients.py; here they get their tiles, are launched, and are
listed for those who compile them.

Known of these kernels is what Triton's interpreter and the machine code say; no card has run them yet.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .attention_forward import LOG2E, attend
from .attention_gradients import attend_bias, attend_factors, attend_keys, attend_queries
from .launch import compile_options, on, upcast
from .table import TYPES, Entry, opcodes

MAX_HEAD_DIM = 128


# --- which tile ----------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Queries x keys that a program takes at a time, warps and pipeline stages, and how much of a head: `chunk` of it
    at a time for what is summed over it, `slice` of it for its result.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    chunk: int
    slice: int

    @property
    def options(self) -> dict[str, Any]:
        # Stated, because ptxas would rather spill than have fewer programs at a time.
        most = {} if torch.version.hip else {"maxnreg": 255}
        return {**compile_options(self.warps, self.stages, fuse=True), **most}


def padded_head_dim(d: int) -> int:
    """The width of a head's rows in registers."""
    return max(16, triton.next_power_of_2(d))


def tile_of(kernel: Any, dtype: torch.dtype, d: int) -> Tile:
    """The tile of a kernel for a dtype and a head dimension: of neither lengths nor batch, so that no bits depend on
    them.

    64 rows, which Hopper's instruction takes, and as much of the rest as leaves ptxas registers on every card: it has
    the least where the kernel holds the most, in `attend_keys`, and for fp32. A slice of a result costs all of the
    scores again. fp32 stays with 4 warps: of 8, Triton lays out the three products differently.
    """
    whole = padded_head_dim(d)
    if dtype == torch.float32:
        large, chunk = whole > 32, min(whole, 32)
        if kernel is attend_keys:
            return Tile(16, 64, 4, 1 if large else 2, chunk, chunk)
        if kernel is attend_bias:
            return Tile(64, 16, 4, 2, chunk if large else 16, chunk)
        wide = kernel is attend_factors or (kernel is attend and not large)
        return Tile(64, 32 if wide else 16, 4, 2, chunk, min(whole, 64))
    large = whole > 64
    if kernel is attend_keys:
        return Tile(32, 64, 8 if large else 4, 2, whole, whole)
    if kernel is attend_bias:
        return Tile(64, 32, 8 if large else 4, 1, min(whole, 64), whole)
    narrow = large or kernel in (attend_queries, attend_factors)
    return Tile(64, 32 if narrow else 64, 4, 2, whole, whole)


# --- launchers -----------------------------------------------------------------------------------------------------


class Sequences(NamedTuple):
    """What attention is asked for beside q, k and v; all tensors on the GPU.

    Attributes:
        cu_seqlens: int32 [sequences + 1].
        max_length: of a sequence.
        scale: of the scores.
        causal: whether a query sees no later keys.
        numbers: int32 [H], the original numbers of the heads that are there; None: 0, 1, 2, ...
        factors: [sequences, original heads] float, or None: all 1.
        bias: [1 or sequences, 1 or original heads, max_length, max_length] float, or None.
        counts: int32 [sequences], how many of a sequence's tokens, the first ones, are keys; None: all. Of the forward
            pass alone.
    """

    cu_seqlens: Tensor
    max_length: int
    scale: float
    causal: bool = False
    numbers: Tensor | None = None
    factors: Tensor | None = None
    bias: Tensor | None = None
    counts: Tensor | None = None

    @property
    def count(self) -> int:
        return self.cu_seqlens.numel() - 1


def supported(d: int, dtype: torch.dtype) -> bool:
    """Whether there are kernels for heads of this dimension and tensors of this dtype."""
    return 1 <= d <= MAX_HEAD_DIM and dtype in (torch.float16, torch.bfloat16, torch.float32)


def _alignment(dtype: torch.dtype, d: int | None = None) -> int:
    """How many elements are read at a time: 16 bytes, or less where the heads' rows begin at no multiples of it."""
    most = 16 // dtype.itemsize
    return most if d is None else math.gcd(most, d)


def _aligned(x: Tensor, align: int) -> bool:
    """Whether rows of x are dense and begin at multiples of `align` elements, x itself at one of 16 bytes."""
    strides = (stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1)
    dense = x.stride(-1) == 1 or x.shape[-1] == 1
    return dense and x.data_ptr() % 16 == 0 and all(stride % align == 0 for stride in strides)


def _readable(x: Tensor) -> Tensor:
    """x [T, H, d] where the kernels can read it; a copy only where it lies askew."""
    return x if _aligned(x, _alignment(x.dtype, x.shape[2])) else x.clone(memory_format=torch.contiguous_format)


def _readable_bias(bias: Tensor) -> Tensor:
    """A bias whose rows are whole groups of 16 bytes; a copy where they are not, as of 127 keys."""
    align, length = _alignment(bias.dtype), bias.shape[-1]
    if length % align == 0 and _aligned(bias, align):
        return bias
    # A row that stands for all is padded once.
    rows = bias[:, :, :1] if bias.stride(2) == 0 else bias
    padded = bias.new_zeros(*rows.shape[:3], length + -length % align)
    padded[..., :length] = rows
    return padded[..., :length].expand(bias.shape)


def _constants(tile: Tile, dtype: torch.dtype, d: int, causal: bool, bias: torch.dtype | None) -> dict[str, Any]:
    return {
        "D": d,
        "CHUNK": tile.chunk,
        "SLICE": tile.slice,
        "BQ": tile.queries,
        "BK": tile.keys,
        "CAUSAL": causal,
        "ALIGN": _alignment(dtype, d),
        "BIAS_ALIGN": 1 if bias is None else _alignment(bias),
        "UPCAST": upcast(dtype),
    }


def _launch(
    kernel: Any, sequences: Sequences, views: dict[str, Tensor], programs: int | None = None, **others: Any
) -> None:
    """Runs `kernel` on `views`, q, k, v and maybe grad, and `others`; by default a program a block of each head."""
    q, bias = views["q"], sequences.bias
    (tokens, heads, d), factors = q.shape, sequences.factors
    tile = tile_of(kernel, q.dtype, d)
    views = {name: _readable(x) for name, x in views.items()}
    bias = None if bias is None else _readable_bias(bias)
    constants = _constants(tile, q.dtype, d, sequences.causal, None if bias is None else bias.dtype)
    # One of a dimension stands for all; strides are in units of what is read at a time.
    of_bias = [0, 0, 0] if bias is None else [bias.stride(i) if bias.shape[i] > 1 else 0 for i in range(3)]
    of_factors = (0, 0) if factors is None else factors.stride()
    arguments = {
        "cu_seqlens": sequences.cu_seqlens,
        "counts": sequences.counts,
        "numbers": sequences.numbers,
        "factors": factors,
        "bias": bias,
        "T": tokens,
        "H": heads,
        "max_length": sequences.max_length,
        "unit": sequences.scale,
        "scale": sequences.scale * (LOG2E.value if bias is None else 1.0),
        **views,
        **{f"{name}_t": x.stride(0) // constants["ALIGN"] for name, x in views.items()},
        **{f"{name}_h": x.stride(1) // constants["ALIGN"] for name, x in views.items()},
        **dict(zip(("factors_b", "factors_h"), of_factors, strict=True)),
        **{name: n // constants["BIAS_ALIGN"] for name, n in zip(("bias_b", "bias_h", "bias_q"), of_bias, strict=True)},
        **constants,
        **others,
    }
    if programs is None:
        programs = blocks_of(kernel, tile, sequences.max_length) * heads * sequences.count
    with on(q):
        slices = triton.cdiv(d, tile.slice) if "SLICE" in kernel.arg_names else 1
        kernel[(programs, slices)](**{name: arguments[name] for name in kernel.arg_names}, **tile.options)


def blocks_of(kernel: Any, tile: Tile, max_length: int) -> int:
    """How many programs a head of a sequence takes."""
    return triton.cdiv(max_length, tile.keys if kernel is attend_keys else tile.queries)


def _even(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Heads of an odd dimension with zeros up to whole 16 bytes, which change no product: nothing could be read of them
    but single elements. Others as they are.
    """
    d = tensors[0].shape[2]
    if d % 2 == 0:
        return tensors
    return tuple(torch.nn.functional.pad(x, (0, -d % _alignment(x.dtype))) for x in tensors)


def _nothing(q: Tensor, sequences: Sequences) -> bool:
    return q.numel() == 0 or sequences.count == 0 or sequences.max_length == 0


def attention(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """out [T, H, d] in q's dtype, and what the gradients need of the rows, fp32 [2, H, T]."""
    statistics = q.new_empty(2, q.shape[1], q.shape[0], dtype=torch.float32)
    if _nothing(q, sequences):
        return q.new_zeros(q.shape), statistics.zero_()
    d = q.shape[2]
    q, k, v = _even(q, k, v)
    out = q.new_empty(q.shape)
    _launch(attend, sequences, {"q": q, "k": k, "v": v}, out=out, statistics=statistics)
    return out[..., :d].contiguous(), statistics


def attention_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, sequences: Sequences
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv [T, H, d] of a grad [T, H, d] and what `attention` gave; delta, fp32 [H, T]: each row's grad . out."""
    delta = torch.empty_like(statistics[0])
    if _nothing(q, sequences):
        return q.new_zeros(q.shape), q.new_zeros(q.shape), q.new_zeros(q.shape), delta.zero_()
    d = q.shape[2]
    grad, q, k, v, out = _even(grad, q, k, v, out)
    views = {"q": q, "k": k, "v": v, "grad": grad}
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    _launch(attend_queries, sequences, views, out=out, statistics=statistics, delta=delta, dq=dq)
    _launch(attend_keys, sequences, views, statistics=statistics, delta=delta, dk=dk, dv=dv)
    return dq[..., :d].contiguous(), dk[..., :d].contiguous(), dv[..., :d].contiguous(), delta


def attention_bias_gradient(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, statistics: Tensor, delta: Tensor, sequences: Sequences
) -> Tensor:
    """dbias, after `attention_gradients`, in the shape and dtype of the bias; zero for heads that are not there."""
    bias, length = sequences.bias, sequences.max_length
    assert bias is not None
    if _nothing(q, sequences):
        return bias.new_zeros(bias.shape)
    all_sequences, all_heads = bias.shape[0] == 1, bias.shape[1] == 1
    grad, q, k, v = _even(grad, q, k, v)
    dbias = bias.new_empty(bias.shape) if sequences.numbers is None or all_heads else bias.new_zeros(bias.shape)
    tile = tile_of(attend_bias, q.dtype, q.shape[2])
    tiles = triton.cdiv(length, tile.queries) * triton.cdiv(length, tile.keys)
    _launch(
        attend_bias, sequences, {"q": q, "k": k, "v": v, "grad": grad},
        tiles * (1 if all_sequences else sequences.count) * (1 if all_heads else q.shape[1]),
        statistics=statistics, delta=delta, dbias=dbias, count=sequences.count,
        dbias_b=dbias.stride(0), dbias_h=dbias.stride(1), ALL_SEQUENCES=all_sequences, ALL_HEADS=all_heads,
    )  # fmt: skip
    return dbias


def attention_factors_gradient(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    """dfactors [sequences, original heads] in the factors' dtype, right also where they are 0; zero for heads that are
    not there.
    """
    factors, numbers = sequences.factors, sequences.numbers
    assert factors is not None
    if _nothing(q, sequences):
        return factors.new_zeros(factors.shape)
    grad, q, k, v = _even(grad, q, k, v)
    tile = tile_of(attend_factors, q.dtype, q.shape[2])
    blocks = blocks_of(attend_factors, tile, sequences.max_length)
    partial = q.new_empty(sequences.count, q.shape[1], blocks, dtype=torch.float32)
    _launch(attend_factors, sequences, {"q": q, "k": k, "v": v, "grad": grad}, partial=partial)
    found = partial.sum(2).to(factors.dtype)
    return found if numbers is None else factors.new_zeros(factors.shape).index_copy_(1, numbers.long(), found)


# --- what is compiled ---------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """One use of the kernels, as the launchers make it of q's dtype, a head dimension and what else is asked for.

    `some` stands for heads that were removed and factors of those left: numbers and factors.
    """

    dtype: torch.dtype
    d: int
    bias: torch.dtype | None = None
    causal: bool = False
    some: bool = False
    counts: bool = False

    @property
    def name(self) -> str:
        parts = [TYPES[self.dtype], str(self.d)]
        parts += [f"bias_{TYPES[self.bias]}"] if self.bias is not None else []
        return "-".join(parts + ["causal"] * self.causal + ["some"] * self.some + ["counts"] * self.counts)


def _opcodes(kernel: Any, dtype: torch.dtype, tile: Tile) -> dict[int, frozenset[str]]:
    rows, across = (tile.keys, tile.queries) if kernel is attend_keys else (tile.queries, tile.keys)
    # Scores are `across` wide, what is summed of them is as wide as its slice; 8 warps halve that.
    widths = {across} if kernel in (attend_bias, attend_factors) else {across, tile.slice}
    return opcodes(dtype, rows, *(width * 4 // tile.warps for width in widths))


# Lengths for the interpreter: tokens less than, as many as and more than a tile has, one alone, and none.
_LENGTHS = ((1,), (64, 0, 16), (131, 3, 77))
_SCALARS = {"scale": "fp32", "unit": "fp32"}


def _entry(kernel: Any, form: Form) -> Entry:
    kind, tile = f"*{TYPES[form.dtype]}", tile_of(kernel, form.dtype, form.d)
    pointers = {
        **dict.fromkeys(("q", "k", "v", "grad", "out", "dq", "dk", "dv"), kind),
        **dict.fromkeys(("statistics", "delta", "partial"), "*fp32"),
        **{name: f"*{TYPES[form.bias]}" for name in ("bias", "dbias") if form.bias is not None},
        **({"factors": "*fp32", "numbers": "*i32"} if form.some else {}),
        **({"counts": "*i32"} if form.counts else {}),
        "cu_seqlens": "*i32",
    }
    constexprs = {
        **_constants(tile, form.dtype, form.d, form.causal, form.bias),
        # The sum over a batch, as of relative positions.
        **({"ALL_SEQUENCES": True, "ALL_HEADS": False} if kernel is attend_bias else {}),
        **({} if form.some else {"factors": None, "numbers": None}),
        **({} if form.bias is not None else {"bias": None}),
        **({} if form.counts else {"counts": None}),
    }
    names = kernel.arg_names
    signature = {name: pointers.get(name, _SCALARS.get(name, "i32")) for name in names if name not in constexprs}
    return Entry(
        name=f"{kernel.__name__}-{form.name}",
        function=kernel,
        signature=signature,
        constexprs={name: value for name, value in constexprs.items() if name in names},
        options=tile.options,
        aligned=tuple(name for name in signature if name in pointers and name not in _UNALIGNED),
        opcodes=_opcodes(kernel, form.dtype, tile),
        shapes=_LENGTHS,
        fetches_ahead=tile.stages > 1 and _alignment(form.dtype, form.d) * form.dtype.itemsize == 16,
    )


_UNALIGNED = ("cu_seqlens", "counts", "numbers", "factors")


def _kernels_of(form: Form) -> tuple[Any, ...]:
    if form.counts:
        return (attend,)
    more = (attend_bias,) if form.bias is not None else ()
    return (attend, attend_queries, attend_keys, *more, *((attend_factors,) if form.some else ()))


FORMS = (
    Form(torch.float16, 64),
    Form(torch.bfloat16, 64, torch.float32, causal=True, some=True),
    Form(torch.float16, 128, torch.float16, some=True),
    Form(torch.float16, 80, torch.float32, causal=True),
    Form(torch.float16, 32),
    Form(torch.float16, 16, torch.float16),
    Form(torch.float16, 26, torch.float32, some=True),
    Form(torch.float32, 64, some=True),
    Form(torch.float32, 128, torch.float32, causal=True, some=True),
    Form(torch.float32, 32),
    Form(torch.float32, 26, torch.float32, causal=True),
    Form(torch.float16, 64, counts=True),
    Form(torch.bfloat16, 32, some=True, counts=True),
    Form(torch.float32, 64, counts=True),
)
# Each kernel's forms as the launchers choose them: common head dimensions plain, awkward ones with all options.
TABLE = tuple(_entry(kernel, form) for form in FORMS for kernel in _kernels_of(form))
