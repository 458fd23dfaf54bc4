"""LayerNorm, codes and embeddings on a card, through the operators."""

import pytest
import torch

from bertkern import _cuda, ops
from tests import reference
from tests.cuda.test_rowwise import FIXED, OWN, ROUNDING, SYMMETRIC, WIDTHS, case, expected_codes

pytestmark = pytest.mark.gpu
_op = torch.ops.bertkern


@pytest.fixture(autouse=True)
def library():
    why = _cuda.missing(torch.cuda.get_device_capability())
    if why is not None:
        pytest.skip(why)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_layer_norm_and_codes(dtype, width):
    x, residual, gamma, beta = (part.cuda() for part in case(1030, width, dtype))
    live = torch.tensor([1027], dtype=torch.int32, device="cuda")
    y, codes, scale, zero = _op.add_layernorm_codes(x, residual, gamma, beta, live, 1e-5, 0.0, 0)
    wanted = reference.add_layernorm(x, residual, gamma, beta, 1e-5)
    torch.testing.assert_close(y[:1027].double(), wanted[:1027], rtol=ROUNDING[dtype], atol=2e-5)
    assert not y[1027:].any() and not codes[1027:].any() and (scale[1027:] == 1).all() and not zero[1027:].any()
    for made, exact in zip((codes, scale, zero), expected_codes(y[:1027], OWN), strict=True):
        assert torch.equal(made[:1027], exact)
    few = _op.add_layernorm_codes(x[:5], residual[:5], gamma, beta, None, 1e-5, 0.0, 0)
    assert all(torch.equal(a, b[:5]) for a, b in zip(few, (y, codes, scale, zero), strict=True))
    assert torch.equal(_op.add_layernorm_live(x, residual, gamma, beta, live, 1e-5), y)
    assert torch.equal(ops.add_layernorm(x[:5], residual[:5], gamma, beta, 1e-5), y[:5])


@pytest.mark.parametrize("width", (1, 26, 717, 768, 3072, 8192))
@pytest.mark.parametrize(
    ("step", "zero_point", "grid"),
    [(0.0, 0, (OWN,)), (0.0, 128, (SYMMETRIC,)), (0.05, 0, (FIXED, 0.05)), (0.031, 35, (FIXED, 0.031, 35 - 128))],
)
def test_codes(width, step, zero_point, grid):
    x = case(37, width, torch.bfloat16)[0].cuda()
    codes, scale, zero = _op.quantize_codes(x, None, step, zero_point)
    wanted = expected_codes(x, *grid)
    assert torch.equal(codes, wanted[0]) and torch.equal(scale, wanted[1])
    assert torch.equal(zero, wanted[2]) if zero.numel() else not wanted[2].any()


def test_codes_are_those_of_the_cpu():
    x = torch.randn(5, 771) * torch.tensor([[1e-3], [1.0], [3e4], [0.0], [1e-39]])
    for arguments in ((0.0, 0, False), (0.02, 0, False), (0.02, 77, True)):
        for made, wanted in zip(ops.quantize_rows(x.cuda(), *arguments), ops.quantize_rows(x, *arguments), strict=True):
            assert torch.equal(made.cpu(), wanted)


@pytest.mark.parametrize("width", (26, 768, 1600))
def test_embeddings(width):
    ids = [torch.randint(11, (3, 7), device="cuda") for _ in range(2)]
    tables = [torch.randn(11, width, device="cuda").half(), torch.randint(-127, 128, (11, width), device="cuda").char()]
    scales = [torch.ones(1, device="cuda"), torch.rand(11, device="cuda") / 50]
    gamma, beta = torch.rand(width, device="cuda") + 0.5, torch.randn(width, device="cuda")
    y = ops.embed(ids, tables, scales, gamma, beta, 1e-5)
    torch.testing.assert_close(
        y.double(), reference.embed(ids, tables, scales, gamma, beta, 1e-5), rtol=2e-6, atol=4e-5
    )
    ids[1][1, 2] = 11
    assert ops.embed(ids, tables, scales, gamma, beta, 1e-5).isnan().all(-1).nonzero().tolist() == [[1, 2]]


def test_a_graph_holds_the_operators():
    """Nothing asks the GPU for anything: the number of rows is read where the kernel runs."""
    x, residual, gamma, beta = (part.cuda() for part in case(64, 768, torch.bfloat16))
    live = torch.tensor([64], dtype=torch.int32, device="cuda")
    _op.add_layernorm_codes(x, residual, gamma, beta, live, 1e-5, 0.0, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, codes, *_ = _op.add_layernorm_codes(x, residual, gamma, beta, live, 1e-5, 0.0, 0)
    live.fill_(9)
    graph.replay()
    wanted = _op.add_layernorm_codes(x, residual, gamma, beta, live, 1e-5, 0.0, 0)
    assert torch.equal(y, wanted[0]) and torch.equal(codes, wanted[1]) and not y[9:].any()


def test_bad_input():
    x, weight = torch.randn(3, 40, device="cuda"), torch.ones(40, device="cuda")
    for broken, said in (
        (lambda: ops.add_layernorm(x, x[:2], weight, weight), "expected residual of x's shape"),
        (lambda: ops.add_layernorm(x, None, weight.cpu(), weight), "one device|on the device of the other tensors"),
        (lambda: ops.add_layernorm(x, None, weight[:8], weight), "expected weight of shape \\[40\\]"),
        (lambda: _op.quantize_codes(x, None, 0.0, 5), "expected zero_point 0 or 128"),
        (lambda: _op.quantize_codes(x.expand(1, 3, 40).repeat(1, 1, 300), None, 0.0, 0), "rows of at most 8192"),
    ):
        with pytest.raises(RuntimeError, match=said):
            broken()
