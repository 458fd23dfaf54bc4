"""`python -m bertkern`: help, mistakes, and the commands on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import engines
from bertkern import cli

COMMANDS = ("doctor", "inspect", "quantize", "bench", "demo")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A saved BERT with a classification head, 2 layers x 64."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def run(capsys, *argv: str) -> tuple[int, str, str]:
    """Exit status, stdout, stderr of one command."""
    try:
        status = cli.main(argv)
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(capsys, command):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert f"python -m bertkern {command}" in out
    assert "examples:" in out


def test_help_lists_the_commands(capsys):
    _, out, _ = run(capsys, "--help")
    assert all(command in out for command in COMMANDS)


def test_bench_help_names_every_engine(capsys):
    _, out, _ = run(capsys, "bench", "--help")
    words = set(out.replace(";", " ").replace(".", " ").split())
    assert {key.partition("/")[2] for key in engines.ALL} <= words


def test_no_command_is_a_usage_error(capsys):
    status, _, err = run(capsys)
    assert status == 2
    assert "required: COMMAND" in err


@pytest.mark.parametrize(
    "argv, message",
    [
        (("bench", "--engines", "nothing"), "engine: expected one of bertkern-int8"),
        (("bench", "--shapes", "8"), "shape: expected BATCHxTOKENS"),
        (("bench", "--model", "/no/such/folder"), "model: expected bert-base, minilm or a folder"),
        (("bench", "gemm", "--layers", "768"), "layer: expected OUTxIN"),
        (("bench", "gemm", "--rows", "0"), "expected a whole number of at least 1. Got '0'"),
        (("bench", "gemm", "--shapes", "1x2"), "--shapes belongs to another benchmark"),
        (("bench", "encoder", "--rows", "1"), "--rows belongs to another benchmark"),
        (("bench", "memory", "--engines", "torch-fp32"), "--engines belongs to another benchmark"),
        (("bench", "--threads", "none"), "expected a whole number of at least 1. Got 'none'"),
        (("inspect", "."), "MODEL: expected a folder with a config.json. Got ."),
    ],
)
def test_mistakes_are_explained_in_one_line(capsys, argv, message):
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_an_unknown_model_is_explained(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, _, err = run(capsys, "inspect", "no-such-user/no-such-model")
    assert status == 2
    assert "MODEL: expected a folder or a name on the hub. Got 'no-such-user/no-such-model'" in err


def test_bench_gemm_writes_what_it_shows(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    options = ["--engines", "torch-int8,torch-fp32", "--rows", "3", "--layers", "32x48", "--epilogues", "fp32"]
    targets = [
        "--json",
        str(tmp_path / "rows.json"),
        "--plot",
        str(tmp_path / "rows.png"),
        "--out",
        str(tmp_path / "o"),
    ]
    status, out, err = run(capsys, "bench", "gemm", *options, "--rounds", "2", *targets)
    assert status == 0, err
    assert "3x32x48" in out
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["provider"] for row in rows} == {"torch-int8", "torch-fp32"}
    assert (tmp_path / "rows.png").stat().st_size > 1000
    assert sorted(file.name for file in (tmp_path / "o").iterdir()) == ["gemm-1t.csv", "gemm-1t.json", "gemm-1t.png"]


def test_bench_encoder_on_a_users_model(capsys, tiny_model):
    options = ["--engines", "torch-int8,torch-fp32", "--model", str(tiny_model), "--shapes", "2x9:0.2,1x900"]
    status, out, err = run(capsys, "bench", *options, "--rounds", "2", "--threads", "1", "--json")
    assert status == 0, err
    run_ = json.loads(out)
    assert {row["x_value"] for row in run_["rows"]} == {"2x9:0.2"}
    assert "1x900: left out" in err


def test_doctor(capsys):
    status, out, err = run(capsys, "doctor", "--json")
    assert status == 0, err
    facts = json.loads(out)
    assert "torch" in json.dumps(facts)
    status, out, err = run(capsys, "doctor")
    assert status == 0, err
    assert len(out.splitlines()) > 3


def test_inspect(capsys, tiny_model):
    status, out, err = run(capsys, "inspect", str(tiny_model))
    assert status == 0, err
    assert "encoder.layer" in out
    status, out, err = run(capsys, "inspect", str(tiny_model), "--json")
    assert status == 0, err
    json.loads(out)


def test_quantize_saves_a_model_that_loads(capsys, tiny_model, tmp_path):
    import torch
    import transformers

    out = tmp_path / "int8"
    status, text, err = run(capsys, "quantize", str(tiny_model), str(out))
    assert status == 0, err
    assert "MB of weights" in text
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert model.config.quantization_config is not None
    with torch.inference_mode():
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()

    status, _, err = run(capsys, "quantize", str(tiny_model), str(out))
    assert status == 2
    assert "holds files; --force" in err
    status, _, err = run(capsys, "quantize", str(tiny_model), str(tiny_model), "--force")
    assert status == 2
    assert "expected another folder than MODEL" in err
