"""int8_linear_cuda and int8_requantize_cuda where no kernel runs, and their checks."""

import math
import re

import pytest
import torch

from bertkern import ops
from bertkern.ops import int8_triton
from bertkern.ops.int8_triton import FP8, int8_linear_cuda, int8_requantize_cuda, pack_int8_weight
from tests import reference
from tests.conftest import ROOT

N, K = 37, 101
CODES = torch.randint(-127, 128, (N, K), generator=torch.Generator().manual_seed(0)).to(torch.int8)
WEIGHT, SUMS = pack_int8_weight(CODES)
STEPS, BIAS = torch.linspace(0.001, 0.02, N), torch.linspace(-1, 1, N)
PACKED = ops.pack_qlinear(CODES, STEPS, BIAS)


def test_packing():
    assert WEIGHT.shape == (N, 112) and torch.equal(WEIGHT[:, :K], CODES) and not WEIGHT[:, K:].any()
    assert SUMS.dtype == torch.int32 and torch.equal(SUMS, CODES.sum(1).int())
    eight, sums = pack_int8_weight(CODES.float().to(FP8))
    assert eight.dtype == FP8 and eight.shape == (N, 112) and not eight.float()[:, K:].any() and not sums.any()
    with pytest.raises(RuntimeError, match=r"expected codes int8 or .*\. Got torch.int16 of shape \[2, 3\]"):
        pack_int8_weight(torch.ones(2, 3).short())


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zero", [0, 3, 255])
@pytest.mark.parametrize("unsigned", [True, False])
def test_the_bits_of_a_processor(unsigned, zero, out):
    codes, scale = torch.randint(0, 256, (5, K)).to(torch.uint8), torch.rand(5) * 0.01
    expected = ops.qgemm(codes, scale, zero, PACKED, N, out_dtype=out)
    point = torch.tensor([zero if unsigned else zero - 128]).int()
    given = codes if unsigned else (codes ^ 128).view(torch.int8)
    got = int8_linear_cuda(given, scale, WEIGHT, STEPS, BIAS, zero_point=point, weight_sums=SUMS, out_dtype=out)
    assert got.dtype == out and torch.equal(got, expected)


@pytest.mark.parametrize("activation", range(6))
def test_epilogues(activation):
    codes, scale = torch.randint(-127, 128, (2, 5, K)).to(torch.int8), torch.rand(2, 5) * 0.01
    zero, residual = torch.randint(-128, 128, (2, 5), dtype=torch.int32), torch.randn(2, 5, N).half()
    options = {"zero_point": zero, "weight_sums": SUMS, "activation": activation, "output_scale": 0.05}
    got = int8_linear_cuda(codes, scale, WEIGHT, STEPS, BIAS, residual=residual, **options)
    rows = (codes.view(10, K), scale.view(10), zero.view(10, 1))
    expected = reference.qgemm(*rows, CODES, STEPS, BIAS, activation, residual.view(10, N), 0.05)
    # One step where a sum lay in the middle of two.
    off = (got.view(10, N).double() - expected).abs()
    assert got.shape == (2, 5, N) and float(off.max()) < 0.06 and float((off > 1e-5).double().mean()) < 0.01


@pytest.mark.parametrize("dtype,zero", [(torch.int8, 0), (torch.int8, -40), (torch.uint8, 0), (torch.uint8, 77)])
def test_requantized(dtype, zero):
    codes, scale = torch.randint(-127, 128, (5, K)).to(torch.int8), torch.rand(5) * 0.01
    scale[2] = math.nan
    got, steps = int8_requantize_cuda(
        codes, scale, WEIGHT, STEPS, BIAS, activation=1, out_scale=0.03, out_zero_point=zero, out_dtype=dtype
    )
    fine = [0, 1, 3, 4]
    assert got.dtype == dtype and torch.equal(steps[fine], torch.full((4,), 0.03)) and bool(steps[2].isnan())
    low = 0 if dtype == torch.uint8 else -128 if zero else -127
    assert bool((got[2] == low).all())
    # The CPU has signed codes without a zero point, and unsigned ones.
    named = zero + 128 if dtype == torch.int8 and zero else zero
    if dtype == torch.int8 or zero:
        expected, _ = ops.qgemm_requantize(codes, scale, 0, PACKED, N, "gelu", 0.03, named)
        off = got.int() - (expected.int() - (128 if dtype == torch.int8 and zero else 0))
        assert int(off[fine].abs().max()) <= 1 and float((off[fine] != 0).double().mean()) < 0.01


def test_float8():
    x, weight = torch.randn(5, K).to(FP8), torch.randn(N, K).to(FP8)
    got = int8_linear_cuda(x, torch.ones(1), pack_int8_weight(weight)[0], torch.ones(1), BIAS)
    torch.testing.assert_close(got.double(), x.double() @ weight.double().T + BIAS, rtol=1e-6, atol=1e-5)


def test_gradients():
    codes, scale = torch.randint(-127, 128, (5, K)).to(torch.int8), torch.rand(5) * 0.01
    bias, residual = BIAS.clone().requires_grad_(), torch.randn(5, N, requires_grad=True)
    y = int8_linear_cuda(codes, scale, WEIGHT, STEPS, bias, residual=residual, activation=1, output_scale=0.05)
    twin = torch.nn.functional.linear(codes.float() * scale[:, None], CODES * STEPS[:, None], bias)
    expected, grad = torch.nn.functional.gelu(twin) + residual, torch.randn(5, N)
    mine, theirs = (torch.autograd.grad(result, (bias, residual), grad) for result in (y, expected))
    for pair in zip(mine, theirs, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
    made = int8_requantize_cuda(codes, scale, WEIGHT, STEPS, bias, out_scale=0.1)
    assert not made[0].requires_grad and not made[1].requires_grad


def arguments(changed=None, *last):
    call = {
        "codes": torch.ones(3, K, dtype=torch.int8), "scale": torch.ones(3), "zero_point": None, "weight": WEIGHT,
        "weight_scale": STEPS, "weight_sums": None, "bias": BIAS, "residual": None, "count": None, "activation": 0,
        "output_scale": 0.0,
    }  # fmt: skip
    return (*{**call, **(changed or {})}.values(), *(last or (torch.float32,)))


def test_opcheck():
    given = {"residual": torch.ones(3, N, requires_grad=True), "count": torch.tensor([3]).int()}
    torch.library.opcheck(torch.ops.bertkern.int8_linear_cuda, arguments(given))
    torch.library.opcheck(torch.ops.bertkern.int8_requantize_cuda, arguments(given, 0.1, 3, torch.int8))


def test_without_elements():
    for shape in ((0, K), (2, 0, K)):
        y = int8_linear_cuda(torch.ones(shape, dtype=torch.int8), torch.ones(shape[:-1]), WEIGHT, STEPS)
        assert y.shape == (*shape[:-1], N)
    assert torch.equal(int8_linear_cuda(torch.ones(1, 0).char(), torch.ones(1), WEIGHT, STEPS, BIAS)[0], BIAS)


WRONG = {
    "codes of floats": ({"codes": torch.ones(3, K)}, "codes of dtype torch.int8, .*. Got torch.float32"),
    "a weight that is too narrow": (
        {"weight": WEIGHT[:, :100]}, r"weight torch.int8 of shape \[N, 101 or more\]. Got .*\[37, 100\]",
    ),
    "a weight of another kind": ({"weight": WEIGHT.float().to(FP8)}, "weight torch.int8 .*. Got torch.float8_e4m3fn"),
    "scales of other rows": ({"scale": torch.ones(4)}, "scale torch.float32 of 3 elements or one. Got"),
    "zero points of floats": ({"zero_point": torch.ones(3)}, "zero_point torch.int32 of 3 elements or one. Got"),
    "no sums": ({"zero_point": torch.ones(3).int()}, "weight_sums beside zero points and uint8 codes. Got none"),
    "a bias of another length": ({"bias": torch.ones(36)}, r"bias torch.float32 of shape \[37\]. Got .*36"),
    "a residual of another shape": ({"residual": torch.ones(3, 36)}, r"residual of shape \[3, 37\]. Got \[3, 36\]"),
    "a residual of integers": ({"residual": torch.ones(3, N).int()}, "residual of dtype .*. Got torch.int32"),
    "counts": ({"count": torch.ones(2).int()}, r"count torch.int32 of shape \[1\]. Got"),
    "no such activation": ({"activation": 6}, "activation from 0 to 5. Got 6"),
    "a negative step": ({"output_scale": -1.0}, "output_scale finite and at least 0. Got -1"),
    "another device": ({"bias": BIAS.to("meta")}, "all tensors on cpu. Got meta"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    wrong, said = WRONG[case]
    with pytest.raises(RuntimeError, match=f"int8_linear_cuda: expected {said}"):
        torch.ops.bertkern.int8_linear_cuda(*arguments(wrong))
    with pytest.raises(RuntimeError, match=f"int8_requantize_cuda: expected {said}"):
        torch.ops.bertkern.int8_requantize_cuda(*arguments(wrong, 0.1, 0, torch.int8))


def test_bad_results():
    with pytest.raises(RuntimeError, match=r"int8_linear_cuda: expected out_dtype to be .*\. Got torch.int8"):
        torch.ops.bertkern.int8_linear_cuda(*arguments(None, torch.int8))
    for last, said in (
        ((0.0, 0, torch.int8), "out_scale finite and above 0"),
        ((0.1, 0, torch.float32), "out_dtype to be torch.int8, torch.uint8. Got torch.float32"),
        ((0.1, 128, torch.int8), r"out_zero_point in \[-128, 127\]. Got 128"),
        ((0.1, -1, torch.uint8), r"out_zero_point in \[0, 255\]. Got -1"),
    ):
        with pytest.raises(RuntimeError, match=f"int8_requantize_cuda: expected {said}"):
            torch.ops.bertkern.int8_requantize_cuda(*arguments(None, *last))


def test_without_triton_it_says_so_once(monkeypatch):
    def missing(name):
        raise ImportError("Run: pip install triton")

    int8_triton._kernels.cache_clear()
    monkeypatch.setattr(int8_triton._triton, "kernels", missing)
    with pytest.warns(UserWarning, match="int8_linear_cuda: runs in plain PyTorch, slowly: Run: pip install"):
        assert int8_triton._kernels() is None
    int8_triton._kernels.cache_clear()


# --- which kernel ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "rows", "dtype", "built", "expected"),
    [
        ((9, 0), 32, torch.int8, True, True),
        ((9, 0), 33, torch.int8, True, False),
        ((9, 0), 1, torch.int8, False, False),
        ((9, 0), 1, FP8, True, False),
        ((10, 0), 1000, torch.uint8, True, False),
        ((8, 0), 1000, torch.uint8, True, True),
        ((8, 9), 1000, FP8, True, False),
        ((12, 0), 1, FP8, True, True),
    ],
)
def test_which_kernel(monkeypatch, capability, rows, dtype, built, expected):
    monkeypatch.setattr(int8_triton, "_built", lambda capability, float8: built)
    assert int8_triton._cuda_kernel(capability, torch.empty(rows, K, dtype=dtype)) is expected


def test_a_build_without_code_for_the_card(monkeypatch):
    monkeypatch.setattr(int8_triton._cuda, "missing", lambda capability: "not built")
    assert not int8_triton._built((9, 0), False)
    monkeypatch.setattr(int8_triton._cuda, "missing", lambda capability: None)
    monkeypatch.setattr(int8_triton._cuda, "build_facts", lambda: {"targets": ["80", "120"]})
    assert int8_triton._built((12, 0), True) and int8_triton._built((9, 0), False)
    assert not int8_triton._built((13, 0), True)


def test_the_cuda_operator_takes_the_arguments_in_this_order():
    text = "".join(re.findall(r'"(.*?)"', (ROOT / "csrc" / "cuda" / "bindings.cpp").read_text()))
    names = re.findall(r"(\w+)[,)]", re.search(r"cuda_qgemm(\(.*?\)) ->", text)[1])
    assert names == [*int8_triton._Call._fields, "out_scale", "out_zero_point", "out_dtype"]


def test_a_layout_copies_where_it_must():
    wide = torch.randint(-127, 128, (6, 128)).to(torch.int8)
    for codes, kept in ((wide[:, :K], True), (wide[:, 16 : 16 + K], True), (wide[:, :K].clone(), False),
                        (wide[:, 1 : 1 + K], False), (wide[:, :K].T.contiguous().T, False)):  # fmt: skip
        call = int8_triton._Call(codes, *arguments()[1:11])
        laid = int8_triton._laid_out(call)
        assert laid.codes.shape == (6, 112) and laid.codes.stride(0) % 16 == 0 and laid.codes.data_ptr() % 16 == 0
        assert torch.equal(laid.codes[:, :K], codes) and (laid.codes.data_ptr() == codes.data_ptr()) == kept
        assert laid.weight.data_ptr() == WEIGHT.data_ptr()
    # Nothing is read behind the memory of the last row, and no float8 that is a NaN.
    short = torch.zeros(5 * 112 + K, dtype=torch.int8).as_strided((6, K), (112, 1))
    eight = torch.full((6, 112), math.nan).to(FP8)[:, :K]
    for codes in (short, eight):
        laid = int8_triton._laid_out(int8_triton._Call(codes, *arguments()[1:11])).codes
        assert laid.data_ptr() != codes.data_ptr() and (codes is short or not laid[:, K:].float().any())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 17, 33, 130, 2100])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, FP8])
def test_on_a_card(dtype, tokens):
    """Every engine there is gives the results of plain PyTorch; of integers the bits."""
    n, k = 200, 300
    made = torch.randint(-100, 100, (tokens, k)).float().to(dtype) if dtype != torch.uint8 else None
    codes = torch.randint(0, 256, (tokens, k)).to(dtype) if made is None else made
    weight, sums = pack_int8_weight(torch.randint(-127, 128, (n, k)).float().to(FP8 if dtype == FP8 else torch.int8))
    zero = None if dtype == FP8 else torch.randint(-99, 99, (tokens,), dtype=torch.int32)
    scale, steps, bias = torch.rand(tokens) * 0.01, torch.rand(n) * 0.01, torch.randn(n)
    call = int8_triton._Call(codes, scale, zero, weight, steps, sums, bias, None, None, 0, 0.0)
    expected = int8_triton._plain(call)
    there = int8_triton._Call(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in call))
    laid, engines = int8_triton._laid_out(there), [int8_triton._kernels().int8_linear]
    capability = torch.cuda.get_device_capability()
    if int8_triton._built(capability, dtype == FP8) and (dtype != FP8 or capability >= (12, 0)):
        engines.append(int8_triton._by_cuda)
    for run in engines:
        got = run(*laid, torch.float32)[0].cpu()
        if dtype == FP8:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
            alone = run(*laid._replace(codes=laid.codes[:1], scale=laid.scale[:1]), torch.float32)[0].cpu()
            assert torch.equal(alone, got[:1])
        else:
            assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", range(6))
def test_a_rows_bits_are_those_of_any_number_of_rows(activation):
    """Few rows are another kernel's, which rounds what follows the sums alike."""
    weight, _ = pack_int8_weight(torch.randint(-127, 128, (256, 768), dtype=torch.int8).cuda())
    codes, scale = torch.randint(-127, 128, (300, 768), dtype=torch.int8).cuda(), torch.rand(300).cuda() * 0.01
    rest = weight, torch.rand(256).cuda() * 0.01, torch.randn(256).cuda()
    whole = int8_triton.int8_linear_cuda(codes, scale, *rest, activation=activation)
    for rows in (1, 16, 32, 33, 65):
        part = int8_triton.int8_linear_cuda(codes[:rows], scale[:rows], *rest, activation=activation)
        assert torch.equal(part, whole[:rows]), rows
