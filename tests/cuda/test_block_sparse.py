"""The block-sparse kernel, run in the emulator."""

import itertools

import pytest
import torch
from torch import Tensor

from bertkern.formats import BsrWeight
from tests import reference
from tests.cuda.emulation import TYPES, emulated, skip_without_emulator

skip_without_emulator()

GLUE = """
extern "C" int block_sparse(void* x, void* values, void* crow, void* col, void* bias, void* residual, void* y,
                            void* x_scale, void* x_zero, void* weight_scale, void* column_sum, void* live,
                            int64_t x_stride, int64_t residual_stride, int64_t y_stride, int64_t tokens, int64_t n,
                            int64_t k, int64_t br, int64_t bc, int64_t operand, int64_t bias_type,
                            int64_t residual_type, int64_t y_type, int64_t activation, int64_t tile_tokens) {
  using namespace bertkern::cuda;
  BlockSparse p = {};
  p.x = x, p.values = values, p.crow = static_cast<int*>(crow), p.col = static_cast<int*>(col), p.bias = bias;
  p.residual = residual, p.y = y, p.x_scale = static_cast<float*>(x_scale), p.x_zero = static_cast<int*>(x_zero);
  p.weight_scale = static_cast<float*>(weight_scale), p.column_sum = static_cast<int*>(column_sum);
  p.live = static_cast<int*>(live);
  p.x_stride = x_stride, p.residual_stride = residual_stride, p.y_stride = y_stride;
  p.tokens = tokens, p.n = n, p.k = k, p.block_rows = br, p.block_columns = bc;
  p.operand = Operand(operand), p.bias_type = Type(bias_type), p.residual_type = Type(residual_type);
  p.y_type = Type(y_type), p.activation = static_cast<Activation>(activation);
  return launch_block_sparse(p, nullptr, tile_tokens);
}
"""

OPERANDS = [torch.float16, torch.bfloat16, torch.int8]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-22}


def rows_of(t: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[t, width], whose rows begin at multiples of 16 bytes, with NaN (int8: -128) between them."""
    each, generator = 16 // dtype.itemsize, torch.Generator().manual_seed(seed)
    wide = torch.full((t, (width // each + 1) * each), -128 if dtype == torch.int8 else float("nan"), dtype=dtype)
    x = wide[:, :width]
    if dtype == torch.int8:
        return x.copy_(torch.randint(-127, 128, (t, width), generator=generator))
    return x.copy_(torch.randn(t, width, generator=generator))


def weight_of(n: int, k: int, block: tuple[int, int], dtype: torch.dtype) -> BsrWeight:
    """About half of the blocks; the second block row is empty, the last block is kept."""
    generator = torch.Generator().manual_seed(n + k)
    kept = torch.rand(-(-n // block[0]), -(-k // block[1]), generator=generator) < 0.5
    kept[0] = True
    kept[1] = False
    kept[-1, -1] = True
    mask = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:n, :k]
    dense = torch.randint(-127, 128, (n, k), generator=generator)
    if dtype != torch.int8:
        dense = torch.randn(n, k, generator=generator)
    return BsrWeight.from_dense((dense * mask).to(dtype), block)


def run(
    x: Tensor,
    weight: BsrWeight,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: torch.dtype | None = None,
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
    weight_scale: Tensor | None = None,
    activation: int = 0,
    tile: int = 0,
    odd: bool = True,
    live: Tensor | None = None,
) -> Tensor:
    (t, k), n = x.shape, weight.shape[0]
    out = out or (torch.float32 if x.dtype == torch.int8 else x.dtype)
    y = torch.full((t, n if odd else -(-n // 8) * 8), float("nan"), dtype=out)[:, :n]
    sums = weight.to_dense().to(torch.int32).sum(1, dtype=torch.int32) if x_zero is not None else None

    def number(tensor: Tensor | None) -> int:
        return TYPES[tensor.dtype] if tensor is not None else 0

    emulated("block_sparse/block_sparse.cu", GLUE).block_sparse(
        x, weight.values, weight.crow, weight.col, bias, residual, y, x_scale, x_zero, weight_scale, sums, live,
        x.stride(0), 0 if residual is None else residual.stride(0), y.stride(0), t, n, k, *weight.block,
        OPERANDS.index(x.dtype), number(bias), number(residual), number(y), activation, tile,
    )  # fmt: skip
    return y


def check(got: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """Equal up to the rounding of the result and that of fp32 sums, of which `magnitude` is the sum of absolutes."""
    assert bool(got.isfinite().all())
    bound = ROUNDING[got.dtype] * expected.abs() + 1e-6 * magnitude + 1e-6
    wrong = (got.double() - expected).abs() > bound
    assert not wrong.any(), f"{int(wrong.sum())} differ, by up to {(got.double() - expected).abs().max()}"


BLOCKS = [(32, 32), (64, 64), (128, 128), (32, 128), (128, 32), (64, 32)]
EPILOGUES = [(None, False, 0), (torch.float32, False, 1), (torch.bfloat16, True, 0), (torch.float16, True, 3)]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_as_the_dense_product(dtype, block):
    n, k = 2 * block[0] + 5, 3 * block[1] + 7
    w = weight_of(n, k, block, dtype)
    dense = w.to_dense().double()
    int8 = dtype == torch.int8
    for (t, tile), (kind, more, activation) in zip([(1, 32), (33, 32), (131, 128), (40, 128)], EPILOGUES, strict=True):
        x = rows_of(t, k, dtype)
        bias = None if kind is None else torch.randn(n).to(kind)
        residual = torch.randn(t, n).to(kind) if more else None
        scales = {"x_scale": torch.rand(t) * 0.01, "weight_scale": torch.rand(n) * 0.01} if int8 else {}
        zero = torch.randint(-128, 128, (t,), dtype=torch.int32) if int8 and more else None
        got = run(x, w, bias=bias, residual=residual, out=kind, activation=activation, tile=tile, x_zero=zero, **scales)
        operand = x.double() - (zero[:, None] if zero is not None else 0)
        expected, magnitude = operand @ dense.T, operand.abs() @ dense.abs().T
        if int8:
            expected = expected * scales["x_scale"].double()[:, None] * scales["weight_scale"].double()
            magnitude = expected.abs()
        expected = reference.activate(expected + (0 if bias is None else bias.double()), activation)
        check(got, expected + (0 if residual is None else residual.double()), magnitude)


@pytest.mark.parametrize("activation", range(6))
def test_activations(activation):
    w, x, bias = weight_of(70, 96, (32, 32), torch.float16), rows_of(5, 96, torch.float16), torch.randn(70).half()
    expected = reference.activate(x.double() @ w.to_dense().double().T + bias.double(), activation)
    for odd in (True, False):  # one element at a time, and eight
        check(run(x, w, bias=bias, out=torch.float32, activation=activation, odd=odd), expected, torch.ones(()))


@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(dtype):
    w, x = weight_of(133, 199, (64, 64), dtype), rows_of(150, 199, dtype)
    scales = {"x_scale": torch.rand(150), "weight_scale": torch.rand(133)} if dtype == torch.int8 else {}
    expected = run(x, w, tile=128, out=torch.float32, activation=1, **scales)
    for rows, tile in itertools.product((slice(0, 1), slice(37, 71)), (32, 128)):
        part = {name: scale[rows] if name == "x_scale" else scale for name, scale in scales.items()}
        assert torch.equal(run(x[rows], w, tile=tile, out=torch.float32, activation=1, **part), expected[rows])


@pytest.mark.parametrize("tile", [32, 128])
def test_int8_has_the_bits_of_the_dense_kernel(tile):
    """What follows the sums is rounded operation by operation."""
    w, x = weight_of(133, 199, (64, 64), torch.int8), rows_of(40, 199, torch.int8)
    zero, bias = torch.randint(-128, 128, (40,), dtype=torch.int32), torch.randn(133)
    scale, steps = torch.rand(40) * 0.01, torch.rand(133) * 0.01
    got = run(x, w, bias=bias, x_scale=scale, x_zero=zero, weight_scale=steps, tile=tile)
    exact = (x.double() - zero[:, None]) @ w.to_dense().double().T
    assert torch.equal(got, exact.float() * (scale[:, None] * steps) + bias)


@pytest.mark.parametrize("count", [0, 1, 33, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
def test_rows_that_are_not_there_are_left_alone(dtype, count):
    w, x = weight_of(70, 96, (32, 32), dtype), rows_of(70, 96, dtype)
    scales = {"x_scale": torch.rand(70), "weight_scale": torch.rand(70)} if dtype == torch.int8 else {}
    expected, there = run(x, w, out=torch.float32, tile=32, **scales), min(count, 70)
    got = run(x, w, out=torch.float32, tile=32, live=torch.tensor([count], dtype=torch.int32), **scales)
    assert torch.equal(got[:there], expected[:there]) and bool(got[there:].isnan().all())


def test_what_is_not_kept_is_not_read():
    x, dense = rows_of(9, 160, torch.float16), torch.randn(64, 160).half()
    dense[:, 32:64] = 0
    dense[32:] = 0
    expected = x.double().nan_to_num() @ dense.double().T
    x[:, 40] = float("inf")
    w, bias = BsrWeight.from_dense(dense, (32, 32)), torch.randn(64)
    got = run(x, w, bias=bias, out=torch.float32)
    check(got, expected + bias.double(), torch.ones(()))
    assert torch.equal(got[:, 32:], bias[32:].expand(9, 32))  # a block row without blocks


def test_not_a_number_stays_one():
    w, x = weight_of(64, 64, (32, 32), torch.bfloat16), rows_of(3, 64, torch.bfloat16)
    x[1, 5] = float("nan")
    for activation in range(6):
        got = run(x, w, activation=activation)
        assert bool(got[1, :32].isnan().all()) and bool(got[[0, 2]].isfinite().all())


def test_without_blocks():
    w = BsrWeight.from_dense(torch.zeros(70, 40, dtype=torch.float16), (32, 64))
    bias = torch.randn(70)
    assert torch.equal(run(rows_of(3, 40, torch.float16), w, bias=bias, out=torch.float32), bias.expand(3, 70))
