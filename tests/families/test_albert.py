"""ALBERT: one set of packed weights however often its layers run, and a run of all of them is one operator call."""

import copy

import pytest
import torch
import transformers
from torch import nn

import bertkern as bk

from .test_accelerate import assert_same
from .test_gradients import assert_gradients, loss, optimizers
from .test_int8 import simulate, sqnr
from .zoo import inputs, make, padded

# Groups, layers in each, and runs of a group.
SHAPES = ((1, 1, 12), (1, 2, 3), (2, 2, 4), (3, 1, 5), (3, 2, 3))


def shaped(groups, inner, runs, head="Model", **options):
    return make(f"Albert{head}", num_hidden_groups=groups, inner_group_num=inner, num_hidden_layers=runs, **options)


def distinct(model):
    return [layer for group in model.base_model.encoder.albert_layer_groups for layer in group.albert_layers]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("swap", [bk.accelerate, bk.quantize_])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_are_held_once(shape, swap, dtype, tmp_path):
    groups, inner, runs = shape
    model = swap(shaped(*shape).to(dtype))
    model.save_pretrained(tmp_path)
    models = [model, copy.deepcopy(model), transformers.AutoModel.from_pretrained(tmp_path)]
    for each in models if swap is bk.quantize_ else models[:2]:
        with torch.no_grad():
            each(**inputs(each))
        packed = each.encoder._stack.linears
        assert len(packed) == 6 * inner * runs
        assert (
            len({id(tensor) for tensor in packed})
            == len({tensor.data_ptr() for tensor in packed})
            == 6 * groups * inner
        )
        # The very copies that single layers run by.
        assert {id(t) for layer in distinct(each) for t in layer._stack.linears} == {id(t) for t in packed}
        assert not bk.report(each).fallbacks


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", ["none", "trailing", "left", "holes", "empty"])
def test_groups_in_their_order(shape, padding):
    model = shaped(*shape, head="ForTokenClassification")
    batch = padded(model, padding)
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)
        got = bk.accelerate(model)(**batch, output_hidden_states=True)
        bare = model(**batch)
    assert_same(expected, got, batch["attention_mask"])
    assert torch.equal(got.logits, bare.logits)
    assert len(got.hidden_states) == len(expected.hidden_states) == shape[1] * shape[2] + 1
    mask = batch["attention_mask"].bool()
    for ours, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours[mask], theirs[mask], atol=3e-5, rtol=1e-4)
    assert not bk.report(model).fallbacks


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_and_int8(shape):
    float_model = shaped(*shape)
    batch = padded(float_model, "trailing")
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = float_model(**batch).last_hidden_state[mask]
        half = bk.accelerate(copy.deepcopy(float_model).bfloat16())
        got = half(**batch).last_hidden_state
        eager = bk.restore(half)(**batch).last_hidden_state
        assert got.dtype == torch.bfloat16
        # No further from fp32 than transformers' own bf16.
        assert sqnr(expected, got[mask]) > sqnr(expected, eager[mask]) - 1
        int8 = bk.quantize_(copy.deepcopy(float_model), exact_attention=True)
        assert sqnr(simulate(int8)(**batch).last_hidden_state[mask], int8(**batch).last_hidden_state[mask]) > 30
        assert not bk.report(int8).fallbacks


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_add_up_over_the_runs(shape):
    model = shaped(*shape)
    twin, batch = copy.deepcopy(model), padded(model, "trailing")
    bk.accelerate(model)
    loss(model(**batch), batch["attention_mask"]).backward()
    loss(twin(**batch), batch["attention_mask"]).backward()
    assert_gradients(model, twin)
    assert not bk.report(model).fallbacks


def test_training_in_eval_mode():
    model = shaped(2, 2, 4, head="ForSequenceClassification")
    twin = copy.deepcopy(model)
    bk.accelerate(model)
    batch = {**padded(model, "trailing"), "labels": torch.tensor([0, 1, 1])}
    for ours, theirs in zip(optimizers(model), optimizers(twin), strict=True):
        for module, optimizer in ((model, ours), (twin, theirs)):
            module.zero_grad()
            module(**batch).loss.backward()
            optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, twin(**batch).logits, atol=1e-3, rtol=1e-3)
    assert not bk.report(model).fallbacks


def test_changes_are_noticed():
    model = shaped(2, 1, 4)
    batch = inputs(model)
    bk.accelerate(model)

    def check(full=True):
        with torch.no_grad():
            got = model(**batch).last_hidden_state
            plain = bk.restore(copy.deepcopy(model))(**batch).last_hidden_state
        torch.testing.assert_close(got, plain, atol=3e-5, rtol=1e-4)
        assert bool(bk.report(model).fallbacks) is not full
        return got

    before = check()
    first, second = distinct(model)
    changes = [
        lambda: first.attention.query.weight.data.copy_(first.attention.query.weight * 1.5),
        lambda: second.full_layer_layer_norm.weight.mul_(1.5),
        lambda: setattr(model.config, "num_hidden_layers", 2),
        lambda: setattr(model.encoder.albert_layer_groups, "0", model.encoder.albert_layer_groups[1]),
        lambda: model.load_state_dict(shaped(2, 1, 4, initializer_range=0.05).state_dict(), strict=False),
    ]
    for change in changes:
        with torch.no_grad():
            change()
        if change is changes[0]:
            model.encoder.stale()  # `data` is invisible
        after = check()
        assert not torch.allclose(before, after, atol=1e-3)
        before = after
    model.encoder.embedding_hidden_mapping_in = nn.Linear(20, 52)
    assert not torch.allclose(before, check(), atol=1e-3)
    second.ffn = nn.Linear(52, 117)
    check(full=False)


def test_hooks():
    model = shaped(1, 1, 3)
    batch = inputs(model)
    with torch.no_grad():
        expected = bk.accelerate(model)(**batch).last_hidden_state
        seen = []
        encoder, layer = model.encoder, distinct(model)[0]
        for module in (encoder.embedding_hidden_mapping_in, encoder):
            handle = module.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
            assert torch.equal(model(**batch).last_hidden_state, expected)
            handle.remove()
        assert seen == ["PackedLinear", "AlbertTransformer"] and not bk.report(model).fallbacks
        for module in (encoder.albert_layer_groups[0], layer, layer.attention.dense):
            seen.clear()
            handle = module.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
            # The linear before the layers still runs once.
            first = encoder.embedding_hidden_mapping_in.register_forward_hook(lambda *_: seen.append("first"))
            torch.testing.assert_close(model(**batch).last_hidden_state, expected, atol=2e-5, rtol=1e-4)
            handle.remove(), first.remove()
            assert seen[0] == "first" and len(seen) == 4 and len(set(seen)) == 2
        assert bk.report(model).fallbacks == {
            "encoder: hooks on inner modules": 3,
            "encoder.albert_layer_groups.0.albert_layers.0: hooks on inner modules": 3,
        }
        assert torch.equal(model(**batch).last_hidden_state, expected)


def test_heads_of_shared_layers():
    """A head that the shared layer loses is gone from every run; the encoder stays one operator."""
    model = shaped(1, 1, 4, num_attention_heads=4)
    batch = padded(model, "trailing")
    bk.prune_heads(model, {0: [1, 3]})
    plain = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(**batch)
        assert_same(expected, bk.accelerate(model)(**batch), batch["attention_mask"])
        assert model.encoder._stack.heads == [2] * 4
        mask = torch.ones(4, 4)
        mask[2, 0] = 0
        with bk.head_mask(model, mask):
            masked = model(**batch)
        with bk.head_mask(plain, mask):
            assert_same(plain(**batch), masked, batch["attention_mask"])
        assert not torch.allclose(masked.last_hidden_state, expected.last_hidden_state, atol=1e-3)
        with pytest.raises(ValueError, match=r"\[layers, heads\] = \[4, 4\]"), bk.head_mask(model, mask[:1]):
            pass


def test_embeddings_of_their_own_width():
    model = make("AlbertModel", embedding_size=7)
    batch = padded(model, "trailing")
    kinds = torch.randint(0, 2, (3, 11), generator=torch.Generator().manual_seed(1))
    calls = [
        {**batch, "token_type_ids": kinds},
        {**batch, "position_ids": torch.arange(11)[None] + 3},
        {"attention_mask": batch["attention_mask"], "inputs_embeds": torch.randn(3, 11, 7)},
        {"input_ids": batch["input_ids"].int(), "attention_mask": batch["attention_mask"]},
    ]
    with torch.no_grad():
        expected = [model(**call) for call in calls]
        bk.accelerate(model)
        for want, call in zip(expected, calls, strict=True):
            assert_same(want, model(**call), batch["attention_mask"])
        assert not bk.report(model).fallbacks
        with pytest.raises(RuntimeError, match=r"expected ids in \[0, 97\)"):
            model(input_ids=batch["input_ids"] + 97)
