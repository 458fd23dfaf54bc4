"""linear, qgemm, qgemm_requantize, quantize_rows and the packed form against float64, over tails and bad input."""

import math
import re
from pathlib import Path

import pytest
import torch

from bertkern import ops
from bertkern.formats.int8 import quantize_weight
from tests import reference

ROWS = (1, 2, 5, 13, 14, 15, 17, 29, 57, 131)
SHAPES = ((1, 1), (5, 7), (17, 33), (768, 65), (312, 717), (833, 96), (64, 32))  # K, N
ACTIVATIONS = list(ops.ACTIVATIONS)


def layer(k, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator) / math.sqrt(k), torch.randn(n, generator=generator)


def rows(m, k, seed=1):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k,n", SHAPES)
def test_int8_against_float64(k, n):
    weight, bias = layer(k, n)
    w = quantize_weight(weight)
    packed = ops.pack_qlinear(w.codes, w.scale, bias)
    for m in ROWS:
        codes, scale = ops.quantize_rows(rows(m, k))
        residual = rows(m, n, 2)
        for name, number in ops.ACTIVATIONS.items():
            expected = reference.qgemm(codes, scale, 0, w.codes, w.scale, bias, number, residual)
            y = ops.qgemm(codes, scale, 0, packed, n, name, residual)
            torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=3e-6)


@pytest.mark.parametrize("k,n", SHAPES)
def test_dynamic_linear_is_quantize_then_multiply(k, n):
    weight, bias = layer(k, n)
    w = quantize_weight(weight)
    packed = ops.pack_qlinear(w.codes, w.scale, bias)
    for m in ROWS:
        x = rows(m, k)
        codes, scale = ops.quantize_rows(x)
        expected_codes, expected_scale = reference.quantize_rows(x)
        assert (codes.int() - expected_codes.int()).abs().max() <= 1
        torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
        y = ops.linear(x, packed, n)
        u, step, zero = reference.quantize_ranges(x)
        wanted = reference.qgemm(u, step, zero[:, None], w.codes, w.scale, bias)
        # A value in the middle between two codes may go to either.
        off = (y - wanted).abs() > 1e-4 * wanted.abs().amax()
        assert bool(off.any(1).float().mean() <= 0.1) and reference.sqnr(wanted, y.double()) > 60
        assert torch.equal(ops.linear(x, packed, n, out_dtype=torch.bfloat16), y.bfloat16())
        assert torch.equal(ops.linear(x, packed, n, out_dtype=torch.float16), y.half())
        symmetric = ops.pack_qlinear(w.codes, w.scale, bias, input_zero_point=128)
        assert torch.equal(ops.linear(x, symmetric, n), ops.qgemm(codes, scale, 0, packed, n))
        again, step = ops.qgemm_requantize(codes, scale, 0, packed, n, "gelu")
        twice = ops.quantize_rows(ops.qgemm(codes, scale, 0, packed, n, "gelu"))
        assert torch.equal(again, twice[0]) and torch.equal(step, twice[1])


@pytest.mark.parametrize("k,n", SHAPES)
@pytest.mark.parametrize("step,zero", ((0.02, 0), (0.03, 7), (0.05, 200)))
def test_requantized_with_a_static_scale(k, n, step, zero):
    weight, bias = layer(k, n)
    w = quantize_weight(weight)
    packed = ops.pack_qlinear(w.codes, w.scale, bias)
    for m in ROWS:
        codes, scale = ops.quantize_rows(rows(m, k))
        for name in ("none", "gelu", "relu"):
            y = ops.qgemm(codes, scale, 0, packed, n, name)
            low, high = (0, 255) if zero else (-127, 127)
            expected = ((y / step).round() + zero).clamp(low, high)
            got, got_scale = ops.qgemm_requantize(codes, scale, 0, packed, n, name, step, zero)
            assert got.dtype == (torch.uint8 if zero else torch.int8)
            assert torch.equal(got_scale, torch.full((m,), step))
            # y / step and y * (1 / step) may differ by an ulp, which shows where a code changes.
            different = got.float() != expected
            assert different.float().mean() < 2e-3 and (got.float() - expected).abs().max() <= 1


def test_first_sums_are_kept_where_all_rows_have_one_zero_point_alone():
    w = quantize_weight(layer(48, 70)[0])
    sizes = [
        ops.pack_qlinear(w.codes, w.scale, None, **given).numel()
        for given in ({}, {"input_zero_point": 128}, {"input_scale": 0.1}, {"input_scale": 0.1, "input_zero_point": 9})
    ]
    assert [size - sizes[0] for size in sizes] == [0, 4 * 96, 4 * 96, 4 * 96]


def test_a_static_scale_tells_a_row_that_is_not_finite():
    weight, bias = layer(64, 40)
    w = quantize_weight(weight)
    x = rows(3, 64)
    x[1, 5] = math.nan
    codes, scale = ops.quantize_rows(x)
    packed = ops.pack_qlinear(w.codes, w.scale, bias)
    _, got = ops.qgemm_requantize(codes, scale, 0, packed, 40, "none", 0.1)
    assert got.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("scale,zero", ((-1.0, 0), (math.inf, 0), (0.0, 3), (0.1, 256), (0.1, -1)))
def test_static_output_scale_out_of_range(scale, zero):
    w = quantize_weight(layer(8, 8)[0])
    packed = ops.pack_qlinear(w.codes, w.scale, None)
    codes, steps = ops.quantize_rows(rows(2, 8))
    with pytest.raises(RuntimeError, match="qgemm_requantize: expected out_"):
        ops.qgemm_requantize(codes, steps, 0, packed, 8, "none", scale, zero)


def test_kernel_times_are_of_the_product():
    w = quantize_weight(layer(96, 64)[0])
    packed = [ops.pack_qlinear(w.codes, w.scale, None) for _ in range(2)]
    codes, steps = ops.quantize_rows(rows(20, 96))
    for requantize in (False, True):
        times = ops.qgemm_seconds(codes, steps, packed, 64, "gelu", requantize, calls=7)
        assert len(times) == 7 and all(0 < t < 1 for t in times)
    with pytest.raises(RuntimeError, match="expected calls > 0"):
        ops.qgemm_seconds(codes, steps, packed, 64, calls=0)


def test_per_tensor_static_unsigned_and_requantized_output():
    k, n, m = 77, 45, 9
    weight, bias = layer(k, n)
    w = quantize_weight(weight, per_channel=False)
    x = rows(m, k)
    step = 0.031
    packed = ops.pack_qlinear(w.codes, w.scale, bias, input_scale=step, output_scale=0.05)
    codes, scale = reference.quantize_rows(x, step)
    expected = reference.qgemm(codes, scale.expand(m), 0, w.codes, w.scale, bias, output_scale=0.05)
    assert ((ops.linear(x, packed, n).double() - expected).abs() > 1e-5).float().mean() < 0.01
    # Unsigned codes with any zero point, against weights packed for another.
    shifted, _ = ops.quantize_rows(x, step, zero_point=100, unsigned=True)
    expected = reference.qgemm(shifted, torch.full((m,), step), 100, w.codes, w.scale, bias)
    for zero in (0, 100):
        dense = ops.pack_qlinear(w.codes, w.scale, bias, input_scale=step, input_zero_point=zero)
        y = ops.qgemm(shifted, torch.tensor([step]), 100, dense, n)
        torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=3e-6)


@pytest.mark.parametrize("k,n", SHAPES)
def test_fp32_and_bf16_weights(k, n):
    weight, bias = layer(k, n)
    for m in ROWS:
        x = rows(m, k)
        y = ops.linear(x, ops.pack_linear(weight, bias), n, "gelu")
        torch.testing.assert_close(y.double(), reference.gelu(reference.dense(weight, bias)(x)), rtol=1e-5, atol=3e-6)
        half = ops.linear(x.bfloat16(), ops.pack_linear(weight.bfloat16(), bias), n, out_dtype=torch.float32)
        expected = reference.dense(weight.bfloat16(), bias)(x.bfloat16())
        torch.testing.assert_close(half.double(), expected, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("kind", ("int8", "fp32", "bf16"))
def test_a_row_depends_on_nothing_else(kind):
    weight, bias = layer(312, 717)
    w = quantize_weight(weight)
    packed = {
        "int8": lambda: ops.pack_qlinear(w.codes, w.scale, bias),
        "fp32": lambda: ops.pack_linear(weight, bias),
        "bf16": lambda: ops.pack_linear(weight.bfloat16(), bias),
    }[kind]()
    x = rows(131, 312)
    whole = ops.linear(x, packed, 717, "gelu")
    threads = torch.get_num_threads()
    for m in ROWS:
        assert torch.equal(ops.linear(x[:m], packed, 717, "gelu"), whole[:m])
    assert torch.equal(torch.cat([ops.linear(row, packed, 717, "gelu")[None] for row in x]), whole)
    torch.set_num_threads(1)
    try:
        assert torch.equal(ops.linear(x, packed, 717, "gelu"), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf_stay_in_their_row(bad, activation):
    weight, bias = layer(77, 45)
    w = quantize_weight(weight)
    x = rows(17, 77)
    for packed in (ops.pack_qlinear(w.codes, w.scale, bias), ops.pack_qlinear(w.codes, w.scale, bias, 0.1)):
        clean = ops.linear(x, packed, 45, activation)
        y = x.clone()
        y[3, 76] = bad
        y = ops.linear(y, packed, 45, activation)
        assert y[3].isnan().all()
        keep = torch.arange(17) != 3
        assert torch.equal(y[keep], clean[keep])


def test_packed_form_gives_the_canonical_tensors_back():
    for k, n in SHAPES:
        weight, bias = layer(k, n)
        w = quantize_weight(weight)
        codes, scale, b = ops.unpack_linear(ops.pack_qlinear(w.codes, w.scale, bias))
        assert torch.equal(codes, w.codes) and torch.equal(scale, w.scale) and torch.equal(b, bias)
        for dtype in (torch.float32, torch.bfloat16):
            dense, _, b = ops.unpack_linear(ops.pack_linear(weight.to(dtype), bias))
            assert torch.equal(dense, weight.to(dtype)) and torch.equal(b, bias)


def test_shapes_views_and_empty_tensors():
    weight, bias = layer(12, 7)
    packed = ops.pack_linear(weight, bias)
    x = rows(30, 12)
    expected = ops.linear(x, packed, 7)
    assert torch.equal(ops.linear(x.view(2, 3, 5, 12), packed, 7), expected.view(2, 3, 5, 7))
    assert torch.equal(ops.linear(x.t().contiguous().t(), packed, 7), expected)
    assert torch.equal(ops.linear(x[::3], packed, 7), expected[::3])
    assert ops.linear(x[:0], packed, 7).shape == (0, 7)
    assert ops.linear(torch.zeros(2, 0, 12), packed, 7).shape == (2, 0, 7)
    assert torch.equal(
        ops.linear(torch.zeros(3, 0), ops.pack_linear(torch.zeros(4, 0), bias[:4]), 4), bias[:4].expand(3, 4)
    )


def test_bad_input():
    weight, bias = layer(12, 7)
    w = quantize_weight(weight)
    packed = ops.pack_qlinear(w.codes, w.scale, bias)
    x = rows(3, 12)
    for match, call in (
        (
            r"expected x of shape \[\.\.\., K\] = \[\.\.\., 12\]. Got \[3, 11\]",
            lambda: ops.linear(x[:, :11], packed, 7),
        ),
        (r"expected x of dtype .* Got float64", lambda: ops.linear(x.double(), packed, 7)),
        (r"expected out_features = 7 as packed. Got 8", lambda: ops.linear(x, packed, 8)),
        (r"expected packed weights", lambda: ops.linear(x, packed[:-1].clone(), 7)),
        (r"expected packed weights", lambda: ops.linear(x, torch.zeros(512, dtype=torch.uint8), 7)),
        (r"expected packed of dtype uint8", lambda: ops.linear(x, weight, 7)),
        (r"expected residual", lambda: ops.linear(x, packed, 7, residual=x)),
        (r"expected activation 0", lambda: ops.linear(x, packed, 7, activation=9)),
        (r"expected out_dtype", lambda: ops.linear(x, packed, 7, out_dtype=torch.int8)),
        (r"expected bias of shape \[N\] = \[7\]. Got \[6\]", lambda: ops.pack_qlinear(w.codes, w.scale, bias[:6])),
        (r"expected weight_scale of shape", lambda: ops.pack_qlinear(w.codes, w.scale[:5])),
        (r"expected weight_codes of dtype int8", lambda: ops.pack_qlinear(weight, w.scale)),
        (r"Got -128", lambda: ops.pack_qlinear(torch.full((7, 12), -128, dtype=torch.int8), w.scale)),
        (r"expected input_scale >= 0", lambda: ops.pack_qlinear(w.codes, w.scale, input_scale=-1.0)),
        (r"expected input_scale >= 0", lambda: ops.pack_qlinear(w.codes, w.scale, input_scale=math.nan)),
        (r"expected codes of shape", lambda: ops.qgemm(w.codes[:, :3], torch.ones(1), 0, packed, 7)),
        (r"expected zero_point 0 for int8", lambda: ops.qgemm(w.codes, torch.ones(1), 5, packed, 7)),
        (r"expected scale of shape", lambda: ops.qgemm(w.codes, torch.ones(3), 0, packed, 7)),
        (r"expected packed int8 weights", lambda: ops.qgemm(w.codes, torch.ones(1), 0, ops.pack_linear(weight), 7)),
    ):
        with pytest.raises(RuntimeError, match=match):
            call()
    with pytest.raises(ValueError, match="Got 'swish'"):
        ops.linear(x, packed, 7, activation="swish")


def test_opcheck():
    weight, bias = layer(12, 7)
    w = quantize_weight(weight)
    x, op = rows(3, 12), torch.ops.bertkern
    packed = ops.pack_qlinear(w.codes, w.scale, bias)
    codes, scale = ops.quantize_rows(x)
    torch.library.opcheck(op.pack_linear.default, (weight, bias))
    torch.library.opcheck(op.pack_qlinear.default, (w.codes, w.scale, bias))
    torch.library.opcheck(op.linear.default, (x, packed, 7))
    torch.library.opcheck(op.quantize_rows.default, (x,))
    torch.library.opcheck(op.qgemm.default, (codes, scale, 0, packed, 7))
    torch.library.opcheck(op.qgemm_requantize.default, (codes, scale, 0, packed, 7, 1))


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="the system has no huge pages")
@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="torch 2.10 has small pages")
def test_packed_weights_ask_for_huge_pages():
    packed = ops.pack_qlinear(torch.ones(64, 64, dtype=torch.int8), torch.ones(1))
    flags = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= packed.data_ptr() < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line.split()
    assert "hg" in flags
