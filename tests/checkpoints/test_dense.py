"""Ordinary checkpoints, full of zeros or not, and what is wrong with some."""

import json

import pytest
import torch
import transformers

import bertkern
from bertkern.checkpoints import load_checkpoint
from bertkern.checkpoints.models import named_class
from tests.formats.matrices import random
from tests.pruned_exports import config_of, distinct, write
from tests.tiny_models import inputs, main_output, tiny


@pytest.mark.parametrize("block", [(1, 4), (4, 1), (1, 1), (16, 4), (32, 32)])
@pytest.mark.parametrize("class_name", ["BertForQuestionAnswering", "DistilBertForSequenceClassification"])
def test_zero_filled(block, class_name, tmp_path):
    model = tiny(class_name)
    with torch.no_grad():
        for name, parameter in model.base_model.named_parameters():
            if parameter.dim() == 2 and "embeddings" not in name:
                parameter.mul_(random(tuple(parameter.shape), 0.3, block) != 0)
    model.save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert all(torch.equal(p, loaded.get_parameter(n)) for n, p in model.named_parameters())
    assert torch.equal(main_output(loaded(**inputs(model))), main_output(model(**inputs(model))))
    accelerated = bertkern.accelerate(loaded)
    torch.testing.assert_close(
        main_output(accelerated(**inputs(model, padding=False))),
        main_output(model(**inputs(model, padding=False))),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "sharded"])
def test_files(file, tmp_path):
    model = tiny("BertForMaskedLM")
    write(tmp_path, distinct(model.state_dict()), config_of(model), file)
    path = tmp_path / ("model.safetensors.index.json" if file == "sharded" else file)
    for given in (tmp_path, path):
        loaded = load_checkpoint(given)
        assert type(loaded) is type(model)
        assert all(torch.equal(p, loaded.get_parameter(n)) for n, p in model.named_parameters())


def test_the_file_that_was_asked_for(tmp_path):
    model, other = tiny("BertModel"), tiny("BertModel", seed=1)
    write(tmp_path, model.state_dict(), config_of(model))
    write(tmp_path, other.state_dict(), config_of(model), "pytorch_model.bin")
    for file, wanted in (("model.safetensors", model), ("pytorch_model.bin", other)):
        loaded = load_checkpoint(tmp_path / file)
        assert all(torch.equal(p, loaded.get_parameter(n)) for n, p in wanted.named_parameters())


def test_classes(tmp_path):
    model = tiny("BertForSequenceClassification")
    model.save_pretrained(tmp_path)
    assert type(load_checkpoint(tmp_path, model_class=transformers.BertModel)) is transformers.BertModel
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for architectures in (None, ["logging"], ["BertConfig"]):
        path.write_text(json.dumps(values | {"architectures": architectures}))
        loaded = load_checkpoint(tmp_path)
        assert type(loaded) is transformers.BertModel
        assert torch.equal(loaded.pooler.dense.weight, model.bert.pooler.dense.weight)
    # A head that the file lacks starts anew.
    path.write_text(json.dumps(values | {"architectures": ["BertForTokenClassification"]}))
    tensors = distinct(model.state_dict())
    del tensors["classifier.weight"], tensors["classifier.bias"]
    write(tmp_path, tensors, values | {"architectures": ["BertForTokenClassification"]})
    assert load_checkpoint(tmp_path).classifier.weight.shape == (3, 48)


@pytest.mark.parametrize("architectures", [None, [], "BertModel", 3, [3], ["logging"], ["BertConfig"], ["os"]])
def test_a_config_can_name_nothing_but_a_model(architectures):
    assert named_class({"architectures": architectures}) is None
    assert named_class({"architectures": ["logging", "BertModel"]}) is transformers.BertModel


def test_quantized_models_of_bertkern(tmp_path):
    model = bertkern.quantize_(tiny("BertForSequenceClassification"))
    model.save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert torch.equal(loaded(**inputs(model)).logits, model(**inputs(model)).logits)


KEY = "bert.encoder.layer.1.output.dense.weight"


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop(KEY), rf"expected {KEY}. Got no such tensor"),
        (lambda s: s.update({KEY: torch.zeros(48, 79)}), rf"expected {KEY} of shape \[48, 80\]. Got \[48, 79\]"),
        (
            lambda s: s.update({"classifier.bias": torch.zeros(4)}),
            r"expected classifier.bias of shape \[3\]. Got",
        ),
        (lambda s: s.update({KEY.replace("1", "2"): torch.zeros(1)}), r"expected no tensor .*layer.2.output.dense.*"),
    ],
)
def test_damage(file, damage, message, tmp_path):
    model = tiny("BertForSequenceClassification")
    state = dict(model.state_dict())
    damage(state)
    write(tmp_path, state, config_of(model), file)
    with pytest.raises(ValueError, match=f"load_checkpoint: {message}"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "sharded"])
@pytest.mark.parametrize("kind", ["truncated", "empty", "text"])
def test_files_that_are_no_tensors(file, kind, tmp_path):
    model = tiny("BertModel")
    write(tmp_path, model.state_dict(), config_of(model), file)
    path = tmp_path / ("model-00001-of-00002.safetensors" if file == "sharded" else file)
    path.write_bytes({"truncated": path.read_bytes()[: path.stat().st_size // 2], "empty": b"", "text": b"{}"}[kind])
    with pytest.raises(ValueError, match=r"expected .* to be a checkpoint that transformers loads"):
        load_checkpoint(tmp_path)


def test_wrong_configs(tmp_path):
    model = tiny("BertModel")
    write(tmp_path, model.state_dict(), config_of(model))
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for change in ({"hidden_size": -4}, {"num_attention_heads": 5}, {"hidden_act": "nope"}):
        path.write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=r"expected .* to be a checkpoint that transformers loads"):
            load_checkpoint(tmp_path)
    for content in ("{", "[]", json.dumps({"hidden_size": 48})):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"expected a checkpoint of one of the formats .*transformers. Got"):
            load_checkpoint(tmp_path)
