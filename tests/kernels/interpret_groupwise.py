"""Runs the kernels of group-wise weights in Triton's interpreter, as interpret.py does the block-sparse ones; results
and partial sums are NaN, or the largest integer, before they are written.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bertkern import _triton
from bertkern.formats.groupwise import GroupwiseWeight, quantize_groupwise
from bertkern.nn import GroupwiseLinear
from bertkern.ops import groupwise_triton as ops
from bertkern.ops.groupwise_planes import pack_for_triton
from tests import reference
from tests.kernels.interpret import run
from tests.kernels.interpret_attention import Recorder

kernels = _triton.kernels("groupwise")

DTYPES = {name: dtype for dtype, name in kernels.TYPES.items()}
# Rounding of a result: to nearest, of bf16 in this interpreter towards zero.
ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-22}
Mixed = int | tuple[int, ...]


def fenced(t: int, k: int, dtype: torch.dtype) -> Tensor:
    """A matrix in the midst of NaN, whose rows begin at multiples of 16 elements."""
    inside = torch.full((t + 4, k + 32 + -k % 16), float("nan"), dtype=dtype)[2 : 2 + t, 16 : 16 + k]
    return inside.copy_(torch.randn(t, k))


def weight_of(n: int, k: int, bits: Mixed, axis: str, size: int, **options: Any) -> GroupwiseWeight:
    """Bits in turn where there are several."""
    groups = -(-(n if axis == "n" else k) // size)
    each = bits if isinstance(bits, int) else [bits[group % len(bits)] for group in range(groups)]
    return quantize_groupwise(torch.randn(n, k) + 0.1, each, size, axis, **options)


def launchable(weight: GroupwiseWeight) -> Any:
    planes = pack_for_triton(weight)
    return kernels.Weight(
        planes.codes, planes.members or [None], planes.bits, planes.scale, planes.shift, planes.column_sum,
        weight.shape, planes.group,
    )  # fmt: skip


def activations(x: Tensor, weight: Any, dtype: torch.dtype, zero_point: int = 0) -> tuple[Any, Tensor]:
    """The operand, and what it stands for in float64."""
    if dtype != torch.int8:
        return x, x.double()
    groups = () if weight.shift is None else (weight.scale.shape[0], weight.group or weight.shape[1])
    codes = kernels.quantize_activations(x, *groups, zero_point=zero_point)
    zero = 0 if codes.zero is None else codes.zero.double()[:, None]
    return codes, (codes.codes.double() - zero) * codes.scale.double()[:, None]


def compare(got: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """Equal up to the rounding of the result and that of fp32 sums, of which `magnitude` is the sum of absolutes."""
    bound = ROUNDING[got.dtype] * expected.abs() + 3e-6 * magnitude + torch.finfo(got.dtype).smallest_normal
    error = (got.double() - expected).abs()
    assert bool((error <= bound).all()), f"{int((error > bound).sum())} of {error.numel()} differ, up to {error.max()}"


def agree(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    bits: Mixed,
    axis: str,
    size: int,
    *,
    zero_point: int = 0,
    bias: bool = True,
    residual: torch.dtype | None = None,
    activation: int = 0,
    out: torch.dtype = torch.float32,
    splits: int | None = None,
    apart: bool | None = None,
    **options: Any,
) -> None:
    """A product by the launchers against float64."""
    (t, n, k), source = shape, torch.float32 if dtype == torch.int8 else dtype
    weight = weight_of(n, k, bits, axis, size, **options)
    laid = launchable(weight)
    operand, x = activations(fenced(t, k, source), laid, dtype, zero_point)
    b = torch.randn(n) if bias else None
    r = None if residual is None else fenced(t, n, residual)
    got = kernels.groupwise_linear(operand, laid, b, activation, r, out, splits=splits, apart=apart)
    dense, whole = weight.dequantize(torch.float64), 0.0 if b is None else b.double()
    # Codes and zero points are summed apart: either may be larger than their difference.
    size_of = weight.spread(weight.scale.double() * (weight.zeros().double().abs() + 2.0 ** weight.bits.double()))
    added = 0 if r is None else r.double()
    expected = reference.activate(x @ dense.T + whole, activation) + added
    compare(got, expected, x.abs() @ size_of.expand(n, k).T + 1)


# --- the forms of the table ------------------------------------------------------------------------------------------


def entry_of(entry: Any, shape: tuple[int, int, int]) -> None:
    """The form is right, and what was launched is what the table says of it."""
    constants, kinds = entry.constexprs, entry.signature
    given = {name for name, kind in kinds.items() if kind.startswith("*")}
    dtype, bits, group = DTYPES[kinds["x"][1:]], constants["BITS"], constants["GROUP"]
    many = "members" in given
    Recorder.launches.clear()
    agree(
        shape,
        dtype,
        (bits, 2 if bits > 2 else 4) if many else bits,
        "k" if group else "n",
        group or 5,
        zero_point=0 if "x_zero" in given else 128,
        symmetric="shift" not in given,
        bias="bias" in given,
        residual=DTYPES[kinds["residual"][1:]] if "residual" in given else None,
        activation=constants["ACTIVATION"],
        out=torch.float32 if constants["PARTIAL"] else DTYPES[kinds["y"][1:]],
        splits=2 if constants["ORDERED"] or constants["PARTIAL"] else 1,
        apart=constants["PARTIAL"],
    )
    found = [arguments for function, arguments in Recorder.launches if function is entry.function]
    (arguments,) = (arguments for arguments in found if arguments["BITS"] == bits)
    assert {name: arguments[name] for name in constants if name != "ORDERED"} == {
        name: value for name, value in constants.items() if name != "ORDERED"
    }
    # Beside partial sums it says nothing.
    assert constants["PARTIAL"] or arguments["ORDERED"] == constants["ORDERED"]
    assert {name: arguments[name] for name in entry.options} == dict(entry.options)
    types = {name: kinds[name][1:] for name in given if name not in ("codes",)}
    assert {name: kernels.TYPES[arguments[name].dtype] for name in types} == types
    sizes = [name for name in entry.aligned if not kinds[name].startswith("*")]
    assert not [name for name in sizes if arguments[name] % 16]


# --- what the table does not show ------------------------------------------------------------------------------------


def apart_as_together() -> None:
    """Runs side by side, or one after the other, give the same bits; a row has them among any rows."""
    for dtype, axis, size, bits in itertools.product(
        (torch.float16, torch.bfloat16, torch.int8), "nk", (64,), (3, (2, 4))
    ):
        weight = launchable(weight_of(70, 1100, bits, axis, size))
        source = torch.float32 if dtype == torch.int8 else dtype
        x = torch.randn(70, 1100).to(source)
        found = []
        for splits in (1, 4):
            operand, _ = activations(x, weight, dtype)
            together = kernels.groupwise_linear(operand, weight, splits=splits, apart=False)
            assert torch.equal(kernels.groupwise_linear(operand, weight, splits=splits, apart=True), together)
            # The interpreter's float products depend on the tile and a row's place in it, int8 ones do not.
            for rows in (slice(0, 1), slice(5, 21), slice(69, 70)) if dtype == torch.int8 else (slice(0, 50),):
                operand, _ = activations(x[rows], weight, dtype)
                assert torch.equal(kernels.groupwise_linear(operand, weight, splits=splits), together[rows])
            found.append(together)
        if dtype == torch.int8 and axis == "n":
            # Whole numbers: exact in any order.
            assert torch.equal(*found)


def large_tiles() -> None:
    """Rows have the same bits in the tile of 1,024 tokens and more."""
    weight, x = launchable(weight_of(33, 288, 4, "k", 32)), torch.randn(1040, 288)
    together = kernels.groupwise_linear(activations(x, weight, torch.int8)[0], weight, splits=2, apart=False)
    for rows in (slice(0, 9), slice(1000, 1040)):
        part = kernels.groupwise_linear(activations(x[rows], weight, torch.int8)[0], weight, splits=2)
        assert torch.equal(part, together[rows])


def exact_integers() -> None:
    """Along N int8 sums are exact, and the scales come in this order: the very bits of fp32."""
    weight = weight_of(37, 301, 4, "n", 6, symmetric=True)
    laid, x = launchable(weight), torch.randn(5, 301)
    codes = kernels.quantize_activations(x, zero_point=128)
    exact = codes.codes.double() @ (weight.unpacked().double() - 8).T
    got = kernels.groupwise_linear(codes, laid)
    assert torch.equal(got, exact.float() * weight.spread(weight.scale)[:, 0] * codes.scale[:, None])


def rounded_activations() -> None:
    """Codes are the nearest ones, as bertkern.ops.quantize_rows gives them; sums are those of the codes."""
    for dtype, (step, zero) in itertools.product(
        (torch.float32, torch.float16, torch.bfloat16), ((0.0, 0), (0.0, 128), (0.03, 0), (0.02, 100), (0.01, 255))
    ):
        x = fenced(7, 205, dtype).add_(0.3)
        x[3] = 0
        x[4] = x[4].abs()
        found = kernels.quantize_activations(x, 6, 37, step=step, zero_point=zero)
        if step == 0 and zero == 0:
            codes, scale, offset = reference.quantize_ranges(x.float())
            codes, offset = codes.int() - 128, offset.int() - 128
        else:
            unsigned = step > 0 and zero not in (0, 128)
            codes, scale = reference.quantize_rows(x.float(), step, zero if unsigned else 0, unsigned)
            codes, offset = codes.int() - (128 if unsigned else 0), torch.full((7,), zero - 128 if unsigned else 0)
        torch.testing.assert_close(found.scale, scale.expand(7), rtol=3e-7, atol=0)
        zeros = torch.zeros(7, dtype=torch.int32) if found.zero is None else found.zero
        assert (found.zero is None) == (zero == 128 or (step > 0 and zero == 0))
        assert torch.equal(zeros, offset.int())
        off = (found.codes.int() - codes).abs()
        # What lies in the middle between two codes may go to either.
        fraction = (x.double() / found.scale.double()[:, None]).frac().abs()
        assert int(off.max()) <= 1 and bool(((fraction[off > 0] - 0.5).abs() < 1e-4).all())
        wide = torch.nn.functional.pad(found.codes.double() - zeros.double()[:, None], (0, 6 * 37 - 205))
        assert torch.equal(found.sums, wide.view(7, 6, 37).sum(2).T.float())
        assert found.codes.stride(0) % 16 == 0


def strange_rows() -> None:
    """A row that is not finite is NaN beside int8 activations, and reaches no other row."""
    for axis in "nk":
        laid = launchable(weight_of(37, 90, 4, axis, 24))
        x = torch.randn(6, 90)
        clean = kernels.groupwise_linear(activations(x, laid, torch.int8)[0], laid)
        x[1, 7], x[4, 80], x[5, 0] = float("nan"), float("inf"), float("-inf")
        got = kernels.groupwise_linear(activations(x, laid, torch.int8)[0], laid)
        assert bool(got[[1, 4, 5]].isnan().all()) and torch.equal(got[[0, 2, 3]], clean[[0, 2, 3]])
        half = kernels.groupwise_linear(x.half(), laid)
        assert bool(half[[0, 2, 3]].isfinite().all()) and not bool(half[[1, 4, 5]].isfinite().any())


def layers() -> None:
    """GroupwiseLinear by the operator, and its gradient, against its dequantized twin."""
    for axis, size, step in (("n", 6, None), ("n", 6, 0.0), ("k", 24, None), ("k", 24, 0.0), ("k", 24, 0.03)):
        layer = GroupwiseLinear(weight_of(37, 96, (3, 4), axis, size), torch.randn(37), input_scale=step).eval()
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(2, 5, 96).to(dtype).requires_grad_()
            got = layer._by_planes(x)
            double = x.detach().double().requires_grad_()
            expected = layer.dequantize().double()(double)
            assert got.dtype == dtype and reference.sqnr(expected.detach(), got.detach().double()) > 28
            grad = torch.randn(got.shape).to(dtype)
            mine = torch.autograd.grad(got, x, grad)[0]
            theirs = torch.autograd.grad(expected, double, grad.double())[0]
            assert mine.dtype == dtype and reference.sqnr(theirs, mine.double()) > 40


def empty() -> None:
    for t, n, k, dtype in itertools.product((0, 3), (0, 5), (0, 40), (torch.float16, torch.int8)):
        for axis in "nk":
            groups = -(-(n if axis == "n" else k) // 24)
            scale = torch.ones((groups,) if axis == "n" else (n, groups))
            weight = GroupwiseWeight(
                torch.full((n * k // 2,), 0x12, dtype=torch.uint8), scale, scale * 3,
                torch.full((groups,), 4, dtype=torch.uint8), (n, k), axis, 24,
            )  # fmt: skip
            laid = launchable(weight)
            operand, x = activations(torch.randn(t, k, dtype=torch.float16), laid, dtype)
            got = kernels.groupwise_linear(operand, laid, torch.ones(n), out_dtype=torch.float16)
            torch.testing.assert_close(got.double(), x @ weight.dequantize(torch.float64).T + 1, atol=0.05, rtol=2e-3)


CHECKS = (
    apart_as_together, large_tiles, exact_integers, rounded_activations, strange_rows, layers, empty,
)  # fmt: skip
PRIMES = ((1, 2, 3), (5, 37, 101), (67, 131, 263))
GROUPINGS = (("n", 24), ("n", 37), ("k", 24), ("k", 32), ("k", 37), ("k", 64), ("k", 128))


def problems() -> Iterator[tuple[str, dict[str, Any]]]:
    """All bits along both axes; every group size; parts of mixed bits; epilogues."""
    half, bfloat, codes = torch.float16, torch.bfloat16, torch.int8
    every = (*range(2, 9), (2, 8, 3))
    for dtype, axis, bits in itertools.product((half, bfloat, codes), "nk", every):
        if dtype == bfloat and bits in (2, 4, 5, 6):
            continue  # as fp16, but for what the interpreter casts
        name = f"bits-{kernels.TYPES[dtype]}-{axis}-{bits}".replace(" ", "")
        yield name, {"shape": (5, 37, 229), "dtype": dtype, "bits": bits, "axis": axis, "size": 24}
    for number, (axis, size) in enumerate(GROUPINGS):
        for place, (dtype, symmetric) in enumerate(itertools.product((half, codes), (True, False))):
            shape = PRIMES[(number + place) % 3]
            bits, splits = (2, 3, 4, 8)[(number + place) % 4], (1, 2, 4)[(number + place) % 3]
            name = f"groups-{kernels.TYPES[dtype]}-{axis}{size}-{'symmetric' if symmetric else 'asymmetric'}"
            asked = {"shape": shape, "dtype": dtype, "bits": bits, "axis": axis, "size": size, "symmetric": symmetric}
            yield name, {**asked, "splits": splits, "zero_point": 128 if place % 2 else 0}
    for axis, dtype, splits in itertools.product("nk", (half, codes), (1, 2, 4)):
        asked = {"shape": (7, 67, 769), "dtype": dtype, "bits": 4, "axis": axis, "size": 64, "splits": splits}
        yield f"splits-{kernels.TYPES[dtype]}-{axis}-{splits}", {**asked, "apart": True, "out": half, "residual": half}
    for activation in range(6):
        asked = {"shape": (3, 37, 520), "dtype": codes, "bits": 4, "axis": "k", "size": 32, "activation": activation}
        yield f"activation-{activation}", {**asked, "residual": bfloat, "splits": 2, "apart": activation % 2 == 0}
    shared = {"shape": (5, 37, 101), "dtype": half, "bits": 4, "axis": "k", "size": 32}
    yield "shared", {**shared, "shared": True, "bias": False}


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for entry in kernels.TABLE:
        for shape in entry.shapes:
            yield f"{entry.name}-{'x'.join(map(str, shape))}", functools.partial(entry_of, entry, shape)
    for name, asked in problems():
        yield name, functools.partial(agree, **asked)
    for check in CHECKS:
        yield check.__name__, check


def main() -> int:
    ops._triton_for = lambda x, quantized: kernels if quantized or kernels.supported(x.dtype) else None
    # Fills what is allocated with NaN, or the largest integer.
    torch.use_deterministic_algorithms(True)
    kernels.multiply = Recorder(kernels.multiply)
    return run(cases())


if __name__ == "__main__":
    sys.exit(main())
