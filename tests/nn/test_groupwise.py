"""Modules of group-wise weights: as their dequantized twins, and the codes are held once."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from bertkern import ops
from bertkern.formats.groupwise import quantize_groupwise
from bertkern.nn import GroupwiseEmbedding, GroupwiseLinear
from tests.reference import sqnr


def layer(bits=4, axis="n", size=6, n=65, k=48, **options) -> GroupwiseLinear:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    return GroupwiseLinear(quantize_groupwise(weight, bits, size, axis), torch.linspace(-1, 1, n), **options).eval()


def table(bits=8, size=1, rows=40, width=35) -> GroupwiseEmbedding:
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
    return GroupwiseEmbedding(quantize_groupwise(weight, bits, size)).eval()


X = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(2))
IDS = torch.tensor([[0, 39, 3], [7, 7, 1]])


@pytest.mark.parametrize("axis,size", [("n", 6), ("k", 16), ("k", 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step,quality", [(0.0, 35), (0.03, 30), (None, 40)])
def test_linear(axis, size, dtype, step, quality):
    made = layer(axis=axis, size=size, input_scale=step)
    dense, x = made.dequantize(), X.to(dtype)
    got = made(x)
    assert got.dtype == dtype and sqnr(dense(X).double(), got.double()) > quality
    made.train()
    assert torch.allclose(made(X), dense(X), atol=1e-5)


def test_float_activations_follow_the_models_dtype():
    made = layer(input_scale=None).bfloat16()
    assert made.weight_scale.dtype == torch.float32
    wanted = X.bfloat16().double() @ made.dequantized_weight().bfloat16().double().T + made.bias.double()
    assert sqnr(wanted, made(X.bfloat16()).double()) > 45
    assert sqnr(made.float().dequantize()(X).double(), made(X).double()) > 110


@pytest.mark.parametrize("make,x", [(layer, X), (table, IDS)])
def test_codes_are_held_once(make, x):
    made = make()
    codes, keys = made.weight_codes.clone(), list(made.state_dict())
    before = made(x)
    assert "weight_codes" not in dict(made.named_buffers()) and torch.equal(made.weight_codes, codes)
    assert list(made.state_dict()) == keys and torch.equal(made.state_dict()["weight_codes"], codes)
    copies = [copy.deepcopy(made), pickle.loads(pickle.dumps(made)), make(bits=made.weight_bits[0].item())]
    copies[2](x)
    copies[2].load_state_dict(made.state_dict())
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    for other in copies:
        assert torch.equal(other(x), before) and torch.equal(other.weight_codes, codes)
    made.weight_codes = torch.zeros_like(codes)
    assert not torch.equal(made(x), before) and int(made.weight_codes.count_nonzero()) == 0
    made.weight_codes = codes
    assert torch.equal(made(x), before)
    made.half()
    assert torch.equal(made.weight_codes, codes) and made.weight_scale.dtype == torch.float32
    made.weight_scale.mul_(2)
    assert torch.equal(made.dequantized_weight(), 2 * copies[0].dequantized_weight())
    assert not torch.equal(made(x).float(), before)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("size", [1, 3, 40])
@pytest.mark.parametrize("width", [8, 35, 768])
def test_embedding(bits, size, width):
    made = table(bits, size, width=width)
    wanted = made.dequantize()(IDS)
    assert torch.allclose(made(IDS), wanted, atol=1e-6)
    assert made.bfloat16()(IDS).dtype == torch.bfloat16
    made.float()
    norm = nn.LayerNorm(width)
    floats = torch.randn(3, width)
    ids = [IDS, torch.tensor([[0, 1, 2], [2, 1, 0]])]
    got = ops.embed(ids, [made.packed(), floats], [torch.ones(1)] * 2, norm.weight, norm.bias, norm.eps)
    assert torch.allclose(got, norm(wanted + floats[ids[1]]), atol=1e-5)


def test_tables_whose_rows_cannot_be_read_alone():
    for made in (
        GroupwiseEmbedding(quantize_groupwise(torch.randn(6, 5), 4, 1)),
        GroupwiseEmbedding(quantize_groupwise(torch.randn(6, 16), 4, 4, "k")),
        GroupwiseEmbedding(quantize_groupwise(torch.randn(6, 16), [2, 4, 8], 2)),
    ):
        assert not made.packable()
        assert torch.equal(made(IDS % 6), made.dequantize()(IDS % 6))


def test_bad_input():
    weight = quantize_groupwise(torch.randn(4, 8), 4, 2)
    with pytest.raises(ValueError, match=r"bias of shape \[N\] = \[4\]"):
        GroupwiseLinear(weight, torch.ones(5))
    with pytest.raises(ValueError, match="finite input_scale"):
        GroupwiseLinear(weight, input_scale=float("inf"))
    with pytest.raises(RuntimeError, match=r"x of shape \[\.\.\., K\]"):
        GroupwiseLinear(weight).eval()(torch.ones(3, 7))
    rows = torch.zeros(4, 20, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="uint8 tables of shape"):
        ops.embed([IDS % 4], [rows], [torch.ones(1)], torch.ones(8), torch.ones(8), 1e-5)
