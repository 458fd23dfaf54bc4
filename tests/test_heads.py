"""prune_heads: what is left computes what the whole model does with the context of the removed heads at zero."""

import copy
import pickle
import types

import numpy
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize, prune

import bertkern as bk

from .families.zoo import inputs, padded, real, tensors
from .ragged_models import FAMILIES, HEADS, SIZE, kept, left, model_of, parts_of, some, zeroed


def assert_close(expected, got, mask=None, atol=1e-12):
    expected, got = tensors(expected), tensors(got)
    assert expected.keys() == got.keys() and expected
    for name, value in expected.items():
        if mask is not None:
            value, got[name] = real(name, value, mask), real(name, got[name], mask)
        torch.testing.assert_close(got[name], value, atol=atol, rtol=atol, msg=name)


def state_of(model):
    return {name: (tensor.clone(), id(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()}


def same(model, state):
    now = model.state_dict(keep_vars=True)
    return now.keys() == state.keys() and all(
        id(now[name]) == address and torch.equal(now[name], tensor) for name, (tensor, address) in state.items()
    )


@torch.no_grad()
def thin(linear, share=0.9):
    """Zeros `share` of the weights and half of the biases."""
    generator = torch.Generator().manual_seed(3)
    linear.weight.mul_(torch.rand(linear.weight.shape, generator=generator) >= share)
    linear.bias.mul_(torch.rand(linear.bias.shape, generator=generator) >= 0.5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["none", "trailing", "left", "holes", "empty"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact(family, padding, attention):
    options = {} if family == "MPNet" else {"attn_implementation": attention}
    model = model_of(family, **options).double()
    whole, batch = zeroed(model, some(family)), padded(model, padding)
    before, hidden = sum(p.numel() for p in model.parameters()), model.config.hidden_size
    assert bk.prune_heads(model, some(family)) is model
    layers = parts_of(model)
    assert kept(model) == left(some(family), len(layers))
    # A head of zeros stands in for none.
    heads = sum(HEADS - max(1, len(heads)) for heads in kept(model))
    assert before - sum(p.numel() for p in model.parameters()) == heads * SIZE * (3 * HEADS * SIZE + hidden + 3)
    with torch.no_grad():
        expected, got = whole(**batch, output_hidden_states=True), model(**batch, output_hidden_states=True)
    assert_close(expected, got)
    for one, other in zip(expected.hidden_states, got.hidden_states, strict=True):
        torch.testing.assert_close(other, one, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_heads_of_all_layers(family):
    model = model_of(family, "ForSequenceClassification").double()
    gone = {layer: range(HEADS) for layer in range(len(parts_of(model)))}
    whole, batch = zeroed(model, gone), padded(model, "trailing")
    bk.prune_heads(model, gone)
    assert kept(model) == [()] * len(gone)
    with torch.no_grad():
        assert_close(whole(**batch), model(**batch))
        expected = model.float()(**batch).logits
        torch.testing.assert_close(bk.accelerate(model)(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    assert not bk.report(model).fallbacks
    assert torch.isfinite(bk.quantize_(bk.restore(model))(**batch).logits).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_attentions_are_those_of_the_kept_heads(family):
    model = model_of(family, **({} if family == "MPNet" else {"attn_implementation": "eager"})).double()
    whole, batch = zeroed(model, some(family)), padded(model, "trailing")
    bk.prune_heads(model, some(family))
    with torch.no_grad():
        expected, got = (m(**batch, output_attentions=True).attentions for m in (whole, model))
    numbers = kept(model) if family != "Albert" else kept(model) * 3
    assert len(got) == len(numbers)
    for one, other, heads in zip(expected, got, numbers, strict=True):
        if heads:
            torch.testing.assert_close(other, one[:, list(heads)], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_training_mode(family):
    model = model_of(family, "ForSequenceClassification").double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    whole, batch = zeroed(model, some(family)), inputs(model)
    bk.prune_heads(model, some(family))
    assert model.training
    assert all(getattr(*slot).training for parts in parts_of(model) for slot in parts.linears())
    for each in (whole, model):
        each(**batch, labels=torch.tensor([0, 1, 1])).loss.backward()
    for one, other, numbers in zip(parts_of(whole), parts_of(model), kept(model), strict=True):
        rows = [head * SIZE + i for head in numbers for i in range(SIZE)]
        for slot in ("query", "key", "value", "out", "ffn1", "ffn2"):
            want, got = (getattr(*getattr(parts, slot)).weight.grad for parts in (one, other))
            if slot in ("query", "key", "value", "out") and not numbers:
                # A stand-in stays what it is through any training.
                assert got is None or not got.any()
                continue
            if slot in ("query", "key", "value"):
                want = want[rows]
            elif slot == "out":
                want = want[:, rows]
            torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer.step()
    assert kept(model) == left(some(family), len(parts_of(model)))


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_the_first_ones_however_often_it_is_called(family):
    model, batch = model_of(family), inputs(model_of(family))
    at_once, twice = copy.deepcopy(model), copy.deepcopy(model)
    bk.prune_heads(at_once, {0: [0, 1, 3]})
    bk.prune_heads(twice, {0: [1]})
    bk.prune_heads(twice, {0: (3, 0)})
    assert kept(at_once)[0] == kept(twice)[0] == (2,)
    state = state_of(twice)
    assert bk.prune_heads(twice, {0: [0, 1]}) is twice and bk.prune_heads(twice, {}) is twice
    assert bk.prune_heads(twice, {0: []}) is twice and same(twice, state)
    with torch.no_grad():
        assert all(
            torch.equal(a, b)
            for a, b in zip(tensors(at_once(**batch)).values(), tensors(twice(**batch)).values(), strict=True)
        )
    assert twice.config.quantization_config == at_once.config.quantization_config
    bk.prune_heads(twice, {0: {2, 0}})
    assert kept(twice)[0] == () and bk.prune_heads(twice, {0: [0, 2]}) is twice and kept(twice)[0] == ()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["none", "trailing"])
def test_before_and_after_accelerate(family, padding):
    model, heads = model_of(family), some(family)
    batch = padded(model, padding)
    whole = zeroed(model, heads)
    before, after = bk.accelerate(bk.prune_heads(copy.deepcopy(model), heads)), bk.accelerate(copy.deepcopy(model))
    assert bk.prune_heads(after, heads) is after
    assert kept(after) == left(heads, len(parts_of(model)))
    with torch.no_grad():
        got = after(**batch)
        assert_close(whole(**batch), got, batch["attention_mask"], atol=2e-5)
        assert torch.equal(before(**batch).last_hidden_state, got.last_hidden_state)
    assert not bk.report(after).fallbacks
    assert [row.name for row in bk.report(after).rows] == [row.name for row in bk.report(before).rows]
    plain = bk.prune_heads(copy.deepcopy(model), heads)
    bk.restore(after)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in after.state_dict().items())
    assert type(getattr(*parts_of(after)[0].query)) is nn.Linear


def test_accelerated_models_stay_as_they_were_asked_for():
    """What accelerate had removed, sparse forms, masks and options."""
    model = model_of("Bert")
    first = parts_of(model)[0]
    with torch.no_grad():
        getattr(*first.out).weight[:, :SIZE] = 0  # head 0 adds nothing
        getattr(*first.ffn2).weight[:, 5:9] = 0
    masked = getattr(*parts_of(model)[1].query)
    thin(masked)
    whole, batch = zeroed(model, {0: [0, 2], 1: [1]}), padded(model, "trailing")
    prune.custom_from_mask(masked, "weight", masked.weight != 0)
    bk.accelerate(model, keep_padding=True, sparse=False)
    assert kept(model)[0] == (1, 2, 3)
    bk.prune_heads(model, {0: [0, 2], 1: [1]})
    assert kept(model) == [(1, 3), (0, 2, 3), (0, 1, 2, 3)]
    assert {str(choice.form) for choice in bk.plan_of(model).layers.values()} == {"dense"}
    assert model.encoder.keep_padding
    with torch.no_grad():
        assert_close(whole(**batch), model(**batch), atol=2e-5)
    bk.restore(model)
    assert getattr(*parts_of(model)[1].query).weight_mask.shape == (3 * SIZE, HEADS * SIZE)
    assert kept_by_config(model) == {"encoder.layer.0": [1, 3], "encoder.layer.1": [0, 2, 3]}
    assert getattr(*parts_of(model)[0].ffn2).in_features == 117


def test_an_accelerated_model_in_training():
    model = model_of("Bert")
    for parts in parts_of(model):
        thin(getattr(*parts.ffn2))
    whole, batch = zeroed(model, {0: [1]}), padded(model, "trailing")
    with pytest.warns(UserWarning, match="parameters in training mode only"):
        bk.accelerate(model, measure=False).train()
    bk.prune_heads(model, {0: [1]})
    assert all(module.training for module in model.modules())
    model(**batch).last_hidden_state.sum().backward()
    assert getattr(*parts_of(model)[0].ffn2).weight.grad is not None
    with torch.no_grad():
        assert_close(whole(**batch), model.eval()(**batch), atol=2e-5)


def test_sparse_forms_stay():
    model = model_of("Bert")
    for parts in parts_of(model):
        for slot in parts.linears():
            thin(getattr(*slot))
    whole, batch = zeroed(model, {1: [0, 3]}), inputs(model)
    bk.accelerate(model, measure=False)
    forms = {name: str(choice.form) for name, choice in bk.plan_of(model).layers.items()}
    assert len(set(forms.values())) > 1
    bk.prune_heads(model, {1: [0, 3]})
    assert {name: str(choice.form) for name, choice in bk.plan_of(model).layers.items()} == forms
    with torch.no_grad():
        assert_close(whole(**batch), model(**batch), atol=2e-5)


def kept_by_config(model):
    return {name: width["heads"] for name, width in model.config.quantization_config["widths"].items()}


def test_a_part_of_an_accelerated_model():
    model = model_of("Bert", "ForSequenceClassification")
    whole = nn.Sequential(model)
    batch = inputs(model)
    bk.accelerate(whole)
    with pytest.raises(ValueError, match=r"expected the module that was accelerated. Got a part of it, where bert"):
        bk.prune_heads(model, {0: [1]})
    reference = zeroed(bk.restore(copy.deepcopy(whole))[0], {0: [1]})
    bk.prune_heads(whole, {0: [1]})
    with torch.no_grad():
        assert_close(reference(**batch), model(**batch), atol=2e-5)
    inner = model_of("Bert", "ForSequenceClassification")
    bk.accelerate(inner.bert)
    bk.prune_heads(inner, {0: [1]})
    assert kept(inner)[0] == (0, 2, 3)
    assert type(inner.bert.encoder).__module__ == "bertkern.families.bert" and type(inner.classifier) is nn.Linear
    with torch.no_grad():
        assert_close(reference(**batch), inner(**batch), atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_int8(family):
    model, heads = model_of(family, "ForSequenceClassification"), some(family)
    whole, batch = zeroed(model, heads), padded(model, "trailing")
    expected = whole(**batch).logits
    quantized = bk.quantize_(bk.prune_heads(copy.deepcopy(model), heads), bk.Int8Config(keep_original=True))
    with torch.no_grad():
        torch.testing.assert_close(quantized(**batch).logits, expected, atol=0.15, rtol=0.1)
    assert not bk.report(quantized).fallbacks
    state = quantized.state_dict()
    with pytest.raises(ValueError, match=r"prune_heads: expected a float model. Got one that is int8: call it before"):
        bk.prune_heads(quantized, {0: [1]})
    assert all(torch.equal(tensor, quantized.state_dict()[name]) for name, tensor in state.items())
    bk.restore(quantized)
    assert kept(quantized) == left(heads, len(parts_of(model)))
    assert kept_by_config(quantized) == kept_by_config(bk.prune_heads(copy.deepcopy(model), heads))
    bk.prune_heads(quantized, {0: [3]})
    assert kept(quantized)[0] == tuple(h for h in range(HEADS) if h not in {*heads[0], 3})


def remember(module, args, output):
    module.seen = output.shape[-1]


def test_parameters_keep_what_they_are():
    model = model_of("Bert", "ForMaskedLM").to(torch.bfloat16)
    first = parts_of(model)[0]
    getattr(*first.query).weight.requires_grad_(False)
    getattr(*first.out).bias.requires_grad_(False)
    others = {name: p for name, p in model.named_parameters() if ".layer.0." not in name}
    getattr(*first.value).register_forward_hook(remember)
    bk.prune_heads(model, {0: [0, 1, 2]})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not getattr(*first.query).weight.requires_grad and getattr(*first.query).bias.requires_grad
    assert getattr(*first.out).weight.requires_grad and not getattr(*first.out).bias.requires_grad
    assert all(model.get_parameter(name) is p for name, p in others.items())
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    model(**inputs(model))
    assert getattr(*first.value).seen == SIZE
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kept(each)[0] == (3,)
        bk.prune_heads(each, {0: [3]})
        assert kept(each)[0] == () and kept(model)[0] == (3,)


def test_on_meta():
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig(hidden_size=52, num_attention_heads=4))
    bk.prune_heads(model, {0: [1], 3: range(4)})
    query = model.encoder.layer[0].attention.self.query
    assert query.weight.shape == (39, 52) and query.weight.device.type == "meta"
    assert model.encoder.layer[3].attention.self.headless


def test_masked_weights_lose_their_masks_rows():
    model = model_of("Roberta").double()
    value = getattr(*parts_of(model)[0].value)
    thin(value)
    whole, batch = zeroed(model, {0: [2], 1: range(4)}), inputs(model)
    for name in ("weight", "bias"):
        prune.custom_from_mask(value, name, getattr(value, name) != 0)
    bk.prune_heads(model, {0: [2], 1: range(4)})
    assert value.weight_orig.shape == value.weight_mask.shape == (39, 52) and value.bias_mask.shape == (39,)
    with torch.no_grad():
        assert_close(whole(**batch), model(**batch))
    bk.prune_heads(model, {0: range(4)})
    assert kept(model)[:2] == [(), ()]


def test_integers_of_other_libraries_and_modules_around():
    model = nn.ModuleDict({"encoder": model_of("DistilBert"), "head": nn.Linear(52, 2)})
    bk.prune_heads(model, {numpy.int64(1): numpy.array([0, 3])})
    assert kept(model["encoder"]) == [(0, 1, 2, 3), (1, 2), (0, 1, 2, 3)]
    assert kept_by_config(model["encoder"]) == {"transformer.layer.1": [1, 2]}


@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        ({3: [0]}, ValueError, "layers from 0 to 2. Got 3"),
        ({-1: [0]}, ValueError, "layers from 0 to 2. Got -1"),
        ({"0": [0]}, ValueError, "layers from 0 to 2. Got '0'"),
        ({True: [0]}, ValueError, "layers from 0 to 2. Got True"),
        ({1.0: [0]}, ValueError, "layers from 0 to 2. Got 1.0"),
        ({0: [1], 1: [4]}, ValueError, "heads of layer 1 from 0 to 3. Got 4"),
        ({0: [1], 1: [-1]}, ValueError, "heads of layer 1 from 0 to 3. Got -1"),
        ({0: [1], 1: [1.0]}, ValueError, "heads of layer 1 from 0 to 3. Got 1.0"),
        ({0: [1], 1: [True]}, ValueError, "heads of layer 1 from 0 to 3. Got True"),
        ({0: [1], 1: ["2"]}, ValueError, "heads of layer 1 from 0 to 3. Got '2'"),
        ({0: [1], 1: [None]}, ValueError, "heads of layer 1 from 0 to 3. Got None"),
        ({0: [1], 1: torch.tensor([2])}, ValueError, r"heads of layer 1 from 0 to 3. Got tensor\(2\)"),
        ({0: [1], 1: [2, 0, 2]}, ValueError, r"each head of layer 1 once. Got \[2, 0, 2\]"),
        ({0: [1], 1: 2}, TypeError, "a list of heads for layer 1. Got 2"),
        ({0: [1], 1: "12"}, TypeError, "a list of heads for layer 1. Got '12'"),
        ({0: [1], 1: {2: 3}}, TypeError, "a list of heads for layer 1. Got {2: 3}"),
        ({0: [1], 1: None}, TypeError, "a list of heads for layer 1. Got None"),
        ([[0]], TypeError, "heads by layer, such as .* Got list"),
        (None, TypeError, "heads by layer, such as .* Got NoneType"),
    ],
)
@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_wrong_heads(family, heads, error, message):
    model = model_of(family)
    state = state_of(model)
    with pytest.raises(error, match=f"prune_heads: expected {message}"):
        bk.prune_heads(model, heads)
    assert same(model, state) and not hasattr(model.config, "quantization_config")


def test_layers_of_albert_are_the_shared_ones():
    model = model_of("Albert")
    with pytest.raises(ValueError, match=r"expected layers from 0 to 0. Got 1"):
        bk.prune_heads(model, {1: [0]})
    model = model_of("Albert", num_hidden_groups=3, inner_group_num=2, num_hidden_layers=6).double()
    heads = {1: [0], 4: [1, 2, 3]}
    whole, batch = zeroed(model, heads), padded(model, "trailing")
    bk.prune_heads(model, heads)
    with torch.no_grad():
        assert_close(whole(**batch), model(**batch))
    assert kept_by_config(model) == {
        "encoder.albert_layer_groups.0.albert_layers.1": [1, 2, 3],
        "encoder.albert_layer_groups.2.albert_layers.0": [0],
    }


class Mine(nn.Linear):
    pass


def replaced(model):
    layer = model.encoder.layer[1].attention.self
    layer.key = Mine(52, 52)


def shared(model):
    one, other = model.encoder.layer[1].attention.self, model.encoder.layer[2].attention.self
    other.key.weight = one.key.weight


def shared_module(model):
    model.encoder.layer[1].attention.self.key = model.encoder.layer[2].attention.self.key


def computed(model):
    parametrize.register_parametrization(model.encoder.layer[1].attention.self.key, "weight", nn.Identity())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced, "a projection is Mine"),
        (shared, "its weights are shared"),
        (shared_module, "its projections are shared|its weights are shared"),
        (computed, "a projection is ParametrizedLinear"),
    ],
)
@pytest.mark.parametrize("fast", [False, True])
def test_layers_that_cannot_be_cut(change, message, fast):
    model = model_of("Bert")
    change(model)
    batch = inputs(model)
    if fast:
        bk.accelerate(model)
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
    state = state_of(model)
    with pytest.raises(ValueError, match=rf"encoder.layer.1 to be a layer that can be cut. Got one .*({message})"):
        bk.prune_heads(model, {0: [1], 1: [0]})
    with torch.no_grad():
        assert torch.equal(model(**batch).last_hidden_state, expected)
    assert same(model, state) and not hasattr(model.config, "quantization_config")
    bk.prune_heads(model, {0: [1]})
    assert getattr(*parts_of(model)[0].query).out_features == 39


def test_other_models():
    tiny = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(**tiny, is_decoder=True))
    with pytest.raises(ValueError, match=r"prune_heads: expected an encoder. Got a decoder"):
        bk.prune_heads(decoder, {0: [1]})
    other = transformers.GPT2Model(transformers.GPT2Config(n_embd=16, n_head=2, n_layer=1))
    with pytest.raises(ValueError, match=r"expected a model of a known family. Got GPT2Model"):
        bk.prune_heads(other, {0: [1]})
    with pytest.raises(ValueError, match=r"expected one transformers model. Got 0"):
        bk.prune_heads(nn.Linear(3, 3), {0: [1]})
    with pytest.raises(ValueError, match=r"expected one transformers model. Got 2: 0, 1; name one of them"):
        bk.prune_heads(nn.Sequential(model_of("Bert"), model_of("Bert")), {0: [1]})
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module. Got SimpleNamespace"):
        bk.prune_heads(types.SimpleNamespace(), {0: [1]})


def test_values_that_are_not_numbers_go_with_their_head():
    model = model_of("Bert").double()
    whole, batch = zeroed(model, {0: [1]}), inputs(model)
    with torch.no_grad():
        expected = whole(**batch)
        getattr(*parts_of(model)[0].value).weight[SIZE] = torch.nan
        bk.prune_heads(model, {0: [1]})
        assert_close(expected, model(**batch))
