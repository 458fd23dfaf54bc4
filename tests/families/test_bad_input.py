"""Wrong calls of a swapped model: what the untouched model answers, or a clear error, and nothing changed."""

import copy

import pytest
import torch

import bertkern as bk

from .zoo import FAMILIES, VOCAB, make, tensors

SWAPS = [bk.accelerate, bk.quantize_]
IDS = torch.randint(5, VOCAB, (3, 11), generator=torch.Generator().manual_seed(0))
ONES = torch.ones_like(IDS)


def same_failure(model, swapped, call):
    """Both models fail; returns the swapped one's error."""
    with torch.no_grad():
        with pytest.raises(Exception) as ours:
            swapped(**call)
        with pytest.raises(Exception):  # noqa: B017  whatever transformers says
            model(**call)
    return ours.value


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("swap", SWAPS)
def test_wrong_ids(family, swap):
    model = make(family + "Model")
    swapped = swap(copy.deepcopy(model))
    with torch.no_grad():
        before = tensors(swapped(input_ids=IDS))
    for wrong, got in ((VOCAB, VOCAB), (-1, -1)):
        ids = torch.where(torch.arange(11) == 4, wrong, IDS)
        error = same_failure(model, swapped, {"input_ids": ids})
        assert f"embed: expected ids in [0, {VOCAB}) of table 0. Got {got}." in str(error)
    for ids in (IDS.float(), IDS.short(), IDS.to(torch.uint8), IDS > 50):
        same_failure(model, swapped, {"input_ids": ids})
    same_failure(model, swapped, {"input_ids": IDS[0]})
    same_failure(model, swapped, {})
    same_failure(model, swapped, {"input_ids": IDS, "position_ids": torch.arange(5)[None]})
    same_failure(model, swapped, {"input_ids": torch.ones(2, 60, dtype=torch.long) * 5})
    same_failure(model, swapped, {"inputs_embeds": torch.zeros(3, 11, 51)})
    same_failure(model, swapped, {"input_ids": IDS, "attention_mask": ONES.to("meta")})
    with torch.no_grad():
        after = tensors(swapped(input_ids=IDS))
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        for ids in (IDS.int(), torch.stack([IDS, IDS], 2)[..., 0]):
            got = tensors(swapped(input_ids=ids))
            assert all(torch.equal(value, got[name]) for name, value in before.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("swap", SWAPS)
def test_sequences_longer_than_the_position_table(family, swap):
    """The error names the table; the longest that fits runs, and RoBERTa's positions do not count padding."""
    model = make(family + "Model")
    swapped = swap(copy.deepcopy(model))
    counts = family in ("Roberta", "XLMRoberta", "MPNet")
    longest = 38 if counts else 40
    ids = torch.randint(5, VOCAB, (2, 60), generator=torch.Generator().manual_seed(0))
    for length in (longest + 1, 60):
        for mask in (None, torch.ones(2, length), (torch.arange(length) < 7).expand(2, length)):
            error = same_failure(model, swapped, {"input_ids": ids[:, :length], "attention_mask": mask})
            expected = "expected ids in [0, 40)" if counts else f"expected ids for {length} tokens. Got 40."
            assert "position_embeddings" in str(error) and expected in str(error)
    with torch.no_grad():
        expected = model(input_ids=ids[:, :longest]).last_hidden_state
        got = swapped(input_ids=ids[:, :longest]).last_hidden_state
        torch.testing.assert_close(got, expected, atol=2e-5 if swap is bk.accelerate else 0.5, rtol=1e-4)
        if counts:
            ids[:, 30:] = 1
            call = {"input_ids": ids, "attention_mask": ids != 1}
            expected, got = (run(**call).last_hidden_state[:, :30] for run in (model, swapped))
            torch.testing.assert_close(got, expected, atol=2e-5 if swap is bk.accelerate else 0.5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "mask",
    [ONES[:, :10], torch.ones(3, 12), ONES[:1], ONES[0], torch.ones(3, 11, 11), ONES * 0.5, -ONES],
    ids=["short", "long", "one row", "one dimension", "three dimensions", "weights", "negative"],
)
def test_odd_masks(family, mask):
    model = make(family + "Model")
    with torch.no_grad():
        try:
            expected = model(input_ids=IDS, attention_mask=mask).last_hidden_state
        except Exception as error:
            pytest.skip(f"the untouched model fails: {error}")
        got = bk.accelerate(model)(input_ids=IDS, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("swap", SWAPS)
def test_an_empty_batch(family, swap):
    model = swap(make(family + "ForTokenClassification"))
    with torch.no_grad():
        assert model(input_ids=IDS[:0], attention_mask=ONES[:0]).logits.shape == (0, 11, 2)
        assert model(input_ids=IDS[:0]).logits.shape == (0, 11, 2)
    assert not bk.report(model).fallbacks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_in_their_row(family, swap, bad):
    model = swap(make(family + "ForSequenceClassification"))
    embeds = torch.randn(4, 9, model.get_input_embeddings().embedding_dim, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        clean = model(inputs_embeds=embeds).logits
        embeds[2, 3, 5] = bad
        dirty = model(inputs_embeds=embeds).logits
    assert torch.equal(clean[[0, 1, 3]], dirty[[0, 1, 3]])
    assert dirty[2].isnan().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_data(family):
    model, source = make(family + "Model"), make(family + "Model")
    with torch.no_grad():
        expected = source(input_ids=IDS).last_hidden_state
        try:
            make(family + "Model").to("meta")(input_ids=IDS.to("meta"))
        except Exception as error:
            pytest.skip(f"the untouched model fails: {error}")
        bk.accelerate(model.to("meta"))
        assert model(input_ids=IDS.to("meta")).last_hidden_state.shape == expected.shape
        model.to_empty(device="cpu").load_state_dict(source.state_dict())
        for ours, theirs in zip(model.buffers(), source.buffers(), strict=True):
            ours.copy_(theirs)
        got = model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_token_types_that_a_family_does_not_have():
    model = make("DistilBertModel")
    with torch.no_grad():
        expected = model(input_ids=IDS, token_type_ids=ONES).last_hidden_state
        got = bk.accelerate(model)(input_ids=IDS, token_type_ids=ONES).last_hidden_state
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    assert not bk.report(model).fallbacks
