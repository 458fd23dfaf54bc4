"""The shapes of TinyBERT: 312 wide with 12 heads of 26 and 1200 units in 4 layers, and BERT's widths in 6 layers."""

import copy

import pytest
import torch

import bertkern as bk

from .test_accelerate import assert_same
from .test_int8 import simulate, sqnr
from .test_padding import computed
from .zoo import VOCAB, inputs, make

SHAPES = {
    "4x312": {"hidden_size": 312, "num_attention_heads": 12, "intermediate_size": 1200, "num_hidden_layers": 4},
    "6x768": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 6},
}


def tinybert(shape, head="Model"):
    # The zoo's weights are four times those of a fresh model, for small widths.
    return make(f"Bert{head}", **SHAPES[shape], max_position_embeddings=64, initializer_range=0.006)


def ragged_batch(lengths, length):
    mask = (torch.arange(length)[None] < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, VOCAB, mask.shape, generator=torch.Generator().manual_seed(2))
    return {"input_ids": torch.where(mask == 0, 1, ids), "attention_mask": mask}


BATCHES = [((1,), 1), ((7,), 7), ((33,), 33), ((33, 7, 1), 33), ((40, 64, 13), 64)]
CASES = [("4x312", *batch) for batch in BATCHES] + [("6x768", *batch) for batch in (BATCHES[1], BATCHES[3])]


@pytest.mark.parametrize("shape,lengths,length", CASES)
def test_fp32(shape, lengths, length):
    model, batch = tinybert(shape), ragged_batch(lengths, length)
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)
        got = bk.accelerate(model)(**batch, output_hidden_states=True)
        assert_same(expected, got, batch["attention_mask"], atol=5e-5)
        mask = computed(batch["attention_mask"])
        for ours, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(ours[mask], theirs[mask], atol=5e-5, rtol=1e-4)
        for row, real in enumerate(lengths):
            alone = model(input_ids=batch["input_ids"][row : row + 1, :real]).last_hidden_state
            assert torch.equal(got.last_hidden_state[row, :real], alone[0])
    assert not bk.report(model).fallbacks
    assert next(row.runs for row in bk.report(model).rows if row.name == "encoder") == "one operator"


@pytest.mark.parametrize("shape,lengths,length", CASES)
def test_bf16(shape, lengths, length):
    model, batch = tinybert(shape), ragged_batch(lengths, length)
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch).last_hidden_state[mask]
        model.bfloat16()
        eager = model(**batch).last_hidden_state[mask]
        for exact in (True, False):
            got = bk.accelerate(model, exact_attention=exact)(**batch).last_hidden_state[mask]
            assert got.dtype == torch.bfloat16
            # Hidden states stay fp32 between the layers, so it is nearer to fp32 than transformers' own bf16.
            assert sqnr(expected, got) > sqnr(expected, eager)
            assert not bk.report(model).fallbacks
            bk.restore(model)


@pytest.mark.parametrize("shape,lengths,length", CASES)
def test_int8(shape, lengths, length):
    model, batch = tinybert(shape, "ForSequenceClassification"), ragged_batch(lengths, length)
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model.bert(**batch).last_hidden_state[mask]
        bk.quantize_(model, exact_attention=True)
        got = model.bert(**batch).last_hidden_state[mask]
        assert sqnr(simulate(model).bert(**batch).last_hidden_state[mask], got) > 30
        assert sqnr(expected, got) > 25
        logits = model(**batch).logits
        for row, real in enumerate(lengths):
            assert torch.equal(logits[row], model(input_ids=batch["input_ids"][row : row + 1, :real]).logits[0])
    assert not bk.report(model).fallbacks
    assert {row.runs for row in bk.report(model).rows} == {"its parts, one by one", "one operator", "int8"}


@pytest.mark.parametrize("swap", [bk.accelerate, bk.quantize_])
def test_heads_of_26_are_pruned_one_by_one(swap):
    model = tinybert("4x312")
    batch = ragged_batch((33, 7, 1), 33)
    gone = {0: [0], 1: [1, 2, 4, 5, 6, 7, 8, 9, 10, 11], 2: range(12), 3: [11, 3]}
    whole = copy.deepcopy(model)
    with torch.no_grad():
        for layer, heads in gone.items():
            for head in heads:
                whole.encoder.layer[layer].attention.output.dense.weight[:, 26 * head : 26 * head + 26] = 0
        expected = whole(**batch)
        bk.prune_heads(model, gone)
        assert [len(heads) for heads in bk.kept_heads(model)][:2] == [11, 2]
        widths = [layer.attention.self.query.out_features for layer in model.encoder.layer]
        assert widths == [11 * 26, 2 * 26, 26, 10 * 26]
        swap(model, exact_attention=True)
        got = model(**batch)
        mask = batch["attention_mask"].bool()
        if swap is bk.accelerate:
            assert_same(expected, got, batch["attention_mask"], atol=5e-5)
        else:
            assert sqnr(expected.last_hidden_state[mask], got.last_hidden_state[mask]) > 25
    assert not bk.report(model).fallbacks


def test_head_masks_at_26():
    model = tinybert("4x312", "ForSequenceClassification")
    batch = ragged_batch((33, 7, 1), 33)
    mask = (torch.rand(4, 12, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    pruned = bk.prune_heads(
        copy.deepcopy(model), {layer: (row == 0).nonzero().flatten().tolist() for layer, row in enumerate(mask)}
    )
    with torch.no_grad():
        expected = pruned(**batch).logits
        bk.accelerate(model)
        with bk.head_mask(model, mask):
            torch.testing.assert_close(model(**batch).logits, expected, atol=5e-5, rtol=1e-4)
        torch.testing.assert_close(model(**batch, head_mask=mask).logits, expected, atol=5e-5, rtol=1e-4)


def test_other_heads_of_the_model():
    for head in ("ForMaskedLM", "ForQuestionAnswering"):
        model = tinybert("4x312", head)
        batch = inputs(model)
        with torch.no_grad():
            expected = model(**batch)
            assert_same(expected, bk.accelerate(model)(**batch), batch["attention_mask"], atol=5e-5)
        assert not bk.report(model).fallbacks
