"""keep_layers: what is left computes what the whole model does with the other layers passed over."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

import bertkern as bk
from bertkern.families import layers_of

from .families import zoo
from .families.zoo import inputs, padded, tensors
from .ragged_models import kept, model_of, zeroed
from .test_heads import assert_close

FAMILIES = [family for family in zoo.FAMILIES if family != "Albert"]  # whose layers are runs of the same few
PLAIN = """
import sys, torch, transformers
model = transformers.AutoModel.from_pretrained(sys.argv[1]).eval()
assert "bertkern" not in sys.modules
batch = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(**batch).last_hidden_state, sys.argv[3])
print(model.config.num_hidden_layers, model.config.kept_layers)
"""


def passed_over(model: nn.Module, layers: list[int]) -> nn.Module:
    """A copy whose other layers hand on what they get."""
    made = copy.deepcopy(model)
    for index, (_, layer, _) in enumerate(layers_of(made)):
        if index not in layers:
            layer.register_forward_hook(
                lambda module, args, y: (args[0], *y[1:]) if isinstance(y, tuple) else args[0],
            )
    return made


def layers_count(model: nn.Module) -> int:
    return len(list(layers_of(model)))


@pytest.mark.parametrize("layers", [[0, 2], [1], (2,), range(1, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_saved_and_loaded(family, layers, tmp_path):
    model = model_of(family, "ForSequenceClassification")
    whole, batch = passed_over(model, list(layers)), padded(model, "trailing")
    assert bk.keep_layers(model, layers) is model
    assert layers_count(model) == model.config.num_hidden_layers == len(layers)
    assert model.config.kept_layers == list(layers)
    with torch.no_grad():
        got = model(**batch, output_hidden_states=True)
        assert torch.equal(whole(**batch).logits, got.logits)
    assert len(got.hidden_states) == len(layers) + 1
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["kept_layers"] == list(layers) and "quantization_config" not in values
    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and loaded.config.kept_layers == list(layers)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, got.logits)


@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_transformers_alone_loads_it(family, tmp_path):
    model = bk.keep_layers(model_of(family), [0, 2])
    batch = inputs(model)
    model.save_pretrained(tmp_path)
    torch.save(batch, tmp_path / "batch")
    arguments = [sys.executable, "-c", PLAIN, tmp_path, tmp_path / "batch", tmp_path / "answer"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.stdout.strip() == "2 [0, 2]", done.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "answer"), model(**batch).last_hidden_state)


@pytest.mark.parametrize("family", FAMILIES)
def test_accelerated(family):
    model = model_of(family)
    whole, batch = passed_over(model, [0, 2]), padded(model, "trailing")
    before, after = bk.accelerate(bk.keep_layers(copy.deepcopy(model), [0, 2])), bk.accelerate(model, keep_padding=True)
    names = bk.plan_of(before).layers.keys()
    bk.keep_layers(after, [0, 2])
    assert bk.plan_of(after).layers.keys() == names and not bk.report(after).fallbacks
    with torch.no_grad():
        got = after(**batch)
        assert_close(whole(**batch), got, atol=2e-5)
        mask = batch["attention_mask"].bool()
        assert torch.equal(before(**batch).last_hidden_state[mask], got.last_hidden_state[mask])
    bk.restore(after)
    assert layers_count(after) == 2


def test_forms_follow_their_layers():
    model = model_of("Bert")
    with torch.no_grad():
        layer = model.encoder.layer[2]
        for linear in (layer.intermediate.dense, layer.output.dense):
            linear.weight.mul_(torch.rand(linear.weight.shape) < 0.1)
    bk.accelerate(model, measure=False)
    form = str(bk.plan_of(model).layers["encoder.layer.2.output.dense"].form)
    assert form != "dense"
    bk.keep_layers(model, [0, 2])
    forms = {name: str(choice.form) for name, choice in bk.plan_of(model).layers.items()}
    assert forms["encoder.layer.1.output.dense"] == form and forms["encoder.layer.0.output.dense"] == "dense"
    assert not any(name.startswith("encoder.layer.2.") for name in forms)


def test_numbers_over_several_calls():
    model = bk.keep_layers(model_of("Bert", num_hidden_layers=6), [0, 2, 3, 5])
    bk.keep_layers(model, [1, 3])
    assert model.config.kept_layers == [2, 5] and layers_count(model) == 2
    state = model.state_dict()
    assert bk.keep_layers(model, [0, 1]) is model and model.config.kept_layers == [2, 5]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [layer.attention.self.layer_idx for layer in model.encoder.layer] in ([0, 1], [None, None])


@pytest.mark.parametrize("family", FAMILIES)
def test_together_with_heads(family, tmp_path):
    model = model_of(family).double()
    heads = {0: [1], 2: range(4)}
    whole, batch = passed_over(zeroed(model, heads), [0, 2]), inputs(model)
    bk.keep_layers(bk.prune_heads(model, heads), [0, 2])
    assert kept(model) == [(0, 2, 3), ()]
    widths = model.config.quantization_config["widths"]
    assert [name.rpartition(".")[2] for name in widths] == ["0", "1"]
    with torch.no_grad():
        assert_close(whole(**batch), model(**batch))
        model.save_pretrained(tmp_path)
        loaded = transformers.AutoModel.from_pretrained(tmp_path)
        assert_close(model(**batch), loaded(**batch))
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    bk.keep_layers(loaded, [0])
    assert [width["heads"] for width in loaded.config.quantization_config["widths"].values()] == [[0, 2, 3]]
    first = bk.keep_layers(bk.prune_heads(model_of(family), {0: [1]}), [1, 2])
    assert not hasattr(first.config, "quantization_config")
    bk.prune_heads(first, {1: [0]})
    assert kept(first) == [(0, 1, 2, 3), (1, 2, 3)]


def test_quantized_afterwards(tmp_path):
    model = bk.quantize_(bk.keep_layers(model_of("Bert"), [0, 2]))
    batch = inputs(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)
    with pytest.raises(ValueError, match=r"keep_layers: expected a float model. Got one that is int8"):
        bk.keep_layers(model, [0])
    assert layers_count(model) == 2


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
def test_albert_runs_less_often(head, fast, tmp_path):
    model = model_of("Albert", head)
    batch = padded(model, "trailing")
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    if fast:
        bk.accelerate(model)
    bk.keep_layers(model, [0, 2])
    model.save_pretrained(tmp_path)
    for each in (model, transformers.AutoModel.from_pretrained(tmp_path)):
        assert each.config.num_hidden_layers == 2
        with torch.no_grad():
            got = each(**batch, output_hidden_states=True).hidden_states
        assert len(got) == 3
        torch.testing.assert_close(got[2][batch["attention_mask"].bool()], states[2][batch["attention_mask"].bool()])


def test_groups_of_albert():
    options = {"num_hidden_groups": 2, "num_hidden_layers": 4}
    model = model_of("Albert", "ForSequenceClassification", **options)
    batch = inputs(model)
    first, second = model.albert.encoder.albert_layer_groups
    one = bk.keep_layers(copy.deepcopy(model), [0, 3])
    assert one.config.num_hidden_groups == 2 and one.config.num_hidden_layers == 2
    other = bk.accelerate(copy.deepcopy(model))
    names = set(bk.plan_of(other).layers)
    bk.keep_layers(other, [2, 3])
    assert other.config.num_hidden_groups == 1 and len(other.albert.encoder.albert_layer_groups) == 1
    assert set(bk.plan_of(other).layers) == {name for name in names if "groups.1." not in name}
    for got, groups in ((one, (first, second)), (other, (second, second))):
        with torch.no_grad():
            x = model.albert.encoder.embedding_hidden_mapping_in(model.albert.embeddings(batch["input_ids"]))
            for group in groups:
                x = group(x)
            expected = model.classifier(model.albert.pooler_activation(model.albert.pooler(x[:, 0])))
            torch.testing.assert_close(got(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"in equal parts. Got \[0, 2, 3\], which are of the groups \[0, 1, 1\]"):
        bk.keep_layers(model, [0, 2, 3])
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([0, 3], ValueError, "layers from 0 to 2. Got 3"),
        ([-1], ValueError, "layers from 0 to 2. Got -1"),
        ([0, True], ValueError, "layers from 0 to 2. Got True"),
        ([0, 1.0], ValueError, "layers from 0 to 2. Got 1.0"),
        (["0"], ValueError, "layers from 0 to 2. Got '0'"),
        ([None], ValueError, "layers from 0 to 2. Got None"),
        ([], ValueError, "at least one layer. Got none"),
        ([2, 0], ValueError, r"layers in ascending order, each once. Got \[2, 0\]"),
        ([0, 0], ValueError, r"layers in ascending order, each once. Got \[0, 0\]"),
        ("02", TypeError, "a list of layers, such as .* Got str"),
        (2, TypeError, "a list of layers, such as .* Got int"),
        ({0: 1}, TypeError, "a list of layers, such as .* Got dict"),
        ({0, 1}, TypeError, "a list of layers, such as .* Got set"),
        (None, TypeError, "a list of layers, such as .* Got NoneType"),
    ],
)
@pytest.mark.parametrize("family", ["Bert", "DistilBert", "Albert"])
def test_wrong_layers(family, layers, error, message):
    model = model_of(family)
    batch = inputs(model)
    expected = tensors(model(**batch))
    with pytest.raises(error, match=f"keep_layers: expected {message}"):
        bk.keep_layers(model, layers)
    assert model.config.num_hidden_layers == 3 and not hasattr(model.config, "kept_layers")
    assert all(torch.equal(value, expected[name]) for name, value in tensors(model(**batch)).items())


def test_other_models():
    with pytest.raises(TypeError, match=r"keep_layers: expected a torch.nn.Module. Got list"):
        bk.keep_layers([], [0])
    with pytest.raises(ValueError, match=r"keep_layers: expected one transformers model. Got 0"):
        bk.keep_layers(nn.Linear(3, 3), [0])
