"""Layers that train as low-bit ones: what they compute, their gradients and ranges, and how a model gets them."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertkern.compress.groupwise import FakeQuantGroupwiseEmbedding, FakeQuantGroupwiseLinear, prepare_qat
from bertkern.compress.groupwise import modules as qat_modules
from bertkern.compress.groupwise.fake_quant import fake_static, fake_tokens, straight_through
from bertkern.config import GroupwiseConfig, Int8Config
from bertkern.formats.groupwise import quantize_groupwise
from bertkern.formats.rounding import METHODS, round_weight
from tests import reference
from tests.tiny_models import VOCABULARY, inputs, main_output, tiny

CONFIGS = [
    GroupwiseConfig(bits=3, groups=8),
    GroupwiseConfig(bits=2, axis="k", group_size=16, symmetric=True),
    GroupwiseConfig(bits=4, axis="k", group_size=20, shared=True, method="percentile", activation="float"),
    GroupwiseConfig(bits=3, groups=8, method="mse", activation="static", activation_unsigned=True),
    GroupwiseConfig(bits=4, groups=8, layer_bits={"layer.1": [2, 4] * 4}, activation="static", embedding_bits=None),
]


def prepared(config: GroupwiseConfig, shape: tuple[int, int] = (24, 40), **options) -> nn.Linear:
    """One layer with groups of `config`, in training mode."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    return prepare_qat(model, config, **options)[0].train()


def rows(count: int = 11, width: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + 0.3


# --- one layer ------------------------------------------------------------------------------------------------------


def test_gradients_pass_straight_through():
    x = torch.linspace(-3, 3, 13, requires_grad=True)
    straight_through(x, x.detach().clamp(-1, 1).round()).mul(torch.arange(13.0)).sum().backward()
    assert torch.equal(x.grad, torch.arange(13.0))
    for half in (torch.bfloat16, torch.float16):
        assert straight_through(x.to(half), x.detach().round()).dtype == half


def test_activations_round_as_the_kernels_do():
    x = torch.cat([rows(), torch.zeros(1, 40), rows().abs(), -rows().abs()])
    codes, step, zero = reference.quantize_ranges(x)
    expected = (codes.float() - zero[:, None]) * step[:, None]
    assert (fake_tokens(x) - expected).abs().max() < 1e-5
    signed, one = reference.quantize_rows(x, scale=2.5 / 127)
    assert (fake_static(x, -2.5, 1.0, False) - signed.float() * one).abs().max() < 1e-5


@pytest.mark.parametrize("config", CONFIGS[:4])
def test_forward_is_that_of_the_rounded_weight(config):
    layer, x = prepared(config), rows()
    y = layer(x)
    weight = round_weight(
        layer.weight.detach(),
        config.bits,
        config.size_of(24 if config.axis == "n" else 40),
        config.axis,
        method=config.method,
        symmetric=config.symmetric,
        whole_zero=config.whole_zero,
        shared=config.shared,
    )
    if config.activation == "dynamic":
        x = fake_tokens(x)
    elif config.activation == "static":
        x = fake_static(x, float(x.min()), float(x.max()), True)
    expected = F.linear(x, weight.dequantize(), layer.bias)
    assert torch.allclose(y, expected, atol=1e-5)
    assert torch.equal(layer.eval().groupwise_weight().codes, weight.codes)
    assert torch.allclose(layer(rows()), expected, atol=1e-5)
    assert layer._step == 1


@pytest.mark.parametrize("config", CONFIGS[:4])
def test_layer_gradients_are_those_of_the_rounded_operands(config):
    layer, x = prepared(config), rows().requires_grad_()
    y = layer(x)
    sign = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(sign)
    rounded = layer.groupwise_weight().dequantize()
    assert torch.allclose(x.grad, sign @ rounded, atol=1e-4)
    seen = x.detach()
    if config.activation == "dynamic":
        seen = fake_tokens(seen)
    elif config.activation == "static":
        seen = fake_static(seen, *layer.input_range(), True)
    assert torch.allclose(layer.weight.grad, sign.T @ seen, atol=1e-4)
    assert torch.allclose(layer.bias.grad, sign.sum(0), atol=1e-4)


@pytest.mark.parametrize("method", ["minmax", "percentile"])
@pytest.mark.parametrize("axis", ["n", "k"])
def test_ranges_of_weights_are_moving_averages(method, axis):
    config = GroupwiseConfig(bits=4, group_size=8, axis=axis, method=method)
    layer = prepared(config, weight_decay=0.9)
    low = high = None
    for step in range(5):
        with torch.no_grad():
            layer.weight.mul_(1 + 0.2 * step)
        layer(rows())
        groups = layer.weight.detach().unflatten(0 if axis == "n" else 1, (-1, 8))
        groups = groups.flatten(1) if axis == "n" else groups
        ends = groups.amin(-1), groups.amax(-1)
        if method == "percentile":
            ends = tuple(torch.quantile(groups, torch.tensor(share), dim=-1) for share in (0.001, 0.999))
        low, high = ends if low is None else (0.9 * low + 0.1 * ends[0], 0.9 * high + 0.1 * ends[1])
        assert torch.allclose(layer.weight_low, low, atol=1e-6) and torch.allclose(layer.weight_high, high, atol=1e-6)
    kept = layer.eval().groupwise_weight()
    ranges = (layer.weight_low, layer.weight_high)
    expected = quantize_groupwise(layer.weight.detach(), 4, 8, axis, whole_zero=True, ranges=ranges)
    assert torch.equal(kept.codes, expected.codes) and torch.equal(kept.scale, expected.scale)


def test_searched_ranges_stay_between_searches(monkeypatch):
    monkeypatch.setattr(qat_modules, "REFRESH", 3)
    layer = prepared(GroupwiseConfig(bits=2, groups=4, method="mse"))
    seen = []
    for _ in range(7):
        layer(rows())
        seen.append(layer.weight_low.clone())
        with torch.no_grad():
            layer.weight.mul_(1.5)
    same = [torch.equal(before, after) for before, after in pairwise(seen)]
    assert same == [True, True, False, True, True, False]


def test_static_ranges_are_moving_averages():
    layer = prepared(GroupwiseConfig(groups=4, activation="static"), input_decay=0.75)
    x = [rows(seed=seed) * (1 + seed) for seed in range(3)]
    low, high = float(x[0].min()), float(x[0].max())
    assert torch.equal(layer.eval()(x[0]), F.linear(x[0], layer.weight, layer.bias)), "no range yet: a plain layer"
    layer.train()(x[0])
    for batch in x[1:]:
        layer(batch)
        low, high = 0.75 * low + 0.25 * float(batch.min()), 0.75 * high + 0.25 * float(batch.max())
    assert layer.input_range() == pytest.approx((low, high))
    layer(torch.full((2, 40), torch.nan))
    layer(torch.empty(0, 40))
    assert layer.input_range() == pytest.approx((low, high)) and layer._step == 5


def test_warm_up_runs_in_floating_point():
    layer = prepared(GroupwiseConfig(bits=2, groups=4), start_step=2)
    plain = F.linear(rows(), layer.weight, layer.bias)
    assert torch.equal(layer(rows()), plain) and torch.equal(layer(rows()), plain)
    assert not torch.allclose(layer(rows()), plain, atol=1e-2)


def test_table_rows_are_groups():
    model = prepare_qat(tiny("BertModel"), GroupwiseConfig(groups=8, embedding_bits=3))
    table = model.embeddings.word_embeddings
    ids = torch.tensor([[5, 9, 5], [0, 119, 7]])
    expected = quantize_groupwise(table.weight.detach(), 3, 1, whole_zero=True)
    assert torch.equal(table.groupwise_weight().codes, expected.codes)
    assert torch.allclose(table(ids), expected.dequantize()[ids], atol=1e-6)
    table(ids).sum().backward()
    counts = torch.bincount(ids[ids != table.padding_idx].flatten(), minlength=VOCABULARY).float()
    assert torch.equal(table.weight.grad, counts[:, None].expand(-1, 48))
    assert table(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 48)


@pytest.mark.parametrize("method", ["mse", "percentile"])
def test_rows_that_are_read_twice_are_searched_once(method, monkeypatch):
    model = prepare_qat(tiny("BertModel"), GroupwiseConfig(groups=8, embedding_bits=3, method=method)).train()
    table = model.embeddings.word_embeddings
    ids = torch.tensor([[5, 9, 5, 5], [9, 119, 7, 5]])
    expected = round_weight(table.weight.detach(), 3, 1, method=method, whole_zero=method != "mse").dequantize()
    seen, find = [], METHODS[method]
    monkeypatch.setitem(METHODS, method, lambda groups, *more: seen.append(len(groups)) or find(groups, *more))
    out = table(ids)
    assert seen == [4] and torch.allclose(out, expected[ids], atol=1e-6)
    out.sum().backward()
    assert torch.equal(table.weight.grad[[5, 7, 9, 119], 0], torch.tensor([4.0, 1.0, 2.0, 1.0]))


def test_what_no_step_changes_is_made_once(monkeypatch):
    layer = prepared(GroupwiseConfig(bits=3, groups=8))
    layer(rows())
    expected = layer(rows())
    monkeypatch.setattr(qat_modules, "expect_bits", lambda *_: pytest.fail("it is known"))
    assert torch.equal(layer(rows()), expected)
    assert torch.equal(copy.deepcopy(layer)(rows()), expected)
    monkeypatch.undo()
    assert layer.bfloat16()(rows().bfloat16()).dtype == torch.bfloat16
    assert "_known" not in vars(layer.release())


# --- whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_prepare_keeps_names_parameters_and_objects(config):
    model = tiny("BertForSequenceClassification")
    names, parameters, objects = list(model.state_dict()), list(model.parameters()), list(model.modules())
    assert prepare_qat(model, config) is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(a is b for a, b in zip(objects, model.modules(), strict=True))
    assert [name for name in model.state_dict() if name in names] == names
    linears = [module for module in model.modules() if isinstance(module, FakeQuantGroupwiseLinear)]
    tables = [module for module in model.modules() if isinstance(module, FakeQuantGroupwiseEmbedding)]
    assert len(linears) == 12 and len(tables) == (3 if config.embedding_bits else 0)
    assert type(model.classifier) is nn.Linear and type(model.bert.pooler.dense) is nn.Linear


@pytest.mark.parametrize("config", CONFIGS)
def test_a_model_learns_and_its_state_reloads(config):
    model = prepare_qat(tiny("BertForSequenceClassification", initializer_range=0.05), config).train()
    model.config.hidden_dropout_prob = 0.0
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    batch = inputs(model, batch=8)
    losses = []
    for _ in range(30):
        loss = model(**batch, labels=torch.arange(8) % 3).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        expected = main_output(model.eval()(**batch))
        other = prepare_qat(tiny("BertForSequenceClassification", seed=7, initializer_range=0.05), config)
        other.load_state_dict(model.state_dict())
        for copied in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(main_output(copied(**batch)), expected)


def test_ranges_stay_fp32_in_casts():
    model = prepare_qat(tiny("BertModel"), GroupwiseConfig(groups=8, activation="static"), weight_decay=0.99)
    model.train()(**inputs(model))
    layer = model.bfloat16().encoder.layer[0].output.dense
    assert layer.weight.dtype == torch.bfloat16
    assert {layer.weight_low.dtype, layer.input_high.dtype, layer._step.dtype} == {torch.float32}
    assert main_output(model(**inputs(model))).dtype == torch.bfloat16


def test_a_tied_decoder_has_the_rows_of_its_table():
    model = prepare_qat(tiny("BertForMaskedLM"), GroupwiseConfig(groups=8, axis="k", head=True))
    decoder, table = model.cls.predictions.decoder, model.bert.embeddings.word_embeddings
    assert decoder.weight is table.weight
    assert torch.equal(decoder.groupwise_weight().codes, table.groupwise_weight().codes)
    assert model.cls.predictions.transform.dense.settings.axis == "k"


def test_refusals_leave_the_model_alone():
    def kinds(model: nn.Module) -> list[type]:
        return [type(module) for module in model.modules()]

    model = tiny("BertModel")
    before = kinds(model)
    with pytest.raises(TypeError, match=r"expected config to be a GroupwiseConfig. Got Int8Config"):
        prepare_qat(model, Int8Config())
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module. Got str"):
        prepare_qat("model")
    with pytest.raises(ValueError, match=r"expected weight_decay to be at least 0 and below 1. Got 1"):
        prepare_qat(model, weight_decay=1)
    with pytest.raises(ValueError, match=r"expected start_step to be a whole number"):
        prepare_qat(model, start_step=-1)
    with pytest.raises(ValueError, match=r"layer.1.output.dense: expected bits of 8 groups. Got 3"):
        prepare_qat(model, GroupwiseConfig(groups=8, layer_bits={"layer.1.output": (2, 3, 4)}))
    with pytest.raises(ValueError, match=r"with a linear layer to quantize. Got none"):
        prepare_qat(nn.Sequential(nn.ReLU()))
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"expected encoder.layer.1.output.dense.weight to be finite"):
        prepare_qat(model)
    assert kinds(model) == before
    once = prepare_qat(tiny("BertModel"))
    with pytest.raises(TypeError, match=r"prepared already"):
        prepare_qat(once)
