"""The block-sparse and the group-wise kernels on a card, through the operators, beside the plain form in float64."""

import pytest
import torch
from torch import Tensor

from bertkern import _cuda
from bertkern.formats import BsrWeight
from bertkern.formats.groupwise import quantize_groupwise
from bertkern.ops import block_sparse
from bertkern.ops.block_sparse_int8 import block_sparse_linear_int8
from bertkern.ops.groupwise_planes import pack_for_triton
from bertkern.ops.groupwise_triton import groupwise_linear_cuda
from bertkern.ops.int8_triton import int8_linear_cuda, pack_int8_weight

pytestmark = pytest.mark.gpu
ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-22}


@pytest.fixture(autouse=True)
def library():
    why = _cuda.missing(torch.cuda.get_device_capability())
    if why is not None:
        pytest.skip(why)


def check(got: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    bound = ROUNDING[got.dtype] * expected.abs() + 2e-6 * magnitude + 1e-5
    assert bool(((got.double() - expected).abs() <= bound).all()), (got.double() - expected).abs().max()


def blocks_of(n: int, k: int, block: tuple[int, int], dtype: torch.dtype) -> BsrWeight:
    kept = torch.rand(-(-n // block[0]), -(-k // block[1]), device="cuda") < 0.4
    kept[0], kept[-1, -1] = False, True
    mask = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:n, :k]
    dense = torch.randint(-127, 128, (n, k), device="cuda") if dtype == torch.int8 else torch.randn_like(mask.float())
    return BsrWeight.from_dense((dense * mask).to(dtype), block)


SHAPES = [(1, 96, 136), (33, 773, 1024), (300, 3072, 768), (4099, 768, 3072)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [(32, 32), (64, 64), (128, 128), (32, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_block_sparse(dtype, block, shape):
    t, n, k = shape
    w, x = blocks_of(n, k, block, dtype), torch.randn(t, k, device="cuda").to(dtype)
    bias, index = torch.randn(n, device="cuda").to(dtype), block_sparse.block_index(w)
    got = block_sparse.block_sparse_linear(x, w.values, index, n, bias, provider="cuda")
    dense = w.to_dense().double()
    check(got, x.double() @ dense.T + bias.double(), x.double().abs() @ dense.abs().T)
    again = block_sparse.block_sparse_linear(x, w.values, index, n, bias, provider="cuda")
    one = block_sparse.block_sparse_linear(x[t // 2], w.values, index, n, bias, provider="cuda")
    assert torch.equal(again, got) and torch.equal(one, got[t // 2])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [(32, 32), (64, 64), (128, 128)], ids=str)
def test_block_sparse_int8(block, shape):
    t, n, k = shape
    w, codes = blocks_of(n, k, block, torch.int8), torch.randint(-128, 128, (t, k), dtype=torch.int8, device="cuda")
    codes = torch.nn.functional.pad(codes, (0, -k % 16))[:, :k]
    scale, weight_scale = torch.rand(t, device="cuda") * 0.01, torch.rand(n, device="cuda") * 0.01
    zero = torch.randint(-128, 128, (t,), dtype=torch.int32, device="cuda")
    call = (codes, scale, w.values, weight_scale, block_sparse.block_index(w), n, torch.randn(n, device="cuda"))
    sums = w.to_dense().int().sum(1, dtype=torch.int32)
    for options in ({}, {"zero": zero, "column_sum": sums, "activation": 1, "residual": torch.randn(t, n).cuda()}):
        got, other = (block_sparse_linear_int8(*call, provider=name, **options) for name in ("cuda", "triton"))
        torch.testing.assert_close(got, other, atol=1e-4, rtol=1e-5)
    # The bits of the dense kernels.
    packed, _ = pack_int8_weight(w.to_dense())
    dense = int8_linear_cuda(codes, scale, packed, weight_scale, call[-1], zero_point=zero, weight_sums=sums)
    for name in ("cuda", "triton"):
        assert torch.equal(block_sparse_linear_int8(*call, provider=name, zero=zero, column_sum=sums), dense)
    count = torch.tensor([t // 2], dtype=torch.int32, device="cuda")
    part = block_sparse_linear_int8(*call, provider="cuda", zero=zero, column_sum=sums, count=count)
    assert torch.equal(part[: t // 2], dense[: t // 2])


@pytest.mark.parametrize("axis,size", [("n", 128), ("k", 32), ("k", 64), ("k", 128), ("k", 24)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_groupwise(dtype, bits, axis, size):
    for n, k in ((768, 768), (3072, 768), (768, 3072), (37, 5000)):
        weight = quantize_groupwise(torch.randn(n, k) + 0.2, bits, size, axis)
        dense, planes = weight.dequantize(torch.float64).cuda(), pack_for_triton(weight.to("cuda"))
        x, bias = torch.randn(40, k, device="cuda").to(dtype), torch.randn(n, device="cuda")
        rows = [
            groupwise_linear_cuda(x[:t], planes, bias, quantized=False, out_dtype=torch.float32, provider="cuda")
            for t in (1, 7, 16, 40)
        ]
        for got in rows:
            t = len(got)
            check(got, x[:t].double() @ dense.T + bias.double(), x[:t].double().abs() @ dense.abs().T)
            assert torch.equal(got, rows[-1][:t])


def test_opcheck():
    w, x = blocks_of(96, 64, (32, 32), torch.float16), torch.randn(5, 64, device="cuda").half()
    index = block_sparse.block_index(w)
    torch.library.opcheck(torch.ops.bertkern.block_sparse_linear, (x, w.values, None, index, 96, 2))
    torch.library.opcheck(torch.ops.bertkern.block_sparse_linear_mma, (x, w.values, None, index, 96))


WRONG = {
    "blocks of 16": ((16, 16), torch.float16, 0, "blocks of 32, 64 or 128 a side. Got"),
    "float32": ((32, 32), torch.float32, 0, "x of dtype float16 or bfloat16. Got float32"),
    "rows that begin anywhere": ((32, 32), torch.float16, 1, "x whose rows begin at multiples of 16 bytes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    block, dtype, first, said = WRONG[case]
    w, x = blocks_of(96, 64, block, dtype), torch.randn(5, 64 + 8, device="cuda").to(dtype)[:, first : first + 64]
    with pytest.raises(RuntimeError, match=f"block_sparse_linear_mma: expected {said}"):
        torch.ops.bertkern.block_sparse_linear_mma(x, w.values, None, block_sparse.block_index(w), 96)
    with pytest.raises(RuntimeError, match="expected index on the device of the other tensors"):
        w, x = blocks_of(96, 64, (32, 32), torch.float16), torch.randn(5, 64, device="cuda").half()
        torch.ops.bertkern.block_sparse_linear_mma(x, w.values, None, block_sparse.block_index(w).cpu(), 96)
