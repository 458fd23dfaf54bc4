"""Pruning's configs and schedule: JSON both ways, the formula, and what they refuse."""

import dataclasses
import json

import pytest

import bertkern as bk

CONFIGS = [
    bk.UnstructuredPruneConfig(sparsity=0.9, scope="global", overrides={"layer.0.*": 0.5, "query": 0}),
    bk.BlockPruneConfig(sparsity=0.8, block=[16, 4], norm="max", skip=["classifier"], pooler=False),
    bk.RowColumnPruneConfig(sparsity=1, axis="columns", head=True, criterion="random", seed=7),
    bk.NmPruneConfig(n=1, m=4, embeddings=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.KIND)
def test_json_both_ways(config):
    record = json.loads(json.dumps(config.to_dict()))
    assert record["version"] == 1
    assert type(config).from_dict(record) == config
    assert bk.PruneConfig.from_dict(record) == config
    assert hash(bk.PruneConfig.from_dict(record)) == hash(config)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIGS[0].sparsity = 0.1


def test_defaults_are_the_papers():
    config = bk.UnstructuredPruneConfig(sparsity=0.5)
    assert (config.scope, config.embeddings, config.pooler, config.head) == ("matrix", True, True, False)
    assert not bk.BlockPruneConfig(sparsity=0.5).embeddings
    assert bk.NmPruneConfig().sparsity == 0.5


SPARSE = {"sparsity": 0.5}


@pytest.mark.parametrize(
    "kind, values, message",
    [
        (
            "PruneConfig",
            {"kind": "blocks"},
            "expected kind \"block or n_m or row_column or unstructured\". Got 'blocks'",
        ),
        ("PruneConfig", SPARSE, "expected kind .* Got ''"),
        ("PruneConfig", [], "expected a mapping. Got list"),
        ("BlockPruneConfig", {**SPARSE, "kind": "n_m"}, "expected kind \"block\". Got 'n_m'"),
        ("BlockPruneConfig", {**SPARSE, "version": 2, "pad": 1}, "BlockPruneConfig: expected version 1. Got 2"),
        ("BlockPruneConfig", {**SPARSE, "version": "1"}, "expected version 1. Got '1'"),
        ("BlockPruneConfig", {**SPARSE, "version": True}, "expected version 1. Got True"),
        ("BlockPruneConfig", {**SPARSE, "blocks": 1}, r"expected fields among .* Got \['blocks'\]"),
        ("BlockPruneConfig", {}, "expected a sparsity. Got none"),
        ("BlockPruneConfig", {"sparsity": 1.01}, "expected sparsity to be a number from 0 to 1. Got 1.01"),
        ("BlockPruneConfig", {"sparsity": -0.1}, "sparsity .* Got -0.1"),
        ("BlockPruneConfig", {"sparsity": float("nan")}, "sparsity .* Got nan"),
        ("BlockPruneConfig", {"sparsity": True}, "sparsity .* Got True"),
        ("BlockPruneConfig", {"sparsity": "0.8"}, "sparsity .* Got '0.8'"),
        ("BlockPruneConfig", {**SPARSE, "block": 16}, r"expected block to be \(rows, columns\).* Got 16"),
        ("BlockPruneConfig", {**SPARSE, "block": (16,)}, r"block .* Got \(16,\)"),
        ("BlockPruneConfig", {**SPARSE, "block": (16, 0)}, r"block .* Got \(16, 0\)"),
        ("BlockPruneConfig", {**SPARSE, "block": (16, 4.0)}, r"block .* Got \(16, 4.0\)"),
        ("BlockPruneConfig", {**SPARSE, "norm": "l3"}, r"norm to be one of \('l1', 'l2', 'max'\). Got 'l3'"),
        ("BlockPruneConfig", {**SPARSE, "scope": "layer"}, "scope to be one of .* Got 'layer'"),
        ("BlockPruneConfig", {**SPARSE, "criterion": "movement"}, "criterion to be one of .* Got 'movement'"),
        ("BlockPruneConfig", {**SPARSE, "seed": -1}, "seed to be a whole number from 0 to .* Got -1"),
        ("BlockPruneConfig", {**SPARSE, "pooler": 1}, "pooler to be one of .* Got 1"),
        ("BlockPruneConfig", {**SPARSE, "skip": "query"}, "skip to be a sequence of names. Got 'query'"),
        ("BlockPruneConfig", {**SPARSE, "overrides": ["query"]}, "overrides to be sparsities by name"),
        ("BlockPruneConfig", {**SPARSE, "overrides": 3}, "overrides to be sparsities by name. Got 3"),
        ("BlockPruneConfig", {**SPARSE, "overrides": {1: 0.5}}, "overrides to be sparsities by name"),
        ("BlockPruneConfig", {**SPARSE, "overrides": {"q": 2}}, r'overrides\["q"\] to be a number from 0 to 1. Got 2'),
        ("RowColumnPruneConfig", {**SPARSE, "axis": 0}, "axis to be one of .* Got 0"),
        ("NmPruneConfig", {"n": 5, "m": 4}, "n to be a whole number from 0 to 4. Got 5"),
        ("NmPruneConfig", {"n": -1}, "n to be a whole number .* Got -1"),
        ("NmPruneConfig", {"m": 0}, "m to be a whole number of at least 1. Got 0"),
        ("NmPruneConfig", {"sparsity": 0.5}, r"Got \['sparsity'\]"),
    ],
)
def test_what_configs_refuse(kind, values, message):
    with pytest.raises(ValueError, match=message):
        getattr(bk, kind).from_dict(values)


def test_the_base_is_no_config():
    with pytest.raises(TypeError, match="expected one of its kinds"):
        bk.PruneConfig()


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_cubic_schedule_is_the_papers():
    schedule = bk.PruneSchedule(begin=100, end=1100, frequency=50, initial=0.2)
    steps = [step for step in range(1300) if schedule.prunes_at(step)]
    assert steps == [100 + 50 * i for i in range(21)]
    for i, step in enumerate(steps):
        # Zhu & Gupta 2017, (1): n = 20 prunings after the first, 50 steps apart.
        assert schedule.sparsity(step, 0.9) == pytest.approx(0.9 + (0.2 - 0.9) * (1 - i / 20) ** 3, abs=1e-12)
    assert schedule.sparsity(100, 0.9) == pytest.approx(0.2)
    assert schedule.sparsity(1100, 0.9) == schedule.sparsity(5000, 0.9) == 0.9
    assert schedule.sparsity(99, 0.9) == 0
    assert schedule.sparsity(100, 0.1) == schedule.sparsity(600, 0.1) == 0.1


def test_linear_schedule():
    schedule = bk.PruneSchedule.linear(begin=10, end=50, frequency=10)
    assert [schedule.sparsity(step, 0.8) for step in (10, 20, 30, 40, 50)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])


def test_one_shot_schedule():
    schedule = bk.PruneSchedule.one_shot(200)
    assert [step for step in range(500) if schedule.prunes_at(step)] == [200]
    assert [schedule.sparsity(step, 0.7) for step in (0, 199, 200, 201)] == [0, 0, 0.7, 0.7]


def test_a_last_interval_that_is_shorter_ends_all_the_same():
    schedule = bk.PruneSchedule(begin=3, end=20, frequency=7)
    assert [step for step in range(40) if schedule.prunes_at(step)] == [3, 10, 17, 20]
    last = [schedule.last_pruning(step) for step in (0, 2, 3, 9, 10, 19, 20, 1000)]
    assert last == [None, None, 3, 3, 10, 17, 20, 20]


def test_schedule_json_both_ways():
    schedule = bk.PruneSchedule(begin=5, end=90, frequency=3, initial=0.1, exponent=2)
    assert bk.PruneSchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


@pytest.mark.parametrize(
    "values, message",
    [
        (None, "expected a mapping. Got NoneType"),
        ({"kind": "cubic"}, "expected kind \"prune_schedule\". Got 'cubic'"),
        ({"version": 2, "warmup": 1}, "expected version 1. Got 2"),
        ({"warmup": 1}, r"Got \['warmup'\]"),
        ({"begin": -1}, "begin to be a whole number of at least 0. Got -1"),
        ({"end": 1.5}, "end to be a whole number .* Got 1.5"),
        ({"begin": 10, "end": 9}, "expected end to be at least begin = 10. Got 9"),
        ({"frequency": 0}, "frequency to be a whole number of at least 1. Got 0"),
        ({"initial": 1.5}, "initial to be a number from 0 to 1. Got 1.5"),
        ({"exponent": 0}, "exponent to be a number above 0. Got 0"),
        ({"exponent": float("inf")}, "exponent to be a number above 0. Got inf"),
    ],
)
def test_what_the_schedule_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        bk.PruneSchedule.from_dict(values)
