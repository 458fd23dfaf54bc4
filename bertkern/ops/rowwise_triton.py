"""What happens to complete rows of a batch between matrix products, for GPUs, as operators that torch.compile knows.

    quantize_rows_cuda             int8 codes, scale and zero point of each row
    add_layernorm_cuda             LayerNorm(x + residual)
    add_layernorm_quantize_cuda    the same, and its codes
    embed_cuda                     LayerNorm of the sum of rows of up to three tables
    gather_rows_cuda               rows by their numbers, zeros for negative ones
    arrange_cuda                   where the tokens of a padded batch stand once the padding is left out

On CUDA they are Triton kernels (kernels/rowwise.py and row_grid.py, which state the formulas); everything else is plain
PyTorch. Neither asks the GPU for anything, so a CUDA graph may hold the operators. They have no gradients: whoever
records some takes another way.

No card has run the kernels yet: they are tested in Triton's interpreter and compiled for sm_80, 90 and 100.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _triton
from ..formats.groupwise import read_rows
from . import providers
from .arguments import explained
from .block_sparse import FLOATS, _expect, _tensor_cores

_TINY = torch.finfo(torch.float32).tiny
# Which masked positions are computed beside the tokens.
NONE, UP_TO_LAST, ALL = 0, 1, 2


class Codes(NamedTuple):
    """int8 activations: x = (codes - zero) * scale.

    Attributes:
        codes: int8 [..., K], 128 less than the unsigned codes of the CPU's kernels.
        scale: fp32 [rows].
        zero: int32 [rows]; None: 0.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def symmetric(step: float, zero_point: int) -> bool:
    """Whether codes of this step and zero point (as of `bertkern.ops.pack_qlinear`) have no zero points."""
    return zero_point == 128 or (step > 0 and zero_point == 0)


# --- Triton --------------------------------------------------------------------------------------------------------


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        return _triton.kernels("rowwise")
    except ImportError as error:
        warnings.warn(f"row operators: run in plain PyTorch, slowly: {error}", stacklevel=2)
        return None


def _by_cuda(op: str, x: Tensor, width: int) -> Callable[..., Any] | None:
    """The operator of the compiled library, where it was found to be faster."""
    if not x.is_cuda or providers.provider(op, x.device, width) != providers.CUDA:
        return None
    return getattr(torch.ops.bertkern, providers.TWINS[op]).default


def _triton_for(x: Tensor, width: int) -> ModuleType | None:
    """The kernels, where they fit."""
    if not x.is_cuda or not _tensor_cores(x.device):
        return None
    found = _kernels()
    return found if found is not None and found.supported(width) else None


# --- checks --------------------------------------------------------------------------------------------------------


def _check_rows(op: str, x: Tensor, others: dict[str, Tensor | None], live: Tensor | None) -> None:
    _expect(op, "x", f"of dtype {', '.join(map(str, FLOATS[:3]))}", x.dtype, x.dtype in FLOATS[:3])
    _expect(op, "x", "of shape [..., H]", list(x.shape), x.dim() > 0 and x.shape[-1] > 0)
    for name, tensor in others.items():
        if tensor is None:
            continue
        shape = list(x.shape) if name == "residual" else [x.shape[-1]]
        _expect(op, name, f"of shape {shape}", list(tensor.shape), list(tensor.shape) == shape)
        _expect(op, name, f"of dtype {', '.join(map(str, FLOATS[:3]))}", tensor.dtype, tensor.dtype in FLOATS[:3])
    if live is not None:
        said = f"{live.dtype} of shape {list(live.shape)}"
        _expect(op, "live", "int32 of shape [1]", said, live.dtype == torch.int32 and live.shape == (1,))
    for name, tensor in {**others, "live": live}.items():
        if tensor is not None:
            _expect(op, name, f"on {x.device}", tensor.device, tensor.device == x.device)


def _check_step(op: str, step: float, zero_point: int) -> None:
    _expect(op, "step", "finite and at least 0", step, 0 <= step < math.inf)
    allowed = 0 <= zero_point <= 255 if step else zero_point in (0, 128)
    _expect(op, "zero_point", "in [0, 255], beside a step of 0 either 0 or 128", zero_point, allowed)


def _check_eps(op: str, eps: float) -> None:
    _expect(op, "eps", "finite and at least 0", eps, 0 <= eps < math.inf)


# --- plain PyTorch -------------------------------------------------------------------------------------------------


def _alive(x: Tensor, live: Tensor | None) -> Tensor | None:
    """bool [..., 1]: which rows of x are there."""
    if live is None:
        return None
    rows = torch.arange(x.shape[:-1].numel(), device=x.device) < live
    return rows.view(*x.shape[:-1], 1)


def _quantize(x: Tensor, live: Tensor | None, step: float, zero_point: int) -> tuple[Tensor, Tensor, Tensor]:
    alive = _alive(x, live)
    x = x.float()
    if alive is not None:
        x = torch.where(alive, x, 0.0)
    fine = x.isfinite()
    bad = ~fine.all(-1, keepdim=True)
    x = torch.where(fine, x, 0.0)
    low, high = x.amin(-1, True).clamp(max=0), x.amax(-1, True).clamp(min=0)
    own = step == 0 and zero_point == 0
    if step:
        size = torch.full_like(low, step)
    elif own:
        size = high * (1 / 255) - low * (1 / 255)
    else:
        size = torch.maximum(-low, high) * (1 / 127)
    size = torch.where(size < _TINY, 1.0, size)
    inverse = 1 / size
    if own:
        zero = (-low * inverse).round().clamp(max=255) - 128
    else:
        zero = torch.full_like(low, 0 if symmetric(step, zero_point) else zero_point - 128)
    least, most = (-127.0 - zero, 127.0 - zero) if symmetric(step, zero_point) else (-128.0 - zero, 127.0 - zero)
    codes = torch.maximum(torch.minimum((torch.where(bad, 0.0, x) * inverse).round(), most), least) + zero
    size = torch.where(bad, torch.nan, size)
    if alive is not None:
        codes, size, zero = torch.where(alive, codes, 0), torch.where(alive, size, 1), torch.where(alive, zero, 0)
    made = zero.flatten().int() if not symmetric(step, zero_point) else zero.new_empty(0, dtype=torch.int32)
    return codes.to(torch.int8), size.flatten(), made


def _normal(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, live: Tensor | None, eps: float
) -> Tensor:
    alive = _alive(x, live)
    wide = x.float() if residual is None else x.float() + residual.float()
    if alive is not None:
        wide = torch.where(alive, wide, 0.0)
    y = F.layer_norm(wide, weight.shape, weight.float(), bias.float(), eps).to(x.dtype)
    return y if alive is None else torch.where(alive, y, 0)


# --- the operators -------------------------------------------------------------------------------------------------


def _define(name: str, schema: str):
    return torch.library.custom_op(f"bertkern::{name}", mutates_args=(), schema=schema)


def _given(found: ModuleType, step: float, zero_point: int, made: tuple) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, zero = made
    return codes, scale, scale.new_empty(0, dtype=torch.int32) if zero is None else zero


@_define("quantize_rows_cuda", "(Tensor x, Tensor? live, float step, int zero_point) -> (Tensor, Tensor, Tensor)")
def _quantize_op(x, live, step, zero_point):
    _check_rows("quantize_rows_cuda", x, {}, live)
    _check_step("quantize_rows_cuda", step, zero_point)
    if (twin := _by_cuda("quantize_rows_cuda", x, x.shape[-1])) is not None:
        return twin(x, live, step, zero_point)
    found = _triton_for(x, x.shape[-1])
    if found is None:
        return _quantize(x, live, step, zero_point)
    codes, scale, zero = _given(found, step, zero_point, found.quantize_rows(x, step, zero_point, live))
    return codes.view(x.shape) if x.dim() != 2 else codes, scale, zero


@_define(
    "add_layernorm_cuda", "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor? live, float eps) -> Tensor"
)
def _normal_op(x, residual, weight, bias, live, eps):
    _check_rows("add_layernorm_cuda", x, {"residual": residual, "weight": weight, "bias": bias}, live)
    _check_eps("add_layernorm_cuda", eps)
    if (twin := _by_cuda("add_layernorm_cuda", x, x.shape[-1])) is not None:
        return twin(x, residual, weight, bias, live, eps)
    found = _triton_for(x, x.shape[-1])
    if found is None:
        return _normal(x, residual, weight, bias, live, eps)
    return found.add_layernorm(x, residual, weight, bias, eps, live)[0]


@_define(
    "add_layernorm_quantize_cuda",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor? live, float eps, float step, int zero_point) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _normal_quantize_op(x, residual, weight, bias, live, eps, step, zero_point):
    op = "add_layernorm_quantize_cuda"
    _check_rows(op, x, {"residual": residual, "weight": weight, "bias": bias}, live)
    _check_eps(op, eps)
    _check_step(op, step, zero_point)
    if (twin := _by_cuda(op, x, x.shape[-1])) is not None:
        return twin(x, residual, weight, bias, live, eps, step, zero_point)
    found = _triton_for(x, x.shape[-1])
    if found is None:
        y = _normal(x, residual, weight, bias, live, eps)
        return y, *_quantize(y, live, step, zero_point)
    y, made = found.add_layernorm(x, residual, weight, bias, eps, live, (step, zero_point))
    codes, scale, zero = _given(found, step, zero_point, made)
    return y, codes.view(x.shape) if x.dim() != 2 else codes, scale, zero


def _row_bits(table: Tensor, width: int) -> int:
    """Bits of the codes in a uint8 table of rows as `table_rows` makes them, or 0."""
    return next((bits for bits in range(2, 9) if 8 + (width * bits + 7) // 8 == table.shape[1]), 0)


def _check_embed(ids, tables, scales, weight, bias, eps, out_dtype) -> None:
    op, floats = "embed_cuda", FLOATS[:3]
    fits = 1 <= len(ids) <= 3 and len(ids) == len(tables) == len(scales)
    said = f"{len(ids)} ids, {len(tables)} tables and {len(scales)} scales"
    _expect(op, "ids, tables and scales", "to be 1 to 3 of each", said, fits)
    width, shape, device = weight.numel(), ids[0].shape, weight.device
    for name, tensor in (("weight", weight), ("bias", bias)):
        _expect(op, name, f"of shape [{width}]", list(tensor.shape), tensor.shape == (width,) and width > 0)
        _expect(op, name, f"of dtype {', '.join(map(str, floats))}", tensor.dtype, tensor.dtype in floats)
    for index, table, scale in zip(ids, tables, scales, strict=True):
        said = f"{index.dtype} of shape {list(index.shape)}"
        fits = index.dtype == torch.int64 and index.dim() == 2 and index.shape == shape
        _expect(op, "ids", f"int64 of one shape [B, L] = {list(shape)}", said, fits)
        kinds = (*floats, torch.int8, torch.uint8)
        _expect(op, "tables", f"of dtype {', '.join(map(str, kinds))}", table.dtype, table.dtype in kinds)
        fits = table.dim() == 2 and table.shape[0] > 0
        fits = fits and (_row_bits(table, width) > 0 if table.dtype == torch.uint8 else table.shape[1] == width)
        _expect(op, "tables", f"of shape [rows, H] = [rows, {width}], or rows of few bits", list(table.shape), fits)
        said = f"{scale.dtype} of shape {list(scale.shape)}"
        fits = scale.dtype == torch.float32 and scale.dim() == 1 and scale.numel() in (1, table.shape[0])
        _expect(op, "scales", f"float32 of shape [{table.shape[0]}] or [1]", said, fits)
    for tensor in (*ids, *tables, *scales, bias):
        _expect(op, "all tensors", f"on {device}", tensor.device, tensor.device == device)
    _check_eps(op, eps)
    _expect(op, "out_dtype", f"to be {', '.join(map(str, floats))}", out_dtype, out_dtype in floats)


@_define(
    "embed_cuda",
    "(Tensor[] ids, Tensor[] tables, Tensor[] scales, Tensor weight, Tensor bias, float eps, ScalarType out_dtype) "
    "-> Tensor",
)
def _embed_op(ids, tables, scales, weight, bias, eps, out_dtype):
    _check_embed(ids, tables, scales, weight, bias, eps, out_dtype)
    if (twin := _by_cuda("embed_cuda", weight, weight.numel())) is not None:
        return twin(ids, tables, scales, weight, bias, eps, out_dtype)
    found = _triton_for(weight, weight.numel())
    if found is not None:
        dense = [table if table.stride(1) == 1 else table.contiguous() for table in tables]
        return found.embeddings(ids, dense, [scale.contiguous() for scale in scales], weight, bias, eps, out_dtype)
    total, wrong = 0.0, torch.zeros(ids[0].shape, dtype=torch.bool, device=weight.device)
    for index, table, scale in zip(ids, tables, scales, strict=True):
        outside = (index < 0) | (index >= table.shape[0])
        wrong, index = wrong | outside, torch.where(outside, 0, index)
        rows = F.embedding(index, table)
        rows = read_rows(rows, weight.numel()) if table.dtype == torch.uint8 else rows.float()
        total = total + rows * (scale if scale.numel() == 1 else scale[index].unsqueeze(-1))
    y = F.layer_norm(total, weight.shape, weight.float(), bias.float(), eps)
    return torch.where(wrong[..., None], torch.nan, y).to(out_dtype)


def _check_gather(x: Tensor, index: Tensor) -> None:
    op = "gather_rows_cuda"
    _expect(op, "x", "of shape [rows, H]", list(x.shape), x.dim() == 2)
    said = f"{index.dtype} of shape {list(index.shape)}"
    _expect(op, "index", "int32 of shape [n]", said, index.dtype == torch.int32 and index.dim() == 1)
    _expect(op, "index", f"on {x.device}", index.device, index.device == x.device)


@_define("gather_rows_cuda", "(Tensor x, Tensor index) -> Tensor")
def _gather_op(x, index):
    _check_gather(x, index)
    found = _triton_for(x, max(1, x.shape[1]))
    if found is not None:
        return found.gather_rows(x, index)
    if not x.shape[0]:
        return x.new_zeros(index.shape[0], x.shape[1])
    return torch.where((index >= 0)[:, None], x[index.clamp(min=0).long()], 0)


def _check_arrange(mask: Tensor, masked: int) -> None:
    op = "arrange_cuda"
    said = f"{mask.dtype} of shape {list(mask.shape)}"
    _expect(op, "mask", "bool of shape [B, L]", said, mask.dtype == torch.bool and mask.dim() == 2)
    _expect(op, "masked", "from 0 to 2", masked, masked in (NONE, UP_TO_LAST, ALL))


@_define("arrange_cuda", "(Tensor mask, int masked, bool empty_attends) -> (Tensor, Tensor, Tensor, Tensor)")
def _arrange_op(mask, masked, empty_attends):
    _check_arrange(mask, masked)
    found = _triton_for(mask, max(1, mask.shape[1]))
    if found is not None:
        return found.arrangement(mask, masked, empty_attends)
    return _arranged(mask, masked, empty_attends)


def _arranged(mask: Tensor, masked: int, empty_attends: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, length), device = mask.shape, mask.device
    position = torch.arange(length, device=device)
    keys = mask.sum(1)
    if masked == NONE:
        rows = keys
    elif masked == ALL or not length:
        rows = torch.full_like(keys, length)
    else:
        rows = torch.where(keys == 0, length, torch.where(mask, position + 1, 0).amax(1))
    others = ~mask & (position < rows[:, None]) if masked != NONE else torch.zeros_like(mask)
    ends = torch.zeros(batch + 1, dtype=torch.int64, device=device)
    ends[1:] = rows.cumsum(0)
    rank = torch.where(mask, mask.cumsum(1) - 1, keys[:, None] + others.cumsum(1) - 1)
    place = torch.where(mask | others, ends[:-1, None] + rank, -1).flatten()
    # One place more, for what is not computed.
    source = torch.full((batch * length + 1,), -1, dtype=torch.int64, device=device)
    numbers = torch.arange(batch * length, device=device)
    source = source.scatter(0, torch.where(place < 0, batch * length, place), torch.where(place < 0, -1, numbers))
    if empty_attends:
        keys = torch.where(keys == 0, rows, keys)
    return source[:-1].int(), place.int(), ends.int(), keys.int()


# Tracing checks too: what does not fit is said there, not by compiled code.


def _fake_codes(x: Tensor, step: float, zero_point: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    none = symmetric(step, zero_point)
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(0 if none else rows, dtype=torch.int32),
    )


@_quantize_op.register_fake
def _(x, live, step, zero_point):
    _check_rows("quantize_rows_cuda", x, {}, live)
    return _fake_codes(x, step, zero_point)


@_normal_op.register_fake
def _(x, residual, weight, bias, live, eps):
    _check_rows("add_layernorm_cuda", x, {"residual": residual, "weight": weight, "bias": bias}, live)
    return x.new_empty(x.shape)


@_normal_quantize_op.register_fake
def _(x, residual, weight, bias, live, eps, step, zero_point):
    _check_rows("add_layernorm_quantize_cuda", x, {"residual": residual, "weight": weight, "bias": bias}, live)
    return x.new_empty(x.shape), *_fake_codes(x, step, zero_point)


@_embed_op.register_fake
def _(ids, tables, scales, weight, bias, eps, out_dtype):
    _check_embed(ids, tables, scales, weight, bias, eps, out_dtype)
    return weight.new_empty((*ids[0].shape, weight.shape[0]), dtype=out_dtype)


@_gather_op.register_fake
def _(x, index):
    _check_gather(x, index)
    return x.new_empty(index.shape[0], x.shape[1])


@_arrange_op.register_fake
def _(mask, masked, empty_attends):
    _check_arrange(mask, masked)
    batch, length = mask.shape
    number = batch * length
    return tuple(mask.new_empty(size, dtype=torch.int32) for size in (number, number, batch + 1, batch))


# --- the functions -------------------------------------------------------------------------------------------------


@explained
def quantize_rows_cuda(x: Tensor, step: float = 0.0, zero_point: int = 0, live: Tensor | None = None) -> Codes:
    """x rounded to int8, as `bertkern.ops.linear` rounds it.

    Args:
        x: [..., K] fp32, bf16 or fp16; rows are copied only where they are not contiguous.
        step, zero_point: see `bertkern.ops.pack_qlinear`.
        live: int32 [1], how many rows are there; the others come out as zeros. None: all.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.

    Example:
        >>> quantize_rows_cuda(torch.tensor([[0.0, 255.0]])).zero
        tensor([-128], dtype=torch.int32)
    """
    codes, scale, zero = torch.ops.bertkern.quantize_rows_cuda.default(x, live, step, zero_point)
    return Codes(codes, scale, None if symmetric(step, zero_point) else zero)


@explained
def add_layernorm_cuda(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, live: Tensor | None = None
) -> Tensor:
    """LayerNorm(x + residual), of x's shape and dtype; sums are fp32.

    Args:
        x, residual: [..., H] fp32, bf16 or fp16; they need not share a dtype.
        weight, bias: [H], any of them.
        live: see `quantize_rows_cuda`.
    """
    return torch.ops.bertkern.add_layernorm_cuda.default(x, residual, weight, bias, live, eps)


@explained
def add_layernorm_quantize_cuda(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    step: float = 0.0,
    zero_point: int = 0,
    live: Tensor | None = None,
) -> tuple[Tensor, Codes]:
    """What `add_layernorm_cuda` gives, and what `quantize_rows_cuda` gives of that."""
    y, codes, scale, zero = torch.ops.bertkern.add_layernorm_quantize_cuda.default(
        x, residual, weight, bias, live, eps, step, zero_point
    )
    return y, Codes(codes, scale, None if symmetric(step, zero_point) else zero)


@explained
def embed_cuda(
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    scales: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """LayerNorm(sum of tables[i][ids[i]] * scales[i]), [B, L, H].

    An id that its table has not makes the token NaN: looking would wait for the GPU.

    Args:
        ids: 1 to 3, int64 [B, L], views of any strides.
        tables: [rows, H] fp32, bf16, fp16 or int8 codes, or uint8 rows of few bits as `table_rows` makes them.
        scales: fp32 [rows] or [1].
        weight, bias: [H] fp32, bf16 or fp16.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
    """
    return torch.ops.bertkern.embed_cuda.default(ids, tables, scales, weight, bias, eps, out_dtype)


@explained
def gather_rows_cuda(x: Tensor, index: Tensor) -> Tensor:
    """x [rows, H] by index int32 [n], [n, H]: zeros for negative numbers; those past the last row are not caught."""
    return torch.ops.bertkern.gather_rows_cuda.default(x, index)


@explained
def arrange_cuda(mask: Tensor, masked: int, empty_attends: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where each position of a padded batch stands once the padding is left out, all int32.

    Of a sequence its keys come first, then the masked positions that are computed as queries alone. A sequence without
    a key keeps all its positions, but where none are computed.

    Args:
        mask: bool [B, L], True for tokens.
        masked: NONE, UP_TO_LAST or ALL: which masked positions are computed, those before a sequence's last token or
            all.
        empty_attends: whether a sequence without a key attends to all its positions.

    Returns:
        source [B * L]: the number in the padded batch of each packed row, -1 past the last one. place [B * L], its
        inverse: -1 for what is left out. ends [B + 1]: where each sequence begins. keys [B]: how many keys it has.
    """
    return torch.ops.bertkern.arrange_cuda.default(mask, masked, empty_attends)
