"""Calibration: the ranges it finds, the data it takes, and what it refuses while the model stays as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bertkern.compress.q8bert import (
    AbsMax,
    FakeQuantLinear,
    MovingAverage,
    OpSettings,
    Percentile,
    Q8BertConfig,
    calibrate,
)
from tests import reference
from tests.tiny_models import CLASSES, VOCABULARY, inputs, tiny


def watched_maxima(model: nn.Module, batch: dict[str, torch.Tensor], name: str) -> tuple[float, float]:
    """max|x| of a layer's input and output over real tokens, by a plain hook."""
    seen = {}

    def hook(module, args, output):
        real = batch["attention_mask"].bool()
        seen["in"], seen["out"] = (float(t[real].abs().max()) for t in (args[0], output))

    handle = model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen["in"], seen["out"]


NAME = "bert.encoder.layer.1.intermediate.dense"


def test_absmax_is_the_largest_over_all_batches_without_padding():
    model = tiny("BertForSequenceClassification")
    batches = [inputs(model, seed=seed) for seed in range(3)]
    expected = [watched_maxima(model, batch, NAME) for batch in batches]
    ranges = calibrate(model, batches, Q8BertConfig(), progress=False)
    assert ranges[NAME].input == pytest.approx(max(i for i, _ in expected), rel=1e-6)
    assert ranges[NAME].output == pytest.approx(max(o for _, o in expected), rel=1e-6)
    layer = model.get_submodule(NAME)
    assert isinstance(layer, FakeQuantLinear) and float(layer.input_thresh) == pytest.approx(ranges[NAME].input)
    assert float(layer.output_thresh) == pytest.approx(ranges[NAME].output)


def test_moving_average_follows_the_papers_rule():
    model = tiny("BertForSequenceClassification")
    batches = [inputs(model, seed=seed) for seed in range(4)]
    maxima = [watched_maxima(model, batch, NAME)[0] for batch in batches]
    ranges = calibrate(model, batches, observer=lambda: MovingAverage(0.7), progress=False)
    assert ranges[NAME].input == pytest.approx(reference.moving_range(maxima, 0.7), rel=1e-6)


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.99, 100.0])
def test_percentile_is_torchs_quantile(percentile):
    torch.manual_seed(0)
    # The largest value grows from batch to batch, so the histogram has to double its top several times.
    batches = [torch.randn(20_000) * 10**step for step in range(4)]
    observer = Percentile(percentile)
    for batch in batches:
        observer.update(batch)
    values = torch.cat(batches).abs()
    # By exact rank: in fp32 the quantile's index rounds to a neighbour, which in the tail lies far off.
    rank = int((len(values) - 1) * percentile / 100)
    low, high = (float(values.sort().values[i]) for i in (rank, min(rank + 1, len(values) - 1)))
    assert low * (1 - 1e-6) <= observer.range() <= high + 2 * float(values.max()) / observer.bins * 1.01


def test_observers_of_zeros():
    for make in (AbsMax, MovingAverage, Percentile):
        observer = make()
        observer.update(torch.zeros(5))
        assert observer.range() == 0


def test_training_goes_on_from_calibrated_ranges():
    model = tiny("BertForSequenceClassification")
    ranges = calibrate(model, inputs(model), Q8BertConfig.uniform(start_step=50), progress=False)
    model.train()(**inputs(model, seed=9))
    assert float(model.get_submodule(NAME).input_thresh) == pytest.approx(ranges[NAME].input, rel=1e-3)


def _forms(model):
    batch = inputs(model, padding=False)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return {
        "mapping": batch,
        "mappings with labels": [{**batch, "labels": torch.full((4,), 99)}],
        "tensor": ids,
        "tensors": [ids[:2], ids[2:]],
        "tuples": [(ids, mask)],
        "loader": DataLoader(TensorDataset(ids, mask), batch_size=2),
        "generator": (part for part in (ids[:2], ids[2:])),
        "strings": ["a"] * 4,
        "lists of strings": [["a"] * 2, ("a",) * 2],
    }


@pytest.mark.parametrize("form", list(_forms(tiny("BertModel"))))
def test_forms_of_data_agree(form):
    model = tiny("BertForSequenceClassification")
    expected = calibrate(copy.deepcopy(model), inputs(model, padding=False), progress=False)
    rows = iter(inputs(model, padding=False)["input_ids"].split(1))

    def tokenizer(texts, **options):
        assert options["padding"] and options["truncation"] and options["return_tensors"] == "pt"
        ids = torch.cat([next(rows) for _ in texts])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    actual = calibrate(model, _forms(model)[form], tokenizer=tokenizer, batch_size=2, progress=False)
    assert actual.keys() == expected.keys()
    assert all(actual[n].input == pytest.approx(expected[n].input, rel=1e-5) for n in expected)


class Sentences(nn.Module):
    """Takes its features as SentenceTransformer does."""

    def __init__(self):
        super().__init__()
        self.auto_model = tiny("MPNetModel")

    def forward(self, features):
        return self.auto_model(**features)


@pytest.mark.parametrize("method", ["tokenize", "preprocess"])
def test_a_model_that_tokenizes_by_itself(method):
    model = Sentences()
    setattr(model, method, lambda texts: inputs(model.auto_model, len(texts)))
    ranges = calibrate(model, ["one", "two", "three"], progress=False)
    assert "auto_model.encoder.layer.0.attention.attn.q" in ranges


@pytest.mark.parametrize("class_name", CLASSES)
def test_every_family_and_head(class_name):
    model = tiny(class_name)
    ranges = calibrate(model, inputs(model), progress=False)
    assert ranges.keys() == {n for n, m in model.named_modules() if isinstance(m, FakeQuantLinear)}
    assert not model.training
    assert torch.isfinite(model(**inputs(model))[0]).all()


def test_multiple_choice_leaves_out_padding_too():
    model = tiny("BertForMultipleChoice")
    batch = inputs(model)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[model.config.pad_token_id] = 1000.0
        model.bert.embeddings.LayerNorm.weight.fill_(1e-3)
    ids = batch["input_ids"].reshape(-1, 24)
    real = batch["attention_mask"].reshape(-1, 24).bool()
    hidden = model.bert.embeddings(ids).detach()[real].abs().max()
    ranges = calibrate(model, batch, progress=False)
    assert ranges["bert.encoder.layer.0.attention.self.query"].input == pytest.approx(float(hidden), rel=1e-5)


def test_dynamic_operations_need_no_ranges():
    model = tiny("BertForSequenceClassification")
    config = Q8BertConfig.uniform(mode="dynamic").replace(head=OpSettings(requantize_output=False))
    ranges = calibrate(model, inputs(model), config, progress=False)
    assert list(ranges) == ["classifier"] and ranges["classifier"].output is None


def test_training_mode_is_restored():
    model = tiny("BertModel").train()
    model.encoder.eval()
    calibrate(model, inputs(model), progress=False)
    assert model.training and not model.encoder.training and not model.encoder.layer[0].output.dense.training


def test_progress_bar(capsys):
    calibrate(tiny("BertModel"), [inputs(tiny("BertModel"))] * 2)
    assert "calibrate" in capsys.readouterr().err


def _nan_model():
    model = tiny("BertForSequenceClassification")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.LayerNorm.weight.fill_(float("inf"))
    return model


class _NoPooler(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = tiny("BertModel")

    def forward(self, ids):
        return self.model.encoder(self.model.embeddings(ids))


IDS = torch.randint(5, VOCABULARY, (2, 8))


@pytest.mark.parametrize(
    ("make", "data", "options", "error", "message"),
    [
        (None, [], {}, ValueError, "expected at least one batch. Got none"),
        (None, 7, {}, TypeError, "expected batches to be an iterable of batches. Got int"),
        (None, "text", {}, TypeError, "expected batches to be an iterable of batches. Got str"),
        (None, [7], {}, TypeError, "expected a batch to be a mapping.* Got int"),
        (None, ["text"], {}, TypeError, "expected a tokenizer with batches of strings"),
        (None, [IDS, IDS.float()], {}, Exception, "indices|Expected"),
        (None, IDS, {"observer": "median"}, ValueError, "expected observer to be one of absmax, .* Got 'median'"),
        (None, IDS, {"batch_size": 0}, ValueError, "expected batch_size to be at least 1. Got 0"),
        (_nan_model, IDS, {}, ValueError, "expected the input of bert.pooler.dense to be finite"),
        (_NoPooler, IDS, {}, ValueError, "expected the batches to reach model.pooler.dense"),
    ],
)
def test_refused_and_unchanged(make, data, options, error, message):
    model = (make or (lambda: tiny("BertForSequenceClassification")))()
    with pytest.raises(error, match=message):
        calibrate(model, data, progress=False, **options)
    assert not any(isinstance(module, FakeQuantLinear) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("options", [{"percentile": 0}, {"percentile": 101}, {"bins": 3}])
def test_percentile_refuses(options):
    with pytest.raises(ValueError, match="Percentile: expected"):
        Percentile(**options)
