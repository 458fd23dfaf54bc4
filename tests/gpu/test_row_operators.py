"""The row operators where no kernel runs: against the CPU's operators, their checks, opcheck."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from bertkern import ops
from bertkern.ops import rowwise_triton as rows
from bertkern.ops.attention_packed import attention_packed_cuda

GRIDS = ((0.0, 128), (0.02, 128), (0.02, 0), (0.02, 40))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_are_the_cpus(grid, dtype):
    x = torch.randn(7, 129).to(dtype)
    x[3], x[4, 5], x[5, 0] = 0, float("nan"), float("inf")
    unsigned = grid[1] not in (0, 128)
    codes, scale = ops.quantize_rows(x, grid[0], grid[1] if unsigned else 0, unsigned)
    got = rows.quantize_rows_cuda(x, *grid)
    torch.testing.assert_close(got.scale, scale, equal_nan=True, rtol=0, atol=0)
    fine = scale.isfinite()
    assert torch.equal(got.codes[fine].int(), codes[fine].int() - 128 * unsigned)


def test_rows_with_ranges_of_their_own():
    x = torch.randn(6, 40) + torch.tensor([0, 5, -5, 0, 0, 0.0])[:, None]
    x[3] = 0
    got = rows.quantize_rows_cuda(x)
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    torch.testing.assert_close(got.scale[:3], ((high - low) / 255)[:3])
    back = (got.codes.float() - got.zero[:, None]) * got.scale[:, None]
    assert bool(((back - x).abs() <= got.scale[:, None] * 0.501).all())
    assert bool((got.codes[got.codes == -128] == -128).all()) and got.codes[0].min() == -128


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layernorm(dtype):
    x, residual = torch.randn(2, 3, 48).to(dtype), torch.randn(2, 3, 48)
    weight, bias = torch.randn(48).to(dtype), torch.randn(48).to(dtype)
    expected = F.layer_norm(x.double() + residual.double(), (48,), weight.double(), bias.double(), 1e-5)
    got = rows.add_layernorm_cuda(x, residual, weight, bias, 1e-5)
    torch.testing.assert_close(got.double(), expected, atol=3e-2 if dtype == torch.bfloat16 else 5e-3, rtol=0)
    y, codes = rows.add_layernorm_quantize_cuda(x, residual, weight, bias, 1e-5)
    again = rows.quantize_rows_cuda(got)
    assert torch.equal(y, got) and all(map(torch.equal, codes, again))


def test_rows_that_are_not_there_are_zeros():
    x, live = torch.randn(5, 8), torch.tensor([2], dtype=torch.int32)
    x[2:] = float("nan")
    codes = rows.quantize_rows_cuda(x, live=live)
    assert not codes.codes[2:].any() and codes.scale[2:].tolist() == [1, 1, 1]
    y = rows.add_layernorm_cuda(x, None, torch.ones(8), torch.ones(8), 1e-5, live)
    assert not y[2:].any() and y[:2].isfinite().all()


def test_embeddings_are_the_cpus():
    tables = [torch.randn(9, 24), torch.randint(-127, 128, (2, 24)).to(torch.int8), torch.randn(5, 24)]
    scales = [torch.ones(1), torch.rand(2), torch.ones(1)]
    ids = [torch.randint(0, len(table), (3, 4)) for table in tables]
    weight, bias = torch.randn(24), torch.randn(24)
    expected = torch.ops.bertkern.embed(ids, tables, scales, weight, bias, 1e-5, torch.float32)
    got = rows.embed_cuda(ids, tables, scales, weight, bias, 1e-5, torch.float32)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


def arranged(mask, masked, empty):
    """What `arrange_cuda` is to give, row by row."""
    source, place, ends, keys = [], [-1] * mask.numel(), [0], []
    for b, row in enumerate(mask.tolist()):
        real = [i for i, there in enumerate(row) if there]
        end = 0 if masked == rows.NONE else max(real) + 1 if real and masked == rows.UP_TO_LAST else len(row)
        order = real + [i for i in range(end) if not row[i]]
        for i in order:
            place[b * len(row) + i] = len(source)
            source.append(b * len(row) + i)
        keys.append(len(order) if empty and not real else len(real))
        ends.append(len(source))
    return source + [-1] * (mask.numel() - len(source)), place, ends, keys


@pytest.mark.parametrize("masked", [rows.NONE, rows.UP_TO_LAST, rows.ALL])
@pytest.mark.parametrize("empty", [False, True])
def test_arrangement(masked, empty):
    generator = torch.Generator().manual_seed(0)
    for batch, length, share in itertools.product((1, 4), (1, 6, 13), (0.0, 0.3, 0.8, 1.0)):
        mask = torch.rand(batch, length, generator=generator) < share
        got = rows.arrange_cuda(mask, masked, empty)
        assert [x.tolist() for x in got] == list(map(list, arranged(mask, masked, empty)))
        x = torch.randn(batch * length, 3)
        back = rows.gather_rows_cuda(rows.gather_rows_cuda(x, got[0]), got[1])
        there = got[1] >= 0
        assert torch.equal(back[there], x[there]) and not back[~there].any()


def test_attention_with_keys_first():
    ends, counts = torch.tensor([0, 5, 5, 9], dtype=torch.int32), torch.tensor([3, 0, 4], dtype=torch.int32)
    q, k, v = torch.randn(3, 11, 2, 8)
    k[3:5], v[3:5] = float("nan"), float("inf")
    got = attention_packed_cuda(q, k, v, ends, 6, counts=counts)
    for begin, end, keys in ((0, 5, 3), (5, 9, 4)):
        heads = [x[begin:end].transpose(0, 1) for x in (q, k, v)]
        expected = F.scaled_dot_product_attention(heads[0], heads[1][:, :keys], heads[2][:, :keys])
        torch.testing.assert_close(got[begin:end], expected.transpose(0, 1), atol=1e-5, rtol=1e-5)
    assert not got[9:].any()
    none = attention_packed_cuda(q, k, v, ends, 6, counts=torch.zeros(3, dtype=torch.int32))
    assert not none.any()


def test_opcheck():
    x, live = torch.randn(3, 16), torch.tensor([2], dtype=torch.int32)
    one, two = torch.randn(16), torch.randn(16)
    ops_ = torch.ops.bertkern
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for op, arguments in (
        (ops_.quantize_rows_cuda, (x, live, 0.0, 0)),
        (ops_.quantize_rows_cuda, (x, None, 0.1, 128)),
        (ops_.add_layernorm_cuda, (x, x, one, two, live, 1e-5)),
        (ops_.add_layernorm_quantize_cuda, (x, None, one, two, None, 1e-5, 0.0, 0)),
        (ops_.gather_rows_cuda, (x, torch.tensor([1, -1], dtype=torch.int32))),
        (ops_.arrange_cuda, (torch.ones(2, 3, dtype=torch.bool), 1, False)),
        (ops_.embed_cuda, ([torch.zeros(2, 3).long()], [torch.randn(4, 16)], [torch.ones(1)], one, two, 0.1, x.dtype)),
        (
            ops_.attention_packed_cuda,
            (*torch.randn(3, 5, 2, 8), torch.tensor([0, 5]).int(), torch.tensor([3]).int(), None, None, 5, 0.3),
        ),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=tests)


def test_bad_input():
    x, meta = torch.randn(3, 16), torch.empty(3, 16, device="meta")
    one = torch.ones(16)
    with pytest.raises(RuntimeError, match=r"quantize_rows_cuda: expected x of dtype .* Got torch\.float64\."):
        rows.quantize_rows_cuda(x.double())
    with pytest.raises(RuntimeError, match=r"expected live on cpu\. Got meta\."):
        torch.ops.bertkern.quantize_rows_cuda(x, torch.empty(1, dtype=torch.int32, device="meta"), 0.0, 0)
    with pytest.raises(RuntimeError, match=r"expected step finite and at least 0\. Got -1"):
        rows.quantize_rows_cuda(x, -1.0)
    with pytest.raises(RuntimeError, match=r"expected zero_point in \[0, 255\], beside a step of 0 either 0 or 128"):
        rows.quantize_rows_cuda(x, 0.0, 7)
    with pytest.raises(RuntimeError, match=r"add_layernorm_cuda: expected residual on cpu\. Got meta\."):
        rows.add_layernorm_cuda(x, meta, one, one, 1e-5)
    with pytest.raises(RuntimeError, match=r"expected weight of shape \[16\]\. Got \[15\]\."):
        rows.add_layernorm_cuda(x, None, one[1:], one, 1e-5)
    with pytest.raises(RuntimeError, match=r"expected residual of shape \[3, 16\]\. Got \[2, 16\]\."):
        rows.add_layernorm_cuda(x, x[:2], one, one, 1e-5)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"embed_cuda: expected ids int64 of one shape \[B, L\] = \[2, 3\]"):
        rows.embed_cuda([ids.int()], [x], [one[:1]], one, one, 1e-5, torch.float32)
    with pytest.raises(RuntimeError, match=r"expected tables of shape \[rows, H\] = \[rows, 16\]"):
        rows.embed_cuda([ids], [x[:, 1:]], [one[:1]], one, one, 1e-5, torch.float32)
    with pytest.raises(RuntimeError, match=r"embed_cuda: expected all tensors on cpu\. Got meta\."):
        rows.embed_cuda([ids], [meta], [one[:1]], one, one, 1e-5, torch.float32)
    with pytest.raises(RuntimeError, match=r"arrange_cuda: expected mask bool of shape \[B, L\]"):
        rows.arrange_cuda(ids, 1, False)
    with pytest.raises(RuntimeError, match=r"gather_rows_cuda: expected index int32 of shape \[n\]"):
        rows.gather_rows_cuda(x, ids)
    q, ends = torch.randn(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(
        RuntimeError, match=r"attention_packed_cuda: expected counts int32 of shape \[sequences\] = \[1\]"
    ):
        attention_packed_cuda(q, q, q, ends, 4, counts=ends)


def test_strides_change_nothing():
    wide = torch.randn(16, 6)
    x = wide.T
    assert not x.is_contiguous()
    for got, expected in zip(rows.quantize_rows_cuda(x), rows.quantize_rows_cuda(x.contiguous()), strict=True):
        assert torch.equal(got, expected)
    mask = (torch.rand(5, 6) < 0.5).T
    for got, expected in zip(
        rows.arrange_cuda(mask, 1, False), rows.arrange_cuda(mask.contiguous(), 1, False), strict=True
    ):
        assert torch.equal(got, expected)
