"""What happens to complete rows of a batch between matrix products; one program a row, which depends on nothing else.

    quantize    int8 codes a of x = (a - zero) * scale
    normalize   y = LayerNorm(x + residual), and its codes where the next layer takes them
    embed       y = LayerNorm(sum of rows of up to three tables)
    gather      y[r] = x[index[r]], zeros where the index is negative
    arrange     where the tokens of a padded batch stand once the padding is left out

The formulas are those of csrc/cpu/rowwise/rowwise.h, those of codes stand in row_grid.py; sums are fp32. A row that is
not finite has a NaN for its scale, and codes of zero. Codes are made of y as it is stored, so `normalize` gives those
that `quantize` would give of its y.

`live` counts, on the device, the rows that are there: those from it on come out as zeros (scale 1), and what x has
there is not read. So grids are sized for the padded batch, and one CUDA graph serves every mask.

Known of these kernels is what Triton's interpreter and the machine code say; no card has run them yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import compile_options, on, row_block, rows_of
from .row_grid import Codes, code_arguments, code_of, empty_codes, row_codes, row_step
from .table import NO_PRODUCTS, Entry

# The widest row that a program holds in registers.
WIDEST = 16384
TABLES = 3


# --- kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _codes(
    x, inside, there, codes, scale, zero, row, code_stride, lane, step, static_zero, OWN: tl.constexpr,
    STATIC: tl.constexpr,
):  # fmt: skip
    """Stores the codes of a row x [BLOCK] in fp32, which is zero outside; where not `there`, those of nothing."""
    fine = tl.abs(x) < float("inf")
    bad = tl.max(tl.where(fine, 0, 1), 0) > 0
    x = tl.where(fine, x, 0.0)
    lowest, highest = tl.minimum(tl.min(x, 0), 0.0), tl.maximum(tl.max(x, 0), 0.0)
    size = row_step(lowest, highest, step, OWN, STATIC)
    inverse = tl.div_rn(1.0, size)
    offset, least, most = row_codes(lowest, inverse, zero, static_zero, OWN)
    if zero is not None:
        tl.store(zero + row, tl.where(there, offset, 0.0).to(tl.int32))
    tl.store(scale + row, tl.where(there, tl.where(bad, float("nan"), size), 1.0))
    a = code_of(tl.where(bad, 0.0, x), inverse, least, most) + offset
    tl.store(codes + row.to(tl.int64) * code_stride + lane, tl.where(there, a, 0.0).to(tl.int8), mask=inside)


@triton.jit
def _normal(x, inside, weight, bias, lane, width, eps):
    """LayerNorm of a row x [BLOCK] that is zero outside, in fp32."""
    mean = tl.sum(x, 0) / width
    centred = tl.where(inside, x - mean, 0.0)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, 0) / width + eps))
    gamma = tl.load(weight + lane, mask=inside, other=0).to(tl.float32)
    return centred * scale * gamma + tl.load(bias + lane, mask=inside, other=0).to(tl.float32)


@triton.jit
def _read(live, row, width):
    """How much of a row is read: nothing of one that is not there."""
    if live is not None:
        width = tl.where(row < tl.load(live), width, 0)
    return width


@triton.jit(do_not_specialize_on_alignment=["live"])
def quantize(
    x, codes, scale, zero, live, width, x_stride, code_stride, step, static_zero,
    BLOCK: tl.constexpr, OWN: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """int8 codes, scale fp32 and zero int32 or None of x in any float dtype."""
    row, lane = tl.program_id(0), tl.arange(0, BLOCK)
    read, inside = _read(live, row, width), lane < width
    a = tl.load(x + row.to(tl.int64) * x_stride + lane, mask=lane < read, other=0).to(tl.float32)
    _codes(a, inside, read > 0, codes, scale, zero, row, code_stride, lane, step, static_zero, OWN, STATIC)


@triton.jit(do_not_specialize_on_alignment=["live"])
def normalize(
    x, residual, weight, bias, y, codes, scale, zero, live, width, x_stride, residual_stride, y_stride, code_stride,
    eps, step, static_zero, BLOCK: tl.constexpr, OWN: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """y = LayerNorm(x + residual), all in any float dtype; residual may be None, and codes, with scale and zero."""
    row, lane = tl.program_id(0), tl.arange(0, BLOCK)
    read, inside = _read(live, row, width), lane < width
    a = tl.load(x + row.to(tl.int64) * x_stride + lane, mask=lane < read, other=0).to(tl.float32)
    if residual is not None:
        at = residual + row.to(tl.int64) * residual_stride + lane
        a += tl.load(at, mask=lane < read, other=0).to(tl.float32)
    a = tl.where(lane < read, _normal(a, inside, weight, bias, lane, width, eps), 0.0)
    stored = a.to(y.dtype.element_ty)
    tl.store(y + row.to(tl.int64) * y_stride + lane, stored, mask=inside)
    if codes is not None:
        rounded = stored.to(tl.float32)
        _codes(rounded, inside, read > 0, codes, scale, zero, row, code_stride, lane, step, static_zero, OWN, STATIC)


@triton.jit
def _number(place):
    """The fp32 whose bytes begin at `place`, which need not be a multiple of 4."""
    bits = tl.load(place).to(tl.int32) | tl.load(place + 1).to(tl.int32) << 8
    bits = bits | tl.load(place + 2).to(tl.int32) << 16 | tl.load(place + 3).to(tl.int32) << 24
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _row_of(
    total, fine, ids, table, scale, count, id_b, id_l, table_stride, scale_stride, inside, lane, length, row,
    BITS: tl.constexpr,
):  # fmt: skip
    """total + the row of a table that the token's id names, and whether all ids so far name rows that are there."""
    sequence, place = row // length, row % length
    id = tl.load(ids + sequence.to(tl.int64) * id_b + place.to(tl.int64) * id_l)
    known = (id >= 0) & (id < count)
    id = tl.where(known, id, 0)
    step = tl.load(scale + id * scale_stride)
    start = table + id * table_stride
    if BITS:
        # Scale, zero point, and the codes as a little-endian stream of bits: `table_rows` of formats/groupwise.py.
        first = lane * BITS
        low = tl.load(start + 8 + first // 8, mask=inside, other=0).to(tl.int32)
        more = inside & (first // 8 * 8 + 8 < first + BITS)
        high = tl.load(start + 9 + first // 8, mask=more, other=0).to(tl.int32)
        code = ((low | high << 8) >> first % 8 & ((1 << BITS) - 1)).to(tl.float32)
        value = (code - _number(start + 4)) * _number(start)
    else:
        value = tl.load(start + lane, mask=inside, other=0).to(tl.float32)
    return total + tl.where(inside, value * step, 0.0), fine & known


@triton.jit
def embed(
    ids0, ids1, ids2, table0, table1, table2, scale0, scale1, scale2, weight, bias, y,
    length, width, y_stride, eps, count0, count1, count2, id0_b, id0_l, id1_b, id1_l, id2_b, id2_l,
    stride0, stride1, stride2, scale_stride0, scale_stride1, scale_stride2,
    BLOCK: tl.constexpr, BITS0: tl.constexpr, BITS1: tl.constexpr, BITS2: tl.constexpr,
):  # fmt: skip
    """y[b * length + l] = LayerNorm(sum_i table_i[ids_i[b, l]] * scale_i); tables past the first may be None.

    ids int64; tables in any float dtype, int8 codes, or rows of codes of BITS bits (uint8); scales fp32, of a row or,
    with a stride of 0, of all. A row with an id that its table has not is NaN, and nothing outside is read.
    """
    row, lane = tl.program_id(0), tl.arange(0, BLOCK)
    inside = lane < width
    total, fine = _row_of(
        tl.zeros((BLOCK,), tl.float32), row >= 0, ids0, table0, scale0, count0, id0_b, id0_l, stride0,
        scale_stride0, inside, lane, length, row, BITS0,
    )  # fmt: skip
    if table1 is not None:
        total, fine = _row_of(
            total, fine, ids1, table1, scale1, count1, id1_b, id1_l, stride1, scale_stride1, inside, lane, length,
            row, BITS1,
        )  # fmt: skip
    if table2 is not None:
        total, fine = _row_of(
            total, fine, ids2, table2, scale2, count2, id2_b, id2_l, stride2, scale_stride2, inside, lane, length,
            row, BITS2,
        )  # fmt: skip
    a = tl.where(fine, _normal(total, inside, weight, bias, lane, width, eps), float("nan"))
    tl.store(y + row.to(tl.int64) * y_stride + lane, a.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gather(x, index, y, width, x_stride, y_stride, BLOCK: tl.constexpr):
    """y[r] = x[index[r]], or zeros; index int32."""
    row, first = tl.program_id(0), tl.program_id(1) * BLOCK
    lane = first + tl.arange(0, BLOCK)
    inside, source = lane < width, tl.load(index + row)
    read = tl.where(source >= 0, width, 0)
    a = tl.load(x + source.to(tl.int64) * x_stride + lane, mask=lane < read, other=0)
    tl.store(y + row.to(tl.int64) * y_stride + lane, a, mask=inside)


@triton.jit
def _extent(real, lane, length, ALL: tl.constexpr, NONE: tl.constexpr):
    """Of a sequence's mask [BLOCK]: how many keys it has, and how many rows are computed."""
    keys = tl.sum(real, 0)
    rows = tl.max(tl.where(real > 0, lane + 1, 0), 0)
    if NONE:
        rows = keys
    elif ALL:
        rows = keys * 0 + length
    else:
        rows = tl.where(keys == 0, length, rows)
    return keys, rows


@triton.jit
def arrange(
    mask, source, place, ends, keys, batch, length, mask_stride,
    BLOCK: tl.constexpr, EMPTY: tl.constexpr, ALL: tl.constexpr, NONE: tl.constexpr,
):  # fmt: skip
    """What `bertkern.gpu.packing` says of a mask [batch, length], bool; one program a sequence.

    source and place int32 [batch * length], ends int32 [batch + 1], keys int32 [batch].
    """
    mine, lane = tl.program_id(0), tl.arange(0, BLOCK)
    inside = lane < length
    begin, total, count = 0, 0, 0
    at = mask + lane
    for other in range(0, batch):
        real = tl.load(at, mask=inside, other=0).to(tl.int32)
        at += mask_stride
        count, rows = _extent(tl.where(real != 0, 1, 0), lane, length, ALL, NONE)
        begin += tl.where(other < mine, rows, 0)
        total += rows
    real = tl.load(mask + mine.to(tl.int64) * mask_stride + lane, mask=inside, other=0).to(tl.int32)
    real = tl.where(real != 0, 1, 0)
    count, rows = _extent(real, lane, length, ALL, NONE)
    others = tl.where((real == 0) & (lane < rows) & (not NONE), 1, 0)
    slot = tl.where(real > 0, tl.cumsum(real, 0) - 1, count + tl.cumsum(others, 0) - 1)
    computed = (real + others) > 0
    number = mine * length + lane
    tl.store(place + number, tl.where(computed, begin + slot, -1), mask=inside)
    tl.store(source + begin + slot, number, mask=inside & computed)
    # What is left of the rows stands behind those of all sequences, in their order.
    spare = total + mine * length - begin + lane
    tl.store(source + spare, lane * 0 - 1, mask=lane < length - rows)
    if EMPTY:
        count = tl.where(count == 0, rows, count)
    tl.store(keys + mine, count)
    tl.store(ends + mine, begin)
    tl.store(ends + batch, total)


# --- launchers -----------------------------------------------------------------------------------------------------


def supported(width: int) -> bool:
    """Whether there are kernels for rows of this width."""
    return 0 < width <= WIDEST


def _options(block: int) -> dict[str, Any]:
    # Products and sums are rounded apart, or codes were others than the CPU's and those of the CUDA twins.
    warps = 1 if block <= 256 else 2 if block <= 512 else 4 if block <= 2048 else 8 if block <= 8192 else 16
    return compile_options(warps, 1, fuse=False)


def quantize_rows(x: Tensor, step: float = 0.0, zero_point: int = 0, live: Tensor | None = None) -> Codes:
    """The codes of x [..., width]; step and zero_point as of `bertkern.ops.pack_qlinear`, live int32 [1]."""
    rows = rows_of(x)
    made = empty_codes(rows, step, zero_point)
    if rows.shape[0]:
        block = row_block(rows.shape[1])
        with on(x):
            quantize[(rows.shape[0],)](
                rows, live=live, width=rows.shape[1], x_stride=rows.stride(0),
                **code_arguments(made, step, zero_point), BLOCK=block, **_options(block),
            )  # fmt: skip
    return made


def add_layernorm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    live: Tensor | None = None,
    coded: tuple[float, int] | None = None,
) -> tuple[Tensor, Codes | None]:
    """LayerNorm(x + residual) of x's shape and dtype, and its codes where `coded` is their step and zero point."""
    rows = rows_of(x)
    others = None if residual is None else rows_of(residual)
    y = rows.new_empty(rows.shape)
    made = None if coded is None else empty_codes(rows, *coded)
    if rows.shape[0]:
        block = row_block(rows.shape[1])
        with on(x):
            normalize[(rows.shape[0],)](
                rows, others, weight, bias, y, live=live, width=rows.shape[1], x_stride=rows.stride(0),
                residual_stride=0 if others is None else others.stride(0), y_stride=y.stride(0), eps=eps,
                **code_arguments(made, *(coded or (0.0, 0))), BLOCK=block, **_options(block),
            )  # fmt: skip
    return y.view(x.shape), made


def row_bits(table: Tensor, width: int) -> int:
    """Bits of the codes in a uint8 table of rows as `table_rows` makes them; 0: values or int8 codes."""
    if table.dtype != torch.uint8:
        return 0
    return next((bits for bits in range(2, 9) if 8 + (width * bits + 7) // 8 == table.shape[1]), 0)


def embeddings(
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    scales: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """LayerNorm of the sum of rows, [B, L, H]; ids int64 [B, L] of any strides."""
    batch, length = ids[0].shape
    width = weight.shape[0]
    y = weight.new_empty(batch, length, width, dtype=dtype)
    if not batch * length:
        return y
    arguments: dict[str, Any] = {}
    for i in range(TABLES):
        here = i < len(tables)
        table, scale = (tables[i], scales[i]) if here else (None, None)
        index = ids[i] if here else None
        arguments |= {
            f"ids{i}": index,
            f"table{i}": table,
            f"scale{i}": scale,
            f"count{i}": table.shape[0] if here else 0,
            f"id{i}_b": index.stride(0) if here else 0,
            f"id{i}_l": index.stride(1) if here else 0,
            f"stride{i}": table.stride(0) if here else 0,
            f"scale_stride{i}": 1 if here and scale.numel() > 1 else 0,
            f"BITS{i}": row_bits(table, width) if here else 0,
        }
    block = row_block(width)
    with on(y):
        embed[(batch * length,)](
            **arguments, weight=weight, bias=bias, y=y, length=length, width=width, y_stride=width, eps=eps,
            BLOCK=block, **_options(block),
        )  # fmt: skip
    return y


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x [rows, width] by index int32 [n], [n, width]; zeros where it is negative."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = x.new_empty(index.shape[0], x.shape[1])
    if y.numel():
        block = min(1024, row_block(x.shape[1]))
        with on(x):
            gather[(y.shape[0], triton.cdiv(x.shape[1], block))](
                x, index, y, x.shape[1], x.stride(0), y.stride(0), BLOCK=block, **_options(block)
            )
    return y


def arrangement(mask: Tensor, masked: int, empty_attends: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """source, place, ends and keys of a bool mask [B, L]; masked 0: no masked position is computed, 1: those before the
    last token, 2: all."""
    mask = mask if mask.stride(1) == 1 else mask.contiguous()
    (batch, length), number = mask.shape, mask.shape[0] * mask.shape[1]
    source, place, ends, keys = (
        torch.empty(size, dtype=torch.int32, device=mask.device) for size in (number, number, batch + 1, batch)
    )
    if not number:
        return source, place, ends.zero_(), keys.zero_()
    block = row_block(length)
    with on(mask):
        arrange[(batch,)](
            mask.view(torch.uint8), source, place, ends, keys, batch, length, mask.stride(0), BLOCK=block,
            EMPTY=empty_attends, ALL=masked == 2, NONE=masked == 0, **_options(block),
        )  # fmt: skip
    return source, place, ends, keys


# --- what is compiled ---------------------------------------------------------------------------------------------


def _entry(name: str, function: Any, pointers: dict[str, str], others: dict[str, str], constants: dict, block: int):
    """An entry; arguments that are not named are None."""
    lacking = dict.fromkeys(set(function.arg_names) - set(pointers) - set(others) - set(constants) - {"BLOCK"})
    return Entry(
        name=f"rowwise-{name}",
        function=function,
        signature={**pointers, **others},
        constexprs={**constants, **lacking, "BLOCK": block},
        options=_options(block),
        aligned=(*(n for n in pointers if n != "live"), *(n for n in others if n.endswith("stride"))),
        opcodes=NO_PRODUCTS,
        shapes=(),
        fetches_ahead=False,
    )


def _table() -> tuple[Entry, ...]:
    integers = dict.fromkeys(("width", "x_stride", "code_stride", "static_zero"), "i32")
    coded = {"codes": "*i8", "scale": "*fp32", "live": "*i32"}
    own, signed = {"OWN": True, "STATIC": False}, {"OWN": False, "STATIC": True}
    made = []
    for kind, block, mode in (("fp16", 1024, own), ("bf16", 4096, signed), ("fp32", 512, own), ("fp32", 16384, own)):
        zero = {"zero": "*i32"} if mode["OWN"] else {}
        made.append(
            _entry(
                f"quantize-{kind}-{block}",
                quantize,
                {"x": f"*{kind}", **coded, **zero},
                {**integers, "step": "fp32"},
                mode,
                block,
            )
        )
    norm = {**dict.fromkeys(("width", "x_stride", "residual_stride", "y_stride", "code_stride", "static_zero"), "i32")}
    norm |= dict.fromkeys(("eps", "step"), "fp32")
    for kind, block, quantized in (("fp16", 1024, True), ("bf16", 1024, False), ("fp32", 512, True)):
        pointers = dict.fromkeys(("x", "residual", "weight", "bias", "y"), f"*{kind}") | {"live": "*i32"}
        pointers |= {**coded, "zero": "*i32"} if quantized else {}
        made.append(_entry(f"normalize-{kind}-{block}", normalize, pointers, norm, own, block))
    sizes = dict.fromkeys(("length", "width", "y_stride", "count0", "count1", "count2"), "i32")
    for i in range(TABLES):
        sizes |= dict.fromkeys((f"id{i}_b", f"id{i}_l", f"stride{i}", f"scale_stride{i}"), "i32")
    for kind, table, bits in (("fp16", "fp16", 0), ("bf16", "i8", 0), ("fp32", "u8", 4)):
        pointers = dict.fromkeys((f"ids{i}" for i in range(TABLES)), "*i64")
        pointers |= {f"table{i}": f"*{table}" for i in range(TABLES)} | {f"scale{i}": "*fp32" for i in range(TABLES)}
        pointers |= dict.fromkeys(("weight", "bias", "y"), f"*{kind}")
        constants = {f"BITS{i}": bits for i in range(TABLES)}
        made.append(_entry(f"embed-{kind}-{table}", embed, pointers, {**sizes, "eps": "fp32"}, constants, 1024))
    made.append(
        _entry(
            "gather-fp16",
            gather,
            {"x": "*fp16", "y": "*fp16", "index": "*i32"},
            dict.fromkeys(("width", "x_stride", "y_stride"), "i32"),
            {},
            1024,
        )
    )
    pointers = {"mask": "*u8", **dict.fromkeys(("source", "place", "ends", "keys"), "*i32")}
    for block in (128, 512):
        made.append(
            _entry(
                f"arrange-{block}",
                arrange,
                pointers,
                dict.fromkeys(("batch", "length", "mask_stride"), "i32"),
                {"EMPTY": False, "ALL": False, "NONE": False},
                block,
            )
        )
    return tuple(made)


# The kernels as the launchers choose them, for BERT's widths and for the widest row.
TABLE = _table()
