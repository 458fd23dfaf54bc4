"""attention over packed sequences against float64: head sizes, lengths, masks, biases, strides, bits and bad input."""

import pytest
import torch

from bertkern import ops
from tests import reference

op = torch.ops.bertkern.attention
# Of the result's size: what the operands are rounded to, and a few roundings of sums.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
LENGTHS = (1, 33, 0, 7, 161, 64, 16, 2)  # more than a chunk of keys, whole blocks of queries, tails


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def heads(lengths, count, size, dtype=torch.float32, seed=0):
    return [part.to(dtype) for part in random(3, sum(lengths), count, size, seed=seed)]


def check(q, k, v, cu, **options):
    y = ops.attention(q, k, v, cu, **options)
    listed = {name: value.tolist() if name == "key_counts" else value for name, value in options.items()}
    expected = reference.packed_attention(q, k, v, cu.tolist(), **listed)
    assert y.dtype == q.dtype and y.shape == q.shape
    assert (y.double() - expected).abs().max() <= TOLERANCE[q.dtype] * max(1.0, float(expected.abs().max()))
    return y


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", (1, 3, 16, 26, 31, 32, 33, 64, 80, 127, 128, 200))
def test_against_float64(dtype, size):
    check(*heads(LENGTHS, 3, size, dtype), starts(LENGTHS))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("length", (159, 160, 162, 321, 1000))
def test_long_sequences(dtype, length):
    """Keys in several chunks, where a later one raises the maximum, lowers it, or changes nothing."""
    q, k, v = heads((length,), 2, 40, dtype)
    for order in (None, torch.linspace(0.1, 6, length), torch.linspace(6, 0.1, length)):
        keys = k if order is None else (k * order[:, None, None]).to(dtype)
        check(q, keys, v, starts((length,)))


def test_eight_thousand_tokens():
    q, k, v = heads((8192,), 1, 16)
    y = ops.attention(q, k, v, starts((8192,)))
    some = torch.tensor([0, 4095, 8191])
    scores = q[some, 0].double() @ k[:, 0].double().T / 4
    expected = scores.softmax(-1) @ v[:, 0].double()
    torch.testing.assert_close(y[some, 0].double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("biased", (None, (1, 1), (1, 3), (8, 1), (8, 3)))
@pytest.mark.parametrize("counted", (False, True))
def test_masks(dtype, causal, biased, counted):
    options = {"causal": causal}
    if biased:
        options["bias"] = random(*biased, 165, 165, seed=1) * 3  # longer than the longest sequence
        options["bias"][..., 5:9, 0:40] = -torch.inf  # for short sequences: no key at all
        options["bias"][..., 11] = -torch.inf
    if counted:
        options["key_counts"] = torch.tensor([1, 20, 0, 0, 150, 63, 16, 1])
    check(*heads(LENGTHS, 3, 26, dtype), starts(LENGTHS), **options)


@pytest.mark.parametrize("lowest", (torch.finfo(torch.float32).min, -1e30))
def test_a_row_of_the_lowest_value_attends_evenly(lowest):
    """As in eager attention: beside such a bias every score vanishes."""
    q, k, v = heads((40,), 2, 32)
    bias = torch.zeros(1, 1, 40, 40)
    bias[..., 3, :], bias[..., 4, 20:] = lowest, lowest
    y = check(q, k, v, starts((40,)), bias=bias)
    torch.testing.assert_close(y[3], v.mean(0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("scale", (0.01, 1.0, 3.0))
def test_scales(dtype, scale):
    check(*heads((70,), 2, 24, dtype), starts((70,)), scale=scale)


def test_exponentials_are_as_exact_as_stated():
    """One query, two keys, values 0 and 1: the output is exp(s) / (1 + exp(s)), from s = -1 to s = -85."""
    scores = -torch.rand(4000, generator=torch.Generator().manual_seed(0)) * 84 - 1
    k = torch.stack((torch.zeros(4000), scores), 1).view(-1, 1, 1)
    v = torch.tensor([0.0, 1.0]).repeat(4000).view(-1, 1, 1)
    y = ops.attention(torch.ones(8000, 1, 1), k, v, torch.arange(0, 8001, 2), scale=1.0)[::2, 0, 0].double()
    exact = scores.double().sigmoid()
    # The score times log2(e) is rounded too, by 2^-24 of itself.
    bound = 3e-7 + 2**-23 * scores.double().abs()
    assert ((y / exact - 1).abs() <= bound).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_head_masks(dtype):
    q, k, v = heads(LENGTHS, 3, 32, dtype)
    cu, mask = starts(LENGTHS), torch.ones(8, 3)
    mask[1], mask[4], mask[5, 1] = torch.tensor([0.0, 0.5, 1.0]), 0.0, -2.0
    poisoned = v.clone()
    poisoned[cu[1] : cu[2], 0] = poisoned[cu[4] : cu[5]] = float("nan")  # of heads that are not computed
    y = check(q, k, v, cu, head_mask=mask)
    assert torch.equal(ops.attention(q, k, poisoned, cu, head_mask=mask), y)


def test_strides_are_read_where_they_lie():
    joint = random(50, 3, 4, 20)
    cu, y = starts((30, 20)), ops.attention(*(part.contiguous() for part in joint.unbind(1)), starts((30, 20)))
    assert torch.equal(ops.attention(*joint.unbind(1), cu), y)
    by_head = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in joint.unbind(1)]
    assert torch.equal(ops.attention(*by_head, cu), y)
    scattered = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in joint.unbind(1)]
    assert torch.equal(ops.attention(*scattered, cu.int()), y)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_sequence_depends_on_nothing_else(dtype):
    """Alone or among others, with one thread or more, with rows beside it that are not finite: the same bits."""
    q, k, v = heads(LENGTHS, 3, 26, dtype)
    cu, threads = starts(LENGTHS), torch.get_num_threads()
    together = ops.attention(q, k, v, cu)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(ops.attention(q, k, v, cu), together)
            for i, length in enumerate(LENGTHS):
                part = slice(int(cu[i]), int(cu[i + 1]))
                alone = ops.attention(q[part], k[part], v[part], torch.tensor([0, length]))
                assert torch.equal(alone, together[part])
    finally:
        torch.set_num_threads(threads)
    for bad in (float("nan"), float("inf")):
        dirty = v.clone()
        dirty[int(cu[4]), 1, 3] = bad
        out = ops.attention(q, k, dirty, cu)
        others = torch.ones_like(out, dtype=torch.bool)
        others[cu[4] : cu[5], 1, 3] = False
        assert torch.equal(out[others], together[others]) and not out[~others].isfinite().any()
        dirty = k.clone()
        dirty[int(cu[4]), 1, 3] = bad
        out = ops.attention(q, dirty, v, cu)
        assert torch.equal(out[: cu[4]], together[: cu[4]]) and torch.equal(out[cu[5] :], together[cu[5] :])
        assert out[cu[4] : cu[5], 1].isnan().any()


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("count", (1, 2, 3, 5, 7, 12))
def test_threads_share_the_heads_of_one_sequence(count, causal):
    """Whole heads, and pieces of those left over: none is missing, none is different."""
    q, k, v = heads((70,), count, 16)
    cu, threads = starts((70,)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = ops.attention(q, k, v, cu, causal=causal)
        for many in (2, 3, 4, 8):
            torch.set_num_threads(many)
            assert torch.equal(ops.attention(q, k, v, cu, causal=causal), expected)
    finally:
        torch.set_num_threads(threads)


def test_keys_that_do_not_count_are_not_read():
    q, k, v = heads((40,), 2, 32)
    clean = ops.attention(q, k, v, starts((40,)), key_counts=torch.tensor([25]))
    k[25:] = v[25:] = float("nan")
    assert torch.equal(ops.attention(q, k, v, starts((40,)), key_counts=torch.tensor([25])), clean)


@pytest.mark.parametrize("shape", ((0, 3, 8), (5, 0, 8), (5, 3, 0)))
def test_empty(shape):
    y = ops.attention(*(torch.zeros(shape) for _ in range(3)), torch.tensor([0, shape[0]]))
    assert y.shape == shape
    assert ops.attention(*(torch.zeros(0, 3, 8) for _ in range(3)), torch.tensor([0])).shape == (0, 3, 8)


def test_gradients():
    q, k, v = heads((9, 6), 2, 5)
    cu, bias, mask = starts((9, 6)), random(2, 2, 9, 9, seed=3), random(2, 2, seed=4)
    for causal in (False, True):
        leaves = [part.clone().requires_grad_() for part in (q, k, v, bias, mask)]
        twins = [part.double().requires_grad_() for part in (q, k, v, bias, mask)]
        op(*leaves[:3], cu, None, *leaves[3:], 0.0, causal).square().sum().backward()
        options = {"bias": twins[3], "head_mask": twins[4], "causal": causal}
        reference.packed_attention(*twins[:3], cu.tolist(), **options).square().sum().backward()
        for ours, theirs in zip(leaves, twins, strict=True):
            torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-4, rtol=1e-3)


def test_opcheck():
    q, k, v = heads((9, 6), 2, 5)
    cu = starts((9, 6))
    torch.library.opcheck(op.default, (q, k, v, cu))
    leaves = [part.requires_grad_() for part in (q, k, v)]
    counts, bias, mask = torch.tensor([4, 6]), random(1, 2, 9, 9), torch.ones(2, 2)
    torch.library.opcheck(op.default, (*leaves, cu, counts, bias, mask, 0.5, True))


BAD = {
    "k of shape": lambda q, cu: (q, q[1:], q, cu),
    "v of dtype": lambda q, cu: (q, q, q.double(), cu),
    "q of dtype": lambda q, cu: (q.int(), q.int(), q.int(), cu),
    r"of shape \[T, H, d\]": lambda q, cu: (q[0], q[0], q[0], cu),
    "begin with 0": lambda q, cu: (q, q, q, cu + 1),
    "end with T": lambda q, cu: (q, q, q, cu[:-1]),
    "to rise": lambda q, cu: (q, q, q, torch.tensor([0, 6, 4, 10])),
    "one row of int32": lambda q, cu: (q, q, q, cu.float()),
    "begin with 0 and to end with T = 10. Got an empty one": lambda q, cu: (q, q, q, cu[:0]),
    "key_counts of shape": lambda q, cu: (q, q, q, cu, cu),
    "key_counts from 0": lambda q, cu: (q, q, q, cu, torch.tensor([5, 6])),
    "expected key_counts from": lambda q, cu: (q, q, q, cu, torch.tensor([-1, 6])),
    "bias of shape": lambda q, cu: (q, q, q, cu, None, torch.zeros(1, 2, 5, 6)),
    "bias of dtype": lambda q, cu: (q, q, q, cu, None, torch.zeros(1, 2, 6, 6, dtype=torch.bool)),
    "expected bias of": lambda q, cu: (q, q, q, cu, None, torch.zeros(3, 2, 6, 6)),
    "head_mask of shape": lambda q, cu: (q, q, q, cu, None, None, torch.ones(2)),
    "scale > 0": lambda q, cu: (q, q, q, cu, None, None, None, -1.0),
    "expected scale": lambda q, cu: (q, q, q, cu, None, None, None, float("nan")),
}


@pytest.mark.parametrize("expected", BAD)
def test_bad_input(expected):
    arguments = BAD[expected](random(10, 2, 8), torch.tensor([0, 4, 10]))
    with pytest.raises(RuntimeError, match=f"attention: .*{expected}|{expected}"):
        op(*arguments)
