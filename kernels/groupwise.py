"""Linear layers whose weights are group-wise low-bit codes, times fp16, bf16 or int8 activations.

The weight is W[n, k] = (q[n, k] - zero) * scale of its group, q of b bits (2 to 8), groups of neighbours along N or
along K. With c = q - 2^(b - 1), shift = scale * (zero - 2^(b - 1)) and R[g, t] = sum of x[t, k] over the columns of
group g (a single group along N):

    y[t, n] = sum_g scale[g, n] * (sum_{k in g} c[n, k] x[t, k]) - sum_g shift[g, n] * R[g, t]

Tensor cores multiply c, a small whole number that fp16, bf16 and int8 hold exactly; scales never round a weight. Along
N scale comes in the epilogue; along K it multiplies the sums of 32 or 64 columns inside the loop. R is summed by a pass
over x, only where a shift is not 0. int8 activations are x = (a - z[t]) * s[t]; their codes a are multiplied, and

    y = s[t] * (sum_g scale * (sum c a) - sum_g shift * R' - z[t] * C[n]),  R' = sum of a - z,  C[n] = sum_k scale * c.

Layout. K is cut into strips of 32 columns. Every group along K begins a strip and fills its last one up; along N strip
s is the columns 32 s .. 32 s + 31. There are S strips, a multiple of 4; what fills up is 0 and meets zeros of x. A code
is cut into planes of 8, 4, 2 and 1 bits: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1 (the widest plane has the
lowest bits). A byte of a plane of p bits holds the parts of 8 / p codes of one feature, from strips that follow each
other:

    plane [ceil(S p / 8)][P][32]    byte (i, n, j): bits p r .. p r + p - 1 are of the code (n, strip i * 8 / p + r, j)

P is the number of features, filled up to 128. So a tile of features is one run of bytes, a shift and a mask make a
strip of codes in registers, and no code moves between lanes. The planes of a part follow each other, widest first.
Features (along N) or groups (along K) of equal bits make a part, and a part is a launch; its `members` name them where
there are several parts. Parts along K leave their sums to `add_in_order`.

Numerics: a layer's columns are cut into `splits` runs of strips by its shape alone. For few tokens a run is a program
of its own and a second pass adds the runs in order; for many a program takes all runs and adds them in that order. No
atomics: the same sums at every run, and for a row whatever stands beside it.

Rows of the operands should begin at multiples of 16 bytes; elsewhere loads are narrow and slow.

The kernels stand in groupwise_products.py and groupwise_rows.py; here they get their tiles, are launched, and are
listed for those who compile them.

Known of these kernels is what Triton's interpreter and the machine code say; no card has run them yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .groupwise_products import add_in_order, multiply
from .groupwise_rows import quantize, sum_groups
from .launch import compile_options, on, row_block, rows_of, upcast
from .row_grid import code_arguments, empty_codes
from .table import NO_PRODUCTS, TYPES, Entry, opcodes

STRIP = 32


# --- which tile ----------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """tokens x features of the result a program computes, strips in a step, warps and pipeline stages."""

    rows: int
    features: int
    step: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        return compile_options(self.warps, self.stages, fuse=True)


SMALL = compile_options(4, 3, fuse=True)  # of passes over rows and partial sums
QUANTIZE = compile_options(4, 3, fuse=False)  # rounded apart, or codes were others than the CPU's
ADD_ROWS, ADD_FEATURES, SUM_ROWS = 16, 64, 8


def tile_of(tokens: int, group: int, narrow: bool = False) -> Tile:
    """The tile of `multiply`; features are the instruction's rows, so that few tokens waste none of it.

    Decoding a weight costs as much as 64 to 128 tokens' products. From 1,024 tokens on 128 share it; 64 beside groups
    along K, whose sums are held three times, and beside `narrow` loads, whose addresses fill the registers. Which tile
    it is changes no sum.
    """
    step, stages = (2, 4) if group else (4, 3)
    if tokens <= 16:
        return Tile(16, 64, step, 4, stages)
    if tokens < 1024:
        return Tile(64, 64, step, 4, 3)
    return Tile(64 if group or narrow else 128, 128, 2, 8, 3)


def runs_of(features: int, strips: int, splits: int | None = None) -> tuple[int, int]:
    """(strips in a run, runs) that a layer's columns are cut into, by its shape alone: so many that 64 features a
    program fill a GPU of 128 multiprocessors, up to 4 and not below 256 columns."""
    if splits is None:
        splits = min(4, 128 // max(1, triton.cdiv(features, 64)), strips // 8)
    run = triton.cdiv(strips // 4, max(1, splits)) * 4
    return run, triton.cdiv(strips, run) if run else 1


# --- launchers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight [n, k] laid out as the head of this file says, on the GPU.

    Attributes:
        codes: uint8, the planes of each part.
        members: int32 of each part: its features (along N) or its groups (along K); None: all, of a lone part.
        bits: of each part.
        scale: fp32 [G, n]; along N [1, n], of the features.
        shift: fp32 of the shape of scale, or None where all are 0.
        column_sum: fp32 [n], needed by activations with zero points.
        shape: (n, k).
        group: columns of a group; 0 where groups run along N.
    """

    codes: Sequence[Tensor]
    members: Sequence[Tensor | None]
    bits: Sequence[int]
    scale: Tensor
    shift: Tensor | None
    column_sum: Tensor | None
    shape: tuple[int, int]
    group: int

    def part(self, number: int) -> dict[str, Any]:
        """The arguments of `multiply` that belong to a part."""
        members, (n, k) = self.members[number], self.shape
        count = None if members is None else members.numel()
        features, held = (n, count or self.scale.shape[0]) if self.group else (count or n, 0)
        wide = held * triton.cdiv(self.group, STRIP) if self.group else triton.cdiv(k, STRIP)
        return {
            "codes": self.codes[number],
            "members": members,
            "features": features,
            "held": held,
            "strips": triton.cdiv(wide, 4) * 4,
            "pitch": triton.cdiv(features, 128) * 128 * STRIP,
            "BITS": self.bits[number],
        }


def supported(dtype: torch.dtype) -> bool:
    """Whether `groupwise_linear` multiplies activations of this dtype as they are."""
    return dtype in (torch.float16, torch.bfloat16)


class Codes(NamedTuple):
    """int8 activations [T, K] = (codes - zero) * scale.

    Attributes:
        scale: fp32 [T].
        zero: int32 [T]; None: 0.
        sums: fp32 [groups, T] of codes - zero; None where they were not asked for.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    sums: Tensor | None


def quantize_activations(x: Tensor, groups: int = 0, group: int = 0, step: float = 0.0, zero_point: int = 0) -> Codes:
    """Codes of x [..., K] in any float dtype, as `bertkern.ops.linear` rounds them.

    Args:
        groups, group: of how many runs of how many columns sums are wanted; 0: none.
        step: of static activations; 0: each row's own.
        zero_point: of static ones, u = code + 128 around it (0: 128); of rows' own ranges 0: a zero point of each, 128:
            symmetric.
    """
    rows = rows_of(x)
    (tokens, k), wanted = rows.shape, groups > 0
    made = empty_codes(rows, step, zero_point)
    sums = x.new_empty(groups, tokens, dtype=torch.float32) if wanted else None
    groups, group = (groups, group) if wanted else (1, k)
    if tokens:
        with on(x):
            quantize[(tokens,)](
                rows, sums=sums, T=tokens, K=k, groups=groups, group=group, x_stride=rows.stride(0),
                **code_arguments(made, step, zero_point), BLOCK=min(1024, row_block(group)), **QUANTIZE,
            )  # fmt: skip
    return Codes(*made, sums)


def groupwise_linear(
    x: Tensor | Codes,
    weight: Weight,
    bias: Tensor | None = None,
    activation: int = 0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    splits: int | None = None,
    apart: bool | None = None,
) -> Tensor:
    """activation(x W^T + bias) + residual, [T, N], for x [T, K] fp16, bf16 or codes.

    Args:
        bias: fp32 [N].
        residual: [T, N] in any float dtype.
        splits: at most so many runs of columns, which decides the order of sums; None: by the layer's shape.
        apart: whether runs are programs of their own; None: where there are few tokens. It changes no sum.
    """
    (n, k), groups = weight.shape, weight.scale.shape[0]
    coded = isinstance(x, Codes)
    rows = rows_of(x.codes if coded else x)
    tokens = rows.shape[0]
    y = rows.new_empty(tokens, n, dtype=out_dtype)
    if tokens == 0 or n == 0:
        return y
    along_k, parts = weight.group > 0, range(len(weight.codes))
    sums = x.sums if coded else None
    if weight.shift is not None and not coded:
        sums = rows.new_empty(groups, tokens, dtype=torch.float32)
        width = weight.group or k
        with on(rows):
            sum_groups[(triton.cdiv(tokens, SUM_ROWS), groups)](
                rows, sums, tokens, k, width, rows.stride(0), ROWS=SUM_ROWS, BLOCK=min(256, row_block(width)), **SMALL
            )  # fmt: skip
    residual = None if residual is None else rows_of(residual)
    finish = {
        "T": tokens, "N": n, "groups": groups, "scale": weight.scale, "shift": weight.shift, "sums": sums,
        "x_scale": x.scale if coded else None, "x_zero": x.zero if coded else None,
        "column_sum": weight.column_sum if coded and x.zero is not None else None, "bias": bias, "residual": residual,
        "residual_stride": 0 if residual is None else residual.stride(0), "GROUP": weight.group,
        "ACTIVATION": activation,
    }  # fmt: skip
    narrow = k % 16 > 0 or rows.stride(0) % 16 > 0
    tile, exact = tile_of(tokens, weight.group, narrow), coded and not along_k
    options = {"BT": tile.rows, "BN": tile.features, "STEP": tile.step, "UPCAST": upcast(rows.dtype), **tile.options}
    cut = [runs_of(n, weight.part(number)["strips"], splits) for number in parts]
    programs = triton.cdiv(tokens, tile.rows) * triton.cdiv(n, tile.features)
    apart = (programs < 128 if apart is None else apart) and cut[0][1] > 1
    apart = apart or (along_k and len(parts) > 1)
    slots = sum(splits for _, splits in cut) if along_k else cut[0][1]
    partial = rows.new_empty(slots, tokens, n, dtype=torch.int32 if exact else torch.float32) if apart else None
    slot = 0
    with on(rows):
        for number in parts:
            part, (run, splits) = weight.part(number), cut[number]
            tiles = triton.cdiv(tokens, tile.rows) * triton.cdiv(part["features"], tile.features)
            multiply[(tiles * (splits if apart else 1),)](
                x=rows, y=partial if apart else y, K=k, run=run, splits=splits, slot=slot, x_stride=rows.stride(0),
                y_stride=n, ORDERED=splits > 1 and not exact, PARTIAL=apart, **finish, **part, **options,
            )  # fmt: skip
            slot += splits if along_k else 0
        if apart:
            add_in_order[(triton.cdiv(tokens, ADD_ROWS) * triton.cdiv(n, ADD_FEATURES),)](
                partial=partial, y=y, slots=slots, y_stride=n, BT=ADD_ROWS, BN=ADD_FEATURES, **finish, **SMALL
            )  # fmt: skip
    return y


# --- what is compiled ---------------------------------------------------------------------------------------------

_SIZES = (
    "T", "N", "K", "groups", "features", "held", "strips", "pitch", "run", "splits", "slot", "x_stride",
    "residual_stride", "y_stride",
)  # fmt: skip
_OPTIONAL = {
    "shift": "*fp32", "sums": "*fp32", "x_scale": "*fp32", "x_zero": "*i32", "column_sum": "*fp32", "bias": "*fp32",
}  # fmt: skip


def _multiply_entry(
    dtype: torch.dtype,
    bits: int,
    group: int,
    shape: tuple[int, int, int],
    *,
    lacking: tuple[str, ...] = (),
    ordered: bool = False,
    partial: bool = False,
    members: bool = False,
    activation: int = 1,
    out: torch.dtype = torch.float16,
    odd: bool = False,
) -> Entry:
    """`lacking`: the tensors that are None. `shape`: the interpreter's problem, whose T decides the tile."""
    tile, coded = tile_of(shape[0], group, odd), dtype == torch.int8
    if partial:
        out = torch.int32 if coded and not group else torch.float32
    lacking = (*lacking, *(() if coded else ("x_scale", "x_zero", "column_sum")))
    pointers = {name: kind for name, kind in _OPTIONAL.items() if name not in lacking}
    if "residual" not in lacking:
        pointers["residual"] = f"*{TYPES[torch.float16 if partial else out]}"
    pointers |= {"x": f"*{TYPES[dtype]}", "codes": "*u8", "scale": "*fp32", "y": f"*{TYPES[out]}"}
    none = dict.fromkeys(lacking) | ({} if members else {"members": None})
    aligned = ("N", "K", "features", "pitch", "x_stride", "residual_stride", "y_stride")
    return Entry(
        name=f"multiply-{TYPES[dtype]}-{bits}{f'k{group}' if group else 'n'}-{tile.rows}x{tile.features}"
        + "".join(f"-{word}" for word, said in
                  (("ordered", ordered), ("partial", partial), ("members", members), ("odd", odd)) if said),
        function=multiply,
        signature={**pointers, **({"members": "*i32"} if members else {}), **dict.fromkeys(_SIZES, "i32")},
        constexprs={
            **none,
            "BT": tile.rows, "BN": tile.features, "STEP": tile.step, "BITS": bits, "GROUP": group, "ORDERED": ordered,
            "PARTIAL": partial, "ACTIVATION": activation, "UPCAST": upcast(dtype),
        },
        options=tile.options,
        aligned=(*pointers, *(("pitch",) if odd else aligned)),
        opcodes=opcodes(dtype, tile.features, tile.rows),
        shapes=(shape,),
        fetches_ahead=not odd,
    )  # fmt: skip


def _pass_entries() -> list[Entry]:
    """The passes beside the products: nothing in them multiplies on tensor cores."""
    common = {"options": SMALL, "opcodes": NO_PRODUCTS, "shapes": (), "fetches_ahead": False}
    finish = {"scale": "*fp32", **_OPTIONAL, "residual": "*bf16", "y": "*bf16"}
    sizes = dict.fromkeys(("T", "N", "groups", "slots", "residual_stride", "y_stride"), "i32")
    made = [
        Entry(
            name=f"add_in_order-{kind}",
            function=add_in_order,
            signature={**finish, "partial": f"*{kind}", **sizes},
            constexprs={"BT": ADD_ROWS, "BN": ADD_FEATURES, "GROUP": 0 if kind == "i32" else 64, "ACTIVATION": 2},
            aligned=(*finish, "partial", "N", "residual_stride", "y_stride"),
            **common,
        )
        for kind in ("i32", "fp32")
    ]
    sizes = dict.fromkeys(("T", "K", "groups", "group", "x_stride", "code_stride", "static_zero"), "i32")
    rows = {"scale": "*fp32", "zero": "*i32", "sums": "*fp32", "codes": "*i8", "x": "*fp32"}
    made.append(
        Entry(
            name="quantize-fp32",
            function=quantize,
            signature={**rows, **sizes, "step": "fp32"},
            constexprs={"BLOCK": 64, "OWN": True, "STATIC": False},
            aligned=(*rows, "K", "x_stride", "code_stride"),
            **common | {"options": QUANTIZE},
        )
    )
    made.append(
        Entry(
            name="sum_groups-bf16",
            function=sum_groups,
            signature={"x": "*bf16", "sums": "*fp32", **dict.fromkeys(("T", "K", "group", "x_stride"), "i32")},
            constexprs={"ROWS": SUM_ROWS, "BLOCK": 256},
            aligned=("x", "sums", "K", "x_stride"),
            **common,
        )
    )
    return made


def _table() -> tuple[Entry, ...]:
    half, bfloat, codes = torch.float16, torch.bfloat16, torch.int8
    plain = ("shift", "sums", "residual")
    symmetric = (*plain, "x_zero", "column_sum")
    return (
        _multiply_entry(half, 4, 0, (5, 80, 512), lacking=plain, partial=True, activation=0),
        _multiply_entry(half, 4, 0, (1030, 144, 528), ordered=True),
        _multiply_entry(bfloat, 3, 0, (20, 80, 160), out=bfloat),
        _multiply_entry(half, 4, 0, (17, 160, 96), members=True, lacking=("bias", "residual")),
        _multiply_entry(half, 2, 64, (3, 80, 528), partial=True, activation=0),
        _multiply_entry(half, 4, 128, (1025, 80, 640), ordered=True),
        _multiply_entry(bfloat, 7, 24, (33, 80, 96), out=bfloat),
        _multiply_entry(bfloat, 8, 32, (33, 80, 608), members=True, partial=True, activation=0),
        _multiply_entry(codes, 4, 0, (16, 80, 528), partial=True, activation=0, lacking=symmetric),
        _multiply_entry(codes, 3, 0, (1024, 80, 160), activation=4, out=torch.float32),
        _multiply_entry(codes, 2, 64, (19, 80, 1040), ordered=True, activation=3),
        _multiply_entry(codes, 8, 32, (1, 80, 96), out=bfloat, activation=5),
        _multiply_entry(codes, 5, 0, (31, 37, 101), out=torch.float32, odd=True),
        _multiply_entry(bfloat, 6, 37, (1031, 37, 101), out=bfloat, odd=True),
        _multiply_entry(half, 7, 0, (1031, 37, 101), odd=True),
        *_pass_entries(),
    )


# Each kernel's forms as the launchers choose them: all bits, both axes, every tile, runs and parts.
TABLE = _table()
