"""Configs of quantization: JSON both ways, and nothing that they do not know."""

import json
from dataclasses import replace

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


def test_zero_points_are_whole_but_for_least_squares():
    assert [bk.GroupwiseConfig(method=method).whole_zero for method in ("minmax", "percentile", "mse")] == [1, 1, 0]
    for whole in (True, False):
        made = [bk.GroupwiseConfig(method=method, whole_zero=whole) for method in ("minmax", "mse")]
        assert [config.whole_zero for config in made] == [whole, whole]
        assert [bk.GroupwiseConfig.from_dict(config.to_dict()) for config in made] == made


def test_groupwise_json_both_ways():
    config = bk.GroupwiseConfig(
        bits=3, group_size=64, axis="k", layer_bits={"layer.1": 2, "layer.0.output": [2, 4]}, skip=["classifier"]
    )
    assert (config.groups, config.group_size) == (None, 64) and (bk.GroupwiseConfig().groups, config.skip) == (
        128,
        ("classifier",),
    )
    record = json.loads(json.dumps(config.to_dict(), sort_keys=True))
    assert record["layer_bits"] == {"layer.1": 2, "layer.0.output": [2, 4]} and record["kind"] == "groupwise"
    assert bk.GroupwiseConfig.from_dict(record) == config and hash(bk.GroupwiseConfig.from_dict(record)) == hash(config)
    assert replace(config, bits=4).layer_bits == config.layer_bits
    assert bk.GroupwiseConfig(layer_bits=dict(reversed(record["layer_bits"].items()))).layer_bits == config.layer_bits


def test_whose_bits():
    """The longest pattern counts in whatever order they come, wildcards aside; tables have bits of their own."""
    bits = {"*": 8, "layer.1": 2, "layer.1.output": 3, "encoder.layer.1?": 5, "word_embeddings": 4, "*.query": (2, 3)}
    config = bk.GroupwiseConfig(bits=6, layer_bits=bits)
    for name, expected in (
        ("encoder.layer.1.output.dense", 3),
        ("encoder.layer.1.intermediate.dense", 2),
        ("encoder.layer.11.output.dense", 5),
        ("encoder.layer.2.output.dense", 8),
        ("encoder.layer.2.attention.self.query", (2, 3)),
    ):
        assert config.bits_of([name]) == config.bits_of(["bert.other", name]) == expected
    assert config.bits_of(["embeddings.word_embeddings"], table=True) == 4
    assert bk.GroupwiseConfig(bits=6).bits_of(["encoder.layer.1.output.dense"]) == 6
    assert bk.GroupwiseConfig(embedding_bits=5).bits_of(["embeddings.word_embeddings"], table=True) == 5
    sizes = [bk.GroupwiseConfig(groups=128).size_of(side) for side in (768, 3072, 100, 129, 1)]
    assert sizes == [6, 24, 1, 2, 1] and bk.GroupwiseConfig(group_size=64).size_of(768) == 64


@pytest.mark.parametrize(
    "values, message",
    [
        ({"version": 2}, "expected version 1. Got 2"),
        ({"weight": "per_tensor"}, "Got \\['weight'\\]"),
        ({"kind": "int8"}, "expected kind \"groupwise\". Got 'int8'"),
        ({"bits": 1}, "bits to be a whole number from 2 to 8. Got 1"),
        ({"bits": True}, "bits to be a whole number from 2 to 8. Got True"),
        ({"bits": 4.0}, "bits to be a whole number"),
        ({"embedding_bits": 9}, "embedding_bits to be a whole number from 2 to 8. Got 9"),
        ({"groups": 0}, "groups to be a whole number of at least 1. Got 0"),
        ({"group_size": -1}, "group_size to be a whole number of at least 1. Got -1"),
        ({"groups": 128, "group_size": 64}, "expected groups or group_size. Got both: 128 and 64"),
        ({"axis": "N"}, "expected axis to be one of"),
        ({"method": "max"}, "expected method to be one of"),
        ({"activation": "int8"}, "expected activation to be one of"),
        ({"symmetric": 1}, "expected symmetric to be one of"),
        ({"whole_zero": 2}, "expected whole_zero to be one of"),
        ({"shared": True}, 'expected axis "k" with shared'),
        ({"activation_unsigned": True}, 'expected activation "static"'),
        ({"skip": "classifier"}, "sequence of names"),
        ({"layer_bits": "layer.1"}, "layer_bits to be a mapping of names. Got 'layer.1'"),
        ({"layer_bits": {"layer.1": 9}}, "layer_bits of layer.1 to be whole numbers from 2 to 8. Got 9"),
        ({"layer_bits": {"layer.1": []}}, "layer_bits of layer.1"),
        ({"layer_bits": {"layer.1": [2, "3"]}}, "layer_bits of layer.1"),
        ({"layer_bits": {"": 4}}, "name every module once"),
        ({"layer_bits": [["layer.1", 2], ["layer.1", 3]]}, "name every module once"),
    ],
)
def test_what_groupwise_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        bk.GroupwiseConfig.from_dict(values)
