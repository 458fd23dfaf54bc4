"""RaggedWeight: exact in every shape, and no tensor of a file is believed."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from bertkern.formats import RaggedWeight
from tests.formats.matrices import DTYPES, EMPTY, SHAPES, random, same, strange


def without(weight, seed=0):
    """`weight` with about half of its rows and columns zeroed."""
    generator = torch.Generator().manual_seed(seed)
    weight = weight.clone()
    weight[torch.rand(weight.shape[0], generator=generator) < 0.5] = 0
    weight[:, torch.rand(weight.shape[1], generator=generator) < 0.5] = 0
    return weight


@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_exact(shape, density):
    weight = without(random(shape, density))
    made = RaggedWeight.from_dense(weight).check()
    assert torch.equal(made.to_dense(), weight)
    assert made.rows.tolist() == [row for row in range(shape[0]) if weight[row].any()]
    assert made.columns.tolist() == [column for column in range(shape[1]) if weight[:, column].any()]
    assert made.rows.dtype == made.columns.dtype == torch.int32
    turned = made.transpose().check()
    assert turned.shape == shape[::-1] and torch.equal(turned.to_dense(), weight.t())
    size = weight.numel()
    assert made.density == (len(made.rows) * len(made.columns) / size if size else 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    weight = without(random((33, 21), 0.5, dtype=dtype))
    weight = weight if dtype == torch.int8 else strange(weight)
    made = RaggedWeight.from_dense(weight).check()
    assert made.dtype == dtype and same(made.to_dense(), weight)


def test_a_row_of_nan_stays_and_one_of_negative_zeros_goes():
    weight = torch.tensor([[0.0, -0.0], [0.0, float("nan")], [0.0, 0.0]])
    made = RaggedWeight.from_dense(weight)
    assert made.rows.tolist() == [1] and made.columns.tolist() == [1]


def test_files(tmp_path):
    weight = without(random((717, 26), 0.5))
    save_file(RaggedWeight.from_dense(weight).tensors("a."), tmp_path / "weights.safetensors")
    tensors = load_file(tmp_path / "weights.safetensors")
    assert sorted(tensors) == ["a.columns", "a.rows", "a.values"]
    assert torch.equal(RaggedWeight.from_tensors(tensors, weight.shape, "a.").to_dense(), weight)


def index(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": index(0)}, r"rows of shape \[2\]. Got \[1\]"),
        ({"rows": index(0, 3).long()}, r"rows of dtype int32. Got int64"),
        ({"rows": index(0, 5)}, r"rows in \[0, 5\). Got 5"),
        ({"rows": index(-1, 3)}, r"rows in \[0, 5\). Got -1"),
        ({"rows": index(3, 0)}, r"rows to be strictly ascending"),
        ({"columns": index(1, 1, 2)}, r"columns to be strictly ascending"),
        ({"columns": index(1, 2, 2**31 - 1)}, r"columns in \[0, 7\). Got 2147483647"),
        ({"columns": index(1, 2)}, r"columns of shape \[3\]. Got \[2\]"),
        ({"values": torch.ones(6)}, r"values of shape \[n', k'\]. Got \[6\]"),
        ({"values": torch.ones(2, 3).short()}, r"values of dtype .* Got int16"),
        ({"shape": (3, 7)}, r"rows in \[0, 3\). Got 3"),
        ({"shape": (5, 7, 1)}, r"shape to be two sizes"),
    ],
)
def test_damage(change, message):
    right = RaggedWeight(torch.ones(2, 3), index(0, 3), index(1, 2, 6), (5, 7)).check()
    with pytest.raises(ValueError, match=f"RaggedWeight: expected {message}"):
        dataclasses.replace(right, **change).check()


def test_bad_dense():
    with pytest.raises(ValueError, match=r"RaggedWeight.from_dense: expected weight of shape \[N, K\]. Got \[3\]"):
        RaggedWeight.from_dense(torch.ones(3))
