"""Bits of layers: sizes beside the format's, the exact search beside trying everything."""

import csv
import itertools
import json
import random

import pytest
import torch
from torch import nn

import bertkern as bk
from bertkern.compress.groupwise import quantization_errors
from bertkern.compress.groupwise.knapsack import Option, cheapest
from bertkern.compress.groupwise.sizes import Grouping
from bertkern.formats.groupwise import quantize_groupwise
from bertkern.formats.rounding import round_weight
from tests.families import zoo

LAYERS = [f"encoder.layer.{i}" for i in range(4)]
SHAPES = {name: [(16, 16)] * 4 + [(24, 16), (16, 24)] for name in LAYERS}
SCORES = dict(zip(LAYERS, (3.0, 9.0, 1.0, 4.0), strict=True))


def assign(sensitivity, model, **options):
    return bk.assign_bits(sensitivity, model, **{"progress": False, **options})


@pytest.mark.parametrize("shape", [(13, 17), (24, 8), (1, 9), (40, 41)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"whole_zero": False},
        {"axis": "k"},
        {"axis": "k", "shared": True},
        {"symmetric": True},
        {"group_size": 3, "axis": "k"},
        {"method": "mse"},
    ],
)
def test_sizes_and_errors_are_the_formats(shape, options):
    grouping = Grouping(groups=6, **options)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    for bits in range(2, 9):
        size = grouping.size(shape)
        how = {"whole_zero": options.get("method") != "mse"} | {
            name: options[name] for name in options if name not in ("axis", "group_size")
        }
        made = round_weight(weight, bits, size, grouping.axis, **how)
        assert grouping.nbytes(shape, bits) == made.nbytes
        expected = float((made.dequantize(torch.float64) - weight.double()).square().sum())
        assert grouping.error(weight, bits) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def best(items: list[list[Option]], budget: int) -> float | None:
    fits = [
        sum(option.cost for option in picked)
        for picked in itertools.product(*items)
        if sum(option.size for option in picked) <= budget
    ]
    return min(fits, default=None)


def test_exact_search_beside_trying_everything():
    rng = random.Random(0)
    for _ in range(200):
        items = [
            [Option(rng.randrange(1, 30), rng.choice([rng.random(), 0.5])) for _ in range(rng.randrange(1, 4))]
            for _ in range(rng.randrange(1, 7))
        ]
        budget = rng.randrange(1, 100)
        picked = cheapest(items, budget)
        expected = best(items, budget)
        if expected is None:
            assert picked is None
            continue
        chosen = [options[i] for options, i in zip(items, picked, strict=True)]
        assert sum(option.size for option in chosen) <= budget
        assert sum(option.cost for option in chosen) == pytest.approx(expected)


def test_many_layers_of_sizes_of_their_own():
    rng = random.Random(1)
    items = [
        [Option(bits * size, rng.random() * size / 4**bits) for bits in range(2, 9)]
        for size in [rng.randrange(10**6, 7 * 10**6) for _ in range(24)]
    ]
    budget = sum(options[2].size for options in items)
    picked = cheapest(items, budget)
    cost = sum(options[i].cost for options, i in zip(items, picked, strict=True))
    # Dropping the whole numbers bounds what is possible: the best multiplier of the budget.
    prices = [10.0**power for power in torch.linspace(-5, 0, 400).tolist()]
    bound = max(
        sum(min(o.cost + price * o.size for o in options) for options in items) - price * budget for price in prices
    )
    assert bound <= cost <= bound * 1.05 + 1e-12
    assert sum(options[i].size for options, i in zip(items, picked, strict=True)) <= budget


def test_exact_assignment_of_a_model():
    model = zoo.make("BertModel")
    scores = {f"encoder.layer.{i}": value for i, value in enumerate((0.5, 2.0, 1.0))}
    errors = quantization_errors(model, (2, 3, 4), Grouping(groups=8), progress=False)
    for name, layer in zip(scores, model.encoder.layer, strict=True):
        weights = [m.weight for m in layer.modules() if isinstance(m, nn.Linear)]
        parts = [round_weight(w, 3, -(-w.shape[0] // 8), whole_zero=True).dequantize() - w for w in weights]
        assert errors[name][3] == pytest.approx(sum(part.square().sum().item() for part in parts), rel=1e-4)
    for average in (2, 2.4, 3, 3.4, 4):
        found = assign(scores, model, choices=(2, 3, 4), average_bits=average, groups=8)
        assert found.average_bits <= average + 1e-9
        costs = {
            picked: sum(scores[name] * errors[name][bits] for name, bits in zip(scores, picked, strict=True))
            for picked in itertools.product((2, 3, 4), repeat=3)
            if sum(picked) <= 3 * average + 1e-9
        }
        assert costs[found.bits] == min(costs.values())
        assert found.errors == tuple(errors[name][bits] for name, bits in found.layer_bits.items())
    given = assign(scores, model, choices=(2, 4), average_bits=3, quantization_error=errors)
    assert assign(scores, {n: [(52, 52)] for n in scores}, average_bits=3, quantization_error=errors).bits == given.bits


def test_budget_in_megabytes():
    model = zoo.make("BertModel")
    least = assign(None, model, average_bits=2)
    found = assign(None, model, target_size_mb=least.nbytes / 1e6)
    assert found.bits == (2, 2, 2)
    shapes = [tuple(p.shape) for n, p in model.encoder.layer[0].named_parameters() if p.dim() == 2]
    expected = sum(quantize_groupwise(torch.randn(n, k), 2, -(-n // 128)).nbytes for n, k in shapes)
    assert found.sizes == (expected,) * 3 and found.nbytes == 3 * expected
    more = (assign(None, model, average_bits=4).nbytes - least.nbytes) / 3
    assert sorted(assign(None, model, target_size_mb=(least.nbytes + 1.5 * more) / 1e6).bits) == [2, 2, 4]
    assert assign(None, model, target_size_mb=1000.0).bits == (4, 4, 4)
    with pytest.raises(ValueError, match=r"expected target_size_mb of at least 0\.0\d+, what 2 bits take\. Got 0\.01"):
        assign(None, model, target_size_mb=0.01)


def test_sorted_as_in_the_paper():
    def bits(average, choices=(2, 4), **options):
        return assign(SCORES, SHAPES, choices=choices, average_bits=average, rule="sorted", **options).bits

    assert bits(2) == (2, 2, 2, 2)
    assert bits(2.5) == (2, 4, 2, 2)
    assert bits(3) == (2, 4, 2, 4)
    assert bits(3.6) == (4, 4, 2, 4)
    assert bits(4) == bits(8) == (4, 4, 4, 4)
    assert bits(3, order="reversed") == (4, 2, 4, 2)
    # One bit is left for the third: 3 + 8 + 3 + 2 of 16.
    assert bits(4, (2, 3, 8)) == (3, 8, 2, 3)
    orders = {bits(3, order="random", seed=seed) for seed in range(20)}
    assert len(orders) > 3 and all(sorted(found) == [2, 2, 4, 4] for found in orders)
    assert bits(3, order="random", seed=5) == bits(3, order="random", seed=5)
    equal = dict.fromkeys(LAYERS, 1.0)
    assert assign(equal, SHAPES, average_bits=3, rule="sorted").bits == (4, 4, 2, 2)


def test_sorted_never_rises_along_the_order():
    shapes = {"a": [(100, 100)], "b": [(10, 10)], "c": [(10, 10)]}
    found = assign({"a": 3.0, "b": 2.0, "c": 1.0}, shapes, average_bits=2.5, rule="sorted")
    assert found.bits == (2, 2, 2), "the first does not fit, so the others stay where it is"


def test_a_sensitivity_as_measured():
    found = bk.Sensitivity(
        layers=tuple(LAYERS),
        weights=(1, 1, 1, 1),
        eigenvalues=tuple((value, value) for value in (-3.0, 9.0, 1.0, -4.0)),
        errors=((0.0, 0.0),) * 4,
        examples=1,
        products=1,
    )
    made = assign(found, SHAPES, average_bits=3, rule="sorted")
    assert made.sensitivity == tuple(SCORES.values()) and made.bits == (2, 4, 2, 4)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_families_give_names_that_their_modules_have(family):
    model = zoo.make(f"{family}ForSequenceClassification")
    found = assign(None, model, average_bits=3)
    assert found.layers[0] == {
        "DistilBert": "transformer.layer.0",
        "Albert": "encoder.albert_layer_groups.0.albert_layers.0",
    }.get(family, "encoder.layer.0")
    for name, count in zip(found.layers, found.weights, strict=True):
        layer = model.base_model.get_submodule(name)
        assert count == sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))


# --- choosing by what there is --------------------------------------------------------------------------------------


def test_without_data():
    model = zoo.make("BertModel")
    with torch.no_grad():
        for parameter in model.encoder.layer[1].parameters():
            parameter.mul_(3)
    found = bk.choose_bits(model, average_bits=2.7, progress=False)
    assert found.layer_bits == {"encoder.layer.0": 2, "encoder.layer.1": 4, "encoder.layer.2": 2}
    assert found.sensitivity is None and "without data" in str(found)
    assert found == assign(None, model, average_bits=2.7)


def test_with_sentences_or_batches():
    model = zoo.make("BertForSequenceClassification")

    def tokenizer(texts, **options):
        return {"input_ids": torch.tensor([[5 + len(word) for word in texts[0].split()]])}

    options = {"samples": 2, "fraction": 0.5, "average_bits": 3, "progress": False}
    unlabelled = bk.choose_bits(model, ["a bb ccc", "dddd e ff", "g hhh i"], tokenizer, **options)
    batch = {**zoo.inputs(model, 4), "labels": torch.tensor([0, 1, 1, 0])}
    labelled = bk.choose_bits(model, batches=batch, **options)
    measured = bk.hessian_sensitivity(model, batch, samples=2, fraction=0.5, progress=False)
    assert labelled == assign(measured, model, average_bits=3)
    assert all(value > 0 for value in unlabelled.sensitivity)
    assert unlabelled.sensitivity != labelled.sensitivity
    with pytest.raises(ValueError, match=r"expected sentences or batches\. Got both"):
        bk.choose_bits(model, ["a"], tokenizer, batches=batch, average_bits=3)


def test_progress(capsys):
    bk.choose_bits(zoo.make("BertModel"), average_bits=3)
    assert "rounding errors: 100%" in capsys.readouterr().err


def test_quantized_models_have_bits_to_give_by_what_they_stand_for():
    model = zoo.make("BertModel")
    expected = assign(None, model, average_bits=3)
    bk.accelerate(model)
    assert assign(None, model, average_bits=3) == expected
    bk.quantize_(model)
    assert assign(None, model, average_bits=3).sizes == expected.sizes


# --- records and refusals -------------------------------------------------------------------------------------------


def test_record_table_and_csv(tmp_path):
    found = assign(SCORES, SHAPES, average_bits=3, rule="sorted")
    assert bk.BitAssignment.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.layer_bits == dict(zip(LAYERS, (2, 4, 2, 4), strict=True)) and found.average_bits == 3
    lines = str(found).splitlines()
    assert lines[0] == "Bits by layer: sorted, order sensitivity"
    assert lines[3].split() == ["encoder.layer.0", "2", "3", "0.001"]
    assert lines[-2].startswith("3.00 bits on average, 0.01 MB of 0.03 MB as fp32")
    assert lines[-1] == "Matrices outside of these layers have the bits of the config."
    found.save_csv(tmp_path / "bits.csv")
    with open(tmp_path / "bits.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["bits"]) for row in rows] == [2, 4, 2, 4]
    assert sum(int(row["bytes"]) for row in rows) == found.nbytes
    for change, message in (
        ({"bits": [2, 4, 2, 3]}, "expected bits among"),
        ({"bits": [2]}, "expected bits to be a list, one for each layer"),
        ({"sizes": [0, 1, 1, 1]}, "expected sizes to be whole numbers above 0"),
        ({"sensitivity": [-1.0, 0.0, 0.0, 0.0]}, "expected sensitivity to be finite numbers from 0 on"),
        ({"choices": [2, 9]}, "expected choices to be different numbers of bits from 2 to 8"),
        ({"rule": "guess"}, "expected rule to be one of"),
        ({"layers": ["a"] * 4}, "expected layers to be different names"),
        ({"version": 3}, "expected version 1"),
    ):
        with pytest.raises(ValueError, match=message):
            bk.BitAssignment.from_dict({**found.to_dict(), **change})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"choices": (1, 4)}, r"expected choices to be different numbers of bits from 2 to 8\. Got \(1, 4\)"),
        ({"choices": (2, 9)}, "expected choices"),
        ({"choices": ()}, "expected choices"),
        ({"choices": (4, 4)}, "expected choices"),
        ({"choices": 4}, "expected choices"),
        ({"choices": (2.0, 4)}, "expected choices"),
        ({"average_bits": None}, r"expected average_bits or target_size_mb\. Got neither"),
        ({"target_size_mb": 1.0}, r"expected average_bits or target_size_mb\. Got both"),
        ({"average_bits": 1.9}, r"expected average_bits of at least 2, what 2 bits take\. Got 1\.9"),
        ({"average_bits": float("nan")}, "expected average_bits to be a number above 0"),
        ({"average_bits": True}, "expected average_bits to be a number above 0"),
        ({"rule": "guess"}, "expected rule to be one of"),
        ({"order": "guess"}, "expected order to be one of"),
        ({"rule": "exact", "order": "random"}, r'expected rule "sorted" with order \'random\'\. Got "exact"'),
        ({"rule": "exact"}, r"expected a model, or quantization_error with shapes\. Got shapes alone"),
        ({"rule": "exact", "quantization_error": {}}, r"quantization_error of encoder\.layer\.0 at 2 bits.* Got None"),
        ({"sensitivity": None}, r'expected a sensitivity with rule "sorted"\. Got none'),
        ({"sensitivity": {"encoder.layer.0": 1.0}}, "expected a sensitivity of each of"),
        ({"sensitivity": {**SCORES, LAYERS[0]: -1.0}}, r"sensitivity of encoder\.layer\.0 to be a number from 0 on"),
        ({"groups": 0}, "expected groups to be a whole number of at least 1"),
        ({"group_size": 0}, "expected group_size to be a whole number of at least 1"),
        ({"axis": "m"}, 'expected axis "n" or "k"'),
        ({"shared": True}, 'expected axis "k" with shared'),
        ({"model": {}}, "expected at least one layer"),
        ({"model": {"a": [(0, 3)]}}, r"expected shapes \(N, K\) of the matrices by layer"),
    ],
)
def test_what_it_refuses(options, message):
    usual = {"sensitivity": SCORES, "model": SHAPES, "average_bits": 3, "rule": "sorted"}
    options = {**usual, **options}
    with pytest.raises(ValueError, match=f"assign_bits: .*{message}|{message}"):
        assign(options.pop("sensitivity"), options.pop("model"), **options)


def test_other_things_it_refuses():
    with pytest.raises(TypeError, match=r"expected a Sensitivity or a mapping of layers to numbers\. Got list"):
        assign([1.0], SHAPES, average_bits=3)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module\. Got str"):
        assign(SCORES, "bert", average_bits=3)
    model = zoo.make("BertModel")
    with torch.no_grad():
        model.encoder.layer[2].output.dense.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"expected finite weights in encoder\.layer\.2\. Got NaN or Inf"):
        assign(None, model, average_bits=3)
