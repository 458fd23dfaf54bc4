"""Import of models that transformers 4 and nn_pruning have taken heads out of: exact, and damage is told by name."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import bertkern
from bertkern.checkpoints import load_checkpoint
from bertkern.nn import NoNorm
from tests.pruned_exports import config_of, distinct, without_heads, write, zero_heads
from tests.tiny_models import inputs, main_output, tiny

CLASSES = [
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForMaskedLM",
    "BertModel",
    "RobertaForTokenClassification",
    "XLMRobertaModel",
    "ElectraForSequenceClassification",
    "DistilBertForSequenceClassification",
    "DistilBertModel",
]
HEADS = {0: [1], 1: [0, 2, 3]}
QUERY = "bert.encoder.layer.0.attention.self.query"
FILES = ["model.safetensors", "pytorch_model.bin", "sharded"]


def exported(folder, class_name="BertForQuestionAnswering", pruned=HEADS, file="model.safetensors", **config):
    """A whole model of which some heads add nothing; `folder` holds it without these heads."""
    model = tiny(class_name, **{k: v for k, v in config.items() if k == "hidden_act"})
    zero_heads(model, pruned)
    config = config_of(model, pruned_heads={str(layer): heads for layer, heads in pruned.items()}, **config)
    write(folder, without_heads(model, pruned), config, file)
    return model


def close(loaded, whole, **options):
    batch = inputs(whole)
    with torch.no_grad():
        expected, actual = main_output(whole(**batch)), main_output(loaded(**batch))
    if expected.dim() >= 3 and expected.shape[-2] == batch["input_ids"].shape[-1]:
        real = batch["attention_mask"].bool()
        expected, actual = expected[..., real, :], actual[..., real, :]
    elif expected.shape[-1] == batch["input_ids"].shape[-1]:
        expected, actual = expected[:, batch["attention_mask"].bool()], actual[:, batch["attention_mask"].bool()]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5, **options)


def attentions(model):
    return [m for m in model.modules() if hasattr(m, "kept_heads")]


@pytest.mark.parametrize("class_name", CLASSES)
def test_exact(class_name, tmp_path):
    whole = exported(tmp_path, class_name)
    loaded = load_checkpoint(tmp_path)
    assert type(loaded) is type(whole) and not loaded.training
    state = load_file(tmp_path / "model.safetensors")
    parameters = dict(loaded.named_parameters())
    assert state.keys() <= {name for name, _ in loaded.named_parameters(remove_duplicate=False)}
    assert len(parameters) == len(state)
    for name, tensor in state.items():
        assert torch.equal(loaded.get_parameter(name), tensor), name
    assert [a.kept_heads for a in attentions(loaded)] == [(0, 2, 3), (1,)]
    close(loaded, whole)
    close(bertkern.accelerate(loaded), whole)
    close(bertkern.restore(loaded), whole)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_and_hidden_states(attention, tmp_path):
    whole = exported(tmp_path, "BertModel")
    loaded = load_checkpoint(tmp_path)
    batch = inputs(whole)
    for model in (whole, loaded):
        model.set_attn_implementation(attention)
    expected = whole(**batch, output_hidden_states=True, output_attentions=attention == "eager")
    actual = loaded(**batch, output_hidden_states=True, output_attentions=attention == "eager")
    torch.testing.assert_close(actual.hidden_states, expected.hidden_states, atol=1e-5, rtol=1e-5)
    if attention == "eager":
        kept = [list(a.kept_heads) for a in attentions(loaded)]
        for got, want, heads in zip(actual.attentions, expected.attentions, kept, strict=True):
            torch.testing.assert_close(got, want[:, heads])


@pytest.mark.parametrize("file", FILES)
def test_files(file, tmp_path):
    whole = exported(tmp_path, file=file)
    close(load_checkpoint(tmp_path), whole)
    close(load_checkpoint(tmp_path / ("model.safetensors.index.json" if file == "sharded" else file)), whole)


@pytest.mark.parametrize("class_name", ["BertForSequenceClassification", "DistilBertModel"])
@pytest.mark.parametrize("pruned", [{0: [0, 1, 2, 3]}, {0: [3, 1, 0, 2], 1: [0, 1, 2, 3]}])
def test_a_layer_without_heads(class_name, pruned, tmp_path):
    whole = exported(tmp_path, class_name, pruned)
    assert any(0 in tensor.shape for tensor in load_file(tmp_path / "model.safetensors").values())
    loaded = load_checkpoint(tmp_path)
    widths = loaded.config.quantization_config["widths"]
    assert [width["heads"] for width in widths.values()] == [[]] * len(pruned)
    assert all(a.kept_heads == (0,) and a.headless for a in attentions(loaded))
    close(loaded, whole)
    loaded.save_pretrained(tmp_path / "again")
    close(load_checkpoint(tmp_path / "again"), whole)
    close(bertkern.accelerate(loaded), whole)


@pytest.mark.parametrize("class_name", ["BertForMaskedLM", "RobertaForTokenClassification", "DistilBertModel"])
def test_saved_models_load_again(class_name, tmp_path):
    whole = exported(tmp_path, class_name)
    first = load_checkpoint(tmp_path)
    first.save_pretrained(tmp_path / "again")
    values = json.loads((tmp_path / "again" / "config.json").read_text())
    widths = values["quantization_config"]["widths"]
    assert [width["heads"] for width in widths.values()] == [[0, 2, 3], [1]] and "pruned_heads" not in values
    second = load_checkpoint(tmp_path / "again")
    assert {n: p.shape for n, p in second.named_parameters()} == {n: p.shape for n, p in first.named_parameters()}
    assert all(torch.equal(p, second.get_parameter(n)) for n, p in first.named_parameters())
    assert [a.kept_heads for a in attentions(second)] == [(0, 2, 3), (1,)]
    close(second, whole)


def test_what_is_made_of_it(tmp_path):
    """Copies, gradients, int8."""
    whole = exported(tmp_path, "BertForSequenceClassification")
    loaded = load_checkpoint(tmp_path)
    close(copy.deepcopy(loaded), whole)
    loaded(**inputs(loaded)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    expected = whole(**inputs(whole)).logits
    bertkern.quantize_(loaded, bertkern.Int8Config())
    assert loaded.bert.encoder.layer[1].attention.self.query.weight_codes.shape == (12, 48)
    torch.testing.assert_close(loaded(**inputs(loaded)).logits, expected, atol=0.1, rtol=0.1)


def nn_pruning_model(folder, **config):
    """As nn_pruning leaves a model: heads gone, feed-forward units zeroed, perhaps without norms and with ReLU."""
    model = tiny("BertForQuestionAnswering", hidden_act=config.get("hidden_act", "gelu"))
    zero_heads(model, HEADS)
    with torch.no_grad():
        for layer, part in zip(model.bert.encoder.layer, (slice(5, 60), slice(0, 71)), strict=True):
            layer.intermediate.dense.weight[part] = 0
            layer.output.dense.weight[:, part] = 0
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.normal_(0.5, 0.1)
    values = config_of(model, pruned_heads={str(layer): heads for layer, heads in HEADS.items()}, **config)
    write(folder, without_heads(model, HEADS), values, "pytorch_model.bin")
    return model


class Scaled(nn.Module):
    """The reference's NoNorm."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return torch.addcmul(self.norm.bias, x, self.norm.weight)


@pytest.mark.parametrize("layer_norm_type", ["layer_norm", "no_norm", None])
@pytest.mark.parametrize("hidden_act", ["gelu", "relu"])
def test_nn_pruning(layer_norm_type, hidden_act, tmp_path):
    config = {"hidden_act": hidden_act, **({"layer_norm_type": layer_norm_type} if layer_norm_type else {})}
    whole = nn_pruning_model(tmp_path, **config)
    loaded = load_checkpoint(tmp_path)
    norms = [m for m in loaded.modules() if isinstance(m, (nn.LayerNorm, NoNorm))]
    without = layer_norm_type == "no_norm"
    assert len(norms) == 5 and all(isinstance(m, NoNorm) == without for m in norms)
    assert (getattr(loaded.config, "layer_norm_type", None) == "no_norm") == without
    if without:
        for parent in list(whole.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.LayerNorm):
                    setattr(parent, name, Scaled(child))
    # The zeros stay where they were.
    dense = loaded.bert.encoder.layer[0].intermediate.dense.weight
    assert dense.shape == (80, 48) and int((dense != 0).any(1).sum()) == 25
    close(loaded, whole)
    loaded.save_pretrained(tmp_path / "again")
    close(load_checkpoint(tmp_path / "again"), whole)
    close(bertkern.accelerate(loaded), whole)


def test_no_norm_without_pruned_heads(tmp_path):
    model = tiny("BertForSequenceClassification")
    write(tmp_path, distinct(model.state_dict()), config_of(model, layer_norm_type="no_norm"))
    loaded = load_checkpoint(tmp_path)
    assert not any(isinstance(m, nn.LayerNorm) for m in loaded.modules())
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(parent, name, Scaled(child))
    close(loaded, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_and_strange_numbers(dtype, tmp_path):
    model = tiny("BertModel").to(dtype)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[3, 7] = float("nan")
        model.encoder.layer[0].output.dense.weight[4, 7] = -float("inf")
    state = without_heads(model, HEADS)
    write(tmp_path, state, config_of(model, pruned_heads={"0": [1], "1": [0, 2, 3]}))
    loaded = load_checkpoint(tmp_path)
    for name, tensor in state.items():
        got = loaded.get_parameter(name)
        assert got.dtype == dtype and torch.equal(got.view(torch.int16), tensor.view(torch.int16)), name


def test_files_of_the_time(tmp_path):
    """Buffers and poolers that newer classes do not have; no architectures; names of code to fetch are not followed."""
    whole = exported(tmp_path, file="pytorch_model.bin", architectures=None, _name_or_path="somewhere/else")
    values = json.loads((tmp_path / "config.json").read_text())
    values |= {"auto_map": {"AutoModel": "evil--code.Model"}, "attn_implementation": "somewhere/kernels"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    state["bert.embeddings.position_ids"] = torch.arange(40)[None]
    state["bert.pooler.dense.weight"] = torch.zeros(48, 48)
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    close(load_checkpoint(tmp_path), whole)
    with pytest.raises(ValueError, match=r"expected no tensor qa_outputs"):
        load_checkpoint(tmp_path, model_class=transformers.BertForMaskedLM)


def test_loading_leaves_the_random_numbers_alone(tmp_path):
    exported(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_checkpoint(tmp_path)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pruned_heads": {"0": [4], "1": [0]}}, "lists of heads below 4 by layer below 2. Got"),
        ({"pruned_heads": {"0": [-1]}}, "lists of heads below 4"),
        ({"pruned_heads": {"0": [1, 1]}}, "lists of heads below 4"),
        ({"pruned_heads": {"0": [1.0]}}, "lists of heads below 4"),
        ({"pruned_heads": {"0": [True]}}, "lists of heads below 4"),
        ({"pruned_heads": {"2": [1]}}, "by layer below 2"),
        ({"pruned_heads": {"-1": [1]}}, "by layer below 2"),
        ({"pruned_heads": {"first": [1]}}, "by layer below 2"),
        ({"pruned_heads": {"0": 1}}, "lists of heads below 4"),
        ({"pruned_heads": [1]}, r"Got \[1\]"),
        ({"pruned_heads": "all"}, "Got 'all'"),
        ({"pruned_heads": {"0": [1, 2], "1": [0, 2, 3]}}, rf"{QUERY}.weight of shape \[24, 48\]. Got \[36, 48\]"),
        ({"pruned_heads": {"1": [0, 2, 3]}}, rf"{QUERY}.weight of shape \[48, 48\]. Got \[36, 48\]"),
        ({"pruned_heads": {"0": [0, 1, 2, 3], "1": [0, 2, 3]}}, rf"{QUERY}.weight of shape \[0, 48\]. Got \[36, 48\]"),
        ({"layer_norm_type": "rms"}, "layer_norm_type to be one of layer_norm, no_norm. Got 'rms'"),
        ({"model_type": "mpnet"}, "to describe a|pruned_heads in a model of type bert"),
        ({"is_decoder": True}, "pruned_heads in an encoder. Got a decoder"),
        ({"num_attention_heads": 5}, "config.json to describe a BertForQuestionAnswering"),
        ({"num_hidden_layers": 1}, "by layer below 1"),
        ({"hidden_act": "nope"}, "config.json to describe a BertForQuestionAnswering"),
        ({"intermediate_size": 81}, r"intermediate.dense.weight of shape \[81, 48\]. Got \[80, 48\]"),
    ],
)
def test_wrong_configs(change, message, tmp_path):
    exported(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"load_checkpoint: expected (.|\n)*({message})"):
        load_checkpoint(tmp_path)


def test_norms_of_other_kinds(tmp_path):
    model = tiny("BertModel")
    write(tmp_path, model.state_dict(), config_of(model, layer_norm_type="rms"))
    with pytest.raises(ValueError, match=r"layer_norm_type to be one of layer_norm, no_norm. Got 'rms'"):
        load_checkpoint(tmp_path)
    model = tiny("MPNetModel")
    write(tmp_path, distinct(model.state_dict()), config_of(model, layer_norm_type="rms"))
    assert type(load_checkpoint(tmp_path)) is type(model)


def test_families_that_cannot_lose_heads(tmp_path):
    model = tiny("MPNetModel")
    write(tmp_path, distinct(model.state_dict()), config_of(model, pruned_heads={"0": [1]}))
    with pytest.raises(ValueError, match=r"pruned_heads in a model of type bert, .*mobilebert. Got 'mpnet'"):
        load_checkpoint(tmp_path)


def _drop(key):
    return lambda state: state.pop(key)


def _put(key, value):
    return lambda state: state.update({key: value})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop(f"{QUERY}.weight"), rf"expected {QUERY}.weight, float32 .* of shape \[36, 48\]. Got no such tensor"),
        (_drop("qa_outputs.bias"), r"expected qa_outputs.bias.* Got no such tensor"),
        (_put(f"{QUERY}.weight", torch.zeros(48, 48)), rf"{QUERY}.weight of shape \[36, 48\]. Got \[48, 48\]"),
        (_put(f"{QUERY}.bias", torch.zeros(48)), rf"{QUERY}.bias of shape \[36\]. Got \[48\]"),
        (_put(f"{QUERY}.weight", torch.zeros(36, 48).int()), rf"{QUERY}.weight of dtype float32 or .* Got int32"),
        (_put("bert.encoder.layer.0.attention.output.dense.weight", torch.zeros(36, 48)), r"of shape \[48, 36\]. Got"),
        (_put(f"{QUERY}.mask_scores", torch.zeros(1)), rf"expected no tensor {QUERY}.mask_scores. Got one"),
        (_put("bert.encoder.layer.2.output.dense.bias", torch.zeros(48)), "expected no tensor bert.encoder.layer.2"),
        (_put(f"{QUERY}.weight", "text"), f"expected '{QUERY}.weight' to be a tensor. Got str"),
    ],
)
def test_damaged_tensors(damage, message, tmp_path):
    exported(tmp_path, file="pytorch_model.bin")
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    damage(state)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"load_checkpoint: (.|\n)*{message}"):
        load_checkpoint(tmp_path)


def test_tied_tensors_must_agree(tmp_path):
    model = tiny("BertForMaskedLM")
    state = without_heads(model, HEADS)
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"].clone()
    config = config_of(model, pruned_heads={"0": [1], "1": [0, 2, 3]})
    write(tmp_path, state, config)
    assert load_checkpoint(tmp_path).cls.predictions.decoder.weight.shape == (120, 48)
    state["cls.predictions.decoder.weight"][3, 4] += 1
    write(tmp_path, state, config)
    with pytest.raises(ValueError, match=r"expected .*decoder.weight to be .*word_embeddings.weight, to which it is"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["truncated", "empty", "text"])
def test_files_that_are_no_tensors(file, kind, tmp_path):
    exported(tmp_path, file=file)
    path = tmp_path / ("model-00002-of-00002.safetensors" if file == "sharded" else file)
    path.write_bytes({"truncated": path.read_bytes()[: path.stat().st_size // 2], "empty": b"", "text": b"{}"}[kind])
    with pytest.raises(ValueError, match=r"load_checkpoint: expected .* to be a file of tensors. Got one that is"):
        load_checkpoint(tmp_path)


def test_damaged_indices(tmp_path):
    exported(tmp_path, file="sharded")
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    for content in ("{", "[]", "{}", '{"weight_map": 3}', json.dumps({"weight_map": {"a": "../model.safetensors"}})):
        index.write_text(content)
        with pytest.raises(ValueError, match=r"index.json' to (be JSON|be an object|name files beside it)"):
            load_checkpoint(tmp_path, format="pruned-heads")
    index.write_text(json.dumps(values))
    (tmp_path / "model-00001-of-00002.safetensors").rename(tmp_path / "kept")
    with pytest.raises(FileNotFoundError, match=r"expected a file of weights. Got .*00001-of-00002"):
        load_checkpoint(tmp_path)
    (tmp_path / "kept").write_bytes((tmp_path / "model-00002-of-00002.safetensors").read_bytes())
    (tmp_path / "kept").rename(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"once. Got it in several files"):
        load_checkpoint(tmp_path)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model.safetensors or pytorch_model.bin in .* Got neither"):
        load_checkpoint(tmp_path, format="pruned-heads")
