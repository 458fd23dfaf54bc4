"""Fake quantization against the paper's arithmetic, its gradients, and its ranges over training."""

import copy
import pickle

import pytest
import torch
from torch import nn

from bertkern.compress.q8bert import FakeQuantEmbedding, FakeQuantLinear, OpSettings
from bertkern.compress.q8bert.fake_quant import fake_quantize, scale_of
from tests import reference


def layer_and_input(mode: str = "ema", *, bias: bool = True, **settings) -> tuple[FakeQuantLinear, torch.Tensor]:
    torch.manual_seed(0)
    layer = FakeQuantLinear(19, 13, bias, settings=OpSettings(mode=mode, **settings))
    return layer, torch.randn(5, 7, 19)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fake_quantize_rounds_to_the_nearest_code(bits):
    x = torch.linspace(-3, 3, 2001)
    actual = fake_quantize(x, scale_of(torch.tensor(1.5), bits), bits)
    torch.testing.assert_close(actual, reference.fake_quantize(x, 1.5, bits))
    assert actual.unique().numel() == 2**bits - 1


def test_gradients_pass_straight_through_clipped_values_too():
    x = torch.tensor([0.1, -5.0, 3.0], requires_grad=True)
    fake_quantize(x, torch.tensor(127.0)).backward(torch.tensor([1.0, 2.0, 3.0]))
    assert x.grad.tolist() == [1, 2, 3]


def test_training_gradients_are_those_of_the_rounded_operands():
    layer, x = layer_and_input(requantize_output=False)
    x.requires_grad_()
    layer(x).sum().backward()
    rounded = reference.fake_quantize(x.detach(), float(x.detach().abs().max()))
    torch.testing.assert_close(layer.weight.grad, rounded.sum((0, 1)).expand(13, 19))
    weight = reference.fake_quantize(layer.weight.detach(), float(layer.weight.detach().abs().max()))
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 7, 19))
    torch.testing.assert_close(layer.bias.grad, torch.full((13,), 35.0))


def test_ranges_start_at_the_first_batch_and_then_follow():
    layer, _ = layer_and_input(start_step=2, ema_decay=0.9)
    layer.requires_grad_(False)
    batches = [torch.randn(4, 19) * (i + 1) for i in range(6)]
    for batch in batches[:2]:
        torch.testing.assert_close(layer(batch), nn.functional.linear(batch, layer.weight, layer.bias))
        assert layer.input_thresh == 0 and layer.output_thresh == 0
    outputs = []
    for batch in batches[2:]:
        layer(batch)
        threshold = float(layer.input_thresh)
        weight = reference.fake_quantize(layer.weight.detach(), float(layer.weight.detach().abs().max()))
        outputs.append(
            float(nn.functional.linear(reference.fake_quantize(batch, threshold), weight, layer.bias).abs().max())
        )
    expected = reference.moving_range([float(b.abs().max()) for b in batches[2:]], 0.9)
    assert float(layer.input_thresh) == pytest.approx(expected, rel=1e-5)
    assert float(layer.output_thresh) == pytest.approx(reference.moving_range(outputs, 0.9), rel=1e-5)
    assert layer._step == 6


def test_evaluation_changes_no_state():
    layer, x = layer_and_input()
    layer(x)
    before = copy.deepcopy(layer.state_dict())
    layer.eval()(x * 100)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("mode", ["ema", "dynamic"])
@pytest.mark.parametrize("requantize", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_evaluation_is_the_papers_integer_inference(mode, requantize, bias):
    layer, x = layer_and_input(mode, bias=bias, requantize_output=requantize)
    layer(x)
    layer.eval().requires_grad_(False)
    ema = mode == "ema"
    actual = layer(x * 0.9)
    output_thresh = (float(layer.output_thresh) if ema else 0.0) if requantize else None
    expected = reference.q8bert_linear(
        x * 0.9, layer.weight, layer.bias, float(layer.input_thresh) if ema else 0.0, output_thresh
    )
    # fp32 against float64 may round a value on the border of two output codes either way.
    step = float(expected.abs().max()) / 127 if requantize else 0
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5 + step * 1.01)
    assert ((actual - expected).abs() > 1e-4).double().mean() < 0.01


def test_without_ranges_evaluation_is_plain():
    layer, x = layer_and_input(start_step=5)
    layer(x)
    assert torch.equal(layer.eval()(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_mode_none_is_plain():
    layer, x = layer_and_input("none")
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert layer._step == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_batch_leaves_the_ranges(bad):
    layer, x = layer_and_input()
    layer(x)
    before = float(layer.input_thresh)
    layer(torch.full_like(x, bad))
    assert float(layer.input_thresh) == before


def test_zeros_stay_zeros():
    layer, x = layer_and_input(bias=False)
    assert torch.equal(layer(torch.zeros_like(x)), torch.zeros(5, 7, 13))
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(layer(x), torch.zeros(5, 7, 13))


def test_empty_input():
    layer, x = layer_and_input("dynamic")
    assert layer(x[:0]).shape == (0, 7, 13)
    assert layer.eval()(x[:0]).shape == (0, 7, 13)


def test_state_is_named_as_in_nlp_architect():
    layer, _ = layer_and_input()
    assert set(layer.state_dict()) == {"weight", "bias", "_step", "input_thresh", "output_thresh"}
    assert all(layer.state_dict()[name].shape == (1,) for name in ("_step", "input_thresh", "output_thresh"))
    layer, _ = layer_and_input(requantize_output=False)
    assert set(layer.state_dict()) == {"weight", "bias", "_step", "input_thresh"}
    assert set(FakeQuantEmbedding(4, 2).state_dict()) == {"weight", "_step"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_ranges_stay_fp32(dtype):
    layer, x = layer_and_input()
    layer(x)
    expected = float(layer.input_thresh)
    parent = nn.Sequential(layer).to(dtype)
    assert layer.input_thresh.dtype == layer._step.dtype == torch.float32
    assert float(layer.input_thresh) == expected
    assert parent(x.to(dtype)).dtype == parent.eval()(x.to(dtype)).dtype == dtype


def test_autocast_does_not_reach_the_integers():
    layer, x = layer_and_input()
    layer(x)
    expected = layer.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)
        assert layer.train()(x).dtype == torch.bfloat16


def test_copies_and_pickles_keep_everything():
    layer, x = layer_and_input(start_step=1)
    layer(x), layer(x)
    expected = layer.eval()(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.settings == layer.settings
        assert torch.equal(other(x), expected)


def test_from_linear_shares_parameters_and_leaves_the_linear():
    linear = nn.Linear(4, 3).eval()
    layer = FakeQuantLinear.from_linear(linear, OpSettings(mode="dynamic"))
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert type(linear) is nn.Linear and set(linear.state_dict()) == {"weight", "bias"}
    assert layer.input_thresh.device == linear.weight.device


def test_adopt_and_release_keep_the_object():
    linear = nn.Linear(4, 3)
    parameters = list(linear.parameters())
    layer = FakeQuantLinear.adopt(linear, OpSettings())
    assert layer is linear and all(a is b for a, b in zip(parameters, layer.parameters(), strict=True))
    assert type(layer.release()) is nn.Linear and set(linear.state_dict()) == {"weight", "bias"}
    with pytest.raises(TypeError, match=r"expected a plain Linear. Got Embedding"):
        FakeQuantLinear.adopt(nn.Embedding(2, 2), OpSettings())


@pytest.mark.parametrize("mode", ["ema", "dynamic"])
def test_embedding_rounds_the_whole_table_by_one_scale(mode):
    torch.manual_seed(0)
    table = FakeQuantEmbedding(11, 6, padding_idx=0, settings=OpSettings(mode=mode))
    ids = torch.tensor([[1, 2, 0], [10, 1, 1]])
    expected = reference.fake_quantize(table.weight.detach(), float(table.weight.detach().abs().max()))[ids]
    torch.testing.assert_close(table(ids), expected)
    torch.testing.assert_close(table.eval()(ids), expected)
    table(ids).sum().backward()
    assert table.weight.grad[:, 0].tolist() == [0, 3, 1] + [0] * 7 + [1]


def test_embedding_waits_for_its_start_step():
    table = FakeQuantEmbedding(11, 6, settings=OpSettings(start_step=1))
    ids = torch.arange(11)
    assert torch.equal(table(ids), table.weight)
    assert not torch.equal(table(ids), table.weight)


def test_embedding_from_embedding_keeps_its_options():
    plain = nn.Embedding(11, 6, padding_idx=3, sparse=True, scale_grad_by_freq=False)
    table = FakeQuantEmbedding.from_embedding(plain)
    assert table.weight is plain.weight and table.padding_idx == 3 and table.sparse


def test_repr_tells_the_settings():
    layer, _ = layer_and_input("dynamic")
    assert "mode=dynamic, weight_bits=8, activation_bits=8" in repr(layer)
