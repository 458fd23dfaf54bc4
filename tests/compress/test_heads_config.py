"""The record of how heads are pruned."""

import json

import pytest

import bertkern as bk


def test_round_trip():
    config = bk.HeadPruneConfig(fraction=0.4, tolerance=0.02, step=0.1, min_heads=0, rescore=True, method="released")
    assert bk.HeadPruneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert bk.HeadPruneConfig.from_dict({"tolerance": 0}).tolerance == 0


def test_frozen():
    with pytest.raises(AttributeError):
        bk.HeadPruneConfig(fraction=0.5).fraction = 0.6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"expected a fraction or a tolerance. Got neither"),
        ({"fraction": 1.1}, r"fraction to be a number from 0 to 1. Got 1.1"),
        ({"fraction": -0.1}, r"fraction to be a number from 0 to 1. Got -0.1"),
        ({"fraction": True}, r"fraction to be a number from 0 to 1. Got True"),
        ({"fraction": float("nan")}, r"fraction to be a number from 0 to 1. Got nan"),
        ({"fraction": "half"}, r"fraction to be a number from 0 to 1. Got 'half'"),
        ({"tolerance": -1}, r"tolerance to be a number from 0 on. Got -1"),
        ({"tolerance": float("inf")}, r"tolerance to be a number from 0 on. Got inf"),
        ({"fraction": 0.5, "step": 0}, r"step to be a number above 0 and up to 1. Got 0"),
        ({"fraction": 0.5, "step": 2}, r"step to be a number above 0 and up to 1. Got 2"),
        ({"fraction": 0.5, "min_heads": -1}, r"min_heads to be a whole number of at least 0. Got -1"),
        ({"fraction": 0.5, "min_heads": 1.0}, r"min_heads to be a whole number of at least 0. Got 1.0"),
        ({"fraction": 0.5, "rescore": 1}, r"rescore to be one of \(True, False\). Got 1"),
        ({"fraction": 0.5, "normalize": 0}, r"normalize to be one of \(True, False, None\). Got 0"),
        ({"fraction": 0.5, "greater_is_better": None}, r"greater_is_better to be one of \(True, False\). Got None"),
        ({"fraction": 0.5, "method": "random"}, r"method to be one of .* Got 'random'"),
        ({"fraction": 0.5, "version": 2}, r"expected version 1. Got 2"),
        ({"version": 2, "share": 0.5}, r"expected version 1. Got 2"),
        ({"fraction": 0.5, "share": 0.5}, r"Got \['share'\]"),
        ({"fraction": 0.5, "kind": "int8"}, "expected kind \"head_prune\"\\. Got 'int8'"),
        ([("fraction", 0.5)], r"expected a mapping. Got list"),
    ],
)
def test_what_it_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        bk.HeadPruneConfig.from_dict(values)
    if isinstance(values, dict) and not {"kind", "share"} & set(values):
        with pytest.raises(ValueError, match=message):
            bk.HeadPruneConfig(**values)
