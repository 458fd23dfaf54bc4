"""accelerate changes no answer: every family, head, padding and output option against the untouched model."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import bertkern as bk

from .zoo import FAMILIES, MODELS, answer, inputs, make, padded, real, tensors

PADDINGS = ("none", "trailing", "left", "holes", "empty")


def assert_same(expected, got, mask, atol=2e-5):
    assert type(got) is type(expected)
    expected, got = tensors(expected), tensors(got)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(real(name, got[name], mask), real(name, value, mask), atol=atol, rtol=1e-4, msg=name)


def fallbacks(model):
    return bk.report(model).fallbacks


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_answers_of_every_head(name, padding):
    model = make(name)
    batch = padded(model, padding)
    with torch.no_grad():
        expected = answer(model, **batch)
        got = bk.accelerate(model)(**batch)
    assert_same(expected, got, batch["attention_mask"])
    assert not fallbacks(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_four_dimensional_masks_of_other_implementations(family, implementation):
    model = make(family + "Model")
    if family == "MPNet" and implementation == "sdpa":
        pytest.skip("MPNet has no attention interface")
    batch = padded(model, "holes")
    with torch.no_grad():
        expected = model(**batch)
        bk.accelerate(model)
        model.config._attn_implementation_internal = implementation
        got = model(**batch)
    assert_same(expected, got, batch["attention_mask"])
    assert not fallbacks(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["none", "trailing", "left"])
def test_hidden_states_have_the_same_bits(family, padding):
    model = make(family + "Model")
    batch = padded(model, padding)
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True).hidden_states
        bk.accelerate(model)
        bare = model(**batch)
        got = model(**batch, output_hidden_states=True)
    assert len(got.hidden_states) == len(expected) == 4
    mask = batch["attention_mask"].bool()
    for theirs, ours in zip(expected, got.hidden_states, strict=False):
        torch.testing.assert_close(ours[mask], theirs[mask], atol=2e-5, rtol=1e-4)
    assert torch.equal(bare.last_hidden_state, got.last_hidden_state)
    assert torch.equal(got.hidden_states[-1], got.last_hidden_state)
    assert not fallbacks(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_attentions_are_the_real_ones(family):
    model = make(family + "Model")
    batch = padded(model, "trailing")
    with torch.no_grad():
        if family != "MPNet":
            model.set_attn_implementation("eager")
        expected = model(**batch, output_attentions=True)
        got = bk.accelerate(model)(**batch, output_attentions=True)
    assert len(got.attentions) == 3
    for theirs, ours in zip(expected.attentions, got.attentions, strict=False):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert_same(expected, got, batch["attention_mask"])
    if family != "MPNet":
        assert any("output_attentions" in reason for reason in fallbacks(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_given_embeddings_positions_and_a_two_sided_mask(family):
    model = make(family + "Model")
    batch = inputs(model)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(batch["input_ids"])
        mask = torch.ones(3, 1, 11, 11, dtype=torch.bool).tril()
        if family == "MPNet":
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        positions = torch.arange(11)[None] + 3
        calls = [
            {"inputs_embeds": embeds},
            {"input_ids": batch["input_ids"], "attention_mask": mask},
            {"input_ids": batch["input_ids"], "position_ids": positions},
            {"input_ids": batch["input_ids"], "position_ids": positions.expand(3, -1).clone()},
        ]
        expected = [answer(model, **call) for call in calls]
        bk.accelerate(model)
        for want, call in zip(expected, calls, strict=False):
            assert_same(want, model(**call), batch["attention_mask"])
    assert any("query to query" in reason for reason in fallbacks(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_eval_and_training_mode(family):
    model = make(family + "Model")
    twin = copy.deepcopy(model)
    bk.accelerate(model)
    batch = padded(model, "trailing")
    weights = torch.randn(3, 11, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    weights = weights * batch["attention_mask"][..., None]
    for training in (False, True):
        for module in (model, twin):
            module.zero_grad()
            module.train(training)
            for dropout in module.modules():
                if isinstance(dropout, nn.Dropout):
                    dropout.p = 0.0
            out = module(**batch)
            (out.last_hidden_state * weights).sum().backward()
        assert out.last_hidden_state.requires_grad
        for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=False):
            if theirs.grad is None:
                assert ours.grad is None or not ours.grad.any(), name
            else:
                scale = theirs.grad.abs().max().item()
                torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4 * scale + 1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_gives_back_the_very_model(family):
    model = make(family + "ForMaskedLM")
    classes = {name: type(module) for name, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    implementation = model.config._attn_implementation
    keys = list(model.state_dict())
    batch = inputs(model)
    with torch.no_grad():
        expected = model(**batch).logits
        bk.accelerate(model)
        assert list(model.state_dict()) == keys
        assert all(isinstance(module, classes[name]) for name, module in model.named_modules())
        bk.restore(model)
        assert torch.equal(model(**batch).logits, expected)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all(parameters[name] is value for name, value in model.named_parameters())
    assert model.config._attn_implementation == implementation
    assert not any("bertkern" in key or key == "_stack" for module in model.modules() for key in vars(module))


def test_packed_copies_follow_every_change():
    model, other = make("BertModel"), make("BertModel", initializer_range=0.1)
    batch = inputs(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
        expected = other(**batch).last_hidden_state
        bk.accelerate(model)
        model(**batch)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(**batch).last_hidden_state, expected, atol=2e-5, rtol=1e-4)

        layer = model.encoder.layer[1]
        for holder in (layer.attention.self.query, layer.output.LayerNorm):
            before = model(**batch).last_hidden_state
            holder.weight.mul_(1.5)
            changed = model(**batch).last_hidden_state
            assert not torch.allclose(before, changed, atol=1e-3)
            holder.weight = nn.Parameter(holder.weight / 1.5)
            torch.testing.assert_close(model(**batch).last_hidden_state, before, atol=2e-5, rtol=1e-4)

        layer.output.dense = nn.Linear(117, 52)
        swapped = model(**batch).last_hidden_state
        assert not torch.allclose(swapped, before, atol=1e-3)
        plain = bk.restore(copy.deepcopy(model))(**batch).last_hidden_state
        torch.testing.assert_close(swapped, plain, atol=2e-5, rtol=1e-4)


def test_surgery_after_the_swap():
    model = make("BertModel")
    batch = inputs(model)

    def check(full=True):
        with torch.no_grad():
            got = model(**batch).last_hidden_state
            plain = bk.restore(copy.deepcopy(model))(**batch).last_hidden_state
        torch.testing.assert_close(got, plain, atol=2e-5, rtol=1e-4)
        assert bool(fallbacks(model)) is not full

    bk.accelerate(model)
    check()
    model.encoder.layer = model.encoder.layer[:2]
    check()
    del model.encoder.layer[0]
    check()
    model.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()
    check()
    model.encoder.layer[0].attention.output.LayerNorm = nn.LayerNorm(52, eps=1e-12)
    check()
    model.encoder.layer[0].intermediate.intermediate_act_fn = nn.Mish()
    check(full=False)
    del model.encoder.layer[0].intermediate.intermediate_act_fn
    model.encoder.layer[0].intermediate.intermediate_act_fn = torch.tanh
    check(full=False)


def test_adapters_and_parametrizations_after_the_swap():
    model = make("BertModel")
    batch = inputs(model)
    bk.accelerate(model)
    query = model.encoder.layer[1].attention.self.query
    with torch.no_grad():
        before = model(**batch).last_hidden_state

    class Twice(nn.Module):
        def forward(self, weight):
            return weight * 2

    parametrize.register_parametrization(query, "weight", Twice())
    with torch.no_grad():
        after = model(**batch).last_hidden_state
        assert not torch.allclose(before, after, atol=1e-3)
        parametrize.remove_parametrizations(query, "weight", leave_parametrized=False)
        torch.testing.assert_close(model(**batch).last_hidden_state, before, atol=2e-5, rtol=1e-4)
        prune.l1_unstructured(query, "weight", 0.5)
        pruned = model(**batch).last_hidden_state
        assert not torch.allclose(before, pruned, atol=1e-3)
        prune.remove(query, "weight")
        torch.testing.assert_close(model(**batch).last_hidden_state, pruned, atol=2e-5, rtol=1e-4)


def test_a_foreign_hook_makes_its_part_fall_back():
    model = make("BertModel")
    batch = inputs(model)
    with torch.no_grad():
        bk.accelerate(model)
        expected = model(**batch).last_hidden_state
        seen = []
        handle = model.encoder.layer[1].output.dense.register_forward_hook(lambda *call: seen.append(call[2].shape))
        torch.testing.assert_close(model(**batch).last_hidden_state, expected, atol=2e-5, rtol=1e-4)
        assert seen == [(3, 11, 52)]
        assert fallbacks(model) == {
            "encoder: hooks on inner modules": 1,
            "encoder.layer.1: hooks on inner modules": 1,
        }
        handle.remove()
        assert torch.equal(model(**batch).last_hidden_state, expected)
        doubled = model.encoder.layer[0].register_forward_hook(lambda module, args, output: output * 2)
        assert not torch.allclose(model(**batch).last_hidden_state, expected, atol=1e-3)
        doubled.remove()


def test_decoders_and_unknown_activations_stay_as_they_were():
    model = make("BertModel", hidden_act="mish")
    batch = inputs(model)
    with torch.no_grad():
        expected = model(**batch)
        assert_same(expected, bk.accelerate(model)(**batch), batch["attention_mask"])
    reasons = {row["name"]: row["why"] for row in bk.report(model).to_dict()["rows"] if row["why"]}
    assert reasons["encoder"] == "its layers stay as they were"
    assert reasons["encoder.layer.2"] == "no kernel for the activation MishActivation"

    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 52, "num_attention_heads": 2, "intermediate_size": 117}
    config = transformers.BertConfig(**sizes, num_hidden_layers=2, is_decoder=True, add_cross_attention=True)
    decoder = transformers.BertLMHeadModel(config).eval()
    memory = torch.randn(3, 7, 52)
    with torch.no_grad():
        expected = decoder(**batch, encoder_hidden_states=memory, encoder_attention_mask=torch.ones(3, 7))
        got = bk.accelerate(decoder)(**batch, encoder_hidden_states=memory, encoder_attention_mask=torch.ones(3, 7))
    assert_same(expected, got, batch["attention_mask"])
    assert decoder.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "tanh", "silu", "swish"])
def test_activations(activation):
    model = make("BertModel", hidden_act=activation)
    batch = inputs(model)
    with torch.no_grad():
        expected = model(**batch)
        assert_same(expected, bk.accelerate(model)(**batch), batch["attention_mask"])
    assert not fallbacks(model)


def test_keep_padding():
    model = make("BertModel")
    batch = padded(model, "trailing")
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        got = bk.accelerate(model, keep_padding=True)(**batch).last_hidden_state
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies(family):
    model = make(family + "ForSequenceClassification")
    batch = padded(model, "trailing")
    with torch.no_grad():
        expected = bk.accelerate(model)(**batch).logits
        assert torch.equal(copy.deepcopy(model)(**batch).logits, expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(**batch).logits, expected)


def test_bf16_and_fp16_models_keep_their_dtype():
    for dtype, atol in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        model = make("BertModel").to(dtype)
        batch = inputs(model)
        with torch.no_grad():
            expected = model(**batch).last_hidden_state
            got = bk.accelerate(model)(**batch).last_hidden_state
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), expected.float(), atol=atol, rtol=0.05)


def test_casts_after_the_swap():
    model = make("BertModel")
    batch = inputs(model)
    with torch.no_grad():
        bk.accelerate(model)
        assert model.bfloat16()(**batch).last_hidden_state.dtype == torch.bfloat16
        assert model.double()(**batch).last_hidden_state.dtype == torch.float64
        assert model.float()(**batch).last_hidden_state.dtype == torch.float32
