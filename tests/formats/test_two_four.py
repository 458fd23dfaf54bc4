"""NmWeight: exact where the pattern holds, refused where not, and no tensor of a file is believed."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from bertkern.formats import NmWeight
from tests.formats.matrices import DTYPES, EMPTY, random, same

PATTERNS = [(2, 4), (1, 2), (1, 4), (3, 4), (4, 4), (4, 8), (1, 1), (5, 7), (2, 256)]


def pruned(shape, n, m, dtype=torch.float32, seed=0):
    """Random values of which each group keeps at most n, some groups fewer."""
    weight = random(shape, 0.8, dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for left in range(0, shape[1], m):
        part = weight[:, left : left + m]
        order = torch.rand(part.shape, generator=generator).argsort(1).argsort(1)
        part[order >= n] = 0
    return weight


@pytest.mark.parametrize("shape", [(64, 128), (7, 833), (26, 13), (1, 1), (5, 3), *EMPTY])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_exact(shape, pattern):
    n, m = pattern
    weight = pruned(shape, n, m)
    made = NmWeight.from_dense(weight, n, m).check()
    assert torch.equal(made.to_dense(), weight)
    assert made.values.shape == made.index.shape == (shape[0], -(-shape[1] // m) * n)
    assert made.index.dtype == torch.uint8 and (made.n, made.m) == pattern
    assert made.nbytes == made.values.numel() * 5
    if shape[1] % m == 0 and weight.numel():
        assert made.density == n / m


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    weight = pruned((9, 31), 2, 4, dtype)
    if dtype != torch.int8:
        weight[:, :4] = torch.tensor([float("nan"), 0.0, 0.0, -float("inf")])
    made = NmWeight.from_dense(weight).check()
    assert made.dtype == dtype and same(made.to_dense(), weight)


def test_the_first_zeros_fill_a_group_up():
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 5.0, 6.0]])
    made = NmWeight.from_dense(weight)
    assert made.index.tolist() == [[0, 1, 0, 2, 0, 1, 2, 3]]
    assert made.values.tolist() == [[0.0, 0.0, 0.0, 3.0, 1.0, 2.0, 5.0, 6.0]]


def test_groups_that_are_too_full_are_refused():
    weight = torch.zeros(5, 12)
    weight[3, 8:11] = float("nan")
    with pytest.raises(ValueError, match=r"at most 2 nonzeros in each 4 along K. Got 3 in row 3 from column 8"):
        NmWeight.from_dense(weight)
    with pytest.raises(ValueError, match=r"from_dense: expected at most 1"):
        NmWeight.from_dense(torch.ones(1, 512), 1, 256)


@pytest.mark.parametrize("pattern", [(0, 4), (5, 4), (2, 257), (-1, 4), (True, 4), (2.0, 4), (2, "4")])
def test_bad_patterns(pattern):
    with pytest.raises(ValueError, match=r"NmWeight.from_dense: expected 1 <= n <= m <= 256. Got n = "):
        NmWeight.from_dense(torch.zeros(4, 4), *pattern)


def test_files(tmp_path):
    weight = pruned((9, 32), 1, 4)
    save_file(NmWeight.from_dense(weight, 1, 4).tensors("a."), tmp_path / "weights.safetensors")
    tensors = load_file(tmp_path / "weights.safetensors")
    assert sorted(tensors) == ["a.index", "a.values"]
    assert torch.equal(NmWeight.from_tensors(tensors, [9, 32], "a.", n=1, m=4).to_dense(), weight)
    with pytest.raises(ValueError, match=r"values of shape \[9, 16\]. Got \[9, 8\]"):
        NmWeight.from_tensors(tensors, [9, 32], "a.")


def codes(*numbers):
    return torch.tensor(numbers, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": codes([0, 1, 2, 4], [0, 1, 2, 3])}, r"index in \[0, 4\). Got 4"),
        ({"index": codes([0, 1, 2, 255], [0, 1, 2, 3])}, r"index in \[0, 4\). Got 255"),
        ({"index": codes([1, 0, 0, 1], [0, 1, 2, 3])}, r"index to be strictly ascending within a group"),
        ({"index": codes([0, 1, 0, 1], [2, 2, 2, 3])}, r"index to be strictly ascending within a group"),
        ({"index": codes([0, 1, 0, 1])}, r"index of shape \[2, 4\]. Got \[1, 4\]"),
        ({"index": torch.zeros(2, 4).char()}, r"index of dtype uint8. Got int8"),
        ({"index": codes([0, 1, 0, 3], [0, 1, 2, 3])}, r"zeros beyond the matrix \[2, 7\]"),
        ({"values": torch.ones(2, 3)}, r"values of shape \[2, 4\]. Got \[2, 3\]"),
        ({"values": torch.ones(2, 4).int()}, r"values of dtype .* Got int32"),
        ({"n": 3}, r"values of shape \[2, 6\]. Got \[2, 4\]"),
        ({"m": 1}, r"1 <= n <= m <= 256. Got n = 2, m = 1"),
        ({"shape": (2, 9)}, r"values of shape \[2, 6\]. Got \[2, 4\]"),
        ({"shape": (2,)}, r"shape to be two sizes"),
    ],
)
def test_damage(change, message):
    right = NmWeight(torch.ones(2, 4), codes([0, 1, 0, 1], [2, 3, 1, 2]), (2, 7)).check()
    with pytest.raises(ValueError, match=f"NmWeight: expected {message}"):
        dataclasses.replace(right, **change).check()
