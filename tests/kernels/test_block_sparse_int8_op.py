"""block_sparse_linear_int8 where no kernel runs, and its checks."""

import pytest
import torch

from bertkern.formats import BsrWeight
from bertkern.ops.block_sparse import block_index
from bertkern.ops.block_sparse_int8 import block_sparse_linear_int8
from bertkern.ops.int8_triton import int8_linear_cuda, pack_int8_weight
from tests import reference


def weight_of(n: int, k: int, block: tuple[int, int]) -> BsrWeight:
    kept = torch.rand(-(-n // block[0]), -(-k // block[1])) < 0.5
    kept[0], kept[-1, -1] = False, True
    mask = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:n, :k]
    return BsrWeight.from_dense((torch.randint(-127, 128, (n, k)) * mask).to(torch.int8), block)


@pytest.mark.parametrize("block", [(16, 16), (32, 64), (3, 5)])
@pytest.mark.parametrize("activation", range(6))
def test_as_the_dense_product(activation, block):
    n, k = 2 * block[0] + 3, 3 * block[1] + 2
    w = weight_of(n, k, block)
    codes, scale, weight_scale = torch.randint(-127, 128, (2, 5, k), dtype=torch.int8), torch.rand(2, 5), torch.rand(n)
    bias, residual = torch.randn(n), torch.randn(2, 5, n, dtype=torch.bfloat16)
    zero, sums = torch.randint(-128, 128, (2, 5), dtype=torch.int32), w.to_dense().int().sum(1, dtype=torch.int32)
    dense = w.to_dense().double() * (weight_scale.double() * 0.01)[:, None]
    for shifted in (False, True):
        got = block_sparse_linear_int8(
            codes, scale * 0.01, w.values, weight_scale * 0.01, block_index(w), n, bias, activation=activation,
            residual=residual, **({"zero": zero, "column_sum": sums} if shifted else {}),
        )  # fmt: skip
        x = (codes.double() - (zero[..., None] if shifted else 0)) * (scale * 0.01).double()[..., None]
        expected = reference.activate(x @ dense.T + bias.double(), activation) + residual.double()
        torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-5)


def arguments(changed=None):
    w = weight_of(37, 101, (32, 32))
    call = {
        "codes": torch.ones(3, 101, dtype=torch.int8), "scale": torch.ones(3), "zero": None, "values": w.values,
        "weight_scale": torch.ones(37), "column_sum": None, "bias": torch.ones(37), "index": block_index(w), "n": 37,
        "activation": 1, "residual": torch.ones(3, 37), "out_dtype": torch.float16,
    }  # fmt: skip
    return tuple({**call, **(changed or {})}.values())


def test_the_bits_of_a_dense_weight():
    w, codes = weight_of(37, 101, (16, 16)), torch.randint(-128, 128, (9, 101), dtype=torch.int8)
    scale, steps, bias = torch.rand(9) * 0.01, torch.rand(37) * 0.01, torch.randn(37)
    packed, sums = pack_int8_weight(w.to_dense())
    for zero in (None, torch.randint(-128, 128, (9,), dtype=torch.int32)):
        beside = {} if zero is None else {"zero": zero, "column_sum": sums}
        got = block_sparse_linear_int8(codes, scale, w.values, steps, block_index(w), 37, bias, **beside)
        assert torch.equal(got, int8_linear_cuda(codes, scale, packed, steps, bias, zero_point=zero, weight_sums=sums))


def test_opcheck_and_without_elements():
    torch.library.opcheck(torch.ops.bertkern.block_sparse_linear_int8, arguments())
    none = {"codes": torch.ones(0, 101, dtype=torch.int8), "scale": torch.ones(0), "residual": torch.ones(0, 37)}
    assert torch.ops.bertkern.block_sparse_linear_int8(*arguments(none)).shape == (0, 37)


WRONG = {
    "float codes": ({"codes": torch.ones(3, 101)}, "codes of dtype torch.int8. Got torch.float32"),
    "another width": (
        {"codes": torch.ones(3, 130, dtype=torch.int8)}, r"index torch.int32 of \d+ elements. Got torch.int32 of shape",
    ),
    "float values": ({"values": torch.ones(1, 32, 32)}, "values int8 of shape .*. Got torch.float32"),
    "a scale of another length": ({"scale": torch.ones(2)}, "scale torch.float32 of 3 elements. Got .* shape"),
    "zero alone": ({"zero": torch.ones(3, dtype=torch.int32)}, "column_sum beside zero. Got one of them"),
    "a residual of another shape": ({"residual": torch.ones(3, 36)}, r"residual of shape \[3, 37\]. Got \[3, 36\]"),
    "no such activation": ({"activation": 6}, "activation from 0 to 5. Got 6"),
    "two counts": ({"count": torch.ones(2, dtype=torch.int32)}, "count torch.int32 of 1 elements. Got .* shape"),
    "another device": ({"bias": torch.ones(37, device="meta")}, "all tensors on cpu. Got meta"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    wrong, said = WRONG[case]
    with pytest.raises(RuntimeError, match=f"block_sparse_linear_int8: expected {said}"):
        torch.ops.bertkern.block_sparse_linear_int8(*arguments(wrong))
