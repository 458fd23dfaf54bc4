"""Import of I-BERT: the codes, steps and linear layers of transformers' own class, and no file is believed."""

import json
import warnings

import pytest
import torch
import transformers

import bertkern as bk
from bertkern.checkpoints import load_checkpoint
from bertkern.checkpoints.ibert import ibert_codes
from bertkern.nn import Int8Embedding, Int8Linear
from tests.pruned_exports import config_of, distinct, write
from tests.reference import sqnr
from tests.tiny_models import inputs

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "vocab_size": 120,
    "max_position_embeddings": 40,
    "num_labels": 3,
    "initializer_range": 0.15,
}


def trained(head="ForSequenceClassification", **config):
    """An I-BERT whose ranges have seen batches, and whose integers were made in a run."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_labels": 2 if head == "ForQuestionAnswering" else 3}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    settings = transformers.IBertConfig(**sizes, **dropout, quant_mode=True, **config)
    model = getattr(transformers, f"IBert{head}")(settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "LayerNorm.weight" in name:
                parameter.fill_(1.0)
    with torch.no_grad():
        for training in (True, True, False):
            model.train(training)(**inputs(model, padding=False))
    return model


def exported(folder, model, file="model.safetensors", **more):
    write(folder, distinct(model.state_dict()), config_of(model, **more), file)


@pytest.mark.parametrize("rows", [1, 17])
def test_codes(rows):
    weight = torch.randn(rows, 33, generator=torch.Generator().manual_seed(0))
    codes, scale = ibert_codes(weight)
    for i in range(rows):
        step = float(weight[i].abs().max()) / 127
        assert float(scale[i]) == pytest.approx(step, rel=1e-6)
        for j in range(33):
            assert abs(int(codes[i, j]) - max(-127, min(126, float(weight[i, j]) / step))) <= 0.5001
    assert int(codes.max()) <= 126


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForQuestionAnswering", "ForMaskedLM"])
@pytest.mark.parametrize("compact", [False, True])
def test_against_transformers(head, compact, tmp_path):
    model = trained(head)
    if compact:
        state = distinct(model.state_dict())
        # Integers and factors alone; a decoder then has what is left of the table.
        dropped = {name for name in state if f"{name}_integer" in state or name.endswith((".x_min", ".x_max"))}
        state = {name: t for name, t in state.items() if name not in {*dropped, "lm_head.decoder.weight"}}
        write(tmp_path, state, config_of(model))
    else:
        exported(tmp_path, model)
    loaded = load_checkpoint(tmp_path)
    assert isinstance(loaded, getattr(transformers, f"Roberta{head}"))
    theirs = dict(model.base_model.named_modules())
    found = {name: module for name, module in loaded.base_model.named_modules() if hasattr(module, "weight_codes")}
    assert sum(isinstance(module, Int8Linear) for module in found.values()) == 12 and len(found) == 15
    for name, module in found.items():
        other = theirs[name]
        assert torch.equal(module.weight_codes.float(), other.weight_integer), name
        if isinstance(module, Int8Embedding):
            assert torch.equal(module.weight_scale, other.weight_scaling_factor)
            continue
        assert torch.equal(module.weight_scale, other.fc_scaling_factor)
        # The same inputs, on the grid of their step, through both layers.
        step = module.input_scale.reshape(1)
        x = torch.randint(-127, 128, (1, 9, module.in_features), generator=torch.Generator().manual_seed(1)) * step
        rounded = f"{name}_activation" in theirs
        # Queries, keys and values are told the factor of the embeddings in every layer.
        wanted, _ = other(x, theirs["embeddings.output_activation"].act_scaling_factor if rounded else step)
        if rounded:
            rounding = theirs[f"{name}_activation"]
            assert float(module.output_scale) == pytest.approx(float(rounding.act_scaling_factor))
            out = float(module.output_scale)
            apart = module(x) - wanted.clamp(-127 * out, 127 * out)
            assert float(apart.detach().abs().max()) <= 0.5001 * out
            module.output_scale.zero_()
        else:
            assert float(module.output_scale) == 0
        assert torch.allclose(module(x), wanted, rtol=1e-5, atol=1e-5 * float(wanted.detach().abs().max())), name


def test_whole_model(tmp_path):
    model = trained(force_dequant="nonlinear")
    given = inputs(model, padding=False)
    exported(tmp_path / "a", model)
    loaded = load_checkpoint(tmp_path / "a")
    with torch.no_grad():
        wanted = model(**given).logits
    # Its attention, norms and residual sums round in other places.
    assert sqnr(wanted.double(), loaded(**given).logits.double()) > 20
    fused = bk.accelerate(loaded)
    assert sqnr(wanted.double(), fused(**given).logits.double()) > 20
    fused.save_pretrained(tmp_path / "b")
    again = transformers.RobertaForSequenceClassification.from_pretrained(tmp_path / "b")
    assert torch.equal(again(**given).logits, fused(**given).logits)


def test_float_models(tmp_path):
    model = trained()
    exported(tmp_path, model, quant_mode=False)
    loaded, given = load_checkpoint(tmp_path), inputs(model)
    for module in model.modules():
        if hasattr(module, "quant_mode"):
            module.quant_mode = False
    assert not any(isinstance(module, Int8Linear) for module in loaded.modules())
    wanted = model.ibert.embeddings.word_embeddings.weight
    assert torch.equal(loaded.roberta.embeddings.word_embeddings.weight, wanted)
    assert torch.isfinite(loaded(**given).logits).all()
    assert isinstance(load_checkpoint(tmp_path, quantize=True).roberta.encoder.layer[0].output.dense, Int8Linear)


def test_ranges_that_saw_nothing(tmp_path):
    torch.manual_seed(0)
    model = transformers.IBertForSequenceClassification(transformers.IBertConfig(**SIZES, quant_mode=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm.weight" in name:
                parameter.fill_(1.0)
    exported(tmp_path, model)
    with pytest.warns(UserWarning, match="12 layers have no range of their inputs"):
        loaded = load_checkpoint(tmp_path)
    assert float(loaded.roberta.encoder.layer[0].output.dense.input_scale) == 0
    floats = load_checkpoint(tmp_path, quantize=False)
    given = inputs(model)
    assert sqnr(floats(**given).logits.double(), loaded(**given).logits.double()) > 20


QUERY = "ibert.encoder.layer.0.attention.self.query"
ACT = "ibert.encoder.layer.0.pre_output_act"


def _at(name, change):
    return lambda state: state.update({name: change(state[name].clone())})


def _first(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


def _no_weights(then):
    def damage(state):
        for name in [name for name in state if f"{name}_integer" in state]:
            del state[name]
        then(state)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: (s.pop(f"{QUERY}.weight"), s.pop(f"{QUERY}.weight_integer")), "query.weight or .* Got neither"),
        (lambda s: s.pop("classifier.dense.weight"), "classifier.dense.weight.* Got no such tensor"),
        (lambda s: s.update({"ibert.encoder.x": torch.ones(1)}), "expected no tensor roberta.encoder.x"),
        (_at(f"{QUERY}.weight", _first(float("nan"))), "query.weight to be finite"),
        (_at(f"{QUERY}.weight", lambda t: t[1:]), r"query.weight of shape \[48, 48\]. Got \[47, 48\]"),
        (_at(f"{QUERY}.weight_integer", lambda t: t.flip(0)), "query.weight_integer to be the codes of"),
        (_at(f"{ACT}.x_min", _first(9e9)), "pre_output_act.x_min of at most x_max. Got 8"),
        (_at(f"{ACT}.x_max", _first(float("inf"))), "pre_output_act.x_max to be finite"),
        (_at(f"{ACT}.x_max", lambda t: t.expand(2)), "pre_output_act.x_max of shape"),
        (_no_weights(_at(f"{QUERY}.weight_integer", _first(127.0))), "whole numbers in .-127, 126.. Got .* to 127.0"),
        (_no_weights(_at(f"{QUERY}.weight_integer", _first(0.5))), "query.weight_integer to hold whole numbers"),
        (_no_weights(_at(f"{QUERY}.fc_scaling_factor", _first(0.0))), "query.fc_scaling_factor to be positive. Got 0"),
        (_no_weights(lambda s: s.pop(f"{QUERY}.fc_scaling_factor")), "query.fc_scaling_factor.* Got no such tensor"),
        (_no_weights(lambda s: s.pop(f"{QUERY}.bias_integer")), "query.bias_integer.* Got no such tensor"),
    ],
)
def test_damaged(damage, message, tmp_path):
    exported(tmp_path, trained(), "pytorch_model.bin")
    file = tmp_path / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    damage(state)
    torch.save({name: tensor.contiguous() for name, tensor in state.items()}, file)
    with warnings.catch_warnings(), pytest.raises(ValueError, match=f"load_checkpoint: (.|\n)*{message}"):
        warnings.simplefilter("ignore")
        load_checkpoint(tmp_path)


def test_named_by_its_tensors(tmp_path):
    exported(tmp_path, trained("Model"))
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["model_type"], values["architectures"]
    path.write_text(json.dumps(values))
    assert isinstance(load_checkpoint(tmp_path), transformers.RobertaModel)
