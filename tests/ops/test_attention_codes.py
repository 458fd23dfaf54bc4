"""attention over int8 codes, and to codes: scales of every kind, exact scores, bits, what is not finite, bad input."""

import pytest
import torch

from bertkern import ops
from tests import reference
from tests.ops.test_attention import LENGTHS, random, starts

qattention, requantize = torch.ops.bertkern.qattention, torch.ops.bertkern.attention_requantize
NARROW = ops.cpu_isa() in ("avx512bf16", "amx")  # p is rounded to bf16 there
KINDS = ("static", "token", "mixed")


def codes(lengths, count, size, kind="token", seed=0):
    """((q, k, v) int8 [T, H, d] of a joint projection, their scales), some tokens without a scale, some codes -128."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    joint = torch.randint(-127, 128, (tokens, 3, count, size), generator=generator, dtype=torch.int8)
    joint[::7, :, :, -1] = -128
    scales = []
    for i in range(3):
        per_token = kind == "token" or (kind == "mixed" and i != 1)
        scale = torch.rand((tokens,) if per_token else (), generator=generator) * 0.02 + 0.002
        if per_token:
            scale[3 + i :: 11] = 0.0
        scales.append(scale)
    return joint.unbind(1), scales


def decoded(parts, scales):
    return [part.double() * scale.double().view(-1, 1, 1) for part, scale in zip(parts, scales, strict=True)]


def check(parts, scales, cu, **options):
    y = ops.qattention(*parts, scales, cu, **options)
    listed = {name: value.tolist() if name == "key_counts" else value for name, value in options.items()}
    floats = decoded(parts, scales)
    expected = reference.packed_attention(*floats, cu.tolist(), **listed)
    assert y.dtype == torch.float32 and y.shape == parts[0].shape
    # A probability is off by 2^-8 of itself where it is rounded to bf16, and by 1e-4 as an exponential.
    bound = (4e-3 if NARROW else 3e-6) * max(1e-3, float(floats[2].abs().max()))
    assert (y.double() - expected).abs().max() <= bound
    return y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", (1, 3, 16, 26, 31, 32, 33, 63, 64, 65, 80, 127, 128, 200))
def test_against_float64(kind, size):
    check(*codes(LENGTHS, 3, size, kind), starts(LENGTHS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", (1, 2, 159, 160, 162, 321, 1000))
def test_lengths(kind, length):
    check(*codes((length,), 2, 40, kind), starts((length,)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("biased", (None, (1, 1), (8, 3)))
@pytest.mark.parametrize("counted", (False, True))
def test_masks(kind, causal, biased, counted):
    options = {"causal": causal}
    if biased:
        options["bias"] = random(*biased, 165, 165, seed=1) * 3
        options["bias"][..., 5:9, 0:40] = -torch.inf
        options["bias"][..., 11] = -torch.inf
    if counted:
        options["key_counts"] = torch.tensor([1, 20, 0, 0, 150, 63, 16, 1])
    check(*codes(LENGTHS, 3, 26, kind), starts(LENGTHS), **options)


@pytest.mark.parametrize("zero", range(3))
@pytest.mark.parametrize("kind", ("static", "token"))
@pytest.mark.parametrize("causal", (False, True))
def test_scales_of_zero(zero, kind, causal):
    """Of q or k: the keys count alike. Of v: zeros."""
    parts, scales = codes((40, 21), 2, 32, kind)
    scales[zero] = torch.zeros_like(scales[zero])
    y = check(parts, scales, starts((40, 21)), causal=causal)
    assert bool(y.any()) == (zero != 2)


def test_products_of_codes_are_exact():
    """Scores near 2^24 that differ by 127: one more bit lost in a product or a sum, and the keys would tie."""
    size = 1032
    q = torch.full((2, 1, size), 127, dtype=torch.int8)
    k, v = q.clone(), torch.tensor([[[127] * size], [[0] * size]], dtype=torch.int8)
    k[1, 0, 0] = 126
    steps = [torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1 / 127)]
    y = ops.qattention(q, k, v, steps, starts((2,)), scale=1 / 127)
    expected = torch.tensor(1.0).sigmoid()
    torch.testing.assert_close(y, expected.expand(2, 1, size), atol=0, rtol=3e-3 if NARROW else 3e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_output_dtypes(dtype):
    parts, scales = codes(LENGTHS, 3, 26)
    cu = starts(LENGTHS)
    y = ops.qattention(*parts, scales, cu, out_dtype=dtype)
    assert y.dtype == dtype and torch.equal(y, ops.qattention(*parts, scales, cu).to(dtype))


def test_strides_are_read_where_they_lie():
    parts, scales = codes((30, 20), 4, 20)
    cu = starts((30, 20))
    assert not parts[0].is_contiguous()
    y = ops.qattention(*(part.contiguous() for part in parts), scales, cu)
    assert torch.equal(ops.qattention(*parts, scales, cu), y)
    by_head = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in parts]
    assert torch.equal(ops.qattention(*by_head, scales, cu), y)
    scattered = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts]
    strided = [torch.stack((scale, scale), 1)[:, 0] for scale in scales]
    assert torch.equal(ops.qattention(*scattered, strided, cu.int()), y)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_depends_on_nothing_else(kind):
    parts, scales = codes(LENGTHS, 3, 26, kind)
    cu, threads = starts(LENGTHS), torch.get_num_threads()
    together = ops.qattention(*parts, scales, cu)
    quantized = ops.attention_requantize(*parts, cu, scales=scales)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(ops.qattention(*parts, scales, cu), together)
            for ours, theirs in zip(ops.attention_requantize(*parts, cu, scales=scales), quantized, strict=True):
                assert torch.equal(ours, theirs)
            for i, length in enumerate(LENGTHS):
                part = slice(int(cu[i]), int(cu[i + 1]))
                its = [scale[part] if scale.dim() else scale for scale in scales]
                alone = ops.qattention(*(t[part] for t in parts), its, torch.tensor([0, length]))
                assert torch.equal(alone, together[part])
    finally:
        torch.set_num_threads(threads)


def test_a_scale_that_is_no_number_spreads_as_its_row_would():
    parts, scales = codes(LENGTHS, 3, 26)
    cu, clean = starts(LENGTHS), ops.qattention(*parts, scales, starts(LENGTHS))
    row, sequence = int(cu[4]) + 5, slice(int(cu[4]), int(cu[5]))
    for i in range(3):
        dirty = [scale.clone() for scale in scales]
        dirty[i][row] = float("nan")
        y = ops.qattention(*parts, dirty, cu)
        others = torch.ones(len(y), dtype=torch.bool)
        others[row if i == 0 else sequence] = False
        assert torch.equal(y[others], clean[others]) and y[~others].isnan().all()
        for out_scale in (0.0, 0.01):
            steps = ops.attention_requantize(*parts, cu, scales=dirty, out_scale=out_scale)[1]
            assert torch.equal(steps.isnan(), ~others)


def test_keys_that_do_not_count_are_not_read():
    parts, scales = codes((40,), 2, 32)
    cu, counts = starts((40,)), torch.tensor([25])
    clean = ops.qattention(*parts, scales, cu, key_counts=counts)
    scales[1][25:] = scales[2][25:] = float("nan")
    assert torch.equal(ops.qattention(*parts, scales, cu, key_counts=counts), clean)


def inputs(kind, lengths, count=3, size=26):
    """(q, k, v, options) for attention_requantize, and the attention in fp32."""
    cu = starts(lengths)
    if kind in KINDS:
        parts, scales = codes(lengths, count, size, kind)
        return parts, {"scales": scales}, ops.qattention(*parts, scales, cu)
    parts = random(sum(lengths), 3, count, size).to(kind).unbind(1)
    return parts, {}, None if kind != torch.float32 else ops.attention(*parts, cu)


@pytest.mark.parametrize("kind", (*KINDS, torch.float32))
@pytest.mark.parametrize("lengths", (LENGTHS, (300,), (513, 2), (9,) * 21))
@pytest.mark.parametrize("threads", (1, 3))
def test_codes_of_rows(kind, lengths, threads):
    """Those of quantize_rows, over all heads together, whether threads take whole rows or heads."""
    parts, options, wide = inputs(kind, lengths)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        made, scale = ops.attention_requantize(*parts, starts(lengths), **options)
    finally:
        torch.set_num_threads(before)
    expected, steps = ops.quantize_rows(wide.flatten(1))
    assert made.dtype == torch.int8 and made.shape == parts[0].shape and torch.equal(made.flatten(1), expected)
    assert torch.equal(scale, steps)


@pytest.mark.parametrize("kind", (*KINDS, torch.float32))
@pytest.mark.parametrize("size", (1, 26, 64, 80))
def test_codes_of_one_step(kind, size):
    parts, options, wide = inputs(kind, LENGTHS, 3, size)
    step = float(wide.abs().max()) / 100  # some are clamped
    for zero in (0, 1, 77, 255):
        made, scale = ops.attention_requantize(*parts, starts(LENGTHS), out_scale=step, out_zero_point=zero, **options)
        expected, _ = ops.quantize_rows(wide, step, zero, unsigned=zero > 0)
        assert made.dtype == expected.dtype and torch.equal(made, expected)
        assert torch.equal(scale, torch.full((len(wide),), step))
    made, _ = ops.attention_requantize(*parts, starts(LENGTHS), out_scale=step, out_zero_point=128, **options)
    # The operator multiplies by the rounded inverse of the step.
    expected = (wide * (1 / torch.tensor(step))).round() + 128
    assert torch.equal(made, expected.clamp(0, 255).to(torch.uint8))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_codes_of_narrow_floats(dtype):
    """From fp32 sums: at most the last code away from those of the rounded output."""
    parts, _, _ = inputs(dtype, LENGTHS)
    cu = starts(LENGTHS)
    expected = ops.attention(*parts, cu).float().flatten(1)
    made, scale = ops.attention_requantize(*parts, cu)
    error = made.flatten(1) * scale[:, None] - expected
    assert (error.abs().amax(1) <= (0.5 + 127 * 2.0**-8) * scale + 1e-6).all()
    made, _ = ops.attention_requantize(*parts, cu, out_scale=0.02)
    assert (made.flatten(1) * 0.02 - expected).abs().max() <= 0.0101 + 2.0**-8 * expected.abs().max()


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("out_scale", (0.0, 0.01))
def test_rows_that_are_not_finite(bad, out_scale):
    parts, _, _ = inputs(torch.float32, LENGTHS)
    cu = starts(LENGTHS)
    clean, clean_steps = ops.attention_requantize(*parts, cu, out_scale=out_scale)
    assert clean_steps.isfinite().all()
    parts[2][int(cu[4]) + 3, 1, 25] = bad
    made, steps = ops.attention_requantize(*parts, cu, out_scale=out_scale)
    others = torch.ones(len(made), dtype=torch.bool)
    others[cu[4] : cu[5]] = False
    assert torch.equal(made[others], clean[others]) and torch.equal(steps[others], clean_steps[others])
    assert steps[~others].isnan().all()


def test_head_masks():
    parts, scales = codes(LENGTHS, 3, 32)
    cu, mask = starts(LENGTHS), torch.ones(8, 3)
    mask[1], mask[4], mask[5, 1] = torch.tensor([0.0, 0.5, 1.0]), 0.0, -2.0
    wide = check(parts, scales, cu, head_mask=mask)
    for zero in (0, 77):
        made, _ = ops.attention_requantize(
            *parts, cu, scales=scales, head_mask=mask, out_scale=0.01, out_zero_point=zero
        )
        assert torch.equal(made, ops.quantize_rows(wide, 0.01, zero, unsigned=zero > 0)[0])
        assert (made[cu[4] : cu[5]] == zero).all()
    made, steps = ops.attention_requantize(*parts, cu, scales=scales, head_mask=mask)
    assert torch.equal(made.flatten(1), ops.quantize_rows(wide.flatten(1))[0]) and (steps[cu[4] : cu[5]] == 1).all()


@pytest.mark.parametrize("shape", ((0, 3, 8), (5, 0, 8), (5, 3, 0)))
def test_empty(shape):
    parts = [torch.zeros(shape, dtype=torch.int8) for _ in range(3)]
    cu, scales = torch.tensor([0, shape[0]]), [torch.ones(shape[0]) for _ in range(3)]
    assert ops.qattention(*parts, scales, cu).shape == shape
    for out_scale in (0.0, 0.5):
        made, steps = ops.attention_requantize(*parts, cu, scales=scales, out_scale=out_scale)
        assert made.shape == shape and torch.equal(steps, torch.full((shape[0],), out_scale or 1.0))


def test_gradients():
    """Of what is no code: scales, bias, head mask."""
    parts, scales = codes((9, 6), 2, 5)
    cu, bias, mask = starts((9, 6)), random(2, 2, 9, 9, seed=3), random(2, 2, seed=4)
    scales = [scale + 0.01 for scale in scales]
    leaves = [part.clone().requires_grad_() for part in (*scales, bias, mask)]
    twins = [part.double().requires_grad_() for part in (*scales, bias, mask)]
    qattention(*parts, *leaves[:3], cu, None, *leaves[3:]).square().sum().backward()
    floats = [part.double() * scale.view(-1, 1, 1) for part, scale in zip(parts, twins, strict=False)]
    y = reference.packed_attention(*floats, cu.tolist(), bias=twins[3], head_mask=twins[4])
    y.square().sum().backward()
    for ours, theirs in zip(leaves, twins, strict=True):
        size = float(theirs.grad.abs().max())
        assert (ours.grad.double() - theirs.grad).abs().max() <= (2e-2 if NARROW else 1e-4) * size
    with pytest.raises(RuntimeError, match="floating point"):
        parts[0].requires_grad_()
    made, steps = requantize(*parts, *leaves[:3], cu, None, *leaves[3:])
    assert not made.requires_grad and not steps.requires_grad


def test_opcheck():
    parts, scales = codes((9, 6), 2, 5)
    cu, counts = starts((9, 6)), torch.tensor([4, 6])
    bias, mask = random(1, 2, 9, 9), torch.ones(2, 2)
    torch.library.opcheck(qattention.default, (*parts, *scales, cu))
    torch.library.opcheck(
        qattention.default, (*parts, *scales, cu, counts, bias, mask.requires_grad_(), 0.5, True, torch.bfloat16)
    )
    mask = mask.detach()
    torch.library.opcheck(requantize.default, (*parts, *scales, cu, counts, bias, mask, 0.5, True, 0.1, 3))
    torch.library.opcheck(requantize.default, (*(part.float() for part in parts), None, None, None, cu))


BAD = {
    "q of dtype int8 beside scales": lambda q, s, cu: (q.float(), q, q, s, s, s, cu),
    "v of dtype int8 beside scales": lambda q, s, cu: (q, q, q.byte(), s, s, s, cu),
    "k of shape": lambda q, s, cu: (q, q[1:], q, s, s, s, cu),
    "q_scale of shape": lambda q, s, cu: (q, q, q, s[:4], s, s, cu),
    "k_scale of shape": lambda q, s, cu: (q, q, q, s, s[:0], s, cu),
    "v_scale of shape": lambda q, s, cu: (q, q, q, s, s, s.view(2, 5), cu),
    r"v_scale of shape \[T\] = \[10\] or \[\]. Got \[1\]": lambda q, s, cu: (q, q, q, s, s, s[:1], cu),
    "v_scale of dtype float32": lambda q, s, cu: (q, q, q, s, s, s.double(), cu),
    "q_scale of at least 0": lambda q, s, cu: (q, q, q, -s, s, s, cu),
    "k_scale of at least 0. Got -2": lambda q, s, cu: (q, q, q, s, torch.tensor(-2.0), s, cu),
    "end with T": lambda q, s, cu: (q, q, q, s, s, s, cu[:-1]),
    "head_mask of shape": lambda q, s, cu: (q, q, q, s, s, s, cu, None, None, torch.ones(2)),
    "scale > 0": lambda q, s, cu: (q, q, q, s, s, s, cu, None, None, None, -1.0),
}


@pytest.mark.parametrize("expected", BAD)
def test_bad_input(expected):
    arguments = BAD[expected](torch.ones(10, 2, 8, dtype=torch.int8), torch.ones(10), torch.tensor([0, 4, 10]))
    for op, name in ((qattention, "qattention"), (requantize, "attention_requantize")):
        with pytest.raises(RuntimeError, match=f"^{name}: expected .*{expected}|^{name}: expected {expected}"):
            op(*arguments)


def test_bad_output():
    q, s, cu = torch.ones(10, 2, 8, dtype=torch.int8), torch.ones(10), torch.tensor([0, 4, 10])
    with pytest.raises(RuntimeError, match="qattention: expected out_dtype float32, bfloat16 or float16"):
        ops.qattention(q, q, q, [s, s, s], cu, out_dtype=torch.int8)
    for out_scale, zero in (
        (-1.0, 0),
        (float("nan"), 0),
        (float("inf"), 0),
        (1e-40, 0),
        (1e40, 0),
        (0.0, 5),
        (0.1, 256),
        (0.1, -1),
    ):
        with pytest.raises(RuntimeError, match="attention_requantize: expected out_"):
            ops.attention_requantize(q, q, q, cu, scales=[s, s, s], out_scale=out_scale, out_zero_point=zero)
    for three in ((s, s), [], (s, s, s, s), s, "abc"):
        with pytest.raises(ValueError, match="expected the scales of q, k and v"):
            ops.qattention(q, q, q, three, cu)
        with pytest.raises(ValueError, match="expected the scales of q, k and v"):
            ops.attention_requantize(q, q, q, cu, scales=three)
    with pytest.raises(RuntimeError, match="q_scale, k_scale and v_scale, or none of them"):
        requantize(q, q, q, s, None, s, cu)
    with pytest.raises(RuntimeError, match="q of dtype float32, bfloat16 or float16"):
        ops.attention_requantize(q, q, q, cu)
