"""Conversion: each int8 layer within one code of the fake-quantized one, the whole model within 40 dB of it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from bertkern.compress.q8bert import (
    FakeQuantEmbedding,
    FakeQuantLinear,
    OpSettings,
    Q8BertConfig,
    calibrate,
    convert,
    prepare_qat,
)
from bertkern.compress.q8bert.conversion import linear_parts
from tests import reference
from tests.tiny_models import CLASSES, inputs, main_output, tiny

FAKE = (FakeQuantLinear, FakeQuantEmbedding)


def trained_layer(mode: str = "ema", *, bias: bool = True, **settings) -> tuple[FakeQuantLinear, torch.Tensor]:
    torch.manual_seed(3)
    layer = FakeQuantLinear(67, 29, bias, settings=OpSettings(mode=mode, **settings))
    x = torch.randn(40, 67)
    layer(x)
    return layer.eval(), x


def run(parts, x: torch.Tensor) -> torch.Tensor:
    steps = float(parts.input_scale), float(parts.output_scale), parts.input_zero_point
    return reference.int8_linear(parts.weight_codes, parts.weight_scale, parts.bias, *steps)(x)


@pytest.mark.parametrize("requantize", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_static_parts_are_within_one_code(requantize, bias):
    layer, x = trained_layer(bias=bias, requantize_output=requantize)
    parts = linear_parts(layer)
    assert parts.weight_codes.dtype == torch.int8 and parts.weight_codes.abs().max() == 127
    assert parts.weight_scale.shape == (1,) and parts.weight_scale.dtype == torch.float32
    assert (parts.bias is None) == (not bias)
    assert torch.equal(parts.weight_codes.float(), layer.weight_codes())
    assert (float(parts.output_scale) > 0) == requantize
    difference = (run(parts, x * 1.2) - layer(x * 1.2)).abs()
    code = float(parts.output_scale) if requantize else float(parts.input_scale * parts.weight_scale) * 127
    assert difference.max() <= code * 1.001
    assert (difference > code * 0.01).double().mean() < 0.01, "a few values may round to the neighbouring code"


def test_dynamic_parts_agree_where_a_batch_is_one_token():
    layer, x = trained_layer("dynamic", requantize_output=False)
    parts = linear_parts(layer)
    assert parts.input_scale == 0 and parts.output_scale == 0
    for row in x.split(1):
        torch.testing.assert_close(run(parts, row).float(), layer(row), rtol=1e-3, atol=1e-3)


def test_dynamic_per_token_is_nearer_to_fp32_than_per_batch():
    layer, x = trained_layer("dynamic")
    exact = nn.functional.linear(x, layer.weight, layer.bias)
    assert reference.sqnr(exact, run(linear_parts(layer), x)) > reference.sqnr(exact, layer(x))


def test_biases_have_32_bits():
    layer, _ = trained_layer()
    parts = linear_parts(layer)
    steps = parts.bias.double() / (float(parts.input_scale) * float(parts.weight_scale))
    assert (steps - steps.round()).abs().max() < 1e-2
    assert (parts.bias - layer.bias).abs().max() <= float(parts.input_scale * parts.weight_scale)


def test_narrow_weights_convert():
    layer, x = trained_layer(weight_bits=4, requantize_output=False)
    parts = linear_parts(layer)
    assert parts.weight_codes.abs().max() == 7
    torch.testing.assert_close(run(parts, x).float(), layer(x), rtol=1e-3, atol=1e-3)


def real_rows(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The main outputs [rows, features] of a model at real tokens."""
    rows = []
    with torch.no_grad():
        for batch in batches:
            output = main_output(model(**batch))
            real = batch["attention_mask"].bool()
            output = output[real] if output.shape[:2] == real.shape else output
            rows.append(output.reshape(-1, output.shape[-1]))
    return torch.cat(rows)


# Logits of 8 bits tie by the dozen among random weights; Q8BERT's successors do not requantize them either.
EXACT_LOGITS = Q8BertConfig().replace(head=OpSettings(requantize_output=False))


@pytest.mark.parametrize("class_name", CLASSES)
def test_whole_models(class_name, reference_kernels):
    """The model agrees with its simulation as well as the simulation does with itself in float64.

    A value on the border of two codes falls to either side by the last bit of what was computed before, and each such
    fall pushes others: rounding networks amplify noise up to that of the quantization itself. No kernel can be nearer
    to an fp32 simulation than the same simulation in float64 is, but for luck (3 dB, half a per cent).
    """
    model = tiny(class_name)
    calibrate(model, [inputs(model, seed=s) for s in range(4)], EXACT_LOGITS, progress=False)
    converted = convert(copy.deepcopy(model))
    assert not any(isinstance(m, FAKE) for m in converted.modules())
    assert not hasattr(converted.config, "q8bert") and hasattr(model.config, "q8bert")
    assert not converted.training
    batches = [inputs(model, batch=32, seed=s) for s in range(10, 14)]
    simulated, actual = real_rows(model, batches), real_rows(converted, batches)
    exact = real_rows(model.double(), batches)
    print(
        f"{reference.sqnr(simulated, actual):.1f} dB, agreement {reference.agreement(simulated, actual):.4f}; float64 "
        f"simulation {reference.sqnr(simulated, exact):.1f} dB, {reference.agreement(simulated, exact):.4f}"
    )
    assert reference.sqnr(simulated, actual) >= min(40, reference.sqnr(simulated, exact) - 3)
    assert reference.agreement(simulated, actual) >= min(0.995, reference.agreement(simulated, exact) - 0.005)


def test_hidden_states_of_a_deep_model_at_transformers_own_initialization(reference_kernels):
    model = tiny("BertModel", hidden_size=256, intermediate_size=1024, num_hidden_layers=12)
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.dim() == 2:
            torch.nn.init.normal_(parameter, 0, 0.02)
    calibrate(model, [inputs(model, seed=s) for s in range(4)], Q8BertConfig(), progress=False)
    batches = [inputs(model, batch=16, seed=s) for s in range(10, 12)]
    simulated = real_rows(model, batches)
    actual = real_rows(convert(model), batches)
    assert reference.sqnr(simulated, actual) >= 40


def test_tied_codes_are_one_tensor(reference_kernels):
    model = tiny("BertForMaskedLM")
    calibrate(model, inputs(model), progress=False)
    convert(model)
    assert model.cls.predictions.decoder.weight_codes is model.bert.embeddings.word_embeddings.weight_codes


def test_a_shared_layer_stays_shared(reference_kernels):
    model = tiny("BertModel")
    model.encoder.layer[1].output.dense = model.encoder.layer[0].output.dense
    calibrate(model, inputs(model), progress=False)
    convert(model)
    assert model.encoder.layer[1].output.dense is model.encoder.layer[0].output.dense
    assert isinstance(model.encoder.layer[1].output.dense, reference.Int8LinearReference)


def test_mode_none_becomes_plain_again(reference_kernels):
    model = prepare_qat(
        tiny("BertForSequenceClassification"), Q8BertConfig.uniform(mode="dynamic").replace(head=OpSettings("none"))
    )
    convert(model)
    assert type(model.classifier) is nn.Linear and set(model.classifier.state_dict()) == {"weight", "bias"}


def test_a_single_layer(reference_kernels):
    layer, _ = trained_layer()
    assert isinstance(convert(layer), reference.Int8LinearReference)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"expected bert.encoder.layer.0.attention.self.query.input_thresh to be positive.* Got 0.0"),
        ({"mode": "dynamic", "activation_bits": 4}, "query to have activations of 8 bits. Got 4"),
    ],
)
def test_refused_before_any_change(settings, message, reference_kernels):
    model = prepare_qat(tiny("BertForSequenceClassification"), Q8BertConfig.uniform(**settings))
    kinds = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        convert(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds


@pytest.mark.parametrize("name", ["weight", "bias", "output_thresh"])
def test_what_is_not_finite_is_refused(name, reference_kernels):
    model = tiny("BertForSequenceClassification")
    calibrate(model, inputs(model), Q8BertConfig(), progress=False)
    with torch.no_grad():
        getattr(model.classifier, name).fill_(float("inf"))
    with pytest.raises(ValueError, match=f"expected classifier.{name} to be"):
        convert(model)


def test_a_pruned_weight_converts_as_its_last_step_left_it(reference_kernels):
    model = prepare_qat(tiny("BertModel"), Q8BertConfig.uniform(mode="dynamic"))
    layer = model.pooler.dense
    prune.l1_unstructured(layer, "weight", 0.5)
    with torch.no_grad():
        # An optimizer's step; torch masks the weight again only at the next forward call.
        layer.weight_orig.mul_(2)
    expected, mask = layer.weight_orig.abs().amax() / 127, layer.weight_mask
    convert(model)
    torch.testing.assert_close(model.pooler.dense.weight_scale, expected.reshape(1))
    assert (model.pooler.dense.weight_codes[mask == 0] == 0).all()


def test_a_plain_model_is_refused():
    with pytest.raises(ValueError, match="Got no fake-quantized layer"):
        convert(tiny("BertModel"))
