"""GroupwiseWeight: its bit streams byte by byte, its grids, and no tensor of a file is believed."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from bertkern.formats import GroupwiseWeight
from bertkern.formats.groupwise import BITS, group_size_of, pack_codes, quantize_groupwise

GROUPINGS = [("n", 1), ("n", 6), ("n", 1000), ("k", 1), ("k", 6), ("k", 24), ("k", 1000)]


def made(shape=(7, 29), axis="n", size=3, bits=4, **options) -> tuple[torch.Tensor, GroupwiseWeight]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return weight, quantize_groupwise(weight, bits, size, axis, **options)


def mixed(groups: int) -> torch.Tensor:
    return torch.arange(groups) % 7 + 2


@pytest.mark.parametrize("axis,size", GROUPINGS)
@pytest.mark.parametrize("bits", [*BITS, "mixed"])
def test_bit_streams(axis, size, bits):
    n, k = 7, 29
    groups = -(-(n if axis == "n" else k) // size)
    _, weight = made((n, k), axis, size, mixed(groups) if bits == "mixed" else bits)
    codes, stream, at = weight.unpacked(), bytes(weight.codes.tolist()), 0
    for row in range(n):
        number = used = 0
        for column in range(k):
            number |= int(codes[row, column]) << used
            used += int(weight.bits[(row if axis == "n" else column) // size])
        width = (used + 7) // 8
        assert stream[at : at + width] == number.to_bytes(width, "little")
        at += width
    assert at == len(stream)
    again = pack_codes(codes, weight.scale, weight.zero, weight.bits, axis, size)
    assert torch.equal(again.codes, weight.codes)


@pytest.mark.parametrize("axis,size", GROUPINGS)
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"whole_zero": True}, {"shared": True}])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_nearest_points_between_the_ends(axis, size, options, bits):
    weight, quantized = made((13, 53), axis, size, bits, **options)
    steps = (quantized.dequantize(torch.float64) - weight.double()).abs() / quantized.spread(quantized.scale)
    # A zero point that is rounded may push an end out by half a step more.
    assert steps.max() <= (1.0 if "whole_zero" in options else 0.5) + 1e-4
    if not options:
        for end in (torch.amin, torch.amax):
            assert torch.allclose(end(quantized.dequantize()), end(weight), rtol=1e-5)
    if "symmetric" in options:
        assert quantized.zero is None and int(quantized.unpacked().min()) >= 1
    if "whole_zero" in options:
        assert torch.equal(quantized.zero, quantized.zero.round())


@pytest.mark.parametrize("value", [0.0, 0.7, -3e-3, 1e-30])
@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_of_one_value(value, symmetric):
    quantized = quantize_groupwise(torch.full((4, 8), value), 4, 2, symmetric=symmetric)
    assert torch.allclose(quantized.dequantize(), torch.full((4, 8), value), rtol=1e-5, atol=1e-37)


def test_files(tmp_path):
    for axis, size in GROUPINGS:
        _, weight = made(axis=axis, size=size)
        save_file(weight.tensors("layer."), tmp_path / "x.safetensors")
        read = GroupwiseWeight.from_tensors(load_file(tmp_path / "x.safetensors"), [7, 29], axis, size, "layer.")
        assert torch.equal(read.dequantize(), weight.dequantize())
    _, symmetric = made(symmetric=True)
    assert set(symmetric.tensors()) == {"codes", "scale", "bits"}


def test_sizes():
    _, weight = made((768, 768), "n", 6, 4)
    assert weight.groups == 128 and weight.average_bits == 4
    assert weight.nbytes <= 0.1265 * 4 * 768 * 768
    assert group_size_of(768, 128) == 6 and group_size_of(7, 3) == 3
    with pytest.raises(ValueError, match=r"a number of groups that 7 can be cut into\. Got 5"):
        group_size_of(7, 5)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"codes": torch.zeros(3, dtype=torch.uint8)}, r"codes uint8 of shape \[105\]"),
        ({"codes": torch.zeros(105, dtype=torch.int8)}, "codes uint8"),
        ({"bits": torch.full((3,), 9, dtype=torch.uint8)}, "bits from 2 to 8"),
        ({"bits": torch.full((3,), 1, dtype=torch.uint8)}, "bits from 2 to 8"),
        ({"bits": torch.full((2,), 4, dtype=torch.uint8)}, r"bits uint8 of shape \[G\] = \[3\]"),
        ({"scale": torch.zeros(3)}, "scales above 0"),
        ({"scale": torch.tensor([1.0, -1.0, 1.0])}, "scales above 0"),
        ({"scale": torch.tensor([1.0, float("nan"), 1.0])}, "finite scale"),
        ({"scale": torch.ones(4)}, r"scale float32 of shape \[3\]"),
        ({"scale": torch.ones(3, dtype=torch.float64)}, "scale float32"),
        ({"zero": torch.tensor([1.0, float("inf"), 1.0])}, "finite zero"),
        ({"zero": torch.ones(3, 1)}, r"zero float32 of shape \[3\]"),
        ({"axis": "m"}, 'axis "n" or "k"'),
        ({"group_size": 0}, "group_size of at least 1"),
        ({"shape": (7, -1)}, "two sizes"),
    ],
)
def test_what_a_file_may_hold(change, message):
    _, weight = made()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(weight, **change).check()


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda w: quantize_groupwise(w, 1, 2), "bits from 2 to 8"),
        (lambda w: quantize_groupwise(w, 9, 2), "bits from 2 to 8"),
        (lambda w: quantize_groupwise(w, 4.0, 2), "a whole number"),
        (lambda w: quantize_groupwise(w, [4, 4], 2), "bits of 3 groups. Got 2"),
        (lambda w: quantize_groupwise(w, 4, 0), "group_size of at least 1"),
        (lambda w: quantize_groupwise(w[0], 4, 2), r"weight of shape \[N, K\]"),
        (lambda w: quantize_groupwise(w[:0], 4, 2), "a weight with elements"),
        (lambda w: quantize_groupwise(w / 0, 4, 2), "finite weights"),
        (lambda w: pack_codes(w.abs().round().long() + 4, torch.ones(3), None, 2, "n", 2), r"codes in \[0, 2\^bits\)"),
        (lambda w: pack_codes(w.abs().long(), torch.zeros(3), None, 8, "n", 2), "scales above 0"),
        (lambda w: pack_codes(w.abs(), torch.ones(3), None, 8, "n", 2), "whole codes"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("axis", ["n", "k"])
@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)])
def test_sizes_of_zero(shape, axis):
    n, k = shape
    scale = torch.ones(n) if axis == "n" else torch.ones(n, k)
    weight = pack_codes(torch.zeros(shape, dtype=torch.int64), scale, None, 4, axis)
    assert weight.unpacked().shape == weight.dequantize().shape == shape
