"""Whole models call their parts one after another, and take transformers' own way wherever a call asks for more."""

import copy
import inspect
import pickle

import pytest
import torch

import bertkern as bk

from .zoo import inputs, make, padded

MODELS = ("BertModel", "RobertaModel", "XLMRobertaModel", "ElectraModel", "DistilBertModel")
SWAPS = (bk.accelerate, bk.quantize_)


def long_way(model, **call):
    """What transformers' own forward makes of the swapped parts."""
    return type(model).unfused().forward(model, **call)


@pytest.fixture
def direct_calls(monkeypatch):
    """How often a model's parts were called one after another."""
    from bertkern.families._model import FusedModel

    seen, encoded = [], FusedModel.encoded

    def spy(*args):
        y = encoded(*args)
        seen.append(y is not None)
        return y

    monkeypatch.setattr(FusedModel, "encoded", spy)
    return seen


def assert_same(got, expected):
    assert type(got) is type(expected) and list(got.keys()) == list(expected.keys())
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(got[key], value), key
        else:
            assert len(got[key]) == len(value)
            assert all(map(torch.equal, got[key], value)), key


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["none", "trailing", "left", "holes", "empty"])
def test_same_bits_as_the_long_way(name, kind, swap, direct_calls):
    model = swap(make(name))
    call = padded(model, kind)
    with torch.no_grad():
        expected = long_way(model, **call)
        assert not direct_calls
        assert_same(model(**call), expected)
    assert direct_calls == [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.uint8, torch.bool])
def test_masks_of_any_dtype(dtype, direct_calls):
    model = bk.accelerate(make("BertModel"))
    call = padded(model, "holes")
    call["attention_mask"] = call["attention_mask"].to(dtype)
    with torch.no_grad():
        assert_same(model(**call), long_way(model, **call))
    assert direct_calls == [True]


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "ElectraForPreTraining", "RobertaForMaskedLM"])
def test_behind_a_head(name, direct_calls):
    model = bk.accelerate(make(name))
    with torch.no_grad():
        model(**inputs(model))
    assert direct_calls == [True]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "more",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"return_dict": False},
        {"head_mask": torch.tensor([1.0, 0.5])},
    ],
    ids=lambda more: next(iter(more)),
)
def test_more_is_asked_for(name, more, direct_calls):
    model = bk.accelerate(make(name))
    call = inputs(model)
    with torch.no_grad():
        got, expected = model(**call, **more), long_way(model, **call, **more)
    assert not direct_calls
    if isinstance(expected, tuple):
        assert isinstance(got, tuple) and all(map(torch.equal, got, expected))
    else:
        assert_same(got, expected)


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions", "return_dict"])
def test_more_by_the_config(option, direct_calls):
    model = bk.accelerate(make("BertModel", attn_implementation="eager", **{option: option != "return_dict"}))
    call = inputs(model)
    with torch.no_grad():
        got = model(**call)
    assert not direct_calls
    if option == "return_dict":
        assert isinstance(got, tuple)
    else:
        assert len(got[option.removeprefix("output_")]) >= model.config.num_hidden_layers


def test_embeddings_instead_of_ids_and_other_masks(direct_calls):
    model = bk.accelerate(make("BertModel"))
    call = inputs(model)
    ids, length = call["input_ids"], call["input_ids"].shape[1]
    causal = torch.ones(len(ids), 1, length, length, dtype=torch.bool).tril()
    with torch.no_grad():
        embeds = model.embeddings.word_embeddings(ids)
        assert_same(model(inputs_embeds=embeds), long_way(model, inputs_embeds=embeds))
        for mask in (causal, call["attention_mask"][:, :-1]):
            assert_same(model(ids, mask), long_way(model, input_ids=ids, attention_mask=mask))
    assert not direct_calls


def test_hooks_run(direct_calls):
    model = bk.accelerate(make("BertModel"))
    call, seen = inputs(model), []
    places = [model, model.embeddings, model.encoder, model.encoder.layer[1].output.dense]
    places += [model.pooler, model.pooler.dense, model.pooler.activation]
    for place in places:
        place.register_forward_hook(lambda module, args, output: seen.append(module))
    with torch.no_grad():
        model(**call)
    assert {id(module) for module in seen} == {id(module) for module in places}


def test_training_and_gradients(direct_calls):
    model = bk.accelerate(make("BertModel"))
    call = inputs(model)
    y = model(**call)
    assert direct_calls == [True]
    (y.last_hidden_state.square().sum() + y.pooler_output.sum()).backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    plain = make("BertModel")
    y = plain(**call)
    (y.last_hidden_state.square().sum() + y.pooler_output.sum()).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=2e-4, rtol=2e-4, msg=name)
    direct_calls.clear()
    model.train()(**call)
    assert not direct_calls


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_model_that_it_was(name):
    original = make(name)
    model = bk.accelerate(make(name))
    assert isinstance(model, type(original)) and type(model).__name__ == name
    assert inspect.signature(model.forward) == inspect.signature(original.forward)
    call = inputs(model)
    with torch.no_grad():
        expected = model(**call).last_hidden_state
        assert torch.equal(copy.deepcopy(model)(**call).last_hidden_state, expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(**call).last_hidden_state, expected)
    assert type(bk.restore(model)) is type(original)


def test_a_decoder_stays_one(direct_calls):
    model = bk.accelerate(make("BertModel", is_decoder=True))
    call, plain = inputs(model), make("BertModel", is_decoder=True)
    with torch.no_grad():
        torch.testing.assert_close(
            model(**call).last_hidden_state, plain(**call).last_hidden_state, atol=2e-5, rtol=1e-4
        )
    assert not direct_calls


def test_bad_input_is_refused_as_before():
    model = bk.accelerate(make("BertModel"))
    call = inputs(model)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()
    with pytest.raises(RuntimeError, match=r"expected ids in \[0, "):
        model(call["input_ids"] + 1000)
