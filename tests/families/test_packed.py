"""Packed output: the padded output's real tokens, bit for bit, and what users make of them."""

import pytest
import torch
from torch import nn

import bertkern as bk
from bertkern.nn.packed_output import wish_of
from tests.transformers4 import make as albert

from .test_padding import MASK_DTYPES, batch
from .zoo import FAMILIES, make, tensors

SWAPS = [bk.accelerate, bk.quantize_]
KINDS = ("none", "trailing", "left", "holes", "everything")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_of_the_padded_output(family, swap, kind):
    model, call = swap(make(family + "Model")), batch(kind)
    real = call["attention_mask"].bool()
    with torch.no_grad():
        padded = model(**call).last_hidden_state
        states = bk.encode_packed(model, **call)
        assert torch.equal(states.hidden, padded[real])
        assert states.cu_seqlens.dtype == torch.int32 and states.indices.dtype == torch.int64
        assert states.cu_seqlens.tolist() == [0, *real.sum(1).cumsum(0).tolist()]
        assert states.lengths.tolist() == real.sum(1).tolist() and states.shape == (6, 11)
        assert torch.equal(states.indices, real.flatten().nonzero().flatten())
        assert torch.equal(states.unpack(), padded.masked_fill(~real[..., None], 0))
        assert torch.equal(model(**call).last_hidden_state, padded)
        for row, part in enumerate(states.split()):
            assert torch.equal(part, padded[row][real[row]])
        whole = bk.encode_packed(model, call["input_ids"])
        assert torch.equal(whole.hidden, model(call["input_ids"]).last_hidden_state.flatten(0, 1))
    assert not bk.report(model).fallbacks


@pytest.mark.parametrize("dtype", MASK_DTYPES)
def test_masks_of_any_dtype(dtype):
    model, call = bk.accelerate(make("BertModel")), batch("everything")
    with torch.no_grad():
        expected = bk.encode_packed(model, **call)
        got = bk.encode_packed(model, call["input_ids"], attention_mask=call["attention_mask"].to(dtype))
    for name in ("hidden", "cu_seqlens", "indices"):
        assert torch.equal(getattr(got, name), getattr(expected, name))


@pytest.mark.parametrize("family", ["Bert", "MPNet"])
def test_pooling(family):
    model, call = bk.accelerate(make(family + "Model")), batch("everything")
    mask = call["attention_mask"][..., None]
    with torch.no_grad():
        padded = model(**call).last_hidden_state
        states = bk.encode_packed(model, **call)
        mean = (padded * mask).sum(1) / mask.sum(1).clamp(min=1)
        largest = padded.masked_fill(mask == 0, -torch.inf).max(1).values
        first = padded[torch.arange(6), call["attention_mask"].argmax(1)]
        for got, expected in ((states.mean(), mean), (states.max(), largest), (states.first(), first)):
            torch.testing.assert_close(got[[0, 1, 2, 3, 5]], expected[[0, 1, 2, 3, 5]], atol=1e-6, rtol=1e-5)
            assert got.shape == (6, 52) and not got[4].any()  # the row without tokens
        for row in range(6):
            alone = bk.encode_packed(model, **{name: value[row : row + 1] for name, value in call.items()})
            for pooled in ("mean", "max", "first"):
                assert torch.equal(getattr(alone, pooled)()[0], getattr(states, pooled)()[row])


@pytest.mark.parametrize("swap", SWAPS)
def test_heads_that_work_token_by_token(swap):
    call = batch("everything")
    real = call["attention_mask"].bool()
    with torch.no_grad():
        tagger = swap(make("BertForTokenClassification"))
        states = bk.encode_packed(tagger, **call)
        logits, expected = tagger.classifier(states.hidden), tagger(**call).logits
        assert torch.equal(logits, expected[real])
        assert torch.equal(states.unpack(logits, fill=-100)[real], expected[real])
        assert (states.unpack(logits, fill=-100)[~real] == -100).all()
        assert torch.equal(states.unpack(logits.argmax(-1)), expected.argmax(-1) * real)
        assert [part.shape for part in states.split(logits)] == [(length, 2) for length in real.sum(1).tolist()]
        masked = swap(make("RobertaForMaskedLM"))
        states = bk.encode_packed(masked, **call)
        assert torch.equal(masked.lm_head(states.hidden), masked(**call).logits[real])


def test_gradients():
    model, call = bk.accelerate(make("BertModel", num_hidden_layers=2)), batch("holes")
    call.pop("input_ids")
    real, found = call["attention_mask"].bool(), []
    embeds = torch.randn(6, 11, 52, generator=torch.Generator().manual_seed(2)).requires_grad_()
    weights = torch.randn(int(real.sum()), 52, generator=torch.Generator().manual_seed(3))
    parameters = [embeds, *model.encoder.parameters()]
    for packed in (True, False):
        if packed:
            hidden = bk.encode_packed(model, inputs_embeds=embeds, **call).hidden
        else:
            hidden = model(inputs_embeds=embeds, **call).last_hidden_state[real]
        found.append(torch.autograd.grad((hidden * weights).sum(), parameters))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    states = bk.encode_packed(model, inputs_embeds=embeds, **call)
    for pooled in (states.mean(), states.max(), states.first(), states.unpack()):
        (gradient,) = torch.autograd.grad(pooled.sum(), embeds, retain_graph=True)
        assert gradient.abs().sum() > 0
    assert not bk.report(model).fallbacks


def test_head_masks_hold():
    model, call = bk.accelerate(make("BertModel")), batch("everything")
    mask, real = torch.tensor([[1, 0], [0.5, 1], [0, 1]]), call["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**call, head_mask=mask).last_hidden_state[real]
        assert torch.equal(bk.encode_packed(model, **call, head_mask=mask).hidden, expected)
        with bk.head_mask(model, mask):
            assert torch.equal(bk.encode_packed(model, **call).hidden, expected)


@pytest.mark.parametrize(
    "how", ["untouched", "hooks", "hooks of the pooler", "training", "albert", "compiled", "wrapped"]
)
def test_the_plain_path_gives_the_same(how):
    model = albert("AlbertModel") if how == "albert" else make("BertModel")
    call, seen = batch("everything"), []
    if how not in ("untouched", "albert"):
        bk.accelerate(model)
    if how == "hooks":
        model.encoder.layer[0].output.register_forward_hook(lambda *_: None)
    elif how == "hooks of the pooler":
        model.pooler.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    elif how == "training":
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    elif how == "wrapped":
        model = nn.ModuleDict({"encoder": model, "top": nn.Linear(2, 2)})
    elif how == "compiled":
        model = torch.compile(model, backend="eager")
    real = call["attention_mask"].bool()
    with torch.no_grad():
        padded = (model["encoder"] if how == "wrapped" else model)(**call).last_hidden_state
        seen.clear()
        assert torch.equal(bk.encode_packed(model, **call).hidden, padded[real])
    if how.endswith("pooler"):
        assert torch.equal(seen[0], padded)


def test_wishes_end():
    """After a call, also one that fails, the encoder pads again; a config's wish for states is not heard."""
    model, call = bk.accelerate(make("BertModel", output_hidden_states=True)), batch("trailing")
    with torch.no_grad():
        expected = tensors(model(**call))
        with pytest.raises(RuntimeError, match=r"expected ids in"):
            bk.encode_packed(model, call["input_ids"] + 1000, attention_mask=call["attention_mask"])
        assert wish_of(model.encoder) is None
        states = bk.encode_packed(model, **call)
        assert torch.equal(states.hidden, expected["last_hidden_state"][call["attention_mask"].bool()])
        assert all(torch.equal(value, expected[name]) for name, value in tensors(model(**call)).items())
        assert len(model(**call).hidden_states) == 4


@pytest.mark.parametrize("swap", SWAPS)
def test_batches_of_nothing(swap):
    model, ids = swap(make("BertModel")), batch("none")["input_ids"]
    with torch.no_grad():
        for given, mask in ((ids[:0], torch.ones(0, 11)), (ids, torch.zeros(6, 11)), (ids[:0], None)):
            states = bk.encode_packed(model, given, attention_mask=mask)
            batch_size = len(given)
            assert states.hidden.shape == (0, 52) and states.cu_seqlens.tolist() == [0] * (batch_size + 1)
            assert states.split() == () or all(part.shape == (0, 52) for part in states.split())
            assert states.unpack().shape == (batch_size, 11, 52)
            for pooled in (states.mean(), states.max(), states.first()):
                assert pooled.shape == (batch_size, 52) and not pooled.any()


def test_bad_input():
    model, call = bk.accelerate(make("BertModel")), batch("trailing")
    ids, mask = call["input_ids"], call["attention_mask"]
    for error, match, arguments, others in (
        (TypeError, r"expected a torch.nn.Module. Got str", ("bert", ids), {}),
        (ValueError, r"with one transformers model. Got one with 0", (nn.Linear(2, 2), ids), {}),
        (TypeError, r"expected input_ids or inputs_embeds as a tensor. Got NoneType", (model,), {}),
        (TypeError, r"expected input_ids or inputs_embeds as a tensor. Got list", (model, ids.tolist()), {}),
        (ValueError, r"expected input_ids of shape \[B, L\].* Got \[11\]", (model, ids[0]), {}),
        (ValueError, r"inputs_embeds of shape \[B, L, H\].* Got \[6, 11\]", (model,), {"inputs_embeds": ids.float()}),
        (
            ValueError,
            r"expected attention_mask of shape \[B, L\] = \[6, 11\]. Got \[6, 10\]",
            (model, ids, mask[:, 1:]),
            {},
        ),
        (ValueError, r"Got \[6, 1, 1, 11\]", (model, ids, mask[:, None, None]), {}),
        (ValueError, r"attention_mask of shape .* Got list", (model, ids, mask.tolist()), {}),
        (ValueError, r"expected no output_hidden_states", (model, ids, mask), {"output_hidden_states": True}),
        (ValueError, r"expected no return_dict", (model, ids, mask), {"return_dict": False}),
    ):
        if len(arguments) == 3:
            arguments, others = arguments[:2], {**others, "attention_mask": arguments[2]}
        with pytest.raises(error, match=match):
            bk.encode_packed(*arguments, **others)
    states = bk.encode_packed(model, **call)
    for values, got in ((torch.zeros(3, 2), r"\[3, 2\]"), (torch.tensor(1.0), r"\[\]"), ([1], "list")):
        for use in (states.unpack, states.split):
            with pytest.raises(
                ValueError, match=rf"expected values of shape \[tokens, ...\] = \[\d+, ...\]. Got {got}"
            ):
                use(values)
