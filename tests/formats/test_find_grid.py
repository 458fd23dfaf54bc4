"""Grids are found again bit for bit, in the groups that they were made in, and nowhere else."""

import pytest
import torch
from torch import nn

import bertkern as bk
from bertkern.formats.grids import find_grid
from bertkern.formats.groupwise import quantize_groupwise

N, K = 96, 144
WEIGHT = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
# A last group that is shorter is among them. One group along "k" of each row is one of each row.
LAYOUTS = [("n", 96, False), ("n", 1, False), ("n", 6, False), ("n", 10, False)]
LAYOUTS += [("k", size, False) for size in (16, 24, 36, 64, 128)] + [("k", size, True) for size in (1, 6, 10, 72)]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("axis", "size", "shared"), LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"whole_zero": True}])
def test_round_trip(bits, axis, size, shared, options):
    made = quantize_groupwise(WEIGHT, bits, size, axis, shared=shared, **options)
    found = find_grid(made.dequantize())
    assert found is not None and torch.equal(found.dequantize(), made.dequantize())
    assert (found.axis, found.group_size) == (axis, size) and int(found.bits.max()) == bits
    assert found.nbytes <= made.nbytes
    if "symmetric" in options:
        assert found.zero is None
    elif options:
        assert found.zero is None or torch.equal(found.zero, found.zero.round())


@pytest.mark.parametrize("axis,size", [("n", 6), ("k", 16)])
def test_mixed_widths(axis, size):
    groups = N // 6 if axis == "n" else K // 16
    bits = [(2, 4, 8)[i % 3] for i in range(groups)]
    made = quantize_groupwise(WEIGHT, bits, size, axis)
    found = find_grid(made.dequantize())
    assert torch.equal(found.dequantize(), made.dequantize()) and found.bits.tolist() == bits


@pytest.mark.parametrize(
    "dtype,bits", [(torch.bfloat16, 2), (torch.bfloat16, 4), (torch.float16, 4), (torch.float16, 6)]
)
@pytest.mark.parametrize("axis,size", [("n", 6), ("k", 36)])
def test_half_precision(dtype, bits, axis, size):
    bits = max(2, bits - (axis == "k"))
    weight = quantize_groupwise(WEIGHT, bits, size, axis, symmetric=True).dequantize(dtype)
    found = find_grid(weight)
    assert found is not None and torch.equal(found.dequantize(dtype), weight)
    assert (found.axis, found.group_size, int(found.bits.max())) == (axis, size, bits)


def by_division(made):
    """Values of the same grids, rounded otherwise."""
    times = 1 / made.spread(made.scale)
    return (made.unpacked().float() - made.spread(made.zeros())) / times


def by_offset(made):
    scale = made.spread(made.scale)
    return made.unpacked().float() * scale + -made.spread(made.zeros()) * scale


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rounded", [by_division, by_offset])
@pytest.mark.parametrize(("axis", "size", "shared"), [("n", 6, False), ("k", 24, True), ("k", 36, False)])
def test_to_rounding(bits, rounded, axis, size, shared):
    made = quantize_groupwise(WEIGHT, bits, size, axis, shared=shared)
    weight = rounded(made)
    assert not torch.equal(weight, made.dequantize())
    exact = find_grid(weight)
    assert exact is None or torch.equal(exact.dequantize(), weight)
    found = find_grid(weight, exact=False)
    assert (found.axis, found.group_size, int(found.bits.max())) == (axis, size, bits)
    room = 4 * torch.finfo(torch.float32).eps * weight.abs().max()
    assert float((found.dequantize(torch.float64) - weight.double()).abs().max()) <= float(room)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", [(N, K), (1, 64), (64, 1), (3, 8), (2, 768), (7, 5)])
def test_ordinary_weights_are_on_none(exact, shape):
    assert find_grid(torch.randn(shape, generator=torch.Generator().manual_seed(1)), exact) is None


def test_one_weight_off_the_grid():
    made = quantize_groupwise(WEIGHT, 4, 6).dequantize()
    for row, column in ((0, 0), (50, 77), (95, 143)):
        weight = made.clone()
        weight[row, column] *= 1 + 1e-3
        found = find_grid(weight)
        assert found is None or torch.equal(found.dequantize(), weight)
    # A bit more is no bit for bit, but still to rounding.
    weight = made.clone()
    weight[50, 77] = torch.nextafter(weight[50, 77], torch.tensor(float("inf")))
    found = find_grid(weight)
    assert found is None or torch.equal(found.dequantize(), weight)
    assert find_grid(weight, exact=False) is not None


def test_few_values():
    for weight in (
        torch.full((32, 32), 0.3),
        torch.eye(32),
        torch.eye(32) * -0.7,
        torch.randn(32, 1).expand(32, 32),
        torch.where(WEIGHT > 1.5, 0.125, 0.0),
        quantize_groupwise(WEIGHT, 4, 6, symmetric=True).dequantize() * (WEIGHT.abs() > 1),
    ):
        found = find_grid(weight)
        assert found is not None and torch.equal(found.dequantize(), weight)
    assert torch.equal(find_grid(torch.zeros(16, 16)).dequantize(), torch.zeros(16, 16))


def test_strange_numbers():
    weight = quantize_groupwise(WEIGHT, 4, 6).dequantize()
    for value in (float("nan"), float("inf"), -float("inf")):
        for row in (0, 40):
            broken = weight.clone()
            broken[row, 3] = value
            assert find_grid(broken) is None
    tiny = weight * 1e-30
    assert (found := find_grid(tiny)) is None or torch.equal(found.dequantize(), tiny)
    assert find_grid(torch.zeros(0, 5)) is None and find_grid(torch.zeros(5, 0)) is None
    for wrong in (torch.ones(3), torch.ones(3, 3, dtype=torch.int8), torch.ones(3, 3, dtype=torch.float64), [1.0]):
        with pytest.raises(ValueError, match="find_grid: expected weight"):
            find_grid(wrong)


def test_views_and_transposes():
    weight = quantize_groupwise(WEIGHT, 4, 6).dequantize()
    found = find_grid(weight.T)
    assert torch.equal(found.dequantize(), weight.T) and (found.axis, found.group_size) == ("k", 6)
    assert torch.equal(find_grid(weight[:, ::2]).dequantize(), weight[:, ::2])


def test_models():
    model = nn.Sequential(nn.Embedding(40, 48), nn.Linear(48, 64), nn.Linear(64, 48), nn.Linear(48, 40))
    with torch.no_grad():
        model[0].weight.copy_(quantize_groupwise(model[0].weight, 8, 1).dequantize())
        model[1].weight.copy_(quantize_groupwise(model[1].weight, 4, 8).dequantize())
    model[3].weight = model[0].weight
    found = bk.grids(model)
    assert sorted(found) == ["0", "1", "3"] and found["0"] is found["3"]
    for name, weight in found.items():
        assert torch.equal(weight.dequantize(), model.get_submodule(name).weight)
    x = torch.randn(5, 48)
    wanted = model[1](x)
    held = nn.Sequential(model[1])
    config = bk.GroupwiseConfig(activation="float", skip=("*",))
    bk.quantize_(held, config, weights=bk.grids(held))
    assert torch.equal(held[0].dequantized_weight(), model[1].weight)
    assert torch.allclose(held.eval()(x), wanted, atol=1e-5)
    with pytest.raises(TypeError, match=r"grids: expected a torch.nn.Module"):
        bk.grids(torch.ones(3, 3))
