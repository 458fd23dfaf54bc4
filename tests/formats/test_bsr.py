"""BsrWeight: exact in every block and shape, and no tensor of a file is believed."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from bertkern.formats import BsrWeight
from tests.formats.matrices import BLOCKS, DTYPES, EMPTY, SHAPES, random, same, strange


def expected(weight, block):
    """(crow, col, values) by plain loops."""
    (n, k), (br, bc) = weight.shape, block
    crow, col, values = [0], [], []
    for top in range(0, n, br):
        for left in range(0, k, bc):
            part = weight[top : top + br, left : left + bc]
            if bool((part != 0).any()):
                full = weight.new_zeros(block)
                full[: part.shape[0], : part.shape[1]] = part
                col.append(left // bc)
                values.append(full)
        crow.append(len(col))
    return crow, col, torch.stack(values) if values else weight.new_zeros(0, br, bc)


@pytest.mark.parametrize("shape", [(64, 128), (70, 33), (33, 26), (1, 1), (1, 131), (131, 1), *EMPTY])
@pytest.mark.parametrize("block", BLOCKS)
def test_against_loops(shape, block):
    weight = random(shape, 0.4, block)
    made = BsrWeight.from_dense(weight, block).check()
    crow, col, values = expected(weight, block)
    assert made.crow.tolist() == crow and made.col.tolist() == col
    assert made.crow.dtype == made.col.dtype == torch.int32
    assert torch.equal(made.values, values) and made.values.is_contiguous()
    assert made.block == block and made.shape == shape
    assert torch.equal(made.to_dense(), weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_exact(shape, block, density):
    weight = random(shape, density, block)
    made = BsrWeight.from_dense(weight, block).check()
    assert torch.equal(made.to_dense(), weight)
    blocks = -(-shape[0] // block[0]) * -(-shape[1] // block[1])
    assert made.density == len(made.col) / blocks
    if density == 0:
        assert made.density == 0 and made.nbytes == 4 * len(made.crow)
    turned = made.transpose().check()
    assert turned.block == block[::-1] and turned.shape == shape[::-1]
    assert torch.equal(turned.to_dense(), weight.t())
    assert turned.tensors().keys() == BsrWeight.from_dense(weight.t(), block[::-1]).tensors().keys()
    for name, tensor in BsrWeight.from_dense(weight.t(), block[::-1]).tensors().items():
        assert torch.equal(turned.tensors()[name], tensor), name
        assert turned.tensors()[name].is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(1, 4), (16, 4), (13, 7)])
def test_dtypes(dtype, block):
    weight = random((61, 35), 0.3, block, dtype)
    weight = weight if dtype == torch.int8 else strange(weight)
    made = BsrWeight.from_dense(weight, block).check()
    assert made.dtype == made.values.dtype == dtype
    assert same(made.to_dense(), weight)
    assert made.nbytes == made.values.numel() * dtype.itemsize + 4 * (len(made.crow) + len(made.col))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e-45])
def test_what_is_no_zero_is_kept(number):
    weight = torch.zeros(9, 9)
    weight[8, 8] = number
    made = BsrWeight.from_dense(weight, (4, 4))
    assert made.col.tolist() == [2] and made.crow.tolist() == [0, 0, 0, 1]
    assert same(made.to_dense(), weight)


def test_a_negative_zero_counts_as_zero_and_stays_in_kept_blocks():
    weight = torch.zeros(2, 4)
    weight[0] = -0.0
    assert len(BsrWeight.from_dense(weight, (2, 2)).col) == 0
    weight[1, 3] = 1.0
    made = BsrWeight.from_dense(weight, (2, 2))
    assert made.col.tolist() == [1]
    assert torch.signbit(made.to_dense()).tolist() == [[False, False, True, True], [False] * 4]


def test_views_and_parameters():
    weight = random((40, 60), 0.5)
    expected = BsrWeight.from_dense(weight[3:30:2, 5:51].t().contiguous(), (4, 4))
    made = BsrWeight.from_dense(torch.nn.Parameter(weight[3:30:2, 5:51].t()), (4, 4)).check()
    assert torch.equal(made.to_dense(), expected.to_dense())
    assert not made.values.requires_grad
    before = weight.clone()
    BsrWeight.from_dense(weight, (4, 4)).values.fill_(7)
    BsrWeight.from_dense(weight, (40, 60)).values.fill_(7)
    BsrWeight.from_dense(weight, (1, 60)).values.fill_(7)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("shape", [(64, 96), (717, 26), (5, 0), (0, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_files(shape, dtype, tmp_path):
    made = BsrWeight.from_dense(random(shape, 0.3, (16, 4), dtype), (16, 4))
    save_file(made.tensors("encoder.query."), tmp_path / "weights.safetensors")
    tensors = load_file(tmp_path / "weights.safetensors")
    assert sorted(tensors) == ["encoder.query.col", "encoder.query.crow", "encoder.query.values"]
    read = BsrWeight.from_tensors(tensors, list(shape), "encoder.query.")
    assert read.shape == shape and read.block == (16, 4)
    assert torch.equal(read.to_dense(), made.to_dense())
    with pytest.raises(ValueError, match=r"BsrWeight: expected a tensor crow. Got encoder\.query\."):
        BsrWeight.from_tensors(tensors, shape)
    with pytest.raises(ValueError, match=r"expected a tensor crow. Got none"):
        BsrWeight.from_tensors({}, shape)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
class TestTorch:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("block", [(1, 4), (16, 4), (32, 32), (13, 7)])
    def test_there_and_back(self, shape, block):
        weight = random(shape, 0.4, block)
        made = BsrWeight.from_dense(weight, block)
        other = made.to_torch()
        assert other.layout == torch.sparse_bsr and other.values().data_ptr() == made.values.data_ptr()
        padded = [-(-side // size) * size for side, size in zip(shape, block, strict=True)]
        assert list(other.shape) == padded
        dense = other.to_dense()
        assert torch.equal(dense[: shape[0], : shape[1]], weight) and dense.count_nonzero() == weight.count_nonzero()
        back = BsrWeight.from_torch(other, shape)
        assert back.shape == shape and torch.equal(back.to_dense(), weight)
        assert BsrWeight.from_torch(other).shape == tuple(padded)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_of_torch(self, dtype):
        weight = random((64, 96), 0.3, (16, 8), dtype)
        other = weight.to_sparse_bsr((16, 8))
        assert other.crow_indices().dtype == torch.int64
        made = BsrWeight.from_torch(other)
        assert made.crow.dtype == torch.int32 and made.dtype == dtype
        assert torch.equal(made.to_dense(), weight)
        assert torch.equal(made.to_torch().to_dense(), weight)

    def test_bad_input(self):
        weight = random((8, 8), 1.0)
        for other in (weight, weight.to_sparse_csr(), weight.to_sparse()):
            with pytest.raises(ValueError, match=r"expected a tensor of layout torch.sparse_bsr. Got torch\."):
                BsrWeight.from_torch(other)
        with pytest.raises(ValueError, match=r"Got list"):
            BsrWeight.from_torch([1.0])
        batch = torch.stack([weight, weight]).to_sparse_bsr((4, 4))
        with pytest.raises(ValueError, match=r"a matrix \[N, K\] without batches. Got \[2, 8, 8\]"):
            BsrWeight.from_torch(batch)
        unsorted = torch.sparse_bsr_tensor([0, 2, 4], [1, 0, 0, 1], torch.ones(4, 4, 4), (8, 8), check_invariants=False)
        with pytest.raises(ValueError, match=r"strictly ascending within a row"):
            BsrWeight.from_torch(unsorted)
        with pytest.raises(ValueError, match=r"zeros where blocks \[4, 4\] reach beyond the matrix \[7, 8\]"):
            BsrWeight.from_torch(weight.to_sparse_bsr((4, 4)), (7, 8))
        with pytest.raises(ValueError, match=r"crow of shape \[2\]. Got \[3\]"):
            BsrWeight.from_torch(weight.to_sparse_bsr((4, 4)), (4, 8))
        with pytest.raises(ValueError, match=r"values of dtype .* Got int64"):
            BsrWeight.from_torch(weight.long().to_sparse_bsr((4, 4)))


def test_to_another_dtype():
    weight = random((20, 30), 0.3)
    made = BsrWeight.from_dense(weight, (4, 4))
    half = made.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.col.dtype == torch.int32 and half.check().shape == (20, 30)
    assert torch.equal(half.to("cpu", torch.float64).to_dense(), weight.double())
    with pytest.raises(ValueError, match=r"a floating dtype for values of float32. Got int8"):
        made.to(torch.int8)
    with pytest.raises(ValueError, match=r"Got complex64"):
        made.to(torch.complex64)
    codes = BsrWeight.from_dense(weight.to(torch.int8), (4, 4))
    assert codes.to("cpu").dtype == torch.int8
    with pytest.raises(ValueError, match=r"int8 codes to stay codes. Got float32"):
        codes.to(torch.float32)


def test_repr():
    assert repr(BsrWeight.from_dense(torch.eye(5), (2, 2))) == (
        "BsrWeight((5, 5), float32, crow=[4], col=[3], values=[3, 2, 2])"
    )


@pytest.mark.parametrize(
    ("weight", "block", "message"),
    [
        (torch.ones(3), (1, 1), r"from_dense: expected weight of shape \[N, K\]. Got \[3\]"),
        (torch.ones(3, 3, 3), (1, 1), r"expected weight of shape \[N, K\]. Got \[3, 3, 3\]"),
        (torch.ones(3, 3).long(), (1, 1), r"weight of dtype float32 or .* Got int64"),
        (torch.ones(3, 3) > 0, (1, 1), r"Got bool"),
        (torch.ones(3, 3).to_sparse(), (1, 1), r"to be a dense tensor with data. Got torch.sparse_coo on cpu"),
        (torch.ones(3, 3, device="meta"), (1, 1), r"Got torch.strided on meta"),
        ([[1.0]], (1, 1), r"expected weight to be a tensor. Got list"),
        (torch.ones(3, 3), (0, 1), r"block to be two sizes \(br, bc\) from 1. Got \(0, 1\)"),
        (torch.ones(3, 3), (-4, 4), r"Got \(-4, 4\)"),
        (torch.ones(3, 3), (1,), r"Got \(1,\)"),
        (torch.ones(3, 3), 4, r"Got 4"),
        (torch.ones(3, 3), (True, 1), r"Got \(True, 1\)"),
        (torch.ones(3, 3), (2.0, 1), r"Got \(2.0, 1\)"),
        (torch.ones(3, 3), (2**62, 2**62), r"block to be two sizes"),
        (torch.ones(3, 3), (2**20, 2**20), r"fit a matrix \[3, 3\] .* Got \[1048576, 1048576\]"),
    ],
)
def test_bad_dense(weight, block, message):
    with pytest.raises(ValueError, match=message):
        BsrWeight.from_dense(weight, block)


def damaged(**change):
    """A right weight of 3 x 3 blocks [4, 8] over [10, 20], one tensor of which is exchanged."""
    weight = torch.zeros(10, 20)
    weight[0, 0] = weight[1, 19] = weight[9, 9] = weight[8, 16] = 1.0
    made = BsrWeight.from_dense(weight, (4, 8)).check()
    assert made.crow.tolist() == [0, 2, 2, 4] and made.col.tolist() == [0, 2, 1, 2]
    return dataclasses.replace(made, **change)


def index(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


BEYOND_RIGHT, BEYOND_BOTTOM = torch.zeros(4, 4, 8), torch.zeros(4, 4, 8)
BEYOND_RIGHT[1, 0, 4] = 1.0
BEYOND_BOTTOM[2, 2, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crow": None}, r"crow, int32 of shape \[4\]. Got NoneType"),
        ({"crow": index(0, 2, 2, 4).long()}, r"crow of dtype int32. Got int64"),
        ({"crow": index(0, 2, 2, 4).float()}, r"crow of dtype int32. Got float32"),
        ({"crow": index(0, 2, 4)}, r"crow of shape \[4\]. Got \[3\]"),
        ({"crow": index()}, r"crow of shape \[4\]. Got \[0\]"),
        ({"crow": index(0, 2, 2, 4)[None]}, r"crow of shape \[4\]. Got \[1, 4\]"),
        ({"crow": index(0, 2, 2, 4).to("meta")}, r"crow to be a dense tensor with data"),
        ({"crow": index(1, 2, 2, 4)}, r"crow to start at 0. Got 1"),
        ({"crow": index(-1, 2, 2, 4)}, r"crow to start at 0. Got -1"),
        ({"crow": index(0, 3, 2, 4)}, r"crow never to fall. Got 3 and then 2 at row 1"),
        ({"crow": index(0, 2**31 - 1, -(2**31), 4)}, r"crow never to fall. Got 2147483647 and then -2147483648"),
        ({"crow": index(0, 2, 2, 3)}, r"crow to end at the number of blocks, 4. Got 3"),
        ({"crow": index(0, 2, 2, 2**31 - 1)}, r"crow to end at the number of blocks, 4. Got 2147483647"),
        ({"col": index(0, 2, 1)}, r"col of shape \[4\]. Got \[3\]"),
        ({"col": index(0, 2, 1, 2).long()}, r"col of dtype int32. Got int64"),
        ({"col": index(0, 3, 1, 2)}, r"col in \[0, 3\). Got 3"),
        ({"col": index(-1, 2, 1, 2)}, r"col in \[0, 3\). Got -1"),
        ({"col": index(0, 2**31 - 1, 1, 2)}, r"col in \[0, 3\). Got 2147483647"),
        ({"col": index(0, 2, 2, 1)}, r"col to be strictly ascending within a row. Got 2 and then 1 in row 2"),
        ({"col": index(2, 2, 1, 2)}, r"col to be strictly ascending within a row. Got 2 and then 2 in row 0"),
        ({"values": torch.zeros(3, 4, 8)}, r"col of shape \[3\]"),
        ({"values": torch.zeros(4, 32)}, r"values of shape \[nnzb, br, bc\]. Got \[4, 32\]"),
        ({"values": torch.zeros(4, 4, 8).long()}, r"values of dtype .* Got int64"),
        ({"values": torch.zeros(4, 0, 8)}, r"blocks of at least \[1, 1\]. Got \[0, 8\]"),
        ({"values": torch.zeros(4, 5, 8)}, r"crow of shape \[3\]. Got \[4\]"),
        ({"values": torch.zeros(4, 4, 64)}, r"col in \[0, 1\). Got 2"),
        ({"values": BEYOND_RIGHT}, r"zeros where blocks \[4, 8\] reach beyond the matrix \[10, 20\]"),
        ({"values": BEYOND_BOTTOM}, r"zeros where blocks \[4, 8\] reach beyond the matrix \[10, 20\]"),
        ({"shape": (14, 20)}, r"crow of shape \[5\]. Got \[4\]"),
        ({"shape": (10, 16)}, r"col in \[0, 2\). Got 2"),
        ({"shape": (10, 17)}, r"zeros where blocks"),
        ({"shape": (10,)}, r"shape to be two sizes \(N, K\). Got \(10,\)"),
        ({"shape": (10, -20)}, r"shape to be two sizes"),
        ({"shape": (10, 2**40)}, r"shape to be two sizes"),
        ({"shape": (10.0, 20)}, r"shape to be two sizes"),
        ({"shape": "10x20"}, r"shape to be two sizes"),
    ],
)
def test_damage(change, message):
    with pytest.raises(ValueError, match=f"BsrWeight: expected ({message})"):
        damaged(**change).check()


def test_right_weights_pass():
    assert damaged().check() is not None
    # Zeros may be stored, and rows may be without blocks at either end.
    assert damaged(values=torch.zeros(4, 4, 8)).check().density == 4 / 9
    for crow in ((0, 0, 0, 2), (0, 2, 2, 2), (0, 0, 2, 2), (0, 1, 2, 2)):
        weight = BsrWeight(index(*crow), index(0, 2), torch.zeros(2, 4, 8), (10, 20)).check()
        assert weight.to_dense().shape == (10, 20)


class TestSmallest:
    @pytest.mark.parametrize("block", [(1, 1), (1, 4), (4, 1), (16, 4), (32, 32), (64, 64)])
    def test_it_finds_the_block_of_the_zeros(self, block):
        weight = random((192, 256), 0.15, block).to(torch.int8)
        made = BsrWeight.smallest(weight)
        assert torch.equal(made.to_dense(), weight)
        assert made.block == block
        for other in BLOCKS:
            assert made.nbytes <= BsrWeight.from_dense(weight, other).nbytes

    @pytest.mark.parametrize("shape", [(70, 33), (1, 1), (1, 131), (131, 1), *EMPTY])
    @pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
    def test_odd_shapes(self, shape, dtype):
        weight = (random(shape, 0.05, (4, 4)) * 10).to(dtype)
        made = BsrWeight.smallest(weight)
        assert made is None or (torch.equal(made.to_dense(), weight) and made.nbytes < 0.9 * weight.nbytes)

    def test_too_few_zeros(self):
        assert BsrWeight.smallest(random((64, 64), 0.95, (16, 4)).to(torch.int8)) is None
        # A quarter of the codes, scattered, need more room for their places than for themselves.
        assert BsrWeight.smallest(random((64, 64), 0.25, (1, 1)).to(torch.int8)) is None
        assert BsrWeight.smallest(random((64, 64), 0.25, (1, 1))).block == (1, 1)
        assert BsrWeight.smallest(torch.zeros(64, 64)).values.numel() == 0

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"BsrWeight.smallest: expected weight of shape \[N, K\]"):
            BsrWeight.smallest(torch.zeros(4))
