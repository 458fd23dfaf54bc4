"""prepare_qat on every family and head: what changes, what stays, what is refused before anything changes."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import prune

from bertkern.compress.q8bert import FakeQuantEmbedding, FakeQuantLinear, OpSettings, Q8BertConfig, prepare_qat
from bertkern.compress.q8bert.roles import find_roles
from tests.tiny_models import CLASSES, inputs, main_output, tiny


@pytest.mark.parametrize("class_name", CLASSES)
def test_names_parameters_and_ties_stay(class_name):
    model = tiny(class_name)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = {name: id(module) for name, module in model.named_modules()}
    assert prepare_qat(model) is model
    assert {name: id(module) for name, module in model.named_modules()} == modules
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameters[name] for name in after)
    output = main_output(model.train()(**inputs(model)))
    output.float().pow(2).mean().backward()
    assert torch.isfinite(output).all()
    assert all(m.input_thresh > 0 for m in model.modules() if isinstance(m, FakeQuantLinear))


@pytest.mark.parametrize("class_name", CLASSES)
def test_every_linear_of_the_paper_is_found(class_name):
    model = prepare_qat(tiny(class_name))
    plain = [n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Embedding)]
    # ELECTRA's and ALBERT's embedding projections and MPNet's position buckets have no counterpart in Q8BERT.
    others = ("embeddings_project", "embedding_hidden_mapping_in", "relative_attention_bias")
    assert all(n.endswith(others) for n in plain), plain
    layers = [r.op for r in find_roles(model)]
    assert all(
        layers.count(op) == 2 for op in ("attention_query", "attention_output", "ffn_intermediate", "ffn_output")
    )


def test_roles_of_a_bert():
    roles = {
        role.name: role.op for role in find_roles(tiny("BertForSequenceClassification")) if "layer.1" not in role.name
    }
    layer = "bert.encoder.layer.0."
    assert roles == {
        "bert.embeddings.word_embeddings": "word_embeddings",
        "bert.embeddings.position_embeddings": "position_embeddings",
        "bert.embeddings.token_type_embeddings": "token_type_embeddings",
        f"{layer}attention.self.query": "attention_query",
        f"{layer}attention.self.key": "attention_key",
        f"{layer}attention.self.value": "attention_value",
        f"{layer}attention.output.dense": "attention_output",
        f"{layer}intermediate.dense": "ffn_intermediate",
        f"{layer}output.dense": "ffn_output",
        "bert.pooler.dense": "pooler",
        "classifier": "head",
    }


def test_settings_reach_their_operations():
    config = Q8BertConfig.uniform(mode="dynamic", skip=("head", "word_embeddings")).replace(
        ffn_output=OpSettings(requantize_output=False, start_step=3)
    )
    model = prepare_qat(tiny("BertForTokenClassification"), config)
    assert type(model.classifier) is nn.Linear
    assert type(model.bert.embeddings.word_embeddings) is nn.Embedding
    assert type(model.bert.embeddings.position_embeddings) is FakeQuantEmbedding
    assert model.bert.encoder.layer[1].output.dense.settings == config.ffn_output
    assert model.bert.encoder.layer[1].attention.self.key.settings.mode == "dynamic"
    assert Q8BertConfig.from_json(model.config.to_dict()) == config


def test_before_its_start_step_a_model_is_the_fp32_one():
    model = tiny("BertForSequenceClassification")
    batch = inputs(model)
    expected = model(**batch).logits
    for p in (model, prepare_qat(copy.deepcopy(model), Q8BertConfig.uniform(start_step=1, skip=_TABLES))):
        torch.testing.assert_close(p(**batch).logits, expected, rtol=0, atol=0)


_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")


def test_an_optimizer_made_before_goes_on():
    model = tiny("BertForMaskedLM")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepare_qat(model).train()
    before = model.cls.predictions.decoder.weight.detach().clone()
    model(**inputs(model), labels=inputs(model)["input_ids"]).loss.backward()
    optimizer.step()
    assert not torch.equal(model.cls.predictions.decoder.weight, before)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_pruning_masks_and_hooks_stay():
    model = tiny("BertModel")
    linear = model.encoder.layer[0].intermediate.dense
    prune.l1_unstructured(linear, "weight", 0.9)
    calls = []
    linear.register_forward_hook(lambda *_: calls.append(1))
    prepare_qat(model).train()
    model(**inputs(model)).last_hidden_state.sum().backward()
    assert calls and linear.weight_orig.grad is not None
    assert (linear.weight_codes() == 0).double().mean() >= 0.9


def test_a_model_inside_a_wrapper():
    wrapper = nn.Sequential(nn.ModuleDict({"auto_model": tiny("MPNetModel")}), nn.Linear(4, 4))
    prepare_qat(wrapper)
    assert isinstance(wrapper[0].auto_model.pooler.dense, FakeQuantLinear)
    assert type(wrapper[1]) is nn.Linear
    assert "0.auto_model.pooler.dense" in {role.name for role in find_roles(wrapper)}


def _broken(change):
    model = tiny("BertForSequenceClassification")
    change(model)
    return model


def _with_nan(model):
    with torch.no_grad():
        model.classifier.weight[0, 0] = float("nan")


def _with_max_norm(model):
    model.bert.embeddings.position_embeddings.max_norm = 1.0


def _with_adapter(model):
    model.classifier = type("LoraLinear", (nn.Linear,), {})(48, 3)


def _with_parametrization(model):
    nn.utils.parametrizations.weight_norm(model.classifier)


def _as_integers(model):
    model.classifier.weight = nn.Parameter(torch.zeros(3, 48, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_with_nan, ValueError, "classifier.weight to be finite"),
        (_with_max_norm, ValueError, "position_embeddings without max_norm. Got 1.0"),
        (_with_adapter, TypeError, "expected classifier to be a plain Linear. Got LoraLinear"),
        (_with_parametrization, TypeError, "expected classifier to be a plain Linear. Got ParametrizedLinear"),
        (_as_integers, TypeError, "classifier.weight to be floating point. Got torch.int8"),
    ],
)
def test_refused_before_any_change(change, error, message):
    model = _broken(change)
    kinds = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(error, match=message):
        prepare_qat(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert not hasattr(model.config, "q8bert")


def test_refusals_of_arguments():
    model = tiny("BertModel")
    with pytest.raises(TypeError, match=r"expected config to be a Q8BertConfig. Got dict"):
        prepare_qat(model, {})
    with pytest.raises(TypeError, match=r"expected model to be a torch module. Got str"):
        prepare_qat("bert")
    with pytest.raises(ValueError, match=r"families bert, roberta.* Got Linear"):
        prepare_qat(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"Got GPT2Model"):
        prepare_qat(transformers.GPT2Model(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)))
    with pytest.raises(ValueError, match=r"quantizes some operation"):
        prepare_qat(model, Q8BertConfig.from_dict({"version": 1}))
    with pytest.raises(TypeError, match=r"prepared already"):
        prepare_qat(prepare_qat(model))
