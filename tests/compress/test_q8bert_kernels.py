"""Q8BERT on the compiled kernels: layers with the bits of the simulation, models that accelerate, save and load.

A linear or table gives the very bits of the simulated one, so a converted model that is not fused does, too. The fused
encoder has LayerNorm and attention of its own, a last bit away from torch's in places: a value on the border of two
codes then falls to the other side, and one such fall brings more with every rounding behind it. Most inputs meet none
and agree to 120 dB and more; those that do part as far as torch does from itself on another instruction set.
"""

import copy

import pytest
import torch
from torch import nn

from bertkern.checkpoints import load_checkpoint
from bertkern.compress.q8bert import FakeQuantEmbedding, FakeQuantLinear, OpSettings, Q8BertConfig, calibrate, convert
from tests import reference
from tests.nlp_architect_export import export
from tests.tiny_models import inputs, main_output, tiny

CLASSES = ["BertForSequenceClassification", "RobertaForQuestionAnswering", "DistilBertForMaskedLM", "MPNetModel"]
EXACT_LOGITS = Q8BertConfig().replace(head=OpSettings(requantize_output=False))


@pytest.fixture(autouse=True)
def compiled_ops():
    """The operators; tests of them must not pass by being skipped."""
    try:
        import bertkern.nn  # noqa: F401

        torch.ops.bertkern.pack_qlinear  # noqa: B018
    except (ImportError, AttributeError) as error:
        pytest.fail(f"expected bertkern's operators: build them first. Got {error}")


def calibrated(class_name: str, config: Q8BertConfig = EXACT_LOGITS) -> nn.Module:
    model = tiny(class_name)
    calibrate(model, [inputs(model, seed=s) for s in range(4)], config, progress=False)
    return model


@pytest.mark.parametrize("requantize", [True, False])
@pytest.mark.parametrize("class_name", CLASSES)
def test_each_layer_is_within_one_code(class_name, requantize):
    for name, layer, int8, x in pairs(class_name, Q8BertConfig.uniform(requantize_output=requantize)):
        codes, weights = float(layer.input_thresh) / 127, float(1 / layer.weight_scale())
        # One input code can fall the other way, times the largest weight; or one output code can.
        code = float(layer.output_thresh) / 127 if requantize else codes * weights * 127
        difference = (int8(x) - layer(x)).abs()
        assert difference.max() <= code * 1.001, name
        assert (difference > code * 0.01).double().mean() < 0.01, name


@pytest.mark.parametrize("requantize", [True, False])
@pytest.mark.parametrize("class_name", CLASSES)
def test_each_layer_has_the_bits_of_the_simulated_one(class_name, requantize):
    for name, layer, int8, x in pairs(class_name, Q8BertConfig.uniform(requantize_output=requantize)):
        assert torch.equal(int8(x), layer(x)), name


def pairs(class_name: str, config: Q8BertConfig) -> list[tuple[str, nn.Module, nn.Module, torch.Tensor]]:
    """(name, simulated linear, int8 linear, input) of a model; tables are compared here."""
    simulated = calibrated(class_name, config).requires_grad_(False)
    converted = convert(copy.deepcopy(simulated))
    torch.manual_seed(0)
    found = []
    for name, layer in simulated.named_modules():
        int8 = converted.get_submodule(name)
        if isinstance(layer, FakeQuantEmbedding):
            assert torch.equal(int8(torch.arange(layer.num_embeddings)), layer(torch.arange(layer.num_embeddings)))
        elif isinstance(layer, FakeQuantLinear):
            found.append((name, layer, int8, torch.randn(37, layer.in_features) * layer.input_thresh / 3))
    assert len(found) >= 12
    return found


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        batches = [inputs(model, batch=32, seed=s, padding=False) for s in range(10, 14)]
        return torch.cat([main_output(model(**batch)).flatten(0, -2) for batch in batches])


@pytest.mark.parametrize("config", [Q8BertConfig(), Q8BertConfig.uniform(requantize_output=False)], ids=["all", "in"])
@pytest.mark.parametrize("class_name", CLASSES)
def test_whole_models_have_the_bits_of_the_simulated_ones(class_name, config):
    simulated = calibrated(class_name, config)
    assert torch.equal(outputs(convert(copy.deepcopy(simulated))), outputs(simulated))


@pytest.mark.parametrize("class_name", CLASSES)
def test_whole_models_fused(class_name):
    import bertkern

    simulated = calibrated(class_name)
    expected, actual = outputs(simulated), outputs(bertkern.accelerate(convert(copy.deepcopy(simulated))))
    assert reference.sqnr(expected, actual) >= 40
    assert reference.agreement(expected, actual) >= 0.995


@pytest.mark.parametrize("class_name", CLASSES)
def test_static_models_save_and_load_bit_for_bit(class_name, tmp_path):
    import bertkern

    model = bertkern.accelerate(convert(calibrated(class_name, Q8BertConfig())))
    batch = inputs(model)
    with torch.no_grad():
        expected = main_output(model(**batch))
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert torch.equal(main_output(loaded(**batch)), expected)
    saved = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("_scale")}
    assert saved and all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in saved.items())


def test_an_imported_model_runs_saves_and_loads(tmp_path):
    import bertkern

    simulated = calibrated("BertForSequenceClassification")
    export(simulated, tmp_path / "theirs", dict(EXACT_LOGITS.items()))
    model = bertkern.accelerate(load_checkpoint(tmp_path / "theirs"))
    batch = inputs(model, batch=32)
    with torch.no_grad():
        expected = model(**batch).logits
        assert reference.agreement(simulated(**batch).logits, expected) >= 0.995
        model.save_pretrained(tmp_path / "ours")
        assert torch.equal(type(model).from_pretrained(tmp_path / "ours")(**batch).logits, expected)
