"""Which heads go, how many, and what the curve records. Heads are masked here, not removed."""

import copy
import csv
import json
from itertools import pairwise

import pytest
import torch
from torch import nn

import bertkern as bk
from bertkern import shrink
from bertkern.head_masks import places
from tests.compress.test_heads_importance import SIZE, batches
from tests.families import zoo
from tests.transformers4 import FAMILIES, HEADS, LAYERS, Transformers4, make

ALL = LAYERS * HEADS


def gone_of(found: bk.HeadPruning) -> set[tuple[int, int]]:
    return {(layer, head) for layer, heads in found.heads.items() for head in heads}


def ranked(scores: torch.Tensor) -> list[tuple[int, int]]:
    return [divmod(i, scores.shape[1]) for i in scores.flatten().argsort(stable=True).tolist()]


def choose(model: nn.Module, config: bk.HeadPruneConfig, *arguments, **options) -> bk.HeadPruning:
    return bk.choose_heads(model, config, *arguments, progress=False, **options)


class Agreement:
    """How near the outputs are to those of the model as it is; counts its calls."""

    def __init__(self, model: nn.Module) -> None:
        self.call = zoo.padded(model, "trailing")
        self.expected = model(**self.call).logits
        self.values = []

    def __call__(self, model: nn.Module) -> float:
        assert not torch.is_grad_enabled() and not model.training
        self.values.append(1 - float((model(**self.call).logits - self.expected).norm() / self.expected.norm()))
        return self.values[-1]


@pytest.mark.parametrize("method", ["paper", "released", "magnitude"])
def test_the_least_important_go_first(method):
    model = make("BertForSequenceClassification")
    data = batches(model)
    scores = bk.head_importance(model, data, method=method, progress=False)
    for fraction in (0, 0.25, 0.5, 1):
        found = choose(model, bk.HeadPruneConfig(fraction=fraction, min_heads=0, method=method), data)
        assert gone_of(found) == set(ranked(scores)[: round(fraction * ALL)])
        assert torch.equal(found.scores, scores)
    assert found.heads == {layer: list(range(HEADS)) for layer in range(LAYERS)}


def test_equal_heads_go_in_order():
    model = make("BertModel")
    with torch.no_grad():
        for place in places(model).layers:
            for projection in place.projections:
                projection.weight.fill_(0.5)
    found = choose(model, bk.HeadPruneConfig(fraction=0.5, min_heads=0, method="magnitude"))
    assert found.heads == {0: [0, 1, 2, 3], 1: [0, 1]}


@pytest.mark.parametrize("floor", [0, 1, 3, 4, 9])
def test_floors(floor):
    model = make("BertModel")
    scores = bk.head_importance(model, method="magnitude")
    spare = LAYERS * max(0, HEADS - floor)
    if spare == 0:
        assert not choose(model, bk.HeadPruneConfig(fraction=0, min_heads=floor, method="magnitude")).heads
    else:
        found = choose(model, bk.HeadPruneConfig(fraction=spare / ALL, min_heads=floor, method="magnitude"))
        assert found.curve[-1].kept == (floor,) * LAYERS
        for layer, heads in found.heads.items():
            # The best of a layer stay, wherever the layer stands.
            assert set(heads) == set(scores[layer].argsort()[: HEADS - floor].tolist())
    if floor:
        with pytest.raises(ValueError, match=rf"of at most .*min_heads = {floor}\. Got 1\.0"):
            choose(model, bk.HeadPruneConfig(fraction=1.0, min_heads=floor, method="magnitude"))


@pytest.mark.parametrize(
    ("step", "removed"),
    [
        (0.05, [*range(13)]),  # less than a head: one at a time
        (0.25, [0, 3, 6, 9, 12]),
        (0.3, [0, 4, 7, 11, 12]),
        (1, [0, 12]),
    ],
)
def test_steps(step, removed):
    model = make("BertForSequenceClassification")
    metric = Agreement(model)
    config = bk.HeadPruneConfig(fraction=1, min_heads=0, step=step, method="magnitude")
    found = choose(model, config, metric=metric)
    assert [point.removed for point in found.curve] == removed
    assert [point.heads for point in found.curve] == [ALL - count for count in removed]
    assert [point.metric for point in found.curve] == metric.values
    assert metric.values[0] == 1 and all(value < 1 for value in metric.values[1:])


@pytest.mark.parametrize("how", ["plain", "accelerated", "quantized"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_metric_sees_the_masked_model(family, how):
    model = make(f"{family}ForSequenceClassification")
    call, whole = zoo.padded(model, "trailing"), copy.deepcopy(model)
    if how != "plain":
        (bk.accelerate if how == "accelerated" else bk.quantize_)(model)
    seen = []

    def metric(model):
        seen.append(model(**call).logits)
        return 0.0

    found = choose(model, bk.HeadPruneConfig(fraction=0.5, step=0.5, method="magnitude"), metric=metric)
    mask = torch.ones(places(whole).rows, HEADS)
    for layer, head in gone_of(found):
        mask[list(places(whole).layers[layer].rows), head] = 0
    expected = Transformers4(whole, mask)(**call).logits
    tolerance = 1e-4 if how != "quantized" else 0.1
    assert len(seen) == 2 and (seen[1].double() - expected).abs().max() < tolerance
    assert (seen[0] - seen[1]).abs().max() > 1e-3
    torch.testing.assert_close(model(**call).logits, seen[0])


def test_tolerance_ends_before_the_step_that_exceeds_it():
    model = make("BertForSequenceClassification")
    values = iter([0.9, 0.95, 0.88, 0.79, 0.99])
    config = bk.HeadPruneConfig(tolerance=0.1, step=0.25, min_heads=0, method="magnitude")
    found = choose(model, config, metric=lambda model: next(values))
    assert [point.metric for point in found.curve] == [0.9, 0.95, 0.88, 0.79]
    assert gone_of(found) == set(ranked(bk.head_importance(model, method="magnitude"))[:6])
    values = iter([0.9, 0.5])
    assert not choose(model, config, metric=lambda model: next(values)).heads
    # Just the tolerance is none too much.
    values = iter([1.0, 0.5, 0.5, 0.5, 0.5])
    config = bk.HeadPruneConfig(tolerance=0.5, step=0.25, min_heads=0, method="magnitude")
    assert len(gone_of(choose(model, config, metric=lambda model: next(values)))) == ALL


def test_tolerance_of_a_loss():
    model = make("BertForSequenceClassification")
    values = iter([2.0, 1.0, 2.05, 2.2])
    config = bk.HeadPruneConfig(tolerance=0.1, step=0.25, greater_is_better=False, method="magnitude")
    found = choose(model, config, metric=lambda model: torch.tensor(next(values)))
    assert len(found.curve) == 4 and len(gone_of(found)) == 6


def test_tolerance_and_fraction():
    model = make("BertForSequenceClassification")
    config = bk.HeadPruneConfig(tolerance=0.1, fraction=0.5, step=0.25, method="magnitude")
    found = choose(model, config, metric=lambda model: 1.0)
    assert len(gone_of(found)) == found.curve[-1].removed == 6


def test_rescoring_ranks_what_is_left():
    model = make("BertForSequenceClassification")
    data = batches(model)
    config = bk.HeadPruneConfig(fraction=0.5, step=1 / ALL, min_heads=0, rescore=True)
    found = choose(model, config, data)
    mask, gone = torch.ones(LAYERS, HEADS), []
    for _ in range(6):
        with bk.head_mask(model, mask):
            scores = bk.head_importance(model, data, progress=False)
        gone.append(next(head for head in ranked(scores) if head not in gone))
        mask[gone[-1]] = 0
    assert gone_of(found) == set(gone)
    once = choose(model, bk.HeadPruneConfig(fraction=0.5, min_heads=0), data)
    assert torch.equal(once.scores, found.scores) and gone_of(once) != gone_of(found)


def test_albert_layers_count_once():
    model = make("AlbertForSequenceClassification")
    data = batches(model)
    scores = bk.head_importance(model, data, progress=False)
    rows = [list(place.rows) for place in places(model).layers]
    assert rows == [[0, 2], [1, 3], [4, 6], [5, 7]]
    found = choose(model, bk.HeadPruneConfig(fraction=0.5, min_heads=0), data)
    by_layer = torch.stack([scores[of].mean(0) for of in rows])
    assert gone_of(found) == set(ranked(by_layer)[:8]) and torch.equal(found.scores, by_layer)
    assert found.curve[0].kept == (HEADS,) * 4


def test_ragged_models():
    """What is gone already is neither counted nor named; numbers are those that the model was built with."""
    model = make("BertModel")
    left = [(0, 2), (0, 1, 2, 3), (3,)]
    for place, kept in zip(places(model).layers, left, strict=True):
        with torch.no_grad():
            place.out.weight.mul_(torch.tensor([float(h in kept) for h in range(HEADS)]).repeat_interleave(SIZE))
    shrink.shrink(model)
    found = choose(model, bk.HeadPruneConfig(tolerance=0, method="magnitude"), metric=lambda model: 1.0)
    assert found.curve[0].kept == (2, 4, 1) and found.curve[-1].kept == (1, 1, 1)
    assert set(found.heads) == {0, 1} and all(set(heads) < set(left[layer]) for layer, heads in found.heads.items())
    assert [point.removed for point in found.curve] == [0, 1, 2, 3, 4]


def test_csv(tmp_path):
    model = make("BertForSequenceClassification")
    found = choose(
        model, bk.HeadPruneConfig(fraction=0.5, step=0.25, min_heads=0, method="magnitude"), metric=Agreement(model)
    )
    found.save_csv(tmp_path / "heads.csv")
    with open(tmp_path / "heads.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["heads"]) for row in rows] == [12, 9, 6]
    assert [float(row["share removed"]) for row in rows] == [0, 0.25, 0.5]
    assert [float(row["metric"]) for row in rows] == [point.metric for point in found.curve]
    for row, point in zip(rows, found.curve, strict=True):
        assert int(row["removed"]) == point.removed
        assert tuple(int(row[f"layer {layer}"]) for layer in range(LAYERS)) == point.kept
    plain = choose(model, bk.HeadPruneConfig(fraction=0.5, method="magnitude"))
    plain.save_csv(str(tmp_path / "plain.csv"))
    assert (tmp_path / "plain.csv").read_text().splitlines()[1] == "12,0,0.0,,4,4,4"


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    model = make("BertForSequenceClassification")
    config = bk.HeadPruneConfig(fraction=0.5, step=0.25, method="magnitude")
    found = choose(model, config, metric=Agreement(model))
    axes = found.plot(tmp_path / "heads.png", metric="agreement").axes[0]
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    assert axes.lines[0].get_xdata().tolist() == [0, 25, 50]
    assert axes.lines[0].get_ydata().tolist() == [point.metric for point in found.curve]
    assert axes.get_ylabel() == "agreement"
    with pytest.raises(ValueError, match=r"expected a curve with a metric\. Got one without"):
        choose(model, config).plot()


def test_matplotlib_is_imported_when_used(run_python):
    code = "import sys, bertkern.compress.heads; assert not any(n.startswith('matplotlib') for n in sys.modules)"
    assert run_python(code).returncode == 0


def test_as_json():
    model = make("BertForSequenceClassification")
    found = choose(model, bk.HeadPruneConfig(fraction=0.5, step=0.5, method="magnitude"), metric=Agreement(model))
    values = json.loads(json.dumps(found.to_dict()))
    assert {int(layer): heads for layer, heads in values["heads"].items()} == found.heads
    assert [point["metric"] for point in values["curve"]] == [point.metric for point in found.curve]
    assert torch.tensor(values["scores"], dtype=torch.float64).equal(found.scores)
    assert all(a["removed"] < b["removed"] for a, b in pairwise(values["curve"]))


def test_the_model_is_left_as_it_was():
    model = make("BertForSequenceClassification").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = bk.HeadPruneConfig(fraction=0.5, rescore=True)
    choose(model, config, batches(model), metric=Agreement(copy.deepcopy(model).eval()))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())

    def metric(model):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        choose(model, config, batches(model), metric=metric)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_progress(capsys):
    model = make("BertForSequenceClassification")
    bk.choose_heads(model, bk.HeadPruneConfig(fraction=0.5), batches(model))
    shown = capsys.readouterr().err
    assert "head importance: 100%" in shown and "remove heads: 100%" in shown
    bk.choose_heads(model, bk.HeadPruneConfig(fraction=0.5), batches(model), progress=False)
    assert not capsys.readouterr().err


def test_a_ranking_that_generalises():
    """Heads that matter by construction are those that stay: the output projection of the others is tiny."""
    model = make("BertForSequenceClassification")
    strong = [(0, 1), (1, 3), (2, 0), (2, 2)]
    with torch.no_grad():
        for layer, place in enumerate(places(model).layers):
            for head in range(HEADS):
                if (layer, head) not in strong:
                    place.out.weight[:, head * SIZE : (head + 1) * SIZE] *= 1e-3
    metric = Agreement(model)
    for method in ("paper", "released"):
        config = bk.HeadPruneConfig(tolerance=0.02, step=1 / ALL, min_heads=0, method=method, normalize=False)
        found = choose(model, config, batches(model), metric=metric)
        assert gone_of(found) == {(i, j) for i in range(LAYERS) for j in range(HEADS)} - set(strong)


def test_removal_is_what_masking_promised():
    model = make("BertForSequenceClassification")
    whole, call = copy.deepcopy(model), zoo.padded(model, "trailing")
    found = bk.prune_heads_by_importance(model, bk.HeadPruneConfig(fraction=0.5), batches(model), progress=False)
    mask = torch.ones(LAYERS, HEADS)
    for head in gone_of(found):
        mask[head] = 0
    with bk.head_mask(whole, mask):
        torch.testing.assert_close(model(**call).logits, whole(**call).logits)
    kept = [[head for head in range(HEADS) if mask[layer, head]] for layer in range(LAYERS)]
    assert bk.kept_heads(model) == kept


def test_what_it_refuses():
    model = make("BertForSequenceClassification")
    data = batches(model)

    def refused(error, message, config, *arguments, **options):
        with pytest.raises(error, match=message):
            choose(model, config, *arguments, **options)

    half = bk.HeadPruneConfig(fraction=0.5, method="magnitude")
    refused(TypeError, r"expected a HeadPruneConfig\. Got dict", {"fraction": 0.5})
    refused(ValueError, r"expected a metric with a tolerance\. Got none", bk.HeadPruneConfig(tolerance=0.1), data)
    refused(TypeError, r"expected metric to be callable\. Got float", half, metric=0.9)
    refused(
        TypeError, r"expected dataloader to be an iterable of batches\. Got NoneType", bk.HeadPruneConfig(fraction=0.5)
    )
    again = bk.HeadPruneConfig(fraction=0.5, rescore=True)
    refused(TypeError, r"iterable several times with rescore\. Got an iterator", again, iter(data))
    refused(TypeError, r"expected a number of metric\. Got str", half, metric=lambda model: "good")
    refused(TypeError, r"expected a number of metric\. Got NoneType", half, metric=lambda model: None)
    refused(ValueError, r"Got NaN, 0 heads gone", half, metric=lambda model: float("nan"))
    with pytest.raises(ValueError, match=r"choose_heads: expected a module with one transformers model"):
        choose(nn.Linear(2, 2), half)


def test_what_cannot_be_pruned_is_refused_before_the_search():
    def searched(model):
        raise AssertionError("the search has begun")

    config = bk.HeadPruneConfig(fraction=0.5, method="magnitude")
    quantized = bk.quantize_(make("BertForSequenceClassification"))
    with pytest.raises(ValueError, match=r"prune_heads_by_importance: expected a float model\. Got one that is int8"):
        bk.prune_heads_by_importance(quantized, config, metric=searched)
    part = bk.accelerate(make("BertForSequenceClassification")).bert
    with pytest.raises(ValueError, match=r"prune_heads_by_importance: expected the module that was accelerated"):
        bk.prune_heads_by_importance(part, config, metric=searched)
