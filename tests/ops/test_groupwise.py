"""Group-wise weights by the kernels, against the canonical form in float64."""

import pytest
import torch

from bertkern import ops
from bertkern.formats.groupwise import BITS, GroupwiseWeight, quantize_groupwise
from tests import reference

GROUPINGS = [("n", 1), ("n", 6), ("n", 64), ("n", 1000), ("k", 5), ("k", 6), ("k", 24), ("k", 64), ("k", 1000)]
SHAPES = [(33, 717), (64, 192), (7, 5), (96, 130), (1, 1)]
OPERANDS = [torch.int8, torch.float32, torch.bfloat16]


def weight_of(n, k, axis="n", size=6, bits=4, **options):
    groups = -(-(n if axis == "n" else k) // size)
    generator = torch.Generator().manual_seed(n + k)
    if bits == "mixed":
        bits = torch.randint(2, 9, (groups,), generator=generator)
    return quantize_groupwise(torch.randn(n, k, generator=generator) + 0.2, bits, size, axis, **options)


def expected(x, weight, bias, operand, step=0.0, zero=0):
    w = weight.dequantize(torch.float64)
    if operand == torch.int8:
        if step or zero:
            zero = zero if step else 0
            codes, scale = ops.quantize_rows(x, step, zero, zero > 0)
        else:
            codes, scale, zero = reference.quantize_ranges(x)
            zero = zero[:, None]
        x = (codes.double() - zero) * scale.double()[:, None]
    elif operand == torch.bfloat16:
        x, w = x.bfloat16(), w.bfloat16()
    return x.double() @ w.double().T + bias.double()


def close(got, wanted, tolerance):
    assert float((got.double() - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("axis,size", GROUPINGS)
@pytest.mark.parametrize("bits", [*BITS, "mixed"])
def test_linear(bits, axis, size, operand):
    for n, k in SHAPES:
        weight = weight_of(n, k, axis, size, bits)
        bias = torch.linspace(-1, 1, n)
        packed = ops.pack_groupwise(weight, bias, operand=operand)
        assert torch.equal(ops.unpack_groupwise(packed, weight.bits), weight.codes)
        for m in (1, 7, 14, 33):
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
            tolerance = 5e-4 if operand == torch.bfloat16 else 5e-5 if axis == "k" else 1e-5
            close(ops.linear(x, packed, n), expected(x, weight, bias, operand), tolerance)


@pytest.mark.parametrize("axis", ["n", "k"])
@pytest.mark.parametrize("m", [1, 5, 40])
def test_without_inputs_the_bias_is_left(m, axis):
    """Whatever the product before has left in the memory for the operand."""
    before, groups = ops.pack_groupwise(weight_of(64, 768)), 11 if axis == "n" else 0
    scale = torch.ones((groups,) if axis == "n" else (64, 0))
    bits, none = torch.full((groups,), 4, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8)
    packed = ops.pack_groupwise(GroupwiseWeight(none, scale, scale * 3, bits, (64, 0), axis, 6), torch.ones(64))
    ops.linear(torch.randn(m, 768) + 5, before, 64)
    assert torch.equal(ops.linear(torch.zeros(m, 0), packed, 64), torch.ones(m, 64))


@pytest.mark.parametrize("axis,size", GROUPINGS)
@pytest.mark.parametrize("options", [{"symmetric": True}, {"shared": True}, {"whole_zero": True}])
@pytest.mark.parametrize("step,zero", [(0.0, 0), (0.0, 128), (0.03, 0), (0.02, 100)])
def test_zero_points_of_both_sides(axis, size, options, step, zero):
    n, k = 70, 90
    weight, bias = weight_of(n, k, axis, size, "mixed", **options), torch.ones(n)
    x = torch.randn(9, k, generator=torch.Generator().manual_seed(3))
    packed = ops.pack_groupwise(weight, bias, input_scale=step, input_zero_point=zero)
    close(ops.linear(x, packed, n), expected(x, weight, bias, torch.int8, step, zero), 5e-5)
    # Ready codes may have another zero point than the packed one.
    codes = torch.randint(0, 256, (9, k), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    got = ops.qgemm(codes, torch.full((9,), 0.01), 77, packed, n)
    close(got, (codes.double() - 77) * 0.01 @ weight.dequantize(torch.float64).T + 1, 5e-5)


@pytest.mark.parametrize("axis,size,bits", [("n", 6, 4), ("n", 6, "mixed"), ("k", 24, 4), ("k", 24, "mixed")])
@pytest.mark.parametrize("activation", list(ops.ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_epilogues(axis, size, bits, activation, dtype):
    n, k, m = 83, 96, 19
    weight, bias = weight_of(n, k, axis, size, bits), torch.linspace(-1, 1, n)
    generator = torch.Generator().manual_seed(5)
    x, residual = torch.randn(m, k, generator=generator).to(dtype), torch.randn(m, n, generator=generator).to(dtype)
    packed = ops.pack_groupwise(weight, bias)
    got = ops.linear(x, packed, n, activation, residual)
    wanted = reference.activate(expected(x.float(), weight, bias, torch.int8), ops.ACTIVATIONS[activation])
    assert got.dtype == dtype
    wanted = wanted + residual.double()
    # A value in the middle between two codes may go to either, and its whole row with it.
    off = (got.double() - wanted).abs().amax(1) > (2e-5 if dtype == torch.float32 else 1e-2) * float(wanted.abs().max())
    assert int(off.sum()) <= 1 and reference.sqnr(wanted, got.double()) > (60 if dtype == torch.float32 else 35)
    codes, scale = ops.qgemm_requantize(*ops.quantize_rows(x), 0, packed, n)
    assert reference.sqnr(expected(x.float(), weight, bias, torch.int8), codes.double() * scale.double()[:, None]) > 35


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("axis,size,bits", [("n", 6, "mixed"), ("k", 24, 3), ("k", 6, "mixed")])
def test_a_row_does_not_depend_on_the_others(axis, size, bits, operand):
    n, k = 75, 120
    packed = ops.pack_groupwise(weight_of(n, k, axis, size, bits), None, operand=operand)
    x = torch.randn(40, k, generator=torch.Generator().manual_seed(6))
    x[3] = float("nan")
    x[5, 7] = float("inf")
    together = ops.linear(x, packed, n)
    finite = [row for row in range(40) if row not in (3, 5)]
    assert bool(together[finite].isfinite().all()) and bool(together[3].isnan().all())
    for rows in (1, 2, 7, 13):
        for first in range(0, 40, rows):
            part = ops.linear(x[first : first + rows], packed, n)
            assert torch.equal(part.nan_to_num(), together[first : first + rows].nan_to_num())


def test_unpacked_weights_and_bias():
    for axis, size, operand in (("n", 6, torch.int8), ("k", 24, torch.int8), ("k", 24, torch.float32)):
        weight, bias = weight_of(70, 90, axis, size, "mixed"), torch.randn(70)
        dense, scale, b = ops.unpack_linear(ops.pack_groupwise(weight, bias, operand=operand))
        assert torch.allclose(dense, weight.dequantize(), atol=1e-6) and scale.numel() == 0 and torch.equal(b, bias)


def test_memory():
    weight = quantize_groupwise(torch.randn(768, 768), 4, 6)
    assert ops.pack_groupwise(weight).numel() <= 0.14 * 4 * 768 * 768
    bits = torch.where(torch.arange(128) % 2 == 0, 2, 4)
    mixed = quantize_groupwise(torch.randn(768, 768), bits, 6)
    assert ops.pack_groupwise(mixed).numel() <= 0.41 * 768 * 768


def test_opcheck():
    weight = weight_of(33, 40)
    arguments = (weight.codes, weight.scale, weight.zero, weight.bits, 33, 40, 0, 6, None, torch.int8)
    torch.library.opcheck(torch.ops.bertkern.pack_groupwise.default, arguments)
    packed = ops.pack_groupwise(weight)
    torch.library.opcheck(torch.ops.bertkern.unpack_groupwise.default, (packed, weight.bits))
    torch.library.opcheck(torch.ops.bertkern.linear.default, (torch.randn(3, 40), packed, 33))


def test_gradients_reach_the_input():
    weight = weight_of(33, 40, "k", 8)
    x = torch.randn(5, 40, requires_grad=True)
    y = ops.linear(x, ops.pack_groupwise(weight), 33)
    y.sum().backward()
    assert torch.allclose(x.grad, weight.dequantize().sum(0).expand(5, -1), atol=1e-4)


@pytest.mark.parametrize(
    "change,message",
    [
        ({0: torch.zeros(3, dtype=torch.uint8)}, r"codes of shape \[660\], as bits say"),
        ({0: torch.zeros(660, dtype=torch.int8)}, "codes of dtype uint8"),
        ({1: torch.zeros(6)}, "finite scales above 0. Got 0 at element 0"),
        ({1: torch.full((6,), float("nan"))}, "finite scales above 0"),
        ({1: torch.ones(5)}, r"scale of shape \[G\], G = 6"),
        ({2: torch.full((6,), float("inf"))}, "finite zero points"),
        ({2: torch.ones(5)}, "zero of the shape of scale"),
        ({3: torch.full((6,), 9, dtype=torch.uint8)}, "bits from 2 to 8. Got 9 in group 0"),
        ({3: torch.full((5,), 4, dtype=torch.uint8)}, r"bits of shape \[G\] = \[6\]"),
        ({4: -1}, "expected n and k"),
        ({6: 2}, "axis 0"),
        ({7: 0}, "group_size"),
        ({8: torch.ones(32)}, r"bias of shape \[N\] = \[33\]"),
        ({9: torch.float16}, "operand int8, float32 or bfloat16"),
        ({10: float("nan")}, "input_scale >= 0"),
        ({10: 0.0, 11: 5}, "expected input_zero_point = 0, or 128 for symmetric ranges"),
    ],
)
def test_bad_input(change, message):
    weight = weight_of(33, 40)
    arguments = [weight.codes, weight.scale, weight.zero, weight.bits, 33, 40, 0, 6, None, torch.int8, 0.0, 0]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bertkern.pack_groupwise(*arguments)


def test_damaged_packed_weights():
    packed = ops.pack_groupwise(weight_of(33, 40))
    for damaged in (packed[:-4], packed[:64], torch.cat([packed, packed[:4]])):
        with pytest.raises(RuntimeError, match="expected packed weights"):
            ops.linear(torch.randn(1, 40), damaged, 33)
        with pytest.raises(RuntimeError, match="expected packed weights"):
            ops.unpack_groupwise(damaged, torch.full((6,), 4, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="bits as packed"):
        ops.unpack_groupwise(packed, torch.full((6,), 5, dtype=torch.uint8))
    with pytest.raises(ValueError, match="weight to be a GroupwiseWeight"):
        ops.pack_groupwise(torch.randn(3, 4))
