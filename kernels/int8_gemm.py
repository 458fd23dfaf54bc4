"""Linear layers of 8-bit codes: int8 activations times int8 weights, or float8 e4m3 times float8 e4m3.

    c[t, n] = sum_k a[t, k] W[n, k] - z[t] sum_k W[n, k]          int32, exact; float8: fp32, z = 0
    y[t, n] = float(c) * (s[t] * S[n]) + b[n]                     each operation rounded, in this order
    y       = clamp(round(y / g), -127, 127) * g                  where sums are rounded to a step g
    y       = activation(y) + residual[t, n]                      stored in fp32, fp16 or bf16,
    or as clamp(round(y / o) + z_o, low, high)                    codes of a static step o; NaN gives the lowest

a [T, K] and W [N, P >= K] are row-major, and from K on W is zero. A tile is [features, tokens], W's rows times a's, as
both lie in memory: tensor cores take 8-bit operands along K alone. So few tokens waste none of an instruction, whose
rows are features.

Floor: W is read once from memory, N K bytes, and from few tokens on that is all: at 4.3 TB/s 1024 x 4096 takes 1 us.
From about 300 tokens on 2 T N K operations of the tensor cores are more; tiles of 128 x 128 take 64 operations from a
byte that comes into shared memory.

Numerics: int32 sums are exact, so neither tile nor splitting changes a bit of them. For few tokens K is cut into
`splits` runs that are programs of their own, and a second pass adds these and finishes. float8 sums are rounded: there
the layer's shape alone decides the runs, and a program that takes several adds them in order; Hopper's products, which
keep few bits of a sum, are added up in fp32 after every 128 of K.

Rows of the operands begin at multiples of 16 bytes. uint8 codes are turned into int8 ones by a pass of their own.

Known of these kernels is what Triton's interpreter and the machine code say; no card has run them yet.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue import add_partials, finish_8bit, rows_wanted, store_partial
from .launch import compile_options, on, upcast
from .table import NO_PRODUCTS, TYPES, Entry, opcodes

FP8 = torch.float8_e4m3fn


# --- kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _sum(
    x, x_stride, rows, live, width, weight, pitch, columns, inside, begin, end,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BN, BT] of products over columns begin .. end of x and of the weight. EVEN: steps of BK end where it ends."""
    lane = tl.arange(0, BK)
    # Rows that are not there are the first one's; what becomes of them is not stored.
    row, column = tl.where(live, rows, 0).to(tl.int64), tl.where(inside, columns, 0).to(tl.int64)
    x_place = x + row[None, :] * x_stride + lane[:, None]
    w_place = weight + column[:, None] * pitch + lane[None, :]
    INT8: tl.constexpr = x.dtype.element_ty == tl.int8
    total = tl.zeros((BN, BT), tl.int32 if INT8 else tl.float32)
    for k in range(begin, end, BK):
        if EVEN:
            a, w = tl.load(x_place + k), tl.load(w_place + k)
        else:
            there = k + lane < width
            nothing = tl.zeros((1, 1), x.dtype.element_ty)
            a = tl.load(x_place + k, mask=there[:, None], other=nothing)
            w = tl.load(w_place + k, mask=there[None, :], other=nothing)
        if UPCAST:
            a, w = a.to(tl.float32), w.to(tl.float32)
        if INT8:
            total = tl.dot(w, a, total, out_dtype=tl.int32)
        else:
            total = tl.dot(w, a, total, input_precision="ieee", max_num_imprecise_acc=128)
    return total


@triton.jit(do_not_specialize=["T", "splits", "out_zero"])
def multiply(
    x, x_scale, x_zero, weight, weight_scale, weight_sums, bias, residual, count, y, steps,
    T, N, width, run, splits, scale_step, zero_step, weight_step, x_stride, pitch, residual_stride, y_stride,
    output_scale, out_scale, out_zero,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, ORDERED: tl.constexpr,
    PARTIAL: tl.constexpr, ACTIVATION: tl.constexpr, ROUND: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y[T, N] of x [T, width] and weight [N, width]; a program is a tile of BN features x BT tokens.

    PARTIAL: y is [splits, T, N], int32 or fp32, and a program sums one run of K and nothing else. Else all, run by run
    where ORDERED. Tiles past `count` rows end at once.
    """
    tiles, above = tl.cdiv(N, BN), tl.cdiv(T, BT)
    tile, split = tl.program_id(0) % tiles, tl.program_id(0) // (tiles * above)
    top = tl.program_id(0) // tiles % above * BT
    last = rows_wanted(T, count)
    if top >= last:
        return
    columns, rows = tile * BN + tl.arange(0, BN), top + tl.arange(0, BT)
    inside, live = columns < N, rows < last
    if PARTIAL or not ORDERED:
        begin = split * run if PARTIAL else 0
        end = tl.minimum(begin + run, width) if PARTIAL else width
        total = _sum(
            x, x_stride, rows, live, width, weight, pitch, columns, inside, begin, end, BT, BN, BK, EVEN, UPCAST
        )
    else:
        total = tl.zeros((BN, BT), tl.float32)
        for number in range(splits):
            total += _sum(
                x, x_stride, rows, live, width, weight, pitch, columns, inside,
                number * run, tl.minimum(number * run + run, width), BT, BN, BK, EVEN, UPCAST,
            )  # fmt: skip
    if PARTIAL:
        store_partial(total, y, split, rows, columns, live, inside, T, N)
    else:
        finish_8bit(
            total, rows, live, columns, inside, tile, x_scale, x_zero, weight_scale, weight_sums, bias, residual,
            y, steps, scale_step, zero_step, weight_step, residual_stride, y_stride, output_scale, out_scale, out_zero,
            ACTIVATION, ROUND,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "splits", "out_zero"])
def add_in_order(
    partial, x_scale, x_zero, weight_scale, weight_sums, bias, residual, count, y, steps,
    T, N, splits, scale_step, zero_step, weight_step, residual_stride, y_stride, output_scale, out_scale, out_zero,
    BT: tl.constexpr, BN: tl.constexpr, ACTIVATION: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """y[T, N] of partial [splits, T, N], added one after the other."""
    tiles = tl.cdiv(N, BN)
    tile, top = tl.program_id(0) % tiles, tl.program_id(0) // tiles * BT
    last = rows_wanted(T, count)
    if top >= last:
        return
    columns, rows = tile * BN + tl.arange(0, BN), top + tl.arange(0, BT)
    inside, live = columns < N, rows < last
    total = add_partials(partial, splits, rows, columns, live, inside, T, N, BT, BN)
    finish_8bit(
        total, rows, live, columns, inside, tile, x_scale, x_zero, weight_scale, weight_sums, bias, residual,
        y, steps, scale_step, zero_step, weight_step, residual_stride, y_stride, output_scale, out_scale, out_zero,
        ACTIVATION, ROUND,
    )  # fmt: skip


# --- which tile ----------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """tokens x features of the result a program computes, the step of K, warps and pipeline stages."""

    rows: int
    features: int
    step: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        # Products and sums are rounded apart, as on a processor.
        return compile_options(self.warps, self.stages, fuse=False)


PROGRAMS = 128  # that fill a large GPU
ADD_ROWS, ADD_FEATURES = 8, 64
ADD = compile_options(4, 2, fuse=False)
LEAST_RUN = 256  # of K, which a program of its own is worth


def tile_of(tokens: int, n: int) -> Tile:
    """The tile of `multiply`. Which it is changes no sum.

    Few tokens wait for the weight: steps are long, so that some 60 KB of it are on their way to a multiprocessor at a
    time. Larger tiles come where they fill the GPU and rows of the result begin at multiples of 16 elements;
    elsewhere the addresses of narrow stores fill the registers.
    """
    if tokens <= 16:
        return Tile(16, 64, 256, 4, 4)
    if tokens <= 32:
        return Tile(32, 64, 256, 4, 3)

    def programs(rows: int, features: int) -> int:
        return triton.cdiv(tokens, rows) * triton.cdiv(n, features)

    if n % 16 == 0 and programs(128, 128) >= PROGRAMS:
        return Tile(128, 128, 128, 8, 3)
    if n % 16 == 0 and programs(64, 128) >= PROGRAMS:
        return Tile(64, 128, 128, 4, 4)
    return Tile(64, 64, 128, 4, 4)


def runs_of(tokens: int, n: int, k: int, tile: Tile, exact: bool) -> tuple[int, int, bool]:
    """(columns in a run, runs, whether they are programs of their own).

    Exact sums are cut where programs are too few; others by the layer's shape alone.
    """
    programs = triton.cdiv(tokens, tile.rows) * triton.cdiv(n, tile.features)
    among = programs if exact else triton.cdiv(n, 64)
    splits = max(1, min(8 if exact else 4, PROGRAMS // max(1, among), k // LEAST_RUN))
    run = triton.cdiv(triton.cdiv(k, splits), LEAST_RUN) * LEAST_RUN
    splits = triton.cdiv(k, run) if run else 1
    return run, splits, splits > 1 and (exact or programs < PROGRAMS)


# --- launchers -----------------------------------------------------------------------------------------------------


def int8_linear(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sums: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    count: Tensor | None,
    activation: int,
    output_scale: float,
    out_dtype: torch.dtype,
    out_scale: float = 0.0,
    out_zero_point: int = 0,
    *,
    splits: int | None = None,
    apart: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y [T, N] as the head of this file says, and the rows' steps, fp32 [T], beside an out_dtype of codes.

    Arguments are those of `bertkern.ops.int8_triton`, checked and laid out there: codes [T, K] and weight [N, K or
    more], K a multiple of 16, have rows that begin at multiples of 16 bytes; at least one of T and N.

    Args:
        splits: at most so many runs of K; None: see `runs_of`.
        apart: whether runs are programs of their own; None: see `runs_of`.
    """
    x, n = codes, weight.shape[0]
    tokens, width = x.shape
    y = x.new_empty(tokens, n, dtype=out_dtype)
    steps = x.new_empty(tokens, dtype=torch.float32) if out_scale else None
    if x.dtype == torch.uint8:
        # u - z = (u - 128) - (z - 128)
        x = (x ^ 128).view(torch.int8)
        zero_point = scale.new_full((1,), -128, dtype=torch.int32) if zero_point is None else zero_point - 128
    exact = x.dtype == torch.int8
    tile = tile_of(tokens, n)
    run, cut, alone = runs_of(tokens, n, width, tile, exact)
    if splits is not None:
        run = max(LEAST_RUN, triton.cdiv(triton.cdiv(width, splits), LEAST_RUN) * LEAST_RUN)
        cut = max(1, triton.cdiv(width, run))
    apart = (alone if apart is None else apart) and cut > 1
    residual = None if residual is None else residual.contiguous()

    def step(tensor: Tensor | None) -> int:
        return 0 if tensor is None or tensor.numel() == 1 else 1

    finish = {
        "x_scale": scale.contiguous(), "x_zero": None if zero_point is None else zero_point.contiguous(),
        "weight_scale": weight_scale.contiguous(), "weight_sums": None if zero_point is None else weight_sums,
        "bias": bias, "residual": residual, "count": count, "T": tokens, "N": n, "scale_step": step(scale),
        "zero_step": step(zero_point), "weight_step": step(weight_scale),
        "residual_stride": 0 if residual is None else residual.stride(0), "output_scale": float(output_scale),
        "out_scale": float(out_scale), "out_zero": out_zero_point, "ACTIVATION": activation, "ROUND": output_scale > 0,
    }  # fmt: skip
    tiles = triton.cdiv(tokens, tile.rows) * triton.cdiv(n, tile.features)
    partial = x.new_empty(cut, tokens, n, dtype=torch.int32 if exact else torch.float32) if apart else None
    with on(x):
        multiply[(tiles * (cut if apart else 1),)](
            x=x, weight=weight, y=partial if apart else y, steps=None if apart else steps, width=width, run=run,
            splits=cut, x_stride=x.stride(0), pitch=weight.stride(0), y_stride=n, BT=tile.rows, BN=tile.features,
            BK=tile.step, EVEN=width % tile.step == 0, ORDERED=cut > 1 and not exact and not apart, PARTIAL=apart,
            UPCAST=upcast(x.dtype), **finish, **tile.options,
        )  # fmt: skip
        if apart:
            add_in_order[(triton.cdiv(tokens, ADD_ROWS) * triton.cdiv(n, ADD_FEATURES),)](
                partial=partial, y=y, steps=steps, splits=cut, y_stride=n, BT=ADD_ROWS, BN=ADD_FEATURES, **finish, **ADD
            )
    return y, steps


# --- what is compiled ---------------------------------------------------------------------------------------------

_SIZES = ("T", "N", "scale_step", "zero_step", "weight_step", "residual_stride", "y_stride", "splits", "out_zero")
_MULTIPLY_SIZES = (*_SIZES, "width", "run", "x_stride", "pitch")
_STEPS = ("output_scale", "out_scale")
_POINTERS = {
    "x_scale": "*fp32", "x_zero": "*i32", "weight_scale": "*fp32", "weight_sums": "*i32", "bias": "*fp32",
    "residual": "*fp16", "count": "*i32", "steps": "*fp32",
}  # fmt: skip


def _multiply_entry(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    out: torch.dtype = torch.float16,
    *,
    lacking: tuple[str, ...] = (),
    partial: bool = False,
    ordered: bool = False,
    activation: int = 0,
    rounds: bool = False,
) -> Entry:
    """`lacking`: the tensors that are None. `shape`: the interpreter's problem, whose T and N decide the tile."""
    (tokens, n, k), coded = shape, out in (torch.int8, torch.uint8)
    tile = tile_of(tokens, n)
    if partial:
        out = torch.int32 if dtype == torch.int8 else torch.float32
    lacking = {*lacking, *(() if coded and not partial else ("steps",)), *(("x_zero",) if dtype == FP8 else ())}
    lacking |= {"weight_sums"} if "x_zero" in lacking else set()
    pointers = {name: kind for name, kind in _POINTERS.items() if name not in lacking}
    pointers |= {"x": f"*{TYPES[dtype]}", "weight": f"*{TYPES[dtype]}", "y": f"*{TYPES[out]}"}
    sizes = ("width", "run", "x_stride", "pitch", *(() if n % 16 else ("N", "residual_stride", "y_stride")))
    even = (k + -k % 16) % tile.step == 0
    return Entry(
        name=f"multiply-{TYPES[dtype]}-{TYPES[out]}-{tile.rows}x{tile.features}"
        + "".join(f"-{word}" for word, said in
                  (("even", even), ("ordered", ordered), ("partial", partial), ("odd", n % 16)) if said),
        function=multiply,
        signature={**pointers, **dict.fromkeys(_MULTIPLY_SIZES, "i32"), **dict.fromkeys(_STEPS, "fp32")},
        constexprs={
            **dict.fromkeys(lacking),
            "BT": tile.rows, "BN": tile.features, "BK": tile.step, "EVEN": even, "ORDERED": ordered, "PARTIAL": partial,
            "ACTIVATION": activation, "ROUND": rounds, "UPCAST": upcast(dtype),
        },
        options=tile.options,
        aligned=(*(name for name in pointers if name != "count"), *sizes),
        opcodes=opcodes(dtype, tile.features, tile.rows),
        shapes=(shape,),
        fetches_ahead=n % 16 == 0,  # else the residual comes element by element
    )  # fmt: skip


def _add_entry(kind: str, out: torch.dtype) -> Entry:
    pointers = {**_POINTERS, "y": f"*{TYPES[out]}", "partial": f"*{kind}"}
    lacking = (*(() if kind == "i32" else ("x_zero", "weight_sums")), *(() if out == torch.int8 else ("steps",)))
    for name in lacking:
        del pointers[name]
    return Entry(
        name=f"add_in_order-{kind}-{TYPES[out]}",
        function=add_in_order,
        signature={**pointers, **dict.fromkeys(_SIZES, "i32"), **dict.fromkeys(_STEPS, "fp32")},
        constexprs={
            **dict.fromkeys(lacking),
            "BT": ADD_ROWS,
            "BN": ADD_FEATURES,
            "ACTIVATION": 1,
            "ROUND": kind == "i32",
        },
        options=ADD,
        aligned=(*(name for name in pointers if name != "count"), "N", "residual_stride", "y_stride"),
        opcodes=NO_PRODUCTS,
        shapes=(),
        fetches_ahead=False,
    )


def _table() -> tuple[Entry, ...]:
    half, bfloat, single = torch.float16, torch.bfloat16, torch.float32
    codes, plain = torch.int8, ("x_zero", "residual", "count")
    return (
        _multiply_entry(codes, (9, 80, 784), lacking=plain, partial=True),
        _multiply_entry(codes, (16, 80, 256), activation=1),
        _multiply_entry(codes, (17, 144, 272), bfloat, lacking=("x_zero", "count"), activation=2),
        _multiply_entry(codes, (67, 80, 144), single, lacking=plain, rounds=True, activation=3),
        _multiply_entry(codes, (33, 80, 128), codes, lacking=("residual",), activation=1),
        _multiply_entry(codes, (65, 16 * 1024, 16), torch.uint8, lacking=(*plain, "bias")),
        _multiply_entry(codes, (130, 16 * 1024, 128), lacking=plain),
        _multiply_entry(codes, (129, 16 * 1024, 48), lacking=("count",), activation=1),
        _multiply_entry(codes, (31, 37, 101), single, activation=4),
        _multiply_entry(codes, (129, 16 * 1024 - 5, 5), half),
        _multiply_entry(FP8, (5, 80, 784), lacking=plain, partial=True),
        _multiply_entry(FP8, (130, 16 * 1024, 128), bfloat, lacking=plain, activation=1),
        _multiply_entry(FP8, (65, 80, 528), ordered=True),
        _multiply_entry(FP8, (31, 37, 101), single, lacking=plain, activation=5),
        _add_entry("i32", codes),
        _add_entry("i32", half),
        _add_entry("fp32", bfloat),
    )


# Each kernel's forms as the launchers choose them: every tile, float8, runs and parts, epilogues.
TABLE = _table()
