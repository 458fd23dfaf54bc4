"""Static activations: the ranges that calibration finds, the steps made of them, and models that run on them."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bertkern as bk
from bertkern.compress import MovingAverage, Percentile
from bertkern.formats.int8 import static_step
from bertkern.nn import Int8Linear
from tests import reference
from tests.tiny_models import inputs, main_output, tiny

SIGNED = bk.Int8Config(activation="static")
UNSIGNED = bk.Int8Config(activation="static", activation_unsigned=True)
CONFIGS = pytest.mark.parametrize("config", [SIGNED, UNSIGNED], ids=["s8", "u8"])
NAME = "bert.encoder.layer.1.output.dense"


def batches(model: nn.Module, count: int = 4) -> list[dict[str, torch.Tensor]]:
    return [inputs(model, seed=seed) for seed in range(count)]


def extremes(model: nn.Module, batch: dict[str, torch.Tensor], name: str) -> tuple[float, float]:
    """Smallest and largest input of a layer over real tokens, by a plain hook."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    real = seen[0][batch["attention_mask"].bool()]
    return float(real.min()), float(real.max())


def test_both_ends_over_all_batches_without_padding():
    model = tiny("BertForSequenceClassification")
    data = batches(model)
    expected = [extremes(model, batch, NAME) for batch in data]
    before = {name: id(module) for name, module in model.named_modules()}
    found = bk.calibrate(model, data, progress=False)
    assert found.ranges[NAME] == pytest.approx((min(low for low, _ in expected), max(high for _, high in expected)))
    # The input of the second feed-forward matrix comes out of GELU, which goes no lower than -0.17.
    assert -0.18 < found.ranges[NAME][0] < 0 < 0.5 < found.ranges[NAME][1]
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_observers_see_each_end():
    model = tiny("BertForSequenceClassification")
    data = batches(model)
    lows, highs = zip(*(extremes(model, batch, NAME) for batch in data), strict=True)
    found = bk.calibrate(model, data, observer=lambda: MovingAverage(0.7), progress=False).ranges[NAME]
    expected = (-reference.moving_range([-low for low in lows], 0.7), reference.moving_range(highs, 0.7))
    assert found == pytest.approx(expected, rel=1e-6)
    full = bk.calibrate(model, data, progress=False).ranges[NAME]
    cut = bk.calibrate(model, data, observer=lambda: Percentile(99.0), progress=False).ranges[NAME]
    assert full[0] <= cut[0] < 0 < cut[1] < full[1]
    for name in ("absmax", "percentile", "ema"):
        assert bk.calibrate(model, data, observer=name, progress=False).ranges[NAME][1] <= full[1]


@pytest.mark.parametrize(
    ("low", "high"), [(-1, 1), (-0.17, 6.5), (0, 3), (-3, 0), (-2, 2.01), (-1e-3, 50), (-50, 1e-3), (-128, 127)]
)
def test_steps_reach_both_ends(low, high):
    step, zero = static_step(low, high)
    assert zero == 0 and step == max(-low, high) / 127
    step, zero = static_step(low, high, unsigned=True)
    # 0 and 128 stand for signed codes.
    assert 1 <= zero <= 254 and zero != 128
    assert round(low / step) + zero >= 0 and round(high / step) + zero <= 255
    assert step <= (high - low) / 255 * 1.01


@pytest.mark.parametrize("ends", [(1, 2), (-2, -1), (0, 0), (float("nan"), 1)])
def test_no_step(ends):
    with pytest.raises(ValueError, match="static_step: expected low <= 0 <= high"):
        static_step(*ends)


@CONFIGS
@pytest.mark.parametrize("weight", ["per_channel", "per_tensor"])
def test_a_layer_is_its_reference(config, weight):
    torch.manual_seed(0)
    linear, x = nn.Linear(67, 29), torch.nn.functional.gelu(torch.randn(40, 67))
    ends = float(x.min()), float(x.max())
    with pytest.raises(ValueError, match=r'expected input_range with activation "static". Got None'):
        Int8Linear.from_linear(linear, config)
    layer = Int8Linear.from_linear(linear, replace(config, weight=weight), input_range=ends)
    step, zero = static_step(*ends, unsigned=config.activation_unsigned)
    assert (float(layer.input_scale), int(layer.input_zero_point)) == (pytest.approx(step), zero)
    codes, scale = reference.quantize_rows(x, float(layer.input_scale), zero, config.activation_unsigned)
    expected = reference.qgemm(codes, scale, zero, layer.weight_codes, layer.weight_scale, linear.bias)
    torch.testing.assert_close(layer.eval()(x).double(), expected.detach(), rtol=1e-5, atol=1e-5)


def outputs(model: nn.Module, data: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The main outputs [rows, features] at real tokens."""
    rows = []
    with torch.no_grad():
        for batch in data:
            output, real = main_output(model(**batch)), batch["attention_mask"].bool()
            if output.shape[:2] == real.shape:
                output = output[real]
            elif output.shape[1:] == real.shape:
                output = output[:, real].T  # of question answering: start and end
            rows.append(output.reshape(-1, output.shape[-1]))
    return torch.cat(rows)


# Every family and every kind of head once.
MODELS = [
    "BertForQuestionAnswering",
    "RobertaForMaskedLM",
    "XLMRobertaForTokenClassification",
    "ElectraForPreTraining",
    "DistilBertForSequenceClassification",
    "MPNetForMultipleChoice",
]


@CONFIGS
@pytest.mark.parametrize("class_name", MODELS)
def test_every_family_and_head(class_name, config):
    model = tiny(class_name)
    expected = outputs(model, batches(model))
    assert bk.quantize_(model, config, calibration=batches(model), progress=False) is model
    assert not bk.report(model).fallbacks
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert len(layers) >= 12 and all(layer.input_scale > 0 for layer in layers)
    assert all(bool(layer.input_zero_point) == config.activation_unsigned for layer in layers)
    # What rounding costs; an activation of the wrong sign, step or zero point would leave next to nothing.
    assert reference.sqnr(expected, outputs(model, batches(model))) > 15


@CONFIGS
def test_fused_as_layer_by_layer(config):
    model = tiny("BertForSequenceClassification")
    bk.quantize_(model, config, calibration=batches(model), progress=False, exact_attention=True)
    fused = outputs(model, batches(model, 8))
    bk.swap.unfuse(model)
    assert reference.sqnr(outputs(model, batches(model, 8)), fused) > 40


@CONFIGS
def test_one_sentence_alone_and_in_a_batch(config):
    model = tiny("BertModel")
    bk.quantize_(model, config, calibration=batches(model), progress=False)
    batch = inputs(model, batch=5)
    with torch.no_grad():
        together = model(**batch)
        alone = model(**{name: value[1:2, :16] for name, value in batch.items()})
    assert torch.equal(together.last_hidden_state[1, :16], alone.last_hidden_state[0])
    assert torch.equal(together.pooler_output[1], alone.pooler_output[0])


@CONFIGS
@pytest.mark.parametrize("class_name", ["BertForSequenceClassification", "DistilBertForMaskedLM", "MPNetModel"])
def test_saved_and_loaded_bit_for_bit(class_name, config, tmp_path):
    model = tiny(class_name)
    bk.quantize_(model, config, calibration=batches(model), progress=False)
    expected = outputs(model, batches(model))
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(outputs(loaded, batches(model)), expected)
    assert torch.equal(outputs(copy.deepcopy(loaded), batches(model)), expected)
    assert loaded.config.quantization_config.config.activation == "static"
    assert str(bk.report(loaded)) == str(bk.report(model)) and "int8 static" in str(bk.report(loaded))


def test_one_calibration_serves_both_signs_and_travels_as_json():
    model = tiny("BertForSequenceClassification")
    found = bk.calibrate(model, batches(model), progress=False)
    again = bk.Calibration.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    for config in (SIGNED, UNSIGNED):
        at_once, later = copy.deepcopy(model), copy.deepcopy(model)
        bk.quantize_(at_once, config, calibration=batches(model), progress=False)
        bk.quantize_(later, config, calibration=again)
        assert torch.equal(outputs(at_once, batches(model)), outputs(later, batches(model)))


def test_unsigned_codes_are_finer_where_inputs_have_one_sign():
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 64), torch.nn.functional.gelu(2 * torch.randn(256, 64))
    ends = float(x.min()), float(x.max())
    exact = linear(x)
    noise = {
        config.activation_unsigned: reference.sqnr(
            exact, Int8Linear.from_linear(linear, config, input_range=ends).eval()(x)
        )
        for config in (SIGNED, UNSIGNED)
    }
    assert noise[True] > noise[False] + 3


def test_any_module_and_layers_left_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 7)).eval()
    loader = DataLoader(TensorDataset(torch.randn(64, 20)), batch_size=16)
    exact = model(torch.ones(3, 20))
    bk.quantize_(model, replace(UNSIGNED, skip=("0",)), calibration=loader, progress=False)
    assert not isinstance(model[0], Int8Linear) and model[2].input_zero_point == 1, "ReLU leaves nothing below zero"
    assert reference.sqnr(exact, model(torch.ones(3, 20))) > 30


def test_an_accelerated_model():
    model = tiny("BertForSequenceClassification")
    expected = bk.calibrate(model, batches(model), progress=False)
    bk.accelerate(model)
    found = bk.calibrate(model, batches(model), progress=False)
    assert all(found.ranges[name] == pytest.approx(ends, rel=1e-4) for name, ends in expected.ranges.items())
    assert not bk.report(model).fallbacks
    bk.quantize_(model, SIGNED, calibration=found)
    assert not bk.report(model).fallbacks and bk.report(model).rows[0].runs


def test_training_mode_and_progress_bar(capsys):
    model = tiny("BertModel").train()
    bk.calibrate(model, batches(model))
    assert model.training and "calibrate" in capsys.readouterr().err


def test_keeping_the_originals():
    model = tiny("BertForMaskedLM")
    expected = outputs(model, batches(model))
    bk.quantize_(model, replace(SIGNED, keep_original=True), calibration=batches(model), progress=False)
    assert model.cls.predictions.decoder.input_scale > 0, "a tied decoder has a range of its own"
    bk.restore(model)
    assert torch.equal(outputs(model, batches(model)), expected)


class _HalfUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


FEATURES = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("make", "config", "data", "options", "error", "message"),
    [
        (None, SIGNED, None, {}, ValueError, 'expected calibration with activation "static": batches .* Got None'),
        (None, bk.Int8Config(), FEATURES, {}, ValueError, 'expected activation "static" with calibration'),
        (None, SIGNED, [], {}, ValueError, "expected at least one batch. Got none"),
        (None, SIGNED, "text", {}, TypeError, "expected batches to be an iterable of batches. Got str"),
        (None, SIGNED, ["text"], {}, TypeError, "expected a tokenizer with batches of strings"),
        (None, SIGNED, FEATURES, {"observer": "median"}, ValueError, "expected observer to be one of absmax"),
        (None, SIGNED, FEATURES, {"speed": 1}, TypeError, "expected options .*, or fields of Int8Config .* Got speed"),
        (None, bk.Int8Config(), None, {"keep_original": True}, TypeError, "fields of Int8Config .* Got keep_original"),
        (None, SIGNED, bk.Calibration(), {}, ValueError, r"expected calibration to hold a range of .*query. Got none"),
        (None, SIGNED, bk.Calibration(), {"batch_size": 4}, TypeError, "expected batch_size only with batches"),
        (_HalfUsed, SIGNED, FEATURES, {}, ValueError, "expected the batches to reach idle. Got none that does"),
        (_HalfUsed, SIGNED, FEATURES * float("nan"), {}, ValueError, "the input of used to be finite. Got Inf or NaN"),
        (_HalfUsed, SIGNED, FEATURES * 0, {}, ValueError, "Got none that does|Got only zeros"),
    ],
)
def test_refused_and_unchanged(make, config, data, options, error, message):
    model = (make or (lambda: tiny("BertForSequenceClassification")))()
    before = {name: (type(module), id(module)) for name, module in model.named_modules()}
    with pytest.raises(error, match=message):
        bk.quantize_(model, config, calibration=data, **options)
    assert {name: (type(module), id(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_only_zeros():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"expected inputs of 0 other than zero. Got only zeros: skip that layer"):
        bk.calibrate(model, torch.zeros(2, 4), progress=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "expected version 1. Got None"),
        ({"version": 2, "more": 1}, "expected version 1. Got 2"),
        ({"version": 1, "more": 1}, r"expected fields among ranges, version. Got \['more'\]"),
        ({"version": 1, "ranges": []}, "expected ranges by name. Got list"),
        ({"version": 1, "ranges": {"a": 1}}, r"expected a range \(low, high\) of a. Got 1"),
        ({"version": 1, "ranges": {"a": [0, 0]}}, "finite and not both 0, of a"),
        ({"version": 1, "ranges": {"a": [0, float("inf")]}}, "finite and not both 0, of a"),
        ({"version": 1, "ranges": {"a": [1, 2]}}, "low <= 0 <= high"),
        ([], "expected a mapping. Got list"),
    ],
)
def test_records_that_are_none(values, message):
    with pytest.raises(ValueError, match=f"Calibration: .*{message}"):
        bk.Calibration.from_dict(values)


def test_a_float_checkpoint_cannot_be_made_static_while_it_loads(tmp_path):
    tiny("BertModel").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected calibration with activation \"static\""):
        type(tiny("BertModel")).from_pretrained(tmp_path, quantization_config=SIGNED)


def test_a_quantized_model_is_refused():
    model = bk.quantize_(tiny("BertModel"))
    with pytest.raises(ValueError, match="calibrate: expected a float model with a linear layer"):
        bk.calibrate(model, batches(model), progress=False)
    with pytest.raises(TypeError, match=r"calibrate: expected a torch.nn.Module. Got dict"):
        bk.calibrate({}, [])
