"""`python -m bertkern prune`: what it writes, and mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bertkern import cli

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A saved BERT with a classification head, 2 layers x 64."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=112
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]))
    return folder


def run(capsys, *argv: object) -> tuple[int, str, str]:
    """Exit status, stdout, stderr of one command."""
    try:
        status = cli.main([str(argument) for argument in argv])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def pruned(capsys, model: Path, out: Path, *options: str):
    """The model that the command writes, and what it prints."""
    status, text, err = run(capsys, "prune", model, "--out", out, *options)
    assert status == 0, err
    return transformers.AutoModelForSequenceClassification.from_pretrained(out), text


def zeros(model: torch.nn.Module, name: str) -> int:
    return int((model.get_parameter(name) == 0).sum())


QUERY = "bert.encoder.layer.0.attention.self.query.weight"
UP = "bert.encoder.layer.1.intermediate.dense.weight"
TABLE, POOLER = "bert.embeddings.word_embeddings.weight", "bert.pooler.dense.weight"


def test_help_shows_examples(capsys):
    status, out, _ = run(capsys, "prune", "--help")
    assert status == 0
    assert "examples:\n  python -m bertkern prune ./my-bert ./my-bert-80 --sparsity 0.8" in out
    _, out, _ = run(capsys, "--help")
    assert "prune " in out


def test_blocks(capsys, tiny_model, tmp_path):
    model, text = pruned(capsys, tiny_model, tmp_path / "out", "--sparsity", "0.8", "--block", "16x4")
    original = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_model)
    assert zeros(model, QUERY) == round(0.8 * 64) * 64 and zeros(model, UP) == round(0.8 * 112) * 64
    assert zeros(model, POOLER) == zeros(model, QUERY)
    for name, value in model.state_dict().items():
        kept = value != 0
        assert torch.equal(value[kept], original.state_dict()[name][kept])
        if not (name.endswith("weight") and ("encoder" in name or "pooler" in name) and "LayerNorm" not in name):
            assert torch.equal(value, original.state_dict()[name])
    table = " ".join(text.split())
    assert "bert.encoder.layer.*.attention.self.query 2 64 x 64 3264 20.3%" in table
    assert "of weights, zeros among them" in text
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= files
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize(
    "options, expected",
    [
        (("--sparsity", "0.5"), {QUERY: 2048, TABLE: 97 * 32, POOLER: 2048, "classifier.weight": 0}),
        (("--sparsity", "0.5", "--no-embeddings"), {QUERY: 2048, TABLE: 64}),
        (("--sparsity", "0.5", "--no-pooler", "--head"), {POOLER: 0, "classifier.weight": 64}),
        (("--sparsity", "1", "--block", "8x8", "--embeddings"), {QUERY: 4096, TABLE: 97 * 64}),
        (("--sparsity", "0.25", "--rows"), {QUERY: 1024, UP: 28 * 64}),
        (("--sparsity", "0.25", "--columns", "--norm", "max"), {QUERY: 1024, UP: 16 * 112}),
        (("--nm", "1:4"), {QUERY: 3072, UP: 112 * 48, TABLE: 64}),
        (("--sparsity", "0.5", "--random", "7", "--skip", "*.query"), {QUERY: 0, UP: 56 * 64}),
        (
            ("--sparsity", "0.5", "--set", "layer.0.*=0.25", "--set", "intermediate.dense=0", "--scope", "matrix"),
            {QUERY: 1024, UP: 0, POOLER: 2048},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options(options, expected, capsys, tiny_model, tmp_path):
    model, _ = pruned(capsys, tiny_model, tmp_path / "out", *options)
    assert {name: zeros(model, name) for name in expected} == expected


def test_global_scope(capsys, tiny_model, tmp_path):
    model, text = pruned(capsys, tiny_model, tmp_path / "out", "--sparsity", "0.9", "--scope", "global")
    weights = [module.weight for name, module in model.bert.named_modules() if isinstance(module, torch.nn.Linear)]
    weights.append(model.get_parameter(TABLE))
    total = sum(weight.numel() for weight in weights)
    assert sum(int((weight == 0).sum()) for weight in weights) == round(0.9 * total)
    assert f"{round(0.9 * total):,} of {total:,} weights are zero: 90.0%" in text


def test_the_pruned_model_can_be_quantized_next(capsys, tiny_model, tmp_path):
    pruned(capsys, tiny_model, tmp_path / "pruned", "--sparsity", "0.8", "--block", "16x4")
    status, _, err = run(capsys, "quantize", tmp_path / "pruned", tmp_path / "int8")
    assert status == 0, err
    status, out, err = run(capsys, "prune", tmp_path / "int8", "--sparsity", "0.8", "--out", tmp_path / "more")
    assert (status, out) == (1, "")
    assert "expected a float model. Got int8 layers, such as bert.embeddings.word_embeddings: prune first" in err
    assert not (tmp_path / "more").exists()


SPARSE = ("--sparsity", "0.5")


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "expected --sparsity, a number from 0 to 1, or --nm"),
        (("--sparsity", "many"), "argument --sparsity: invalid float value: 'many'"),
        (("--sparsity", "80"), "UnstructuredPruneConfig: expected sparsity to be a number from 0 to 1. Got 80.0"),
        (("--sparsity", "nan"), "expected sparsity to be a number from 0 to 1. Got nan"),
        ((*SPARSE, "--block", "16"), "argument --block: expected ROWSxCOLUMNS, such as 16x4. Got '16'"),
        ((*SPARSE, "--block", "0x4"), "expected block to be (rows, columns), whole numbers of at least 1. Got (0, 4)"),
        ((*SPARSE, "--block", "4x4", "--rows"), "argument --rows: not allowed with argument --block"),
        (("--nm", "2-4"), "argument --nm: expected N:M, such as 2:4. Got '2-4'"),
        (("--nm", "5:4"), "NmPruneConfig: expected n to be a whole number from 0 to 4. Got 5"),
        (("--nm", "2:4", *SPARSE), "--sparsity does not go together with --nm"),
        (("--nm", "2:4", "--sparsity", "0"), "--sparsity does not go together with --nm"),
        (("--nm", "2:4", "--scope", "global"), "--scope does not go together with --nm"),
        (("--nm", "2:4", "--set", "query=0.1"), "--set does not go together with --nm"),
        ((*SPARSE, "--norm", "l1"), "--norm belongs to blocks, rows or columns"),
        ((*SPARSE, "--set", "query"), "argument --set: expected PATTERN=SPARSITY, such as layer.0.*=0.3. Got 'query'"),
        ((*SPARSE, "--set", "query=2"), 'expected overrides["query"] to be a number from 0 to 1. Got 2.0'),
        ((*SPARSE, "--random", "-3"), "expected seed to be a whole number from 0 to 2147483647. Got -3"),
    ],
)
def test_mistakes_are_explained(options, message, capsys, tiny_model, tmp_path):
    status, out, err = run(capsys, "prune", tiny_model, "--out", tmp_path / "out", *options)
    assert (status, out) == (2, "")
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ("--block", "128x4"),
            "expected blocks that fit into bert.encoder.layer.0.attention.self.query.weight of",
        ),
        (("--set", "qurey=0.1"), 'expected overrides to name matrices that are pruned. Got "qurey"'),
        (("--skip", "query", "--skip", "qurey"), 'expected skip to name matrices of the model. Got "qurey"'),
        (("--skip", "bert"), "expected at least one matrix to prune. Got none"),
    ],
)
def test_what_does_not_fit_the_model(options, message, capsys, tiny_model, tmp_path):
    status, out, err = run(capsys, "prune", tiny_model, *SPARSE, "--out", tmp_path / "out", *options)
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1 and message in err
    assert not (tmp_path / "out").exists()


def test_where_to_write(capsys, tiny_model, tmp_path):
    status, _, err = run(capsys, "prune", tiny_model, *SPARSE)
    assert status == 2 and "required: OUT" in err
    status, _, err = run(capsys, "prune", tiny_model, *SPARSE, "--out", tiny_model)
    assert status == 2 and "holds files; --force" in err
    status, _, err = run(capsys, "prune", tiny_model, *SPARSE, "--out", tiny_model, "--force")
    assert status == 2 and "expected another folder than MODEL" in err
    file = tmp_path / "file"
    file.write_text("old")
    status, _, err = run(capsys, "prune", tiny_model, *SPARSE, "--out", file)
    assert status == 2 and "OUT: expected a folder. Got the file" in err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    model, _ = pruned(capsys, tiny_model, tmp_path / "out", *SPARSE, "--force")
    assert zeros(model, QUERY) == 2048


def test_nan_is_told(capsys, tiny_model, tmp_path):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_model)
    torch.nn.init.constant_(model.get_parameter(UP), float("nan"))
    model.save_pretrained(tmp_path / "nan")
    status, _, err = run(capsys, "prune", tmp_path / "nan", *SPARSE, "--out", tmp_path / "out")
    assert status == 1 and f"expected {UP} without NaN. Got some" in err
    assert not (tmp_path / "out").exists()
