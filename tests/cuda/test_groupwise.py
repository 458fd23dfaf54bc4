"""The group-wise kernel for few tokens, run in the emulator."""

import itertools

import pytest
import torch
from torch import Tensor

from bertkern.formats.groupwise import quantize_groupwise
from bertkern.ops.groupwise_planes import GroupwisePlanes, pack_for_triton, strip_count
from tests import reference
from tests.cuda.emulation import TYPES, emulated, skip_without_emulator
from tests.cuda.test_block_sparse import FLOATS, check, rows_of

skip_without_emulator()

GLUE = """
extern "C" int groupwise(void* x, void* codes, void* members, void* scale, void* shift, void* bias, void* residual,
                         void* y, void* partial, int64_t x_stride, int64_t residual_stride, int64_t y_stride,
                         int64_t tokens, int64_t n, int64_t k, int64_t features, int64_t held, int64_t group,
                         int64_t bits, int64_t strips, int64_t splits, int64_t slot, int64_t bf16,
                         int64_t residual_type, int64_t y_type, int64_t activation, int64_t tile_tokens,
                         int64_t slots) {
  using namespace bertkern::cuda;
  Groupwise p = {};
  p.x = x, p.codes = static_cast<uint8_t*>(codes), p.members = static_cast<int*>(members);
  p.scale = static_cast<float*>(scale), p.shift = static_cast<float*>(shift), p.bias = static_cast<float*>(bias);
  p.residual = residual, p.y = y, p.partial = static_cast<float*>(partial);
  p.x_stride = x_stride, p.residual_stride = residual_stride, p.y_stride = y_stride;
  p.tokens = tokens, p.n = n, p.k = k, p.features = features, p.held = held, p.group = group, p.bits = bits;
  p.strips = strips, p.splits = splits, p.slot = slot, p.bf16 = bf16, p.residual_type = Type(residual_type);
  p.y_type = Type(y_type), p.activation = static_cast<Activation>(activation);
  if (slots) return launch_add_in_order(p, slots, nullptr);
  return launch_groupwise(p, nullptr, tile_tokens);
}
"""


def planes_of(n: int, k: int, bits: int | list[int], axis: str, size: int, symmetric: bool = False) -> GroupwisePlanes:
    generator = torch.Generator().manual_seed(n + k)
    weight = quantize_groupwise(
        torch.randn(n, k, generator=generator) + 0.2,
        torch.tensor(bits) if isinstance(bits, list) else bits, size, axis, symmetric=symmetric,
    )  # fmt: skip
    return pack_for_triton(weight)


def dense_of(planes: GroupwisePlanes) -> Tensor:
    from bertkern.ops.groupwise_planes import unpack_from_triton

    return unpack_from_triton(planes).dequantize(torch.float64)


def run(
    x: Tensor,
    planes: GroupwisePlanes,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: torch.dtype = torch.float32,
    activation: int = 0,
    tile: int = 0,
    splits: int = 1,
) -> Tensor:
    (t, k), n, group, parts = x.shape, planes.scale.shape[1], planes.group, len(planes.codes)
    y = torch.full((t, n), float("nan"), dtype=out)
    slots = splits * (parts if group else 1)
    partial = torch.full((slots, t, n), float("nan")) if slots > 1 else None

    def call(number: int, slots: int) -> None:
        members = planes.members[number] if planes.members else None
        total = planes.scale.shape[0] if group else n
        count = total if members is None else len(members)
        emulated("groupwise/groupwise.cu", GLUE).groupwise(
            x, planes.codes[number], members, planes.scale, planes.shift, bias, residual, y, partial, x.stride(0),
            0 if residual is None else residual.stride(0), n, t, n, k, n if group else count, count if group else 0,
            group, planes.bits[number], strip_count(k, group, count), splits, number * splits if group else 0,
            x.dtype == torch.bfloat16, 0 if residual is None else TYPES[residual.dtype], TYPES[out],
            activation, tile, slots,
        )  # fmt: skip

    for number in range(parts):
        call(number, 0)
    if slots > 1:
        call(0, slots)
    return y


GROUPS = [("n", 5), ("k", 32), ("k", 64), ("k", 128), ("k", 96), ("k", 24), ("k", 37)]


@pytest.mark.parametrize("axis,size", GROUPS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_as_the_dequantized_weight(dtype, bits, axis, size):
    for (t, n, k), symmetric in (((1, 37, 700), False), ((11, 70, 331), True), ((17, 16, 128), False)):
        planes = planes_of(n, k, bits, axis, size, symmetric)
        x, bias = rows_of(t, k, dtype), torch.randn(n)
        residual = torch.randn(t, n).to(dtype) if t == 11 else None
        got = run(x, planes, bias=bias, residual=residual, activation=1 if t == 1 else 0)
        dense = dense_of(planes)
        expected = reference.activate(x.double() @ dense.T + bias.double(), 1 if t == 1 else 0)
        check(got, expected + (0 if residual is None else residual.double()), x.double().abs() @ dense.abs().T + 8)


@pytest.mark.parametrize("activation", range(6))
def test_activations(activation):
    planes, x, bias = planes_of(40, 70, 4, "n", 8), rows_of(3, 70, torch.float16), torch.randn(40)
    expected = reference.activate(x.double() @ dense_of(planes).T + bias.double(), activation)
    for out in FLOATS:
        check(run(x, planes, bias=bias, out=out, activation=activation), expected, torch.full((), 10.0))


@pytest.mark.parametrize("axis,size", [("n", 16), ("k", 64)])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_row_does_not_depend_on_its_neighbours(bits, splits, axis, size):
    planes, x = planes_of(50, 1100, bits, axis, size), rows_of(19, 1100, torch.float16)
    dense = dense_of(planes)
    expected = run(x, planes, tile=16, splits=splits)
    check(expected, x.double() @ dense.T, x.double().abs() @ dense.abs().T)
    for rows, tile in itertools.product((slice(0, 1), slice(5, 18)), (8, 16)):
        assert torch.equal(run(x[rows], planes, tile=tile, splits=splits), expected[rows])


@pytest.mark.parametrize("splits", [1, 2])
def test_parts_of_several_bits(splits):
    for axis, size, bits in (("n", 16, [4, 2, 8]), ("k", 64, [3, 8, 2, 4, 2]), ("k", 37, [3, 8, 2, 4, 2])):
        n, k = (45, 290) if axis == "n" else (45, 5 * size - 9)
        planes, x, bias = planes_of(n, k, bits, axis, size), rows_of(5, k, torch.bfloat16), torch.randn(n)
        assert len(planes.codes) == len(set(bits))
        dense = dense_of(planes)
        got = run(x, planes, bias=bias, activation=3, splits=splits)
        expected = (x.double() @ dense.T + bias.double()).clamp(min=0)
        check(got, expected, x.double().abs() @ dense.abs().T)


def test_rows_that_begin_anywhere():
    planes, x = planes_of(20, 101, 4, "n", 8), torch.randn(6, 101).half()
    wide = rows_of(6, 101, torch.float16)
    wide.copy_(x)
    assert torch.equal(run(x, planes), run(wide, planes))


def test_every_code():
    # All codes of each width at every place of a strip, one row for each.
    for bits, dtype in itertools.product((2, 3, 4, 8), (torch.float16, torch.bfloat16)):
        planes = planes_of(2**bits, 256, bits, "n", 1)
        x = torch.zeros(16, 256, dtype=dtype)
        x[torch.arange(16), torch.arange(16) * 16 + 3] = 1
        expected = dense_of(planes).T[torch.arange(16) * 16 + 3]
        check(run(x, planes), expected, torch.ones(()))
