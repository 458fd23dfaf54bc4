"""The choice between Triton's kernels and the CUDA library's, without a card: what is asked, fits and is said."""

import itertools
import warnings

import pytest
import torch

from bertkern.formats import BsrWeight
from bertkern.formats.groupwise import quantize_groupwise
from bertkern.nn import BlockSparseLinear, GroupwiseLinear
from bertkern.ops import block_sparse, groupwise_triton, linear_providers
from bertkern.ops.groupwise_planes import pack_for_triton
from bertkern.ops.linear_providers import AUTO, CUDA, CUDA_FEW, TRITON, Rule, Table


class OnCard:
    """What the choice looks at of a tensor on a card."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, rows: int, dtype: torch.dtype = torch.float16) -> None:
        self.shape, self.dtype = torch.Size([rows, 64]), dtype


@pytest.fixture
def library(monkeypatch):
    """The CUDA library as if it were there; `library[0]` is why it is not."""
    why = [None]
    monkeypatch.setattr(linear_providers, "lacking", lambda device: why[0])
    monkeypatch.delenv(linear_providers.VARIABLE, raising=False)
    linear_providers._say.cache_clear()
    yield why
    linear_providers._say.cache_clear()


TABLE = Table((Rule(CUDA, (torch.int8,), rows=32), Rule(CUDA, (torch.bfloat16,), sides=(32,))), few=16)
ASKED = [
    (AUTO, 32, torch.int8, 64, True),
    (AUTO, 33, torch.int8, 64, False),
    (AUTO, 500, torch.bfloat16, 32, True),
    (AUTO, 500, torch.bfloat16, 64, False),
    (AUTO, 1, torch.float16, 32, False),
    (TRITON, 1, torch.int8, 32, False),
    (CUDA, 500, torch.float16, 64, True),
    (CUDA_FEW, 16, torch.float16, 64, True),
    (CUDA_FEW, 17, torch.float16, 64, False),
]


@pytest.mark.parametrize("provider,rows,dtype,side,expected", ASKED)
def test_who_runs_a_call(library, provider, rows, dtype, side, expected):
    x = OnCard(rows, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert linear_providers.by_cuda("op", TABLE, provider, x, None, side) == expected
    library[0] = "there is no NVIDIA driver"
    said = pytest.warns(
        UserWarning, match="op: its CUDA kernels were asked for and do not run: there is no NVIDIA driver"
    )
    with said if expected and provider != AUTO else warnings.catch_warnings():
        assert not linear_providers.by_cuda("op", TABLE, provider, x, None, side)
    assert not linear_providers.by_cuda("op", TABLE, CUDA, torch.ones(rows, 64), None, side)


def test_the_variable_counts_where_a_call_does_not_say(library, monkeypatch):
    x = OnCard(1000)
    monkeypatch.setenv(linear_providers.VARIABLE, "cuda")
    assert linear_providers.by_cuda("op", TABLE, AUTO, x, None)
    assert not linear_providers.by_cuda("op", TABLE, TRITON, x, None)
    monkeypatch.setenv(linear_providers.VARIABLE, "triton")
    assert linear_providers.by_cuda("op", TABLE, CUDA, x, None)
    assert not linear_providers.by_cuda("op", TABLE, AUTO, OnCard(1, torch.int8), None)
    monkeypatch.setenv(linear_providers.VARIABLE, "rocket")
    with pytest.raises(ValueError, match=r"BERTKERN_GPU_PROVIDER: expected one of auto, triton, .*. Got 'rocket'"):
        linear_providers.by_cuda("op", TABLE, AUTO, x, None)


def test_a_misfit_is_said_once(library):
    x = OnCard(8)
    with pytest.warns(UserWarning, match="no kernel for blocks of 16 x 16. Triton's do."):
        assert not linear_providers.by_cuda("op", TABLE, CUDA, x, "there is no kernel for blocks of 16 x 16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not linear_providers.by_cuda("op", TABLE, CUDA, x, "there is no kernel for blocks of 16 x 16")


def test_no_float_layer_is_told_apart_by_its_rows():
    tables = (linear_providers.BLOCK_SPARSE, linear_providers.GROUPWISE)
    rules = [rule for table in tables for rule in table.rules]
    assert not [rule for rule in rules if rule.rows is not None and rule.dtypes != (torch.int8,)]


def test_what_the_block_sparse_kernels_take():
    half, codes = linear_providers.HALF, linear_providers.CODES
    x = torch.ones(6, 80, dtype=torch.float16)
    cases = [
        (x, (32, 128), half, None),
        (x, (16, 32), half, "no kernel for blocks of 16 x 32"),
        (x.float(), (32, 32), half, "no kernel for torch.float32"),
        (x, (32, 32), codes, "no kernel for torch.float16"),
        (x[:, :77], (32, 32), half, None),  # rows begin at multiples, whatever their width
        (x[:, 1:77], (32, 32), half, "multiples of 16 bytes"),
        (x[:, :77].contiguous(), (32, 32), half, "multiples of 16 bytes"),
        (x[:1, :77].contiguous(), (32, 32), half, None),
        (x.view(2, 3, 80)[:, ::2], (32, 32), half, None),  # is copied
        (x.view(2, 3, 80)[:, ::2, :77], (32, 32), half, "multiples of 16 bytes"),
        (x.to(torch.int8), (64, 64), codes, None),
    ]
    for tensor, block, dtypes, said in cases:
        got = block_sparse._misfit(tensor, block, dtypes)
        assert got is None if said is None else said in got, (got, said)


def test_what_the_groupwise_kernels_take():
    for bits, quantized, dtype in itertools.product((4, 5), (True, False), (torch.float16, torch.float32)):
        planes = pack_for_triton(quantize_groupwise(torch.randn(8, 40), bits))
        call = groupwise_triton._Call(
            torch.ones(2, 40, dtype=dtype), planes.codes, planes.members, planes.scale, planes.shift, planes.column_sum,
            None, None, planes.bits, planes.group, 0, quantized, 0.0, 0, dtype,
        )  # fmt: skip
        assert (groupwise_triton._misfit(call) is None) == (bits == 4 and not quantized and dtype == torch.float16)


def test_layers_and_functions_hand_it_on(monkeypatch):
    seen = []
    monkeypatch.setattr(
        linear_providers, "by_cuda", lambda op, table, provider, *rest: seen.append((op, provider)) or False
    )
    weight = BsrWeight.from_dense(torch.eye(64), (32, 32))
    layer, other = BlockSparseLinear.from_weight(weight), GroupwiseLinear(quantize_groupwise(torch.randn(8, 40), 4))
    x = torch.ones(2, 64)
    layer(x)
    layer.provider = "cuda"
    layer(x)
    other._by_planes(torch.ones(2, 40))
    other.provider = "cuda-few"
    other._by_planes(torch.ones(2, 40))
    block_sparse.block_sparse_linear(x, weight.values, layer.index, 64, provider="triton")
    assert seen == [
        ("block_sparse_linear", AUTO), ("block_sparse_linear", CUDA), ("groupwise_linear_cuda", AUTO),
        ("groupwise_linear_cuda", CUDA_FEW), ("block_sparse_linear", TRITON),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"provider: expected one of auto, triton, .*. Got 'torch'"):
        block_sparse.block_sparse_linear(x, weight.values, layer.index, 64, provider="torch")
