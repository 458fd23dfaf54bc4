"""mobilebert_encoder and trigram_embed against float64, over every kind of bottleneck, norm and padding."""

import pytest
import torch

from bertkern import ops
from bertkern.formats.int8 import quantize_weight
from tests import reference

from .test_encoder import every_padding, inputs

encoder = torch.ops.bertkern.mobilebert_encoder
embed = torch.ops.bertkern.trigram_embed
NONE, INPUT, SHARED, ALL = range(4)
RELU = 3


class Stack:
    """Packed linears, their float64 references, and norms of some layers.

    Args:
        hidden, width: of the states and within a layer; heads: of `width`, or of `wide` where some are gone.
        ffn: widths of the feed-forwards.
    """

    def __init__(self, layers, hidden, width, heads, ffn, bottleneck, kind="fp32", eps=False, wide=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        wide = width if wide is None else wide
        width = width if bottleneck else hidden
        wide = wide if bottleneck else hidden
        from_all = hidden if bottleneck in (NONE, INPUT) else width
        of_values = width if bottleneck == ALL else hidden
        narrowing = {NONE: 0, INPUT: 1, SHARED: 2, ALL: 1}[bottleneck]
        shapes = [(width, hidden)] * narrowing
        shapes += [(wide, from_all), (wide, from_all), (wide, of_values), (width, wide)]
        shapes += [shape for units in ffn for shape in ((units, width), (width, units))]
        shapes += [(hidden, width)] * (bottleneck > 0)
        features = [width] * (narrowing + 1 + len(ffn)) + [hidden] * (bottleneck > 0)
        self.packed, self.plain, self.pairs = [], [], []
        for _ in range(layers):
            here = []
            for n, k in shapes:
                weight = torch.randn(n, k, generator=generator) / k**0.5
                bias = torch.randn(n, generator=generator) * 0.1
                if kind == "int8":
                    w = quantize_weight(weight)
                    self.packed.append(ops.pack_qlinear(w.codes, w.scale, bias))
                    here.append(reference.int8_linear(w.codes, w.scale, bias))
                else:
                    weight = weight.bfloat16() if kind == "bf16" else weight
                    self.packed.append(ops.pack_linear(weight, bias))
                    here.append(reference.dense(weight, bias))
            self.plain.append(here)
            draws = [torch.randn(2, n, generator=generator) * 0.1 for n in features]
            self.pairs.append([(0.8 + draw[0], draw[1]) for draw in draws])
        self.norms = torch.stack([torch.cat([t for pair in pairs for t in pair]) for pairs in self.pairs])
        # Of the last feed-forward, transformers' own differs from the others.
        self.floors = [1e-5 if i == len(features) - 2 else 1e-12 for i in range(len(features))] if eps else None
        self.eps = torch.tensor(self.floors) if eps else None
        self.heads, self.bottleneck = [heads] * layers, bottleneck

    def arguments(self):
        return self.packed, self.norms, self.eps, self.heads, self.bottleneck, RELU

    def run(self, x, mask, *flags):
        return encoder(x, mask, *self.arguments(), *flags)

    def expected(self, x, mask, *flags):
        plain = (self.plain, self.pairs, self.floors, self.heads, self.bottleneck, RELU)
        return reference.mobilebert_encoder(x, mask, *plain, *flags)


@pytest.mark.parametrize("bottleneck", (NONE, INPUT, SHARED, ALL))
@pytest.mark.parametrize("eps", (False, True))
@pytest.mark.parametrize("length", (1, 7, 33, 150))
@pytest.mark.parametrize("batch", (1, 3))
def test_fp32_against_float64(bottleneck, eps, length, batch):
    stack = Stack(2, 68, 39, 3, (50, 33, 17), bottleneck, eps=eps) if bottleneck else None
    stack = stack or Stack(2, 52, 52, 4, (50, 33), NONE, eps=eps)
    x = inputs(batch, length, 68 if bottleneck else 52)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, (length + 1) // 2 :] = 0
    expected, y = stack.expected(x, mask), stack.run(x, mask)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=2e-5)
    states = stack.run(x, mask, False, True)
    assert torch.equal(states[1], y)
    torch.testing.assert_close(states.double(), stack.expected(x, mask, False, True), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("hidden,width,heads,ffn", ((512, 128, 4, (512,) * 4), (33, 26, 2, (7,)), (64, 64, 1, (96,))))
@pytest.mark.parametrize("kind", ("int8", "bf16"))
def test_other_weights_against_the_simulation(hidden, width, heads, ffn, kind):
    for bottleneck in (INPUT, SHARED, ALL):
        stack = Stack(2, hidden, width, heads, ffn, bottleneck, kind)
        x = inputs(2, 40, hidden)
        expected = stack.expected(x, None)
        assert reference.sqnr(expected, stack.run(x, None, False, False, False, True)) > 38
        # Attention in bf16 has codes fall the other way.
        assert reference.sqnr(expected, stack.run(x, None)) > 32


@pytest.mark.parametrize("keep_padding", (False, True))
@pytest.mark.parametrize("empty_attends", (False, True))
@pytest.mark.parametrize("bottleneck", (NONE, SHARED))
def test_every_padding(keep_padding, empty_attends, bottleneck):
    stack = Stack(2, 52, 26, 2, (60, 20), bottleneck)
    x, mask = inputs(8, 41, 52), every_padding(41)
    flags = (keep_padding, True, empty_attends)
    y = stack.run(x, mask, *flags)
    torch.testing.assert_close(y.double(), stack.expected(x, mask, *flags), rtol=1e-5, atol=5e-5)
    poisoned = x.masked_fill(mask[..., None] == 0, float("nan"))
    if not keep_padding:
        assert torch.equal(stack.run(poisoned, mask, *flags)[:, mask != 0], y[:, mask != 0])


@pytest.mark.parametrize("kind", ("int8", "fp32"))
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_nan_and_inf_stay_in_their_sequence(kind, bad):
    stack = Stack(2, 64, 32, 4, (96, 40), SHARED, kind)
    x, mask = inputs(8, 41, 64), every_padding(41)
    clean = stack.run(x, mask)
    x[3, 6, 7] = bad
    dirty = stack.run(x, mask)
    others = torch.arange(8) != 3
    assert torch.equal(clean[others], dirty[others])
    assert not dirty[3][mask[3] != 0].isfinite().any()


@pytest.mark.parametrize("kind", ("int8", "fp32"))
def test_a_sequence_depends_on_nothing_else(kind):
    """Alone or in a batch, padded or not, one thread or two: the same bits."""
    stack = Stack(2, 64, 32, 4, (96, 40), SHARED, kind)
    x = inputs(5, 61, 64)
    lengths = (61, 1, 17, 40, 32)
    mask = (torch.arange(61)[None] < torch.tensor(lengths)[:, None]).long()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            batch = stack.run(x, mask)
            for i, length in enumerate(lengths):
                assert torch.equal(batch[i, :length], stack.run(x[i : i + 1, :length], None)[0])
                assert (batch[i, length:] == 0).all()
            results.append(batch)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_fewer_heads_and_dtypes_of_the_input():
    stack = Stack(2, 68, 52, 3, (50, 33), SHARED, wide=39)
    x = inputs(3, 9, 68)
    torch.testing.assert_close(stack.run(x, None).double(), stack.expected(x, None), rtol=1e-5, atol=2e-5)
    for dtype in (torch.bfloat16, torch.float16):
        y = stack.run(x.to(dtype), None)
        assert y.dtype == dtype
        torch.testing.assert_close(y, stack.run(x.to(dtype).float(), None).to(dtype))
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(stack.run(strided, None), stack.run(x, None))


@pytest.mark.parametrize("bottleneck", (NONE, INPUT, SHARED, ALL))
@pytest.mark.parametrize("eps", (False, True))
def test_gradients_of_every_kind(bottleneck, eps):
    stack = Stack(2, 36, 36, 2, (20, 15), bottleneck, eps=eps)
    x, mask = inputs(3, 7, 36), every_padding(7)[:3]
    weights = torch.randn(2, 3, 7, 36, generator=torch.Generator().manual_seed(3))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    (stack.run(ours, mask, False, True) * weights).sum().backward()
    (stack.expected(theirs, mask, True, True) * weights * mask[..., None]).sum().backward()
    (ours_again,) = torch.autograd.grad((stack.run(ours, mask, True, True) * weights * mask[..., None]).sum(), ours)
    torch.testing.assert_close(ours_again, theirs.grad, rtol=1e-4, atol=1e-4)
    # Positions that are dropped have no gradient.
    assert not ours.grad[1, 3:].any()


def test_bad_input_and_opcheck():
    stack = Stack(2, 36, 24, 2, (20, 15), SHARED, eps=True)
    x, mask = inputs(2, 9, 36), torch.ones(2, 9)
    packed, norms, eps, heads, bottleneck, act = stack.arguments()
    for match, arguments in (
        (r"expected x of shape \[B, L, H\]", (x[0], mask, packed, norms, eps, heads, bottleneck, act)),
        (r"expected mask of shape \[B, L\] = \[2, 9\]", (x, mask[:, :8], packed, norms, eps, heads, bottleneck, act)),
        (r"expected mask of dtype", (x, mask.cfloat(), packed, norms, eps, heads, bottleneck, act)),
        (r"expected bottleneck 0 \(none\).* Got 4", (x, mask, packed, norms, eps, heads, 4, act)),
        (r"expected bottleneck 0 \(none\).* Got -1", (x, mask, packed, norms, eps, heads, -1, act)),
        (r"expected 7 packed linears a layer", (x, mask, packed[:-1], norms, eps, heads, bottleneck, act)),
        (r"of 0 layers", (x, mask, packed, norms, eps, [], bottleneck, act)),
        (r"expected 6 packed linears a layer", (x, mask, packed, norms, eps, heads, ALL, act)),
        (
            r"expected packed weights for k of layer 0",
            (x, mask, [*packed[:3], x, *packed[4:]], norms, eps, heads, 2, 3),
        ),
        (r"expected v of layer 0 of shape", (x, mask, [*packed[:4], packed[3], *packed[5:]], norms, eps, heads, 2, 3)),
        (r"multiple of its 5 heads", (x, mask, packed, norms, eps, [2, 5], bottleneck, act)),
        (r"multiple of its 0 heads", (x, mask, packed, norms, eps, [2, 0], bottleneck, act)),
        (r"expected norms of shape", (x, mask, packed, norms[:, 1:], eps, heads, bottleneck, act)),
        (r"expected norms of dtype", (x, mask, packed, norms.double(), eps, heads, bottleneck, act)),
        (r"expected eps of shape", (x, mask, packed, norms, eps[1:], heads, bottleneck, act)),
        (r"expected eps >= 0. Got -1", (x, mask, packed, norms, eps - 1, heads, bottleneck, act)),
        (r"expected activation", (x, mask, packed, norms, eps, heads, bottleneck, 9)),
    ):
        with pytest.raises(RuntimeError, match=match):
            encoder(*arguments)
    assert stack.run(x[:0], mask[:0]).shape == (0, 9, 36)
    assert stack.run(x[:, :0], mask[:, :0], False, True).shape == (2, 2, 0, 36)
    torch.library.opcheck(encoder.default, (x, mask, *stack.arguments()))


def tables_of(embedding, hidden, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tables = [torch.randn(n, w, generator=generator) for n, w in ((50, embedding), (20, hidden), (2, hidden))]
    weight = torch.randn(hidden, 3 * embedding, generator=generator) / (3 * embedding) ** 0.5
    gamma, beta, bias = torch.randn(3, hidden, generator=generator)
    return tables, weight, bias, gamma, beta


@pytest.mark.parametrize("embedding,hidden", ((128, 512), (5, 15), (20, 68)))
@pytest.mark.parametrize("batch,length", ((1, 1), (1, 2), (3, 7), (3, 33), (2, 150)))
@pytest.mark.parametrize("eps", (None, 1e-5))
def test_trigram_embed(embedding, hidden, batch, length, eps):
    tables, weight, bias, gamma, beta = tables_of(embedding, hidden)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, len(t), (batch, length), generator=generator) for t in tables]
    ones = [torch.ones(1)] * 3
    for trigram, w in ((True, weight), (False, weight[:, :embedding].contiguous())):
        packed, plain = ops.pack_linear(w, bias), reference.dense(w, bias)
        expected = reference.trigram_embed(ids, tables, ones, plain, gamma, beta, eps, trigram)
        y = embed(ids, tables, ones, packed, gamma, beta, eps, trigram)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
        rows = torch.stack(
            [
                embed([i[b : b + 1] for i in ids], tables, ones, packed, gamma, beta, eps, trigram)[0]
                for b in range(batch)
            ]
        )
        assert torch.equal(rows, y)
    quantized = [quantize_weight(t) for t in tables]
    codes, scales = [w.codes for w in quantized], [w.scale for w in quantized]
    w = quantize_weight(weight)
    packed, plain = ops.pack_qlinear(w.codes, w.scale, bias), reference.int8_linear(w.codes, w.scale, bias)
    expected = reference.trigram_embed(ids, codes, scales, plain, gamma, beta, eps, True)
    assert reference.sqnr(expected, embed(ids, codes, scales, packed, gamma, beta, eps)) > 40


def test_trigram_embed_bad_input_and_opcheck():
    tables, weight, bias, gamma, beta = tables_of(8, 12)
    ids, ones = [torch.zeros(2, 3, dtype=torch.long)] * 3, [torch.ones(1)] * 3
    packed = ops.pack_linear(weight, bias)
    wide = [torch.randn(50, 12), *tables[1:]]
    expected = reference.trigram_embed(ids, wide, ones, None, gamma, beta, None, False)
    torch.testing.assert_close(embed(ids, wide, ones, None, gamma, beta, None, False).double(), expected)
    for match, arguments in (
        (r"as many tables and scales as ids", (ids[:2], tables, ones, packed, gamma, beta)),
        (r"as many tables and scales as ids", ([], [], [], packed, gamma, beta)),
        (r"expected ids in \[0, 50\) of table 0. Got 50", ([ids[0] + 50, *ids[1:]], tables, ones, packed, gamma, beta)),
        (r"expected ids of one shape", ([ids[0], ids[0][:1], ids[0]], tables, ones, packed, gamma, beta)),
        (r"expected ids of shape \[B, L\]", ([i[0] for i in ids], tables, ones, packed, gamma, beta)),
        (r"expected ids of dtype", ([i.int() for i in ids], tables, ones, packed, gamma, beta)),
        (r"expected table 1 of shape", (ids, [tables[0], tables[0], tables[2]], ones, packed, gamma, beta)),
        (r"transformation of shape \[N, K\] = \[12, 8\]", (ids, tables, ones, packed, gamma, beta, None, False)),
        (r"expected packed weights of shape \[N, K\] = \[12, 24\]. Got none", (ids, tables, ones, None, gamma, beta)),
        (r"expected weight and bias of shape \[H\]", (ids, tables, ones, packed, gamma, beta[1:])),
        (r"expected scales of shape", (ids, tables, [torch.ones(3), *ones[1:]], packed, gamma, beta)),
        (r"expected eps >= 0. Got -1", (ids, tables, ones, packed, gamma, beta, -1.0)),
    ):
        with pytest.raises(RuntimeError, match=match):
            embed(*arguments)
    assert embed([i[:0] for i in ids], tables, ones, packed, gamma, beta).shape == (0, 3, 12)
    torch.library.opcheck(embed.default, (ids, tables, ones, packed, gamma, beta))
