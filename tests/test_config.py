"""Int8Config: JSON both ways, and nothing that it does not know."""

import json

import pytest

import bertkern as bk


def test_json_both_ways():
    config = bk.Int8Config(weight="per_tensor", skip=["classifier"], pooler=False)
    assert config.skip == ("classifier",)
    assert bk.Int8Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict()["version"] == 1


@pytest.mark.parametrize(
    "values, message",
    [
        ({"version": 2}, "expected version 1. Got 2"),
        ({"version": "1"}, "expected version 1. Got '1'"),
        ({"version": 2, "bits": 4}, "expected version 1. Got 2"),
        ({"bits": 4}, "Got \\['bits'\\]"),
        ({"kind": "int4"}, "expected kind \"int8\". Got 'int4'"),
        ({"kind": ["int8"]}, "expected kind \"int8\". Got \\['int8'\\]"),
        ([("weight", "per_tensor")], "Int8Config: expected a mapping. Got list"),
        ({"weight": "per_group"}, "expected weight to be one of"),
        ({"activation": None}, "expected activation to be one of"),
        ({"embeddings": 1}, "expected embeddings to be one of"),
        ({"skip": "classifier"}, "sequence of names"),
        ({"activation_unsigned": True}, 'expected activation "static"'),
    ],
)
def test_what_it_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        bk.Int8Config.from_dict(values)
