"""Head masks inside the encoder operator: what the plain path gives, without computing the heads that are left out."""

import copy

import pytest
import torch
from torch import nn

import bertkern as bk
from bertkern.nn.packing import plain_path
from tests.families import zoo
from tests.transformers4 import BATCH, HEADS, LAYERS, Transformers4, make, rows_of

from .test_head_masks import KEYWORD_FAMILIES, close, random_mask

SWAPS = [bk.accelerate, bk.quantize_]
KINDS = ("heads", "layers", "batch")
# Families whose layers run once.
ONE_RUN = [family for family in zoo.FAMILIES if family != "Albert"]


def masked(model: nn.Module, how: str, call: dict, mask: torch.Tensor, **options):
    """The answer under a mask, given by keyword, by context or, as their product, by both."""
    if how == "keyword":
        return model(**call, **options, head_mask=mask)
    with bk.head_mask(model, mask):
        return model(**call, **options) if how == "context" else model(**call, **options, head_mask=mask)


def plainly(model: nn.Module, how: str, call: dict, mask: torch.Tensor, **options):
    with plain_path():
        return masked(model, how, call, mask, **options)


@pytest.mark.parametrize("how", ["context", "keyword", "both"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", ["trailing", "left", "holes", "empty"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_as_the_plain_path(family, padding, kind, how):
    if how != "context" and family not in KEYWORD_FAMILIES:
        pytest.skip("its keywords do not reach the encoder")
    model = bk.accelerate(make(f"{family}Model"))
    call, mask = zoo.padded(model, padding), random_mask(model, kind)
    with torch.no_grad():
        expected = plainly(model, how, call, mask, output_hidden_states=True)
        assert not bk.report(model).fallbacks
        got = masked(model, how, call, mask, output_hidden_states=True)
        last = masked(model, how, call, mask)
    assert not bk.report(model).fallbacks
    assert torch.equal(got.last_hidden_state, last.last_hidden_state)
    assert len(got.hidden_states) == len(expected.hidden_states) == rows_of(model) + 1
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        # A row without tokens counts whole.
        real = call["attention_mask"].bool() | ~call["attention_mask"].bool().any(1, keepdim=True)
        torch.testing.assert_close(a[real], b[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["context", "keyword"])
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("form", ["heads", "batch"])
def test_ones_change_no_bit(form, swap, how):
    model = swap(make("BertModel"))
    call = zoo.padded(model, "trailing")
    mask = torch.ones(HEADS) if form == "heads" else torch.ones(LAYERS, BATCH, HEADS, dtype=torch.bool)
    expected = model(**call).last_hidden_state
    with torch.no_grad():
        assert torch.equal(masked(model, how, call, mask).last_hidden_state, expected)
    # With a gradient, ones are factors like all others.
    graded = torch.ones(LAYERS, HEADS, requires_grad=True)
    assert torch.equal(masked(model, how, call, graded).last_hidden_state, expected)
    assert not bk.report(model).fallbacks


@pytest.mark.parametrize("how", ["context", "keyword"])
@pytest.mark.parametrize("exact_attention", [False, True])
def test_int8_heads_are_what_the_output_projection_quantizes(how, exact_attention):
    """A factor 0 or 0.5 has the bits of values that are 0 or half as large."""
    model = make("BertForSequenceClassification")
    call = zoo.padded(model, "trailing")
    factors = torch.tensor([[0, 1, 0.5, 1], [1, 1, 1, 1], [2, 0, 0, 0.25]])
    bk.quantize_(model, bk.Int8Config(keep_original=True), exact_attention=exact_attention)
    twin = copy.deepcopy(model)
    for row, layer in zip(factors, twin.bert.encoder.layer, strict=True):
        value = layer.attention.self.value
        with torch.no_grad():
            value.weight_scale.mul_(row.repeat_interleave(13))
            value.bias.mul_(row.repeat_interleave(13))
    with torch.no_grad():
        expected = twin(**call).logits
        assert (model(**call).logits - expected).abs().max() > 1e-3
        assert torch.equal(masked(model, how, call, factors).logits, expected)
    assert not bk.report(model).fallbacks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["context", "keyword"])
def test_masked_heads_are_not_computed(how, dtype):
    """NaN in their weights reaches nobody whose mask has a 0 there."""
    model = make("BertModel").to(dtype)
    call, mask = zoo.padded(model, "holes"), torch.ones(LAYERS, BATCH, HEADS)
    mask[1, :, 2] = 0
    with torch.no_grad():
        expected = masked(bk.accelerate(copy.deepcopy(model)), how, call, mask).last_hidden_state
        attention = model.encoder.layer[1].attention.self
        for projection in (attention.query, attention.key, attention.value):
            projection.weight[26:39] = torch.nan
        bk.accelerate(model)
        assert torch.equal(masked(model, how, call, mask).last_hidden_state, expected)
        mask[1, 2, 2] = 0.5
        got = masked(model, how, call, mask).last_hidden_state
        assert torch.equal(got[:2], expected[:2]) and got[2].isnan().any()


def test_bfloat16_errs_no_more_with_a_mask():
    model = make("BertModel")
    call, mask = zoo.padded(model, "trailing"), random_mask(model, "batch")
    real, ones = call["attention_mask"].bool(), torch.ones(HEADS)
    expected = [Transformers4(model, m)(**call).last_hidden_state[real] for m in (ones, mask)]
    bk.accelerate(model.bfloat16())
    with torch.no_grad():
        got = [model(**call, head_mask=m).last_hidden_state[real] for m in (ones, mask)]
    plain, masked = ((a.double() - b).abs().max() for a, b in zip(got, expected, strict=True))
    assert masked < 2 * plain < (expected[0] - expected[1]).abs().max()
    assert not bk.report(model).fallbacks


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("swap", SWAPS)
def test_a_sequence_depends_on_nothing_else(swap, threads):
    """Alone or in a batch that is long enough to be split by rows: the same bits, with its own factors."""
    model = swap(zoo.make("BertModel", num_attention_heads=4, max_position_embeddings=200))
    call, mask = zoo.inputs(model, 3, 150), random_mask(model, "batch")
    call["attention_mask"][0, 7:] = 0
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.no_grad():
            together = model(**call, head_mask=mask).last_hidden_state
            for row, length in enumerate((7, 150, 150)):
                part = {name: value[row : row + 1, :length] for name, value in call.items()}
                alone = model(**part, head_mask=mask[:, row : row + 1]).last_hidden_state
                assert torch.equal(alone[0], together[row, :length])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("how", ["context", "keyword"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_as_the_plain_path(kind, how):
    """Of mask, weights and inputs, in float."""
    model = bk.accelerate(make("BertModel"))
    mask_of_tokens = zoo.padded(model, "holes")["attention_mask"]
    embeds = torch.randn(BATCH, 11, 52, generator=torch.Generator().manual_seed(2)).requires_grad_()
    call = {"inputs_embeds": embeds, "attention_mask": mask_of_tokens}
    mask = random_mask(model, kind).requires_grad_()
    weights = [parameter for name, parameter in model.named_parameters() if "encoder" in name]
    found = []
    for run in (masked, plainly):
        states = run(model, how, call, mask, output_hidden_states=True).hidden_states
        loss = sum(state[mask_of_tokens.bool()].square().sum() for state in states[1:])
        found.append(torch.autograd.grad(loss, [mask, embeds, *weights]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()) + 1e-6)
    assert found[0][0].abs().min() > 0 and not bk.report(model).fallbacks


@pytest.mark.parametrize("how", ["context", "keyword"])
def test_int8_gradients_of_the_mask(how):
    model = make("BertForSequenceClassification")
    call, mask = zoo.padded(model, "trailing"), random_mask(model, "batch").requires_grad_()
    (expected,) = torch.autograd.grad(Transformers4(model, mask)(**call).logits.square().sum(), mask)
    bk.quantize_(model)
    (got,) = torch.autograd.grad(masked(model, how, call, mask).logits.square().sum(), mask)
    assert torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), 0) > 0.99
    assert not bk.report(model).fallbacks


def test_gradients_of_the_mask_alone_leave_the_packed_weights():
    model = bk.accelerate(make("BertForSequenceClassification")).requires_grad_(False)
    call, mask = zoo.inputs(model), random_mask(model, "layers").requires_grad_()
    model(**call, head_mask=mask).logits.sum().backward()
    layers = [module for module in model.modules() if hasattr(module, "packed")]
    packed = [layer.packed() for layer in layers]
    mask.grad = None
    model(**call, head_mask=mask).logits.sum().backward()
    assert mask.grad.abs().min() > 0
    assert all(layer.packed() is copy for layer, copy in zip(layers, packed, strict=True))


@pytest.mark.parametrize(
    "family, swap, backend",
    [
        ("Bert", bk.accelerate, "inductor"),
        ("Bert", bk.quantize_, "aot_eager"),
        ("DistilBert", bk.accelerate, "aot_eager"),
        ("DistilBert", bk.quantize_, "eager"),
    ],
)
def test_compiled_keyword(family, swap, backend):
    torch._dynamo.reset()
    # With parameters that are to change, a backward pass has the next compiled call take the plain path.
    model = swap(make(f"{family}ForSequenceClassification")).requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for kind in KINDS:
        call, mask = zoo.padded(model, "trailing"), random_mask(model, kind).requires_grad_()
        with torch.no_grad():
            expected = model(**call, head_mask=mask).logits
            assert torch.equal(compiled(**call, head_mask=mask).logits, expected)
        (gradient,) = torch.autograd.grad(model(**call, head_mask=mask).logits.sum(), mask)
        got = compiled(**call, head_mask=mask).logits
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), mask)[0], gradient, rtol=1e-4, atol=1e-6)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"encoder: expected head_mask to be finite"):
        compiled(**call, head_mask=mask.detach() * torch.nan)


@pytest.mark.parametrize("swap", SWAPS)
def test_export_takes_the_mask(swap):
    model = swap(make("BertModel"))

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, head_mask):
            return self.model(input_ids, attention_mask, head_mask=head_mask).last_hidden_state

    call = {**zoo.padded(model, "trailing"), "head_mask": random_mask(model, "layers")}
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=32)}
    shapes = {"input_ids": sizes, "attention_mask": sizes, "head_mask": None}
    with torch.no_grad():
        program = torch.export.export(Masked(), (), call, dynamic_shapes=shapes)
        assert str(program.graph).count("bertkern.encoder") == 1
        other = {**zoo.inputs(model, 2, 7), "head_mask": random_mask(model, "layers", 1)}
        assert torch.equal(program.module()(**other), model(**other).last_hidden_state)


@pytest.mark.parametrize("how", ["context", "keyword"])
@pytest.mark.parametrize("state", ["plain", "accelerated", "int8"])
@pytest.mark.parametrize("family", ONE_RUN)
def test_layers_without_heads(family, state, how):
    """One head of zeros stands in there, but has no number, and no factor does anything."""
    if how == "keyword" and (family not in KEYWORD_FAMILIES or state == "plain"):
        pytest.skip("its keywords do not reach the encoder")
    whole = make(f"{family}ForSequenceClassification")
    model = bk.prune_heads(copy.deepcopy(whole), {0: [1, 3], 1: range(HEADS)})
    assert bk.kept_heads(model) == [[0, 2], [], [0, 1, 2, 3]]
    call, mask = zoo.padded(whole, "trailing"), random_mask(whole, "batch").requires_grad_()
    left = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])[:, None]
    expected = Transformers4(whole, mask * left)(**call)
    (gradient,) = torch.autograd.grad(expected.logits.sum(), mask)
    if state == "accelerated":
        bk.accelerate(model)
    elif state == "int8":
        bk.quantize_(model)
    assert bk.kept_heads(model) == [[0, 2], [], [0, 1, 2, 3]]
    got = masked(model, how, call, mask)
    (ours,) = torch.autograd.grad(got.logits.sum(), mask)
    assert not ours[1].any() and not ours[0, :, [1, 3]].any()
    if state == "int8":
        assert torch.nn.functional.cosine_similarity(ours.flatten(), gradient.flatten(), 0) > 0.98
        return
    close(got, expected, call)
    torch.testing.assert_close(ours, gradient, rtol=1e-3, atol=1e-5)


def test_layers_without_heads_by_attn_implementation_alone():
    """Attention that finds its row of the mask by itself."""
    whole = make("BertForSequenceClassification")
    model = bk.prune_heads(copy.deepcopy(whole), {1: range(HEADS)})
    call, mask = zoo.padded(whole, "trailing"), random_mask(whole, "layers").requires_grad_()
    expected = Transformers4(whole, mask * torch.tensor([[1], [0], [1]]))(**call)
    for name in ("bertkern", "bertkern_eager"):
        model.set_attn_implementation(name)
        close(model(**call, head_mask=mask), expected, call)


def test_other_hooks_still_take_the_plain_path():
    model = bk.accelerate(make("BertModel"))
    call, mask, seen = zoo.padded(model, "trailing"), random_mask(model, "layers"), []
    handle = model.encoder.layer[1].output.register_forward_hook(lambda *_: seen.append(1))
    with bk.head_mask(model, mask):
        got = model(**call)
    assert seen == [1] and set(bk.report(model).fallbacks) == {"encoder: hooks on inner modules"} | {
        "encoder.layer.1: hooks on inner modules"
    }
    close(got, Transformers4(bk.restore(model), mask)(**call), call)
    handle.remove()
