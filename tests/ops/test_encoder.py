"""encoder, embed and add_layernorm against float64, over head sizes, masks and both ways of splitting the work."""

import pytest
import torch

from bertkern import ops
from bertkern.formats.int8 import quantize_weight
from tests import reference

encoder = torch.ops.bertkern.encoder


def stack(layers, hidden, ffn, kind, seed=0):
    """Packed linears, their float64 references, and norms."""
    generator = torch.Generator().manual_seed(seed)
    packed, plain = [], []
    for _ in range(layers):
        for n, k in ((hidden, hidden),) * 4 + ((ffn, hidden), (hidden, ffn)):
            weight = torch.randn(n, k, generator=generator) / k**0.5
            bias = torch.randn(n, generator=generator) * 0.1
            if kind == "int8":
                w = quantize_weight(weight)
                packed.append(ops.pack_qlinear(w.codes, w.scale, bias))
                plain.append(reference.int8_linear(w.codes, w.scale, bias))
            else:
                packed.append(ops.pack_linear(weight, bias))
                plain.append(reference.dense(weight, bias))
    norms = torch.randn(layers, 4, hidden, generator=generator) * 0.1
    norms[:, 0] += 1
    norms[:, 2] += 1
    return packed, plain, norms


def inputs(batch, length, hidden):
    return torch.randn(batch, length, hidden, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("hidden,heads,ffn", ((64, 4, 128), (52, 2, 117), (39, 3, 50), (80, 1, 33)))
@pytest.mark.parametrize("length", (1, 7, 33, 150))
def test_fp32_against_float64(hidden, heads, ffn, length):
    packed, plain, norms = stack(2, hidden, ffn, "fp32")
    x = inputs(3, length, hidden)
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, (length + 1) // 2 :] = 0
    expected = reference.encoder(x, mask, None, plain, norms, [heads] * 2, 1, 1e-12)
    y = encoder(x, mask, None, packed, norms, [heads] * 2, 1, 1e-12)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=2e-5)
    states = encoder(x, mask, None, packed, norms, [heads] * 2, 1, 1e-12, False, True)
    assert torch.equal(states[1], y)


def test_int8_against_the_simulation():
    packed, plain, norms = stack(2, 64, 128, "int8")
    x = inputs(2, 40, 64)
    expected = reference.encoder(x, None, None, plain, norms, [4, 4], 1, 1e-12)
    y = encoder(x, None, None, packed, norms, [4, 4], 1, 1e-12)
    assert reference.sqnr(expected, y) > 40


def every_padding(length):
    """A row without padding, then trailing, left, holes, all of these, no token but one, and no token."""
    mask = torch.ones(8, length, dtype=torch.long)
    mask[1, length // 2 :] = 0
    mask[2, : length // 3] = 0
    mask[3, 2:-1:3] = 0
    mask[4, : length // 4] = mask[4, length // 2] = mask[4, -length // 4 :] = 0
    mask[5, :-1] = 0
    mask[6, 1:] = 0
    mask[7] = 0
    return mask


@pytest.mark.parametrize("keep_padding", (False, True))
@pytest.mark.parametrize("empty_attends", (False, True))
@pytest.mark.parametrize("biased", (None, 1, 8))
def test_every_padding(keep_padding, empty_attends, biased):
    packed, plain, norms = stack(2, 52, 60, "fp32")
    x, mask = inputs(8, 41, 52), every_padding(41)
    bias = None if biased is None else torch.randn(biased, 2, 41, 41, generator=torch.Generator().manual_seed(6))
    flags = (keep_padding, True, empty_attends)
    expected = reference.encoder(x, mask, bias, plain, norms, [2, 2], 2, 1e-5, *flags)
    y = encoder(x, mask, bias, packed, norms, [2, 2], 2, 1e-5, *flags)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=5e-5)
    assert torch.equal(encoder(x, mask, bias, packed, norms, [2, 2], 2, 1e-5, keep_padding, False, empty_attends), y[1])


def head_mask(rows, heads, seed=7):
    """Fractions, a head of zeros in each layer, and some of ones."""
    made = torch.rand(rows, sum(heads), generator=torch.Generator().manual_seed(seed)) * 1.5
    made[:, 1], made[:, heads[0]], made[:, -1] = 0, 0, 1
    made[-1, 0] = 0
    return made


@pytest.mark.parametrize("rows", (1, 8))
@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("biased", (False, True))
def test_head_masks_against_float64(rows, threads, biased):
    """Layers have heads of their own; with 64 wide heads and two threads, heads are tasks."""
    heads = [2, 2] if biased else [2, 4]
    packed, plain, norms = stack(2, 128, 60, "fp32")
    bias = torch.randn(1, 2, 41, 41, generator=torch.Generator().manual_seed(6)) if biased else None
    factors = head_mask(rows, heads)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for batch in (8, 1):
            x, mask = inputs(8, 41, 128)[:batch], every_padding(41)[:batch]
            options = (norms, heads, 1, 1e-5, False, True, False, False, factors[:batch])
            expected = reference.encoder(x, mask, bias, plain, *options)
            torch.testing.assert_close(
                encoder(x, mask, bias, packed, *options).double(), expected, rtol=1e-5, atol=5e-5
            )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ("int8", "fp32"))
def test_masked_heads_are_skipped(kind):
    """What a masked head would compute is not looked at, be it NaN; ones change no bit."""
    packed, _, norms = stack(2, 64, 96, kind)
    x, mask = inputs(8, 41, 64), every_padding(41)
    options = (norms, [4, 4], 1, 1e-12, False, True, False, False)
    clean = encoder(x, mask, None, packed, *options, head_mask(8, [4, 4]))
    assert torch.equal(
        encoder(x, mask, None, packed, *options, torch.ones(1, 8)), encoder(x, mask, None, packed, *options)
    )
    poisoned = list(packed)
    for i in range(3):  # head 1 of layer 0, which is masked in every sequence
        weight, scale, bias = ops.unpack_linear(packed[i])
        bias = bias.clone()
        bias[16:32] = float("nan")
        poisoned[i] = ops.pack_qlinear(weight, scale, bias) if kind == "int8" else ops.pack_linear(weight, bias)
    assert torch.equal(encoder(x, mask, None, poisoned, *options, head_mask(8, [4, 4])), clean)
    some = head_mask(8, [4, 4])
    some[3, 1] = 0.5
    mixed = encoder(x, mask, None, poisoned, *options, some)
    others = torch.arange(8) != 3
    assert torch.equal(mixed[:, others], clean[:, others]) and mixed[:, 3, :2].isnan().all()


@pytest.mark.parametrize("kind", ("int8", "fp32"))
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("length", (1, 9, 150))
def test_packed_output_has_the_bits_of_the_padded(kind, masked, length):
    packed, _, norms = stack(2, 64, 96, kind)
    x, mask = inputs(8, length, 64), every_padding(length)
    factors = head_mask(8, [4, 4]) if masked else None
    for empty_attends in (False, True):
        for states in (False, True):
            options = (packed, norms, [4, 4], 1, 1e-12, False, states, empty_attends, False, factors)
            for given in (mask, mask[:, :0], None, torch.zeros_like(mask), mask.bool()):
                part = x if given is None else x[:, : given.shape[1]]
                expected = encoder(part, given, None, *options)
                expected = expected.flatten(-3, -2) if given is None else expected[..., given != 0, :]
                got = encoder(part, given, None, *options, True)
                assert got.shape == expected.shape and torch.equal(got, expected)
    bias = torch.randn(1, 4, length, length, generator=torch.Generator().manual_seed(6))
    options = (packed, norms, [4, 4], 1, 1e-12)
    expected = encoder(x, mask, bias, *options)[mask != 0]
    assert torch.equal(encoder(x, mask, bias, *options, packed=True), expected)
    for dtype in (torch.bfloat16, torch.float16):
        expected = encoder(x.to(dtype), mask, None, *options)[mask != 0]
        got = encoder(x.to(dtype), mask, None, *options, packed=True)
        assert got.dtype == dtype and torch.equal(got, expected)


@pytest.mark.parametrize("kind", ("int8", "fp32"))
def test_padding_reaches_no_token_and_no_other_sequence(kind):
    packed, _, norms = stack(2, 64, 96, kind)
    x, mask = inputs(8, 41, 64), every_padding(41)
    poisoned = x.masked_fill(mask[..., None] == 0, float("nan"))
    for empty_attends in (False, True):
        options = (packed, norms, [4, 4], 1, 1e-12, False, False, empty_attends)
        clean, dirty = encoder(x, mask, None, *options), encoder(poisoned, mask, None, *options)
        assert torch.equal(clean[mask != 0], dirty[mask != 0])
        for row in range(8):
            assert torch.equal(encoder(x[row : row + 1], mask[row : row + 1], None, *options)[0], clean[row])


@pytest.mark.parametrize("kind", ("int8", "fp32"))
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_nan_and_inf_stay_in_their_sequence(kind, bad):
    packed, _, norms = stack(2, 64, 96, kind)
    x, mask = inputs(8, 41, 64), every_padding(41)
    clean = encoder(x, mask, None, packed, norms, [4, 4], 1, 1e-12)
    x[3, 6, 7] = bad
    dirty = encoder(x, mask, None, packed, norms, [4, 4], 1, 1e-12)
    others = torch.arange(8) != 3
    assert torch.equal(clean[others], dirty[others])
    # Every token of the sequence attends to the one that is not finite.
    assert dirty[3][mask[3] != 0].isnan().all()


@pytest.mark.parametrize("backend", ("aot_eager", "export"))
@pytest.mark.parametrize("empty_attends", (False, True))
def test_traced_calls_give_the_same_bits(backend, empty_attends):
    packed, _, norms = stack(2, 32, 40, "fp32")

    class Encoder(torch.nn.Module):
        def forward(self, x, mask):
            options = (packed, norms, [2, 2], 1, 1e-12, False, True, empty_attends, False)
            states = encoder(x, mask, None, *options, mask[:, :1].float() * torch.tensor([[1, 0, 0.5, 2]]))
            return torch.cat([states.flatten(1, 2), encoder(x, mask, None, *options, None, True)], 1)

    torch._dynamo.reset()
    x, mask = inputs(8, 41, 32), every_padding(41)
    if backend == "export":
        sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=64)}
        traced = torch.export.export(Encoder(), (x, mask), dynamic_shapes=(sizes, sizes)).module()
    else:
        traced = torch.compile(Encoder(), fullgraph=True, dynamic=True, backend=backend)
    for rows, length in ((8, 41), (7, 40), (1, 3)):
        call = (x[-rows:, :length], mask[-rows:, :length])
        assert torch.equal(traced(*call), Encoder()(*call))


@pytest.mark.parametrize("kind", ("int8", "fp32"))
def test_a_sequence_depends_on_nothing_else(kind):
    """Alone or in a batch, padded or not, one thread or two, split by rows or by columns: the same bits."""
    packed, _, norms = stack(2, 64, 96, kind)
    x = inputs(5, 61, 64)
    lengths = (61, 1, 17, 40, 32)
    mask = (torch.arange(61)[None] < torch.tensor(lengths)[:, None]).long()
    poisoned = torch.where(mask[..., None] != 0, x, torch.full_like(x, float("nan")))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            batch = encoder(poisoned, mask, None, packed, norms, [4, 4], 1, 1e-12)
            for i, length in enumerate(lengths):
                alone = encoder(x[i : i + 1, :length], None, None, packed, norms, [4, 4], 1, 1e-12)
                assert torch.equal(batch[i, :length], alone[0])
                assert (batch[i, length:] == 0).all()
            results.append(batch)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


MASK_DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)


@pytest.mark.parametrize("dtype", MASK_DTYPES)
def test_mask_dtypes(dtype):
    packed, _, norms = stack(1, 32, 40, "fp32")
    x, mask = inputs(8, 9, 32), every_padding(9)
    expected = encoder(x, mask, None, packed, norms, [2], 1, 1e-12)
    assert torch.equal(encoder(x, mask.to(dtype), None, packed, norms, [2], 1, 1e-12), expected)
    strided = torch.stack([mask, 1 - mask], dim=2).to(dtype)[..., 0]
    assert torch.equal(encoder(x, strided, None, packed, norms, [2], 1, 1e-12), expected)
    if dtype.is_floating_point:
        assert torch.equal(encoder(x, mask.to(dtype) * -0.0, None, packed, norms, [2], 1, 1e-12)[7], expected[7])


def test_embed_and_add_layernorm():
    generator = torch.Generator().manual_seed(3)
    for hidden in (1, 15, 48, 312):
        tables = [torch.randn(n, hidden, generator=generator) for n in (50, 20, 2)]
        gamma, beta = torch.randn(2, hidden, generator=generator)
        ids = [torch.randint(0, len(t), (3, 11), generator=generator) for t in tables]
        ones = [torch.ones(1)] * 3
        expected = reference.embed(ids, tables, ones, gamma, beta, 1e-5)
        torch.testing.assert_close(
            ops.embed(ids, tables, ones, gamma, beta, 1e-5).double(), expected, rtol=1e-4, atol=1e-4
        )
        quantized = [quantize_weight(t) for t in tables]
        codes, scales = [w.codes for w in quantized], [w.scale for w in quantized]
        expected = reference.embed(ids, codes, scales, gamma, beta, 1e-5)
        torch.testing.assert_close(
            ops.embed(ids, codes, scales, gamma, beta, 1e-5).double(), expected, rtol=1e-4, atol=1e-4
        )
        x, residual = torch.randn(2, 7, hidden, generator=generator)
        expected = reference.add_layernorm(x, residual, gamma, beta, 1e-5)
        torch.testing.assert_close(
            ops.add_layernorm(x, residual, gamma, beta, 1e-5).double(), expected, rtol=1e-4, atol=1e-4
        )
    with pytest.raises(RuntimeError, match=r"expected ids in \[0, 50\) of table 0. Got 50"):
        ops.embed([torch.tensor([50])], tables[:1], ones[:1], gamma, beta)
    torch.library.opcheck(torch.ops.bertkern.embed.default, (ids, tables, ones, gamma, beta, 1e-5))
    torch.library.opcheck(torch.ops.bertkern.add_layernorm.default, (x, residual, gamma, beta, 1e-5))


def test_bad_input_and_opcheck():
    packed, _, norms = stack(1, 32, 40, "fp32")
    x = inputs(2, 9, 32)
    mask = torch.ones(2, 9)
    for match, arguments in (
        (r"expected x of shape \[B, L, H\]", (x[0], mask, None, packed, norms, [2])),
        (r"expected mask of shape \[B, L\] = \[2, 9\]", (x, mask[:, :8], None, packed, norms, [2])),
        (r"expected 6 packed linears a layer", (x, mask, None, packed[:5], norms, [2])),
        (r"expected norms of shape", (x, mask, None, packed, norms[:, :3], [2])),
        (r"multiple of its 3 heads", (x, mask, None, packed, norms, [3])),
        (r"expected packed weights for k of layer 0", (x, mask, None, [packed[0], x, *packed[2:]], norms, [2])),
        (r"expected ffn1 of layer 0 of shape", (x, mask, None, [*packed[:4], packed[5], packed[5]], norms, [2])),
        (r"expected position_bias", (x, mask, torch.zeros(1, 2, 9, 8), packed, norms, [2])),
    ):
        with pytest.raises(RuntimeError, match=match):
            encoder(*arguments, 1, 1e-12)
    for match, factors in (
        (r"expected head_mask of shape \[1 or B, heads of all layers\] = \[2, 2\]. Got \[2\]", torch.ones(2)),
        (r"expected head_mask of shape .* Got \[2, 3\]", torch.ones(2, 3)),
        (r"expected head_mask of shape .* Got \[3, 2\]", torch.ones(3, 2)),
        (r"expected head_mask of shape .* Got \[0, 2\]", torch.ones(0, 2)),
        (r"expected head_mask of dtype float32. Got int64", torch.ones(2, 2, dtype=torch.int64)),
        (r"expected head_mask to be finite. Got NaN or Inf", torch.tensor([[1, float("nan")]])),
        (r"expected head_mask to be finite. Got NaN or Inf", torch.tensor([[1, -float("inf")]])),
    ):
        with pytest.raises(RuntimeError, match=match):
            encoder(x, mask, None, packed, norms, [2], 1, 1e-12, head_mask=factors)
    assert encoder(x[:0], mask[:0], None, packed, norms, [2], 1, 1e-12).shape == (0, 9, 32)
    options = {"head_mask": torch.tensor([[1, 0.5]]), "packed": True}
    with pytest.raises(RuntimeError, match=r"expected a mask with data, which decides the packed size"):
        encoder(
            *(t.to("meta") for t in (x, mask)),
            None,
            [p.to("meta") for p in packed],
            norms.to("meta"),
            [2],
            1,
            1e-12,
            packed=True,
        )
    for given in ({}, {"head_mask": options["head_mask"]}, options):
        torch.library.opcheck(torch.ops.bertkern.encoder.default, (x, mask, None, packed, norms, [2], 1, 1e-12), given)
    torch.library.opcheck(torch.ops.bertkern.encoder.default, (x, None, None, packed, norms, [2], 1, 1e-12), options)
