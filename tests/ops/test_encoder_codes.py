"""encoder whose q, k and v are requantized (Q8BERT): their codes go to the attention, which no bit may show."""

import pytest
import torch

from bertkern import ops
from bertkern.formats.int8 import quantize_weight
from tests import reference
from tests.ops.test_encoder import every_padding, inputs

encoder = torch.ops.bertkern.encoder
STEP, OUT = 4.0 / 127, (3.0 / 127, 2.5 / 127, 2.0 / 127)


def layer(hidden, ffn, requantized, shared=True, seed=0):
    """Packed linears, their float64 references, and norms: static int8 q, k, v, of which some give codes; fp32 else."""
    generator = torch.Generator().manual_seed(seed)
    packed, plain = [], []
    for i in range(3):
        w = quantize_weight(torch.randn(hidden, hidden, generator=generator) / hidden**0.5)
        bias = torch.randn(hidden, generator=generator) * 0.1
        steps = STEP if shared else STEP * (1 + i / 8), OUT[i] if i in requantized else 0.0
        packed.append(ops.pack_qlinear(w.codes, w.scale, bias, steps[0], 0, steps[1]))
        plain.append(reference.int8_linear(w.codes, w.scale, bias, *steps))
    for n, k in ((hidden, hidden), (ffn, hidden), (hidden, ffn)):
        weight = torch.randn(n, k, generator=generator) / k**0.5
        bias = torch.randn(n, generator=generator) * 0.1
        packed.append(ops.pack_linear(weight, bias))
        plain.append(reference.dense(weight, bias))
    norms = torch.randn(1, 4, hidden, generator=generator) * 0.1
    norms[:, ::2] += 1
    return packed, plain, norms


@pytest.mark.parametrize("threads", (1, 2, 4))  # rows, columns, heads
@pytest.mark.parametrize("shared", (True, False))
@pytest.mark.parametrize("requantized", ((0, 1, 2), (0, 1), (2,)))
@pytest.mark.parametrize("hidden,heads", ((128, 4), (128, 2), (52, 2), (39, 3)))
def test_against_float64(hidden, heads, requantized, shared, threads):
    packed, plain, norms = layer(hidden, 96, requantized, shared)
    x, mask = inputs(8, 41, hidden)[:4], every_padding(41)[:4]
    expected = reference.encoder(x, mask, None, plain, norms, [heads], 1, 1e-12)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = encoder(x, mask, None, packed, norms, [heads], 1, 1e-12)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shared", (True, False))
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_what_is_not_finite_spreads_as_it_does_without_codes(shared, bad):
    """A code cannot say NaN."""
    packed, _, norms = layer(128, 96, (0, 1, 2), shared)
    x, mask = inputs(8, 41, 128), every_padding(41)
    threads = torch.get_num_threads()
    clean = encoder(x, mask, None, packed, norms, [4], 1, 1e-12)
    x[3, 6, 7] = bad
    others = torch.arange(8) != 3
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            dirty = encoder(x, mask, None, packed, norms, [4], 1, 1e-12)
            assert torch.equal(clean[others], dirty[others])
            assert dirty[3][mask[3] != 0].isnan().all()
    finally:
        torch.set_num_threads(threads)
    # Padding that is a query only: nothing but its own row.
    x, mask = inputs(1, 9, 128), torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1, 1]])
    clean = encoder(x, mask, None, packed, norms, [4], 1, 1e-12)
    x[0, 4] = bad
    dirty = encoder(x, mask, None, packed, norms, [4], 1, 1e-12)
    assert dirty[0, 4].isnan().all() and torch.equal(dirty[0, mask[0] != 0], clean[0, mask[0] != 0])


def test_a_sequence_depends_on_nothing_else():
    """Split by rows, by columns or by heads, alone or in a batch: the same bits."""
    parts = [layer(128, 96, (0, 1, 2), seed=seed) for seed in range(2)]
    packed, norms = [linear for part in parts for linear in part[0]], torch.cat([part[2] for part in parts])
    x, lengths = inputs(5, 161, 128), (161, 1, 17, 40, 32)
    mask = (torch.arange(161)[None] < torch.tensor(lengths)[:, None]).long()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(encoder(x, mask, None, packed, norms, [4, 2], 1, 1e-12))
            for i, length in enumerate(lengths):
                alone = encoder(x[i : i + 1, :length], None, None, packed, norms, [4, 2], 1, 1e-12)
                assert torch.equal(alone[0], results[-1][i, :length])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
