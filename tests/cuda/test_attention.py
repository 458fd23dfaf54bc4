"""csrc/cuda/attention, its source run on the host, against float64: lengths, widths, masks, biases, strides, bits."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests import reference

from .emulation import TYPES, emulated

GLUE = """
using namespace bertkern::cuda;
extern "C" int attend(void* q, void* k, void* v, void* out, void* statistics, void* cu_seqlens, void* key_counts,
                      void* numbers, void* factors, void* bias, int64_t q_t, int64_t q_h, int64_t k_t, int64_t k_h,
                      int64_t v_t, int64_t v_h, int64_t factors_b, int64_t factors_h, int64_t bias_b, int64_t bias_h,
                      int64_t bias_q, int64_t type, int64_t bias_type, int64_t tokens, int64_t heads,
                      int64_t sequences, int64_t max_length, int64_t head_dim, int64_t causal, float scale,
                      int64_t warps, int64_t places) {
  AttentionParams p{};
  p.q = q, p.k = k, p.v = v, p.out = out, p.statistics = static_cast<float*>(statistics);
  p.q_t = q_t, p.q_h = q_h, p.k_t = k_t, p.k_h = k_h, p.v_t = v_t, p.v_h = v_h;
  p.cu_seqlens = static_cast<const int32_t*>(cu_seqlens), p.key_counts = static_cast<const int32_t*>(key_counts);
  p.numbers = static_cast<const int32_t*>(numbers), p.factors = static_cast<const float*>(factors);
  p.factors_b = factors_b, p.factors_h = factors_h;
  p.bias = bias, p.bias_b = bias_b, p.bias_h = bias_h, p.bias_q = bias_q;
  p.type = static_cast<Type>(type), p.bias_type = static_cast<Type>(bias_type);
  p.tokens = tokens, p.heads = heads, p.sequences = sequences, p.max_length = max_length, p.head_dim = head_dim;
  p.causal = causal, p.scale = scale, p.warps = warps, p.places = places;
  return launch_attention(p, nullptr);
}
"""
# Of the largest result: what q, k, v and the weights are rounded to.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
NAN = float("nan")
LENGTHS = (1, 15, 0, 17, 64, 66)


def starts(lengths) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def packed(tokens: int, heads: int, d: int, dtype: torch.dtype, step: int = 8, first: int = 0, seed: int = 0):
    """q, k and v among NaN; rows begin at multiples of `step` elements behind `first` ones."""
    torch.manual_seed(seed)
    wide = d + step + -d % step
    around = torch.full((first + (tokens + 2) * 3 * (heads + 1) * wide,), NAN, dtype=dtype)
    inside = around[first:].view(tokens + 2, 3, heads + 1, wide)[1 : tokens + 1, :, :heads, :d]
    inside.copy_(torch.randn(tokens, 3, heads, d))
    return list(inside.unbind(1))


def attend(
    q, k, v, cu, longest, *, counts=None, numbers=None, mask=None, bias=None, causal=False, scale=None,
    warps=0, places=0
):  # fmt: skip
    """out and statistics, which were NaN before."""
    tokens, heads, d = q.shape
    out = torch.full((tokens, heads, d), NAN, dtype=q.dtype)
    statistics = torch.full((2, heads, tokens), NAN)
    strides = [0, 0, 0] if bias is None else [bias.stride(i) if bias.shape[i] > 1 else 0 for i in range(3)]
    factors = [0, 0] if mask is None else list(mask.stride())
    emulated("attention/attention.cu", GLUE).attend(
        q, k, v, out, statistics, cu, counts, numbers, mask, bias,
        *(stride for x in (q, k, v) for stride in x.stride()[:2]), *factors, *strides,
        TYPES[q.dtype], TYPES[torch.float32 if bias is None else bias.dtype], tokens, heads, len(cu) - 1, longest, d,
        causal, d**-0.5 if scale is None else scale, warps, places,
    )  # fmt: skip
    return out, statistics


def check(
    dtype, d, lengths, *, heads=2, spare=0, step=8, first=0, counts=None, numbers=None, mask=None, bias=None, **options
):  # fmt: skip
    """Against float64; tokens beyond the sequences, `spare` of them, give zeros."""
    tokens, cu = sum(lengths), starts(lengths)
    q, k, v = packed(tokens + spare, heads, d, dtype, step, first)
    longest = options.pop("longest", max(lengths))
    counted = None if counts is None else torch.tensor(counts, dtype=torch.int32)
    numbered = None if numbers is None else torch.tensor(numbers, dtype=torch.int32)
    out, statistics = attend(q, k, v, cu, longest, counts=counted, numbers=numbered, mask=mask, bias=bias, **options)
    own = slice(None) if numbers is None else numbers
    table = None if bias is None else bias if bias.shape[1] == 1 else bias[:, own]
    factors = None if mask is None else mask[:, own]
    named = {name: options.get(name) for name in ("scale", "causal")}
    q, k, v = (x[:tokens] for x in (q, k, v))
    args = (cu.tolist(), counts, None if table is None else table.double(), None if mask is None else factors.double())
    expected = reference.packed_attention(q, k, v, *args, scale=named["scale"], causal=bool(named["causal"]))
    assert out.isfinite().all() and not out[tokens:].any()
    size = max(1.0, float(expected.abs().max()))
    error = float((out[:tokens].double() - expected).abs().max())
    assert error <= TOLERANCE[dtype] * size, f"differs by {error}"
    return out, statistics


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("d", [1, 13, 16, 24, 26, 32, 40, 64, 80, 96, 100, 128])
def test_widths(d, dtype):
    """Every kernel, rows by 16 bytes where the width allows it."""
    check(dtype, d, LENGTHS if d in (26, 64) else (1, 0, 33, 66), spare=3)


@pytest.mark.parametrize("step, first", [(8, 0), (8, 4), (2, 0), (2, 6), (1, 1), (3, 0)])
def test_rows_that_begin_anywhere(step, first):
    """By 16, 4 and 2 bytes at a time; the results have the same bits."""
    d = 32
    aligned = check(torch.float16, d, (5, 70))
    for mine, theirs in zip(check(torch.float16, d, (5, 70), step=step, first=first), aligned, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("warps, places", [(4, 0), (4, 2), (8, 2), (8, 9)])
@pytest.mark.parametrize("d", [26, 64, 80])
def test_blocks_of_any_size_give_the_same_bits(d, warps, places):
    """Chunks that stay, and chunks that come in turns; 64 and 128 queries; a maximal length far beyond."""
    lengths = (200, 3, 129)
    expected = check(torch.bfloat16, d, lengths, heads=1, causal=d == 64)
    got = check(torch.bfloat16, d, lengths, heads=1, causal=d == 64, warps=warps, places=places, longest=321)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("places", [0, 2])
@pytest.mark.parametrize("biased", [None, (1, 1), (1, 2), (6, 1), (6, 2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("counted", [False, True])
def test_masks(counted, causal, biased, places):
    bias = None
    if biased:
        torch.manual_seed(1)
        bias = torch.randn(*biased, 67, 67) * 3  # odd, longer than the longest sequence
        bias[..., 5:9, :40] = -torch.inf  # of short sequences: no key at all
        bias[..., 11] = -torch.inf
        bias[..., 12, 20:] = torch.finfo(torch.float32).min
    counts = (1, 3, 0, 0, 63, 17) if counted else None
    lengths = (1, 15, 0, 17, 64, 66)
    check(torch.float16, 26, lengths, counts=counts, causal=causal, bias=bias, places=places, warps=4)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pitch", [66, 67, 72])
def test_biases_of_any_type_and_pitch(kind, pitch):
    torch.manual_seed(1)
    wide = torch.full((2, 3, 66, pitch), NAN).to(kind)
    bias = wide[..., :66].copy_(torch.randn(2, 3, 66, 66))
    check(torch.bfloat16, 32, (66, 31), heads=3, bias=bias, causal=True)
    check(torch.float16, 32, (66, 31), heads=3, bias=bias[:1, :1, :1].expand(-1, -1, 66, -1))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_heads_that_are_left_and_factors(dtype):
    torch.manual_seed(1)
    mask = torch.rand(3, 9)[:, ::2] + 0.5
    mask[1, 4], mask[0, 1], mask[2, 0] = 0, -2, 0
    bias = torch.randn(3, 5, 40, 40)
    out, _ = check(dtype, 24, (5, 17, 40), heads=3, numbers=(4, 0, 1), mask=mask, bias=bias, spare=2)
    assert not out[5:22, 0].any() and not out[22:62, 1].any()


def test_a_skipped_head_is_not_read():
    q, k, v = (torch.full((70, 2, 64), NAN, dtype=torch.float16) for _ in range(3))
    out, statistics = attend(q, k, v, starts((3, 67)), 67, mask=torch.zeros(2, 2))
    assert not out.any() and statistics.isnan().all()


def test_keys_behind_the_count_are_not_read():
    q, k, v = packed(70, 1, 32, torch.float16)
    for x in (k, v):
        x[20:] = NAN
    counts = torch.tensor([20], dtype=torch.int32)
    out, _ = attend(q, k, v, starts((70,)), 70, counts=counts)
    assert out.isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_statistics(biased, causal):
    """What the kernels of kernels/attention_gradients.py read: the maximum, in log2 without a bias, and 1 / sum."""
    (q, k, v), length = packed(100, 2, 40, torch.float16), 100
    bias = torch.randn(1, 2, 100, 100) if biased else None
    _, (peak, inverse) = attend(q, k, v, starts((100,)), length, bias=bias, causal=causal, scale=0.3)
    score = torch.einsum("ihd,jhd->hij", q.double(), k.double()) * 0.3
    if biased:
        score += bias[0].double()
    if causal:
        score.masked_fill_(torch.ones(100, 100).triu(1).bool(), -torch.inf)
    most = score.amax(-1)
    torch.testing.assert_close(peak.double() * (1 if biased else math.log(2)), most, atol=1e-5, rtol=1e-5)
    sums = (score - most[..., None]).exp().sum(-1)
    torch.testing.assert_close(inverse.double(), 1 / sums, atol=0, rtol=2e-5)


def test_queries_that_see_nothing():
    q, k, v = packed(40, 1, 16, torch.float16)
    counts = torch.zeros(1, dtype=torch.int32)
    out, statistics = attend(q, k, v, starts((40,)), 40, counts=counts)
    assert not out.any() and not statistics.any()
    bias = torch.zeros(1, 1, 40, 40)
    bias[..., 7, :] = -torch.inf
    out, statistics = attend(q, k, v, starts((40,)), 40, bias=bias)
    assert not out[7].any() and not statistics[:, 0, 7].any() and out[8].any()


def test_large_scores():
    """No power overflows, whichever chunk holds the maximum."""
    for order in (torch.linspace(0.1, 30, 150), torch.linspace(30, 0.1, 150)):
        q, k, v = packed(150, 1, 64, torch.float16)
        k.mul_(order[:, None, None])
        out, _ = attend(q, k, v, starts((150,)), 150, scale=1.0)
        expected = reference.packed_attention(q, k, v, [0, 150], scale=1.0)
        assert (out.double() - expected).abs().max() <= 2e-3 * expected.abs().max()


def test_alone_as_in_a_batch():
    lengths = (3, 70, 129)
    q, k, v = packed(sum(lengths), 2, 26, torch.float16)
    together, _ = attend(q, k, v, starts(lengths), 140, causal=True)
    for begin, end in itertools.pairwise(starts(lengths).tolist()):
        part = slice(begin, end)
        alone, _ = attend(q[part], k[part], v[part], starts((end - begin,)), end - begin, causal=True)
        assert torch.equal(alone, together[part])


@pytest.mark.parametrize(
    "said",
    [[0, 50], [0, 30, 20, 40], [5, 20, 40], [0, -7, 40], [0, 10, 10, 25], [0, 2**31 - 1], [-(2**31), 9]],
    ids=str,
)
def test_lengths_that_lie(said):
    """Nothing looks at them before the card does: nothing outside of the tensors is touched, and all is written."""
    q, k, v = packed(40, 2, 16, torch.float16)
    cu = torch.tensor(said, dtype=torch.int32)
    for longest in (1, 16, 40, 100):
        counts = torch.full((len(said) - 1,), 2**31 - 1, dtype=torch.int32)
        out, _ = attend(q, k, v, cu, longest, causal=True, counts=counts)
        assert out.isfinite().all(), longest
    # Longer than max_length: what lies beyond gives zeros, and is no key.
    out, _ = attend(q, k, v, starts((10, 30)), 20)
    expected = torch.cat([reference.packed_attention(*(x[part] for x in (q, k, v)), [0, part.stop - part.start])
                          for part in (slice(0, 10), slice(10, 30))])  # fmt: skip
    assert (out[:30].double() - expected).abs().max() <= 2e-3 and not out[30:].any()


@pytest.fixture
def card():
    """A card and the library for it."""
    from bertkern.ops import attention_triton

    lacking = attention_triton.lacking(torch.device("cuda"))
    if lacking is not None:
        pytest.skip(f"needs bertkern's CUDA library: {lacking}")
    return attention_triton.attention_cuda


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("d", [16, 26, 31, 64, 80, 128])
@pytest.mark.parametrize("biased", [False, True])
def test_on_a_card(card, biased, d, dtype):
    """The kernel itself by the operator's way, and the gradients that are made of its statistics."""
    torch.manual_seed(0)
    lengths, options = (1, 384, 0, 77, 512, 64), {"causal": d == 64}
    cu, mask = starts(lengths), torch.rand(6, 3)
    mask[1, 0], mask[4] = 0, 0
    x = torch.randn(sum(lengths) + 3, 3, 3, d).to(dtype)
    bias = torch.randn(1, 3, 512, 512) if biased else None
    grad = torch.randn(sum(lengths) + 3, 3, d)
    given = {"head_mask": mask.cuda(), "bias": None if bias is None else bias.cuda(), **options}
    mine = x.cuda().requires_grad_()
    out = card(*mine.unbind(1), cu.cuda(), 512, provider="cuda", **given)
    wide = x.double().requires_grad_()
    theirs = card(*wide.unbind(1), cu, 512, head_mask=mask, bias=bias, **options)
    assert out.isfinite().all() and not out[sum(lengths) :].any()
    assert (out.cpu().double() - theirs).abs().max() <= TOLERANCE[dtype] * theirs.abs().max()
    (dx,) = torch.autograd.grad(out, mine, grad.cuda().to(dtype))
    (exact,) = torch.autograd.grad(theirs, wide, grad.double())
    assert (dx.cpu().double() - exact).abs().max() <= 4 * TOLERANCE[dtype] * exact.abs().max()
    if biased:
        return
    for i, (begin, end) in enumerate(itertools.pairwise(cu.tolist())):  # alone as in a batch
        if end > begin:
            one = starts((end - begin,)).cuda()
            part = x[begin:end].cuda().unbind(1)
            alone = card(*part, one, end - begin, provider="cuda", head_mask=mask[i : i + 1].cuda(), **options)
            assert torch.equal(alone, out[begin:end])


@pytest.mark.gpu
def test_in_a_graph_that_serves_any_lengths(card):
    x = torch.randn(300, 3, 4, 64, device="cuda", dtype=torch.float16)
    cu = starts((100, 200)).cuda()
    card(*x.unbind(1), cu, 256, provider="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = card(*x.unbind(1), cu, 256, provider="cuda")
    for lengths in ((100, 200), (1, 7), (256, 44), (0, 0)):
        cu.copy_(starts(lengths))
        graph.replay()
        expected = card(*x.cpu().double().unbind(1), starts(lengths), 256)
        assert (out.cpu().double() - expected).abs().max() <= 2e-3 * max(1, expected.abs().max())
