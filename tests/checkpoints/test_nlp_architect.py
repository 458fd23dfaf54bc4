"""Import of NLP Architect's files: right against the simulated model, and every kind of damage told by name."""

import json

import pytest
import torch
import transformers
from torch import nn

from bertkern.checkpoints import FORMATS, load_checkpoint
from bertkern.compress.q8bert import FakeQuantLinear, OpSettings, Q8BertConfig, calibrate, convert
from tests import reference
from tests.nlp_architect_export import INT8_FILE, TRAINING_FILE, export
from tests.tiny_models import inputs, main_output, tiny

pytestmark = pytest.mark.usefixtures("reference_kernels")

HEADS = ["BertForSequenceClassification", "BertForTokenClassification", "BertForQuestionAnswering", "BertModel"]
CONFIGS = {
    "default": Q8BertConfig(),
    "dynamic": Q8BertConfig.uniform(mode="dynamic"),
    "no output codes": Q8BertConfig.uniform(requantize_output=False),
    "mixed": Q8BertConfig.uniform(skip=("pooler",)).replace(
        head=OpSettings("none"), attention_value=OpSettings("dynamic"), token_type_embeddings=None
    ),
}


def exported(folder, class_name="BertForSequenceClassification", config=CONFIGS["default"], **options):
    """A calibrated model, exported to `folder`."""
    model = tiny(class_name)
    calibrate(model, [inputs(model, seed=s) for s in range(3)], config, progress=False)
    export(model, folder, dict(config.items()), **options)
    return model


@pytest.mark.parametrize("class_name", HEADS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_int8_modules_are_within_one_code(class_name, config, tmp_path):
    simulated = exported(tmp_path, class_name, config)
    model = load_checkpoint(tmp_path)
    assert type(model) is type(simulated) and not model.training
    torch.manual_seed(0)
    count = 0
    simulated.requires_grad_(False)
    for name, layer in simulated.named_modules():
        if not isinstance(layer, FakeQuantLinear) or layer.settings.mode == "none":
            continue
        imported = model.get_submodule(name)
        assert torch.equal(imported.weight_codes.float(), layer.weight_codes()), name
        # One token, so that a range of the batch and one of the token are the same.
        x = torch.randn(1, layer.in_features)
        difference = (imported(x) - layer(x)).abs().max()
        static = layer.settings.mode == "ema"
        input_step = float(layer.input_thresh if static else x.abs().max()) / 127
        if not layer.settings.requantize_output:
            allowed = input_step / float(layer.weight_scale())
        else:
            allowed = float(layer.output_thresh if static else layer(x).abs().max()) / 127
        assert difference <= allowed * 1.01 + 1e-5, name
        count += 1
    assert count >= 12
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, simulated.get_parameter(name)), name


@pytest.mark.parametrize("class_name", HEADS)
def test_int8_end_to_end(class_name, tmp_path):
    simulated = exported(tmp_path, class_name, CONFIGS["default"].replace(head=OpSettings(requantize_output=False)))
    model = load_checkpoint(tmp_path / INT8_FILE)
    expected, actual = [], []
    with torch.no_grad():
        for seed in range(20, 24):
            batch = inputs(simulated, batch=32, seed=seed, padding=False)
            expected.append(main_output(simulated(**batch)).flatten(0, -2))
            actual.append(main_output(model(**batch)).flatten(0, -2))
    expected, actual = torch.cat(expected), torch.cat(actual)
    assert reference.sqnr(expected, actual) >= 40
    assert reference.agreement(expected, actual) >= 0.995


def test_importing_is_converting(tmp_path):
    simulated = exported(tmp_path)
    batch = inputs(simulated)
    expected = convert(simulated)(**batch).logits
    torch.testing.assert_close(load_checkpoint(tmp_path)(**batch).logits, expected)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_training_checkpoint_simulates_as_before(config, tmp_path):
    simulated = exported(tmp_path, config=config)
    (tmp_path / INT8_FILE).unlink()
    model = load_checkpoint(tmp_path)
    batch = inputs(simulated)
    assert torch.equal(model(**batch).logits, simulated(**batch).logits)
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in simulated.state_dict().items())
    assert model.classifier.__class__ is simulated.classifier.__class__


@pytest.mark.parametrize("class_name", ["BertForMaskedLM", "RobertaForMaskedLM", "DistilBertModel", "MPNetForMaskedLM"])
def test_prepared_models_of_all_families_save_and_load(class_name, tmp_path):
    model = tiny(class_name)
    calibrate(model, inputs(model), progress=False)
    model.save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(main_output(loaded(**inputs(model))), main_output(model(**inputs(model))))


def test_fp32_file_can_be_asked_for_beside_the_int8_one(tmp_path):
    exported(tmp_path)
    assert isinstance(load_checkpoint(tmp_path).classifier, reference.Int8LinearReference)
    assert isinstance(load_checkpoint(tmp_path / TRAINING_FILE).classifier, FakeQuantLinear)
    assert isinstance(load_checkpoint(tmp_path, format="nlp-architect-training").classifier, FakeQuantLinear)


def test_files_of_the_time(tmp_path):
    """No architectures, the old zip-less container, a position_ids buffer, a pooler under a token classifier."""
    exported(tmp_path, "BertForTokenClassification", architectures=False)
    state = torch.load(tmp_path / INT8_FILE, weights_only=True)
    state["bert.embeddings.position_ids"] = torch.arange(40)[None]
    state["bert.pooler.dense.quantized_weight"] = torch.zeros(48, 48, dtype=torch.int8)
    torch.save(state, tmp_path / INT8_FILE, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification or BertForTokenClassification"):
        load_checkpoint(tmp_path)
    model = load_checkpoint(tmp_path, model_class=transformers.BertForTokenClassification)
    assert isinstance(model.classifier, reference.Int8LinearReference)


def test_without_quantization_keys_the_tensors_decide(tmp_path):
    simulated = exported(tmp_path, config=CONFIGS["mixed"])
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in values.items() if k not in dict(Q8BertConfig().items())}))
    (tmp_path / TRAINING_FILE).unlink()
    state = torch.load(tmp_path / INT8_FILE, weights_only=True)
    for idle in ("_step", "input_thresh", "output_thresh"):
        del state[f"classifier.{idle}"]
    torch.save(state, tmp_path / INT8_FILE)
    assert type(load_checkpoint(tmp_path).classifier) is nn.Linear
    batch = inputs(simulated, batch=1)
    assert torch.isfinite(load_checkpoint(tmp_path)(**batch).logits).all()


def test_loading_leaves_the_random_numbers_alone(tmp_path):
    exported(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_checkpoint(tmp_path)
    assert torch.equal(torch.rand(3), expected)


QUERY = "bert.encoder.layer.0.attention.self.query"


def _drop(key):
    return lambda state: state.pop(key)


def _put(key, value):
    return lambda state: state.update({key: value})


def _edit(key, change):
    return lambda state: state.update({key: change(state[key])})


def _minus_128(codes):
    codes = codes.clone()
    codes[0, 0] = -128
    return codes


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _drop(f"{QUERY}.quantized_weight"),
            rf"expected {QUERY}.quantized_weight, int8 of shape \[48, 48\]. Got no such",
        ),
        (_drop(f"{QUERY}._weight_scale"), f"expected {QUERY}._weight_scale, float32 .* Got no such tensor"),
        (_drop(f"{QUERY}._quantized_bias"), rf"expected {QUERY}._quantized_bias, int32 of shape \[48\]. Got no such"),
        (_drop(f"{QUERY}.bias_scale"), f"expected {QUERY}.bias_scale"),
        (_drop(f"{QUERY}.input_thresh"), f"expected {QUERY}.input_thresh"),
        (_drop(f"{QUERY}.output_thresh"), f"expected {QUERY}.output_thresh"),
        (_drop("bert.embeddings.LayerNorm.weight"), r"LayerNorm.weight, float32 or .* of shape \[48\]. Got no such"),
        (_put("bert.stranger", torch.zeros(1)), "expected no tensor bert.stranger. Got one"),
        (_put("classifier.weight", torch.zeros(3, 48)), "expected no tensor classifier.weight. Got one"),
        (_edit(f"{QUERY}.quantized_weight", lambda t: t[:-1]), r"of shape \[48, 48\]. Got \[47, 48\]"),
        (_edit(f"{QUERY}._quantized_bias", lambda t: t[:5]), r"_quantized_bias of shape \[48\]. Got \[5\]"),
        (_edit(f"{QUERY}._weight_scale", lambda t: t.expand(2)), r"_weight_scale of shape \[\]. Got \[2\]"),
        (_edit(f"{QUERY}.quantized_weight", lambda t: t.float()), "quantized_weight of dtype int8. Got float32"),
        (_edit(f"{QUERY}._quantized_bias", lambda t: t.long()), "_quantized_bias of dtype int32. Got int64"),
        (_edit(f"{QUERY}.quantized_weight", _minus_128), r"to hold codes in \[-127, 127\]. Got -128"),
        (_edit(f"{QUERY}._weight_scale", lambda t: t * 0), "_weight_scale to be positive. Got 0.0"),
        (_edit(f"{QUERY}._weight_scale", lambda t: -t), "_weight_scale to be positive. Got -"),
        (_edit(f"{QUERY}._weight_scale", lambda t: t * float("nan")), "_weight_scale to be finite. Got Inf or NaN"),
        (_edit(f"{QUERY}.input_thresh", lambda t: t * 0), "input_thresh to be positive. Got 0.0"),
        (_edit(f"{QUERY}.output_thresh", lambda t: t / 0), "output_thresh to be finite"),
        (_edit(f"{QUERY}.bias_scale", lambda t: t * 2), r"bias_scale to be _weight_scale \* 127 / input_thresh = "),
        (_edit("bert.embeddings.LayerNorm.bias", lambda t: t * float("inf")), "LayerNorm.bias to be finite"),
        (_put(f"{QUERY}._weight_scale", "text"), f"expected '{QUERY}._weight_scale' to be a tensor. Got str"),
    ],
)
def test_damaged_int8_tensors(damage, message, tmp_path):
    exported(tmp_path)
    state = torch.load(tmp_path / INT8_FILE, weights_only=True)
    damage(state)
    torch.save(state, tmp_path / INT8_FILE)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop("classifier.weight"), r"expected classifier.weight, float32 .* of shape \[3, 48\]. Got no such"),
        (_drop("classifier._step"), "expected classifier._step"),
        (_edit("classifier.input_thresh", lambda t: -t), "classifier.input_thresh to be at least 0"),
        (_edit("classifier.input_thresh", lambda t: t.double()), "input_thresh of dtype float32. Got float64"),
        (_edit("classifier.weight", lambda t: t[:, :-1]), r"classifier.weight of shape \[3, 48\]. Got \[3, 47\]"),
        (_put("classifier.weight_g", torch.zeros(3)), "expected no tensor classifier.weight_g"),
    ],
)
def test_damaged_training_tensors(damage, message, tmp_path):
    exported(tmp_path)
    state = torch.load(tmp_path / TRAINING_FILE, weights_only=True)
    damage(state)
    torch.save(state, tmp_path / TRAINING_FILE)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / TRAINING_FILE)


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    exported(tmp_path)
    state = torch.load(tmp_path / INT8_FILE, weights_only=True)
    for leaf in ("quantized_weight", "_weight_scale"):
        del state[f"{QUERY}.{leaf}"]
    torch.save(state, tmp_path / INT8_FILE)
    with pytest.raises(ValueError) as error:
        load_checkpoint(tmp_path)
    assert "quantized_weight" in str(error.value) and "_weight_scale" in str(error.value)
    torch.save({}, tmp_path / INT8_FILE)
    with pytest.raises(ValueError, match=r"\.\.\. and \d+ more"):
        load_checkpoint(tmp_path)


class _Payload:
    def __reduce__(self):
        return (print, ("a pickle was run",))


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "pickle", "list"])
@pytest.mark.parametrize("name", [INT8_FILE, TRAINING_FILE])
def test_files_that_are_no_tensors(name, kind, tmp_path, capsys):
    exported(tmp_path)
    path = tmp_path / name
    if kind == "pickle":
        torch.save({"weight": _Payload()}, path)
    elif kind == "list":
        torch.save([torch.zeros(2)], path)
    else:
        path.write_bytes(
            {"truncated": path.read_bytes()[: path.stat().st_size // 2], "empty": b"", "text": b"{}"}[kind]
        )
    with pytest.raises(ValueError, match=r"load_checkpoint: expected .* to (be a file of|hold) tensors"):
        load_checkpoint(path)
    assert "a pickle was run" not in capsys.readouterr().out


def test_config_and_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"which does not exist"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"expected a checkpoint of one of the formats nlp-architect-int8"):
        load_checkpoint(tmp_path)
    exported(tmp_path)
    with pytest.raises(ValueError, match=r"expected format to be one of .* Got 'onnx'"):
        load_checkpoint(tmp_path, format="onnx")
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    for change, message in (
        ({"pruned_heads": {"0": [1]}}, "with all of its heads. Got pruned_heads"),
        ({"attention_query": {"mode": "int4"}}, "attention_query: .* Got 'int4'"),
        ({"attention_query": {"mode": "none"}}, f"expected {QUERY}.weight, float32"),
        ({"num_labels": 4}, r"classifier.quantized_weight of shape \[4, 48\]. Got \[3, 48\]"),
        ({"num_hidden_layers": 3}, r"expected bert.encoder.layer.2.attention.self.query.quantized_weight, .* no such"),
        ({"num_hidden_layers": 1}, r"expected no tensor bert.encoder.layer.1.* Got one"),
        ({"attention_query": {"mode": "ema", "weight_bits": 4}}, r"quantized_weight to hold codes in \[-7, 7\]. Got -"),
        ({"num_attention_heads": 5}, "to describe a BertForSequenceClassification. Got one of which none can be made"),
        ({"hidden_size": -4}, "to describe a BertForSequenceClassification"),
        ({"hidden_act": "nope"}, "to describe a BertForSequenceClassification.*nope"),
        # What transformers holds under a name need not be a model.
        ({"architectures": ["BertConfig"]}, "to name the class under architectures"),
        ({"architectures": ["logging"]}, "to name the class under architectures"),
    ):
        config.write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config.json' to be JSON"):
        load_checkpoint(tmp_path)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected config.json beside the weights"):
        load_checkpoint(tmp_path)


def test_formats_have_names_of_their_own():
    assert len({row.name for row in FORMATS}) == len(FORMATS)
