"""CsrWeight: exact in every shape, and no tensor of a file is believed."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from bertkern.formats import BsrWeight, CsrWeight
from tests.formats.matrices import DTYPES, EMPTY, SHAPES, random, same, strange


@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_exact(shape, density):
    weight = random(shape, density)
    made = CsrWeight.from_dense(weight).check()
    assert torch.equal(made.to_dense(), weight)
    assert len(made.values) == int(weight.count_nonzero()) and made.crow.dtype == made.col.dtype == torch.int32
    assert made.crow.tolist() == [0, *(weight != 0).sum(1).cumsum(0).tolist()]
    assert made.col.tolist() == weight.nonzero()[:, 1].tolist()
    assert made.density == (len(made.values) / weight.numel() if weight.numel() else 0)
    turned, other = made.transpose().check(), CsrWeight.from_dense(weight.t())
    assert turned.shape == shape[::-1]
    assert all(torch.equal(turned.tensors()[name], tensor) for name, tensor in other.tensors().items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    weight = random((61, 35), 0.3, dtype=dtype)
    weight = weight if dtype == torch.int8 else strange(weight)
    made = CsrWeight.from_dense(weight).check()
    assert made.dtype == dtype and same(made.to_dense(), weight)
    assert made.nbytes == len(made.values) * (dtype.itemsize + 4) + 4 * 62


@pytest.mark.parametrize("shape", [(833, 26), (0, 3), (3, 0)])
def test_as_blocks(shape):
    weight = random(shape, 0.2)
    made = CsrWeight.from_dense(weight)
    blocks = made.blocks().check()
    assert blocks.block == (1, 1) and blocks.values.data_ptr() == made.values.data_ptr()
    other = BsrWeight.from_dense(weight, (1, 1))
    assert all(torch.equal(blocks.tensors()[name], tensor) for name, tensor in other.tensors().items())


@pytest.mark.parametrize("number", [float("nan"), -float("inf"), 1e-45])
def test_what_is_no_zero_is_kept(number):
    weight = torch.tensor([[0.0, -0.0, number]])
    assert CsrWeight.from_dense(weight).col.tolist() == [2]


def test_views_and_parameters():
    weight = random((40, 60), 0.5)
    view = torch.nn.Parameter(weight)[3:30:2, 5:51].t()
    made = CsrWeight.from_dense(view).check()
    assert torch.equal(made.to_dense(), view) and not made.values.requires_grad
    before = weight.clone()
    CsrWeight.from_dense(weight).values.fill_(7)
    assert torch.equal(weight, before)


def test_files(tmp_path):
    weight = random((717, 26), 0.1)
    save_file(CsrWeight.from_dense(weight).tensors("a."), tmp_path / "weights.safetensors")
    tensors = load_file(tmp_path / "weights.safetensors")
    assert sorted(tensors) == ["a.col", "a.crow", "a.values"]
    assert torch.equal(CsrWeight.from_tensors(tensors, weight.shape, "a.").to_dense(), weight)
    tensors.pop("a.col")
    with pytest.raises(ValueError, match=r"CsrWeight: expected a tensor a.col. Got a"):
        CsrWeight.from_tensors(tensors, weight.shape, "a.")


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
class TestTorch:
    @pytest.mark.parametrize("shape", [*SHAPES, *EMPTY])
    def test_there_and_back(self, shape):
        weight = random(shape, 0.3)
        made = CsrWeight.from_dense(weight)
        other = made.to_torch()
        assert other.layout == torch.sparse_csr and other.shape == shape
        assert torch.equal(other.to_dense(), weight)
        assert torch.equal(CsrWeight.from_torch(other).to_dense(), weight)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_of_torch(self, dtype):
        weight = random((64, 96), 0.3, dtype=dtype)
        made = CsrWeight.from_torch(weight.to_sparse_csr())
        assert made.dtype == dtype and made.crow.dtype == torch.int32
        assert torch.equal(made.to_dense(), weight)

    def test_scipy_agrees(self):
        sparse = pytest.importorskip("scipy.sparse")
        weight = random((33, 47), 0.3)
        made, other = CsrWeight.from_dense(weight), sparse.csr_matrix(weight.numpy())
        assert made.crow.tolist() == other.indptr.tolist() and made.col.tolist() == other.indices.tolist()
        assert made.values.tolist() == other.data.tolist()

    def test_bad_input(self):
        weight = random((8, 8), 1.0)
        with pytest.raises(ValueError, match=r"expected a tensor of layout torch.sparse_csr. Got torch.sparse_bsr"):
            CsrWeight.from_torch(weight.to_sparse_bsr((4, 4)))
        with pytest.raises(ValueError, match=r"without batches. Got \[2, 8, 8\]"):
            CsrWeight.from_torch(torch.stack([weight, weight]).to_sparse_csr())
        twice = torch.sparse_csr_tensor([0, 2], [1, 1], [1.0, 2.0], (1, 8), check_invariants=False)
        with pytest.raises(ValueError, match=r"strictly ascending within a row. Got 1 and then 1 in row 0"):
            CsrWeight.from_torch(twice)


def index(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crow": index(0, 2, 3)}, r"crow of shape \[4\]. Got \[3\]"),
        ({"crow": index(0, 2, 2, 3).long()}, r"crow of dtype int32. Got int64"),
        ({"crow": index(0, 4, 2, 3)}, r"crow never to fall. Got 4 and then 2"),
        ({"crow": index(0, 2, 2, 2)}, r"crow to end at the number of elements, 3. Got 2"),
        ({"crow": index(2, 2, 2, 3)}, r"crow to start at 0. Got 2"),
        ({"col": index(1, 0, 2)}, r"col to be strictly ascending within a row. Got 1 and then 0 in row 0"),
        ({"col": index(0, 0, 2)}, r"col to be strictly ascending within a row. Got 0 and then 0 in row 0"),
        ({"col": index(0, 5, 2)}, r"col in \[0, 5\). Got 5"),
        ({"col": index(0, 1, -7)}, r"col in \[0, 5\). Got -7"),
        ({"col": index(0, 1)}, r"col of shape \[3\]. Got \[2\]"),
        ({"col": index(0, 1, 2).short()}, r"col of dtype int32. Got int16"),
        ({"values": torch.ones(3, 1)}, r"values of shape \[nnz\]. Got \[3, 1\]"),
        ({"values": torch.ones(3, dtype=torch.int32)}, r"values of dtype .* Got int32"),
        ({"values": torch.ones(4)}, r"col of shape \[4\]. Got \[3\]"),
        ({"shape": (4, 5)}, r"crow of shape \[5\]. Got \[4\]"),
        ({"shape": (3, 2)}, r"col in \[0, 2\). Got 2"),
        ({"shape": None}, r"shape to be two sizes \(N, K\). Got None"),
    ],
)
def test_damage(change, message):
    right = CsrWeight(index(0, 2, 2, 3), index(0, 1, 2), torch.ones(3), (3, 5)).check()
    with pytest.raises(ValueError, match=f"CsrWeight: expected {message}"):
        dataclasses.replace(right, **change).check()


@pytest.mark.parametrize("weight", [torch.ones(3), torch.ones(2, 2, dtype=torch.int32), torch.eye(2).to_sparse()])
def test_bad_dense(weight):
    with pytest.raises(ValueError, match=r"CsrWeight.from_dense: expected weight"):
        CsrWeight.from_dense(weight)
