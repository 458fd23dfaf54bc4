"""Q8BertConfig: JSON both ways, the authors' JSON, and what it refuses."""

import dataclasses
import json

import pytest

from bertkern.compress.q8bert import OpSettings, Q8BertConfig


def test_round_trip_through_json():
    config = Q8BertConfig.uniform(start_step=7, ema_decay=0.99, skip=("head",)).replace(
        pooler=OpSettings(mode="dynamic", requantize_output=False)
    )
    values = json.loads(json.dumps(config.to_dict()))
    assert values["version"] == 1 and "head" not in values
    assert Q8BertConfig.from_dict(values) == config
    assert Q8BertConfig.from_json({"model_type": "bert", "q8bert": values}) == config


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Q8BertConfig().head = None


AUTHORS = {
    "hidden_size": 768,
    "attention_query": {"mode": "ema", "start_step": 100, "ema_decay": 0.999},
    "ffn_output": {"mode": "dynamic", "requantize_output": False},
    "head": {},
    "word_embeddings": {"mode": "ema", "weight_bits": 8},
}


@pytest.mark.parametrize("form", ["values", "text", "path"])
def test_the_authors_json(form, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(AUTHORS))
    config = Q8BertConfig.from_json({"values": AUTHORS, "text": json.dumps(AUTHORS), "path": path}[form])
    assert config.attention_query == OpSettings("ema", start_step=100, ema_decay=0.999)
    assert config.ffn_output == OpSettings("dynamic", requantize_output=False)
    assert config.head.mode == "none", "the authors' default"
    assert config.pooler is None and config.attention_key is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "expected version 1. Got None"),
        ({"version": 2}, "expected version 1. Got 2"),
        ({"version": 1, "heads": {}}, "Got heads"),
        ({"version": 1, "head": {"bits": 8}}, r"Q8BertConfig.head: expected only the fields mode.* Got bits"),
        (
            {"version": 1, "head": {"mode": "static"}},
            "head: .*expected mode to be one of none, dynamic, ema. Got 'static'",
        ),
        ({"version": 1, "head": {"weight_bits": 9}}, "expected weight_bits to be an integer from 2 to 8. Got 9"),
        ({"version": 1, "head": {"activation_bits": True}}, "expected activation_bits .* Got True"),
        ({"version": 1, "head": {"start_step": -1}}, "expected start_step .* Got -1"),
        ({"version": 1, "head": {"ema_decay": 1.5}}, "expected ema_decay .* Got 1.5"),
        ({"version": 1, "head": {"requantize_output": "yes"}}, "expected requantize_output .* Got 'yes'"),
        ({"version": 1, "head": 8}, "head: expected a mapping of settings. Got 8"),
        ([], "expected a mapping. Got"),
    ],
)
def test_refusals(values, message):
    with pytest.raises(ValueError, match=message):
        Q8BertConfig.from_dict(values)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"hidden_size": 8}, "Got none of them"),
        ("{broken", "does not parse"),
        ("no/such/file.json", "which does not exist"),
        ({"q8bert": {"version": 3}}, "expected version 1. Got 3"),
    ],
)
def test_json_refusals(source, message):
    with pytest.raises(ValueError, match=message):
        Q8BertConfig.from_json(source)


def test_uniform_refuses_unknown_names():
    with pytest.raises(ValueError, match=r"expected skip to name some of .* Got classifier"):
        Q8BertConfig.uniform(skip=("classifier",))
    with pytest.raises(ValueError, match=r"Got bits"):
        Q8BertConfig.uniform(bits=4)
    with pytest.raises(ValueError, match=r"Q8BertConfig.head: expected OpSettings or None"):
        Q8BertConfig(head={"mode": "ema"})
