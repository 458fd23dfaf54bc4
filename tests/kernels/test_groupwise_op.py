"""groupwise_linear_cuda where no kernel runs, its checks, its planes, and the layer that calls it."""

import copy
import itertools
import pickle
from dataclasses import replace

import pytest
import torch

from bertkern import ops
from bertkern.formats.groupwise import BITS, pack_codes, quantize_groupwise
from bertkern.nn import GroupwiseLinear, groupwise
from bertkern.ops import groupwise_triton
from bertkern.ops.groupwise_planes import pack_for_triton, unpack_from_triton
from bertkern.ops.groupwise_triton import groupwise_linear_cuda
from tests import reference


def weight_of(n, k, axis="n", size=24, bits=4, **options):
    groups = -(-(n if axis == "n" else k) // size)
    generator = torch.Generator().manual_seed(n + k)
    if bits == "mixed":
        bits = torch.randint(2, 9, (groups,), generator=generator)
    return quantize_groupwise(torch.randn(n, k, generator=generator) + 0.2, bits, size, axis, **options)


@pytest.mark.parametrize("axis", ["n", "k"])
@pytest.mark.parametrize("bits", [*BITS, "mixed"])
def test_planes_and_back(bits, axis):
    for (n, k), size, symmetric in itertools.product(((1, 1), (37, 101), (130, 257)), (1, 24, 37, 64), (True, False)):
        weight = weight_of(n, k, axis, size, bits, symmetric=symmetric)
        planes = pack_for_triton(weight)
        found = unpack_from_triton(planes)
        for name, tensor in weight.tensors().items():
            assert torch.equal(getattr(found, name), tensor), name
        assert (found.zero is None) == symmetric and (planes.shift is None) == symmetric
        assert (found.shape, found.axis, found.group_size) == (weight.shape, axis, size)


def test_bytes_of_the_planes():
    # 2 and 1 bits: byte (n, j) has the codes of columns j, 32 + j, .. of four strips, or eight.
    codes = torch.arange(256).remainder(8).expand(2, -1).clone()
    codes[1] = codes[1].flip(0)
    (planes,) = pack_for_triton(pack_codes(codes, torch.ones(1), None, 3, "n", 2)).codes
    two, one = planes[: 2 * 128 * 32].view(2, 128, 32), planes[2 * 128 * 32 :].view(1, 128, 32)
    for n, j in ((0, 0), (0, 31), (1, 5)):
        for tile in range(2):
            parts = [int(codes[n, 128 * tile + 32 * r + j]) & 3 for r in range(4)]
            assert int(two[tile, n, j]) == sum(part << 2 * r for r, part in enumerate(parts))
        assert int(one[0, n, j]) == sum((int(codes[n, 32 * r + j]) >> 2) << r for r in range(8))
    assert not two[:, 2:].any() and not one[:, 2:].any()


@pytest.mark.parametrize("axis,size", [("n", 24), ("k", 24), ("k", 37)])
@pytest.mark.parametrize("bits", [3, "mixed"])
@pytest.mark.parametrize("step,zero", [(0.0, 0), (0.0, 128), (0.03, 0), (0.02, 100)])
def test_as_on_a_processor(bits, axis, size, step, zero):
    weight, bias, x = weight_of(37, 101, axis, size, bits), torch.randn(37), torch.randn(2, 5, 101)
    options = {"input_scale": step, "input_zero_point": zero}
    expected = ops.linear(x, ops.pack_groupwise(weight, bias, **options), 37)
    got = groupwise_linear_cuda(x, pack_for_triton(weight), bias, **options)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("axis", ["n", "k"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", range(6))
def test_float_activations_and_epilogues(activation, dtype, axis):
    weight, bias = weight_of(37, 101, axis, 24, "mixed"), torch.randn(37)
    x, residual = torch.randn(5, 101).to(dtype), torch.randn(5, 37).to(dtype)
    got = groupwise_linear_cuda(
        x, pack_for_triton(weight), bias, activation=activation, residual=residual, quantized=False
    )
    expected = x.double() @ weight.dequantize(torch.float64).T + bias.double()
    expected = reference.activate(expected, activation) + residual.double()
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


def test_rows_that_are_not_finite():
    x = torch.randn(3, 101)
    x[1, 5] = float("inf")
    got = groupwise_linear_cuda(x, pack_for_triton(weight_of(37, 101)))
    assert bool(got[1].isnan().all()) and bool(got[[0, 2]].isfinite().all())


@pytest.mark.parametrize("quantized", [True, False])
def test_gradients_are_those_of_the_dequantized_weight(quantized):
    weight = weight_of(37, 101, "k")
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((5, 101), (37,), (5, 37))]
    x, bias, residual = leaves
    got = groupwise_linear_cuda(x, pack_for_triton(weight), bias, activation=1, residual=residual, quantized=quantized)
    twin = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight.dequantize(), bias)) + residual
    grad = torch.randn(5, 37)
    for mine, theirs in zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(twin, leaves, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def arguments(x, planes, changed=None):
    call = {
        "x": x, "codes": planes.codes, "members": planes.members, "scale": planes.scale, "shift": planes.shift,
        "column_sum": planes.column_sum, "bias": None, "residual": None, "bits": planes.bits, "group": planes.group,
        "activation": 0, "quantized": True, "input_scale": 0.0, "input_zero_point": 0, "out_dtype": x.dtype,
    }  # fmt: skip
    return tuple({**call, **(changed or {})}.values())


@pytest.mark.parametrize("axis,bits", [("n", 4), ("k", "mixed")])
def test_opcheck(axis, bits):
    planes = pack_for_triton(weight_of(37, 101, axis, 24, bits))
    x = torch.randn(5, 101, requires_grad=True)
    torch.library.opcheck(torch.ops.bertkern.groupwise_linear_cuda, arguments(x, planes))


def test_without_elements():
    for t, k in ((0, 40), (3, 40)):
        got = groupwise_linear_cuda(torch.randn(2, t, k), pack_for_triton(weight_of(5, k)), torch.ones(5))
        assert got.shape == (2, t, 5)


PLANES = pack_for_triton(weight_of(37, 101, "k", 24, "mixed"))
WRONG = {
    "x of integers": ({"x": torch.ones(3, 101).int()}, "x of dtype torch.float32, .*. Got torch.int32"),
    "x of another width": ({"x": torch.ones(3, 130)}, r"x of shape \[..., K\] as 5 groups .*. Got \[3, 130\]"),
    "a bias of another length": ({"bias": torch.ones(36)}, r"bias float32 of shape \[37\]. Got torch.float32 of shape"),
    "a residual of another shape": ({"residual": torch.ones(3, 36)}, r"residual of shape \[3, 37\]. Got \[3, 36\]"),
    "bits that are none": ({"bits": [9] * len(PLANES.bits)}, "bits from 2 to 8"),
    "fewer members": ({"members": PLANES.members[1:]}, "codes, bits and members of each part"),
    "codes of another length": (
        {"codes": [PLANES.codes[0][1:], *PLANES.codes[1:]]}, r"codes uint8 of shape \[\d+\]. Got torch.uint8 of shape",
    ),
    "a zero point beside rows' own ranges": ({"input_zero_point": 5}, ".* either 0 or 128. Got 5"),
    "another device": ({"shift": PLANES.shift.to("meta")}, "all tensors on cpu. Got meta"),
    "no such activation": ({"activation": 6}, "activation from 0 to 5. Got 6"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    wrong, said = WRONG[case]
    with pytest.raises(RuntimeError, match=f"groupwise_linear_cuda: expected {said}"):
        torch.ops.bertkern.groupwise_linear_cuda(*arguments(torch.ones(3, 101), PLANES, wrong))


def test_a_checked_weight_is_packed():
    with pytest.raises(ValueError, match="scales above 0"):
        pack_for_triton(replace(weight_of(5, 40), scale=torch.zeros(1)))


def test_without_triton_it_says_so_once(monkeypatch):
    def missing(name):
        raise ImportError("Run: pip install triton")

    groupwise_triton._kernels.cache_clear()
    monkeypatch.setattr(groupwise_triton._triton, "kernels", missing)
    with pytest.warns(UserWarning, match="groupwise_linear_cuda: runs in plain PyTorch, slowly: Run: pip install"):
        assert groupwise_triton._kernels() is None
    groupwise_triton._kernels.cache_clear()


# --- the layer -------------------------------------------------------------------------------------------------------


def test_a_layers_planes_follow_its_tensors(monkeypatch):
    made = []
    monkeypatch.setattr(groupwise, "pack_for_triton", lambda weight: made.append(weight) or pack_for_triton(weight))
    layer = GroupwiseLinear(weight_of(37, 101, "k"), torch.randn(37)).eval()
    x = torch.randn(3, 101)
    before = layer._by_planes(x)
    assert torch.equal(layer._by_planes(x), before) and len(made) == 1
    torch.testing.assert_close(before, layer(x), atol=1e-4, rtol=1e-5)
    layer.weight_scale.mul_(2)
    twice = layer._by_planes(x)
    assert len(made) == 2 and not torch.allclose(twice, before)
    torch.testing.assert_close(twice, layer(x), atol=1e-4, rtol=1e-5)
    layer.weight_codes = torch.zeros_like(layer.weight_codes)
    assert not torch.allclose(layer._by_planes(x), twice) and len(made) == 3
    layer.load_state_dict(GroupwiseLinear(weight_of(37, 101, "k"), layer.bias).state_dict())
    torch.testing.assert_close(layer._by_planes(x), before)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert "_planes" not in other.__dict__ and torch.equal(other._by_planes(x), before)
    layer.half()
    assert "_planes" not in layer.__dict__


def test_a_layers_activations():
    x = torch.randn(3, 101)
    for step in (None, 0.0, 0.03):
        layer = GroupwiseLinear(weight_of(37, 101), torch.randn(37), input_scale=step).eval()
        torch.testing.assert_close(layer._by_planes(x), layer(x), atol=1e-4, rtol=1e-5)
    compiled = torch.compile(layer._by_planes, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), atol=1e-4, rtol=1e-5)
