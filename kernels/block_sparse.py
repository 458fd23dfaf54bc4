"""Linear layers whose weight is a grid of blocks of which some are kept: forward, and both gradients.

The weight W [N, K] is in block-sparse rows: values [nnzb, br, bc], full blocks in the order of (block row, block
column), zero where they reach over the edge of W. What a kernel reads of the pattern is three int32 lists a direction:

    starts [G + 1]  the list of output block g is starts[g] .. starts[g + 1]
    inner  [nnzb]   the block of the summed dimension
    number [nnzb]   the place of the block in values

For y = x W^T the output blocks are W's block rows and number is 0, 1, 2, ...; for dx = dy W they are its block columns.
So values are never copied nor transposed in memory.

Numerics: a program sums its whole output tile, block by block in the order of the list, in fp32 (int32 for int8), and
rounds once. No atomics, no splitting of a sum: the same bits at every run. Along the summed dimension step and
instruction depend on the layer alone, never on T, so neither does a row's result. fp32 operands are multiplied as three
TF32 products ("tf32x3"), which keeps fp32's accuracy. A block that is not kept is never read: its 0 x Inf is 0.

Blocks: 16, 32, 64 or 128 rows x 16, 32, 64 or 128 columns. N, K and T are arbitrary. Rows of the operands should begin
at multiples of 16 bytes; elsewhere loads are narrow and slow.

Known of these kernels is what Triton's interpreter and the machine code say; no card has run them yet.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue import finish_8bit, rows_wanted
from .launch import compile_options, on, rows_of, upcast
from .table import PRECISION, TYPES, Entry, opcodes

SIDES = (16, 32, 64, 128)


# --- kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _sum_of_blocks(
    x, x_stride, rows, live, width, starts, inner, number, values, tile,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
    TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """sum over kept blocks of x[rows, block] w^T, [BT, BN], for output columns tile * BN .. (tile + 1) * BN.

    A step takes BK of the summed dimension: a slice of one block (BK <= IN), or several blocks (BK > IN).
    """
    SLICES: tl.constexpr = IN // BK if BK <= IN else 1
    GROUP: tl.constexpr = BK // IN if BK > IN else 1
    group = tile * BN // OUT
    n = tl.arange(0, BN) if BN == OUT else tile * BN % OUT + tl.arange(0, BN)
    lane = tl.arange(0, BK)
    # Element (n, k) of a block lies at n * IN + k; read as its transpose, at k * OUT + n.
    n_offset = n if TRANSPOSED else n * IN
    x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    begin, end = tl.load(starts + group), tl.load(starts + group + 1)
    total = tl.zeros((BT, BN), tl.int32 if values.dtype.element_ty == tl.int8 else tl.float32)
    for step in range(begin * SLICES, end * SLICES, GROUP):
        if GROUP == 1:
            place = step // SLICES
            k = lane if SLICES == 1 else step % SLICES * BK + lane
            block = tl.load(number + place) if TRANSPOSED else place
            column = tl.load(inner + place) * IN + k
            k_offset = block.to(tl.int64) * (OUT * IN) + (k * OUT if TRANSPOSED else k)
            inside = column < width
            w = tl.load(values + k_offset[:, None] + n_offset[None, :])
        else:
            place = step + lane // IN
            k = lane % IN
            kept = place < end
            block = tl.load(number + place, mask=kept, other=0) if TRANSPOSED else place
            # Runs of IN neighbours in memory: the compiler cannot know it of loaded numbers.
            column = tl.load(inner + place, mask=kept, other=0) * IN + k
            column = tl.max_contiguous(tl.multiple_of(column, IN), IN)
            k_offset = block.to(tl.int64) * (OUT * IN) + (k * OUT if TRANSPOSED else k)
            if not TRANSPOSED:
                k_offset = tl.max_contiguous(tl.multiple_of(k_offset, IN), IN)
            inside = kept & (column < width)
            w = tl.load(values + k_offset[:, None] + n_offset[None, :], mask=kept[:, None], other=0)
        a = tl.load(x_rows + column[None, :], mask=live[:, None] & inside[None, :], other=0)
        if UPCAST:
            a, w = a.to(tl.float32), w.to(tl.float32)
        if total.dtype == tl.int32:
            total = tl.dot(a, w, total, out_dtype=tl.int32)
        else:
            total = tl.dot(a, w, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["starts", "inner", "number"])
def multiply(
    x, starts, inner, number, values, bias, y, T, x_width, y_width, x_stride, y_stride,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
    TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y[T, y_width] = x[T, x_width] times the blocks, + bias; one program a tile of BT x BN.

    values fp16, bf16 or fp32; bias [y_width] or None; y in any of them.
    """
    tiles = tl.cdiv(y_width, BN)
    tile, rows = tl.program_id(0) % tiles, tl.program_id(0) // tiles * BT + tl.arange(0, BT)
    live = rows < T
    total = _sum_of_blocks(
        x, x_stride, rows, live, x_width, starts, inner, number, values, tile,
        BT, BN, BK, OUT, IN, TRANSPOSED, UPCAST,
    )  # fmt: skip
    columns = tile * BN + tl.arange(0, BN)
    inside = columns < y_width
    if bias is not None:
        total += tl.load(bias + columns, mask=inside, other=0).to(tl.float32)[None, :]
    out = y + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["starts", "inner", "number", "count"])
def multiply_int8(
    x, x_scale, x_zero, starts, inner, number, values, weight_scale, weight_sums, bias, residual, count, y,
    T, x_width, y_width, x_stride, residual_stride, y_stride,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y of sums of int8 x int8, finished as int8_gemm.py finishes those of a dense weight, with the same bits.

    x_zero, weight_sums, bias, residual and count may be None; tiles past `count` rows end at once.
    """
    tiles = tl.cdiv(y_width, BN)
    tile, top = tl.program_id(0) % tiles, tl.program_id(0) // tiles * BT
    last = rows_wanted(T, count)
    if top >= last:
        return
    rows = top + tl.arange(0, BT)
    live = rows < last
    total = _sum_of_blocks(
        x, x_stride, rows, live, x_width, starts, inner, number, values, tile, BT, BN, BK, OUT, IN, False, False
    )
    columns = tile * BN + tl.arange(0, BN)
    finish_8bit(
        tl.trans(total), rows, live, columns, columns < y_width, tile, x_scale, x_zero, weight_scale, weight_sums, bias,
        residual, y, None, 1, 1, 1, residual_stride, y_stride, 0.0, 0.0, 0, ACTIVATION, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["row", "col"])
def multiply_sampled(
    dy, x, row, col, dvalues, T, N, K, dy_stride, x_stride,
    BT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dvalues[b] = dy[:, row[b]]^T x[:, col[b]], [BR, BC], kept blocks only; one program a tile of BM x BN of a block.

    What a block has outside of W is written as zero.
    """
    down: tl.constexpr = BR // BM
    across: tl.constexpr = BC // BN
    block = tl.program_id(0) // (down * across)
    m = tl.program_id(0) // across % down * BM + tl.arange(0, BM)
    n = tl.program_id(0) % across * BN + tl.arange(0, BN)
    i, j = tl.load(row + block) * BR + m, tl.load(col + block) * BC + n
    i_inside, j_inside = i < N, j < K
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(0, T, BT):
        t = first + tl.arange(0, BT)
        live = t < T
        t_offset = t.to(tl.int64)
        a = tl.load(dy + t_offset[None, :] * dy_stride + i[:, None], mask=i_inside[:, None] & live[None, :], other=0)
        b = tl.load(x + t_offset[:, None] * x_stride + j[None, :], mask=live[:, None] & j_inside[None, :], other=0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    # 0 x NaN of a masked load is NaN.
    total = tl.where(i_inside[:, None] & j_inside[None, :], total, 0.0)
    out = dvalues + block.to(tl.int64) * (BR * BC) + m[:, None] * BC + n[None, :]
    tl.store(out, total.to(dvalues.dtype.element_ty))


# --- which tile ----------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """rows x columns of the result a program computes, the summed dimension's step, warps and pipeline stages."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        return compile_options(self.warps, self.stages, fuse=True)


def multiply_tile(dtype: torch.dtype, out_block: int, in_block: int, tokens: int) -> Tile:
    """The tile of `multiply` for a block's extent along the output and along the sum.

    A tile is as wide as its block, since the next block row has another pattern; fp32, which holds its operands three
    times, stops at 64. Rows: 64, and 128 from 1,024 tokens on, which reads the weight half as often; both are the same
    instruction along the sum. A step is 32 to 64 elements: tensor cores take 32 of int8, so 16-wide blocks go in pairs.
    int8 sums are exact in any order: 16 tokens or fewer take 16 rows.
    """
    if dtype == torch.float32:
        # Here and in sampled_tile, one shape takes another step: with 32 ptxas spills on sm_100.
        return Tile(64, min(out_block, 64), 16 if (out_block, in_block) == (32, 128) else 32, 4, 3)
    rows = 128 if tokens >= 1024 else 64
    if dtype == torch.int8 and tokens <= 16:
        rows = 16
    step = min(max(in_block, 32), 64)
    return Tile(rows, out_block, step, 8 if rows * out_block == 128 * 128 else 4, 4 if out_block <= 64 else 3)


def sampled_tile(dtype: torch.dtype, block: tuple[int, int]) -> Tile:
    """The tile of `multiply_sampled`: all of a block, of fp32 ones up to 64 x 64; the step is in tokens."""
    most = 64 if dtype == torch.float32 else 128
    rows, columns = min(block[0], most), min(block[1], most)
    area = rows * columns
    warps = 1 if area < 1024 else 2 if area == 1024 else 8 if area == 128 * 128 else 4
    if rows >= 64:
        warps = max(warps, 4)  # Hopper's instruction is four warps' together
    if dtype == torch.float32:
        return Tile(rows, columns, 64 if (rows, columns) == (64, 32) else 32, warps, 3)
    return Tile(rows, columns, 64, warps, 3)


# --- launchers -----------------------------------------------------------------------------------------------------


class Lists(NamedTuple):
    """The pattern in one direction, int32 (see the head of this file), and the extent of a block there."""

    starts: Tensor
    inner: Tensor
    number: Tensor
    out_block: int
    in_block: int


class WeightIndex(NamedTuple):
    """The pattern of a weight [n, k] in blocks of br x bc, for every kernel here; all lists int32, on the GPU.

    Attributes:
        shape: (n, k).
        block: (br, bc).
        crow: [block rows + 1], col [nnzb], row [nnzb]: the block column and the block row of each block.
        ccol: [block columns + 1], number [nnzb]: the blocks of each block column, by their place in values, in the
            order of their rows, which `number_row` [nnzb] names.
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    crow: Tensor
    col: Tensor
    row: Tensor
    ccol: Tensor
    number_row: Tensor
    number: Tensor

    @property
    def forward(self) -> Lists:
        # `number` is not read there: places are 0, 1, 2, ...
        return Lists(self.crow, self.col, self.col, *self.block)

    @property
    def transposed(self) -> Lists:
        return Lists(self.ccol, self.number_row, self.number, *self.block[::-1])


def supported(block: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether there are kernels for blocks of this shape and values of this dtype."""
    return block[0] in SIDES and block[1] in SIDES and dtype in (torch.float16, torch.bfloat16, torch.float32)


def _multiply(x: Tensor, lists: Lists, values: Tensor, bias: Tensor | None, width: int, transposed: bool) -> Tensor:
    rows = rows_of(x)
    y = x.new_empty(*x.shape[:-1], width)
    tokens = rows.shape[0]
    if tokens == 0 or width == 0:
        return y
    tile = multiply_tile(values.dtype, lists.out_block, lists.in_block, tokens)
    grid = (triton.cdiv(tokens, tile.rows) * triton.cdiv(width, tile.columns),)
    with on(x):
        multiply[grid](
            rows, lists.starts, lists.inner, lists.number, values, bias, y,
            tokens, rows.shape[1], width, rows.stride(0), width,
            **_multiply_constants(tile, lists.out_block, lists.in_block),
            TRANSPOSED=transposed, UPCAST=upcast(values.dtype), **tile.options,
        )  # fmt: skip
    return y


def _multiply_constants(tile: Tile, out_block: int, in_block: int) -> dict[str, int]:
    return {"BT": tile.rows, "BN": tile.columns, "BK": tile.step, "OUT": out_block, "IN": in_block}


def block_sparse_linear(x: Tensor, index: WeightIndex, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias for x [..., K]; x, values [nnzb, br, bc] and bias [N] share fp16, bf16 or fp32. [..., N]."""
    return _multiply(x, index.forward, values.contiguous(), bias, index.shape[0], False)


def block_sparse_input_gradient(grad: Tensor, index: WeightIndex, values: Tensor) -> Tensor:
    """dx = dy W for dy [..., N]; [..., K]."""
    return _multiply(grad, index.transposed, values.contiguous(), None, index.shape[1], True)


def block_sparse_values_gradient(grad: Tensor, x: Tensor, index: WeightIndex) -> Tensor:
    """dvalues[b] = dy[:, its rows]^T x[:, its columns] for dy [..., N] and x [..., K]; [nnzb, br, bc], dtype of x."""
    (n, k), block = index.shape, index.block
    dy, rows = rows_of(grad), rows_of(x)
    dvalues = x.new_empty(index.col.numel(), *block)
    if not dvalues.numel():
        return dvalues
    tile = sampled_tile(x.dtype, block)
    grid = (dvalues.numel() // (tile.rows * tile.columns),)
    with on(x):
        multiply_sampled[grid](
            dy, rows, index.row, index.col, dvalues, rows.shape[0], n, k, dy.stride(0), rows.stride(0),
            **_sampled_constants(tile, block), UPCAST=upcast(x.dtype), **tile.options,
        )  # fmt: skip
    return dvalues


def _sampled_constants(tile: Tile, block: tuple[int, int]) -> dict[str, int]:
    return {"BT": tile.step, "BM": tile.rows, "BN": tile.columns, "BR": block[0], "BC": block[1]}


def block_sparse_linear_int8(
    codes: Tensor,
    scale: Tensor,
    index: WeightIndex,
    values: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    zero: Tensor | None = None,
    weight_sums: Tensor | None = None,
    activation: int = 0,
    residual: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """y = activation((codes - zero) W^T * (scale[row] * weight_scale[column]) + bias) + residual, summed in int32.

    Args:
        codes: int8 [T, K].
        scale: fp32 [T], the step of each row.
        values: int8 [nnzb, br, bc].
        weight_scale: fp32 [N].
        bias: fp32 [N].
        out_dtype: fp32, bf16 or fp16, of the result [T, N].
        zero: int32 [T], beside weight_sums int32 [N], the sums of W's rows.
        activation: see bertkern.nn.activations.
        residual: [T, N] in any float dtype.
        count: int32 [1], how many rows are wanted; the others are not written.
    """
    codes = rows_of(codes)
    tokens, width = codes.shape[0], index.shape[0]
    y = codes.new_empty(tokens, width, dtype=out_dtype)
    if tokens == 0 or width == 0:
        return y
    residual = None if residual is None else rows_of(residual)
    lists = index.forward
    tile = multiply_tile(torch.int8, lists.out_block, lists.in_block, tokens)
    grid = (triton.cdiv(tokens, tile.rows) * triton.cdiv(width, tile.columns),)
    with on(codes):
        multiply_int8[grid](
            codes, scale, zero, lists.starts, lists.inner, lists.number, values.contiguous(), weight_scale,
            None if zero is None else weight_sums, bias, residual, count, y,
            tokens, codes.shape[1], width, codes.stride(0), 0 if residual is None else residual.stride(0), width,
            **_multiply_constants(tile, lists.out_block, lists.in_block), ACTIVATION=activation, **_exact(tile),
        )  # fmt: skip
    return y


def _exact(tile: Tile) -> dict[str, Any]:
    # What is made of exact sums is rounded operation by operation, as on a processor.
    return compile_options(tile.warps, tile.stages, fuse=False)


# --- what is compiled ---------------------------------------------------------------------------------------------

_LISTS = {"starts": "*i32", "inner": "*i32", "number": "*i32"}
_SIZES = {"T": "i32", "x_width": "i32", "y_width": "i32", "x_stride": "i32", "y_stride": "i32"}


def _shapes(block: tuple[int, int]) -> tuple[tuple[int, int, int], ...]:
    """Problems (T, N, K): whole tiles, one token, and odd edges everywhere with more tokens than a tile has rows."""
    br, bc = block
    return ((64, 2 * br, 3 * bc), (1, br + 1, bc + 3), (131, 3 * br + 5, 5 * bc + 7))


def _multiply_entry(dtype: torch.dtype, block: tuple[int, int], tokens: int, transposed: bool = False) -> Entry:
    kind, (out_block, in_block) = TYPES[dtype], block[::-1] if transposed else block
    tile = multiply_tile(dtype, out_block, in_block, tokens)
    bias = {} if transposed else {"bias": f"*{kind}"}
    constants = _multiply_constants(tile, out_block, in_block)
    return Entry(
        name=f"{'input_gradient' if transposed else 'linear'}-{kind}-{block[0]}x{block[1]}-{tile.rows}",
        function=multiply,
        signature={**_LISTS, **_SIZES, **bias, **dict.fromkeys(("x", "values", "y"), f"*{kind}")},
        constexprs={
            **constants,
            "TRANSPOSED": transposed,
            "UPCAST": upcast(dtype),
            **({"bias": None} if transposed else {}),
        },
        options=tile.options,
        aligned=("x", "values", *bias, "y", "x_stride", "y_stride", "x_width", "y_width"),
        opcodes=opcodes(dtype, tile.rows, tile.columns),
        shapes=_shapes(block),
    )


def _int8_entry(block: tuple[int, int], tokens: int, out: torch.dtype, activation: int | None = None) -> Entry:
    """With an activation also with all else that may be None."""
    tile = multiply_tile(torch.int8, *block, tokens)
    pointers = {**dict.fromkeys(("x_scale", "weight_scale", "bias"), "*fp32"), "x": "*i8", "values": "*i8"}
    pointers["y"] = f"*{TYPES[out]}"
    optional = {"x_zero": "*i32", "weight_sums": "*i32", "residual": f"*{TYPES[out]}"}
    pointers |= {} if activation is None else optional
    count = {} if activation is None else {"count": "*i32"}
    lacking = dict.fromkeys((*optional, "count")) if activation is None else {}
    return Entry(
        name=f"linear_int8-{TYPES[out]}-{block[0]}x{block[1]}-{'' if activation is None else 'all-'}{tile.rows}",
        function=multiply_int8,
        signature={**_LISTS, **_SIZES, "residual_stride": "i32", **pointers, **count},
        constexprs={**_multiply_constants(tile, *block), **lacking, "ACTIVATION": activation or 0},
        options=_exact(tile),
        aligned=(*pointers, "x_stride", "y_stride", "residual_stride", "x_width", "y_width"),
        opcodes=opcodes(torch.int8, tile.rows, tile.columns),
        shapes=_shapes(block),
    )


def _sampled_entry(dtype: torch.dtype, block: tuple[int, int]) -> Entry:
    kind, tile = TYPES[dtype], sampled_tile(dtype, block)
    pointers = dict.fromkeys(("dy", "x", "dvalues"), f"*{kind}")
    return Entry(
        name=f"values_gradient-{kind}-{block[0]}x{block[1]}",
        function=multiply_sampled,
        signature={
            **pointers,
            **dict.fromkeys(("row", "col"), "*i32"),
            **dict.fromkeys(("T", "N", "K", "dy_stride", "x_stride"), "i32"),
        },
        constexprs={**_sampled_constants(tile, block), "UPCAST": upcast(dtype)},
        options=tile.options,
        aligned=(*pointers, "N", "K", "dy_stride", "x_stride"),
        opcodes=opcodes(dtype, tile.rows, tile.columns),
        shapes=_shapes(block),
    )


def _odd(entry: Entry) -> Entry:
    """`entry` for widths that are no multiples of 16: the narrow loads need the most registers."""
    sizes = ("x_width", "y_width", "N", "K", "x_stride", "y_stride", "dy_stride", "residual_stride")
    aligned = tuple(name for name in entry.aligned if name not in sizes)
    return replace(entry, name=f"{entry.name}-odd", aligned=aligned, shapes=(), fetches_ahead=False)


def _table() -> tuple[Entry, ...]:
    half, bfloat, single = torch.float16, torch.bfloat16, torch.float32
    squares = [(side, side) for side in SIDES]
    few, many = 128, 4096
    entries = [
        *(_multiply_entry(half, block, many) for block in (*squares, (32, 64))),
        *(_multiply_entry(half, block, many, transposed=True) for block in ((16, 16), (32, 32), (128, 128), (32, 64))),
        _multiply_entry(half, (32, 32), few),
        _multiply_entry(bfloat, (16, 16), few),
        _multiply_entry(bfloat, (64, 64), few, transposed=True),
        *(_multiply_entry(single, block, few) for block in ((16, 16), (64, 64), (32, 128))),
        *(_multiply_entry(single, block, few, transposed=True) for block in ((32, 32), (128, 128))),
        *(_int8_entry(block, many, half) for block in squares),
        _int8_entry((16, 64), few, bfloat),
        _int8_entry((32, 32), few, half, activation=1),
        _int8_entry((128, 128), many, bfloat, activation=1),
        *(_int8_entry(block, 16, single) for block in ((16, 16), (128, 128))),
        *(_sampled_entry(half, block) for block in (*squares, (32, 64))),
        _sampled_entry(bfloat, (128, 64)),
        *(_sampled_entry(single, block) for block in ((32, 32), (64, 64), (64, 32))),
    ]
    odd = (_multiply_entry(half, (128, 128), many), _int8_entry((32, 32), many, half), _sampled_entry(single, (64, 64)))
    return (*entries, *map(_odd, odd))


# Each kernel's forms as the launchers choose them, for square blocks and some oblong ones, half and full tiles.
TABLE = _table()
