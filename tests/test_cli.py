"""`python -m bertkern`: help, mistakes, and the commands on a tiny model."""

from __future__ import annotations

import json
import re
import shutil
import sys
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
        (("inspect", "."), "MODEL: expected a folder with a config.json. Got ., which has none."),
        (("inspect", "setup.py"), "MODEL: expected a folder with a config.json. Got setup.py, which is a file."),
        (
            ("inspect", "./no/such/folder"),
            "MODEL: expected a folder with a config.json. Got ./no/such/folder, which does",
        ),
        (
            ("quantize", "/no/such/folder", "out"),
            "expected a folder with a config.json. Got /no/such/folder, which does",
        ),
    ],
)
def test_mistakes_are_explained_in_one_line(capsys, argv, message):
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_an_unknown_model_is_explained(capsys, monkeypatch):
    # The variable is read once, when the hub's library is imported; without it every file is asked for again and again.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
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


def test_doctor_fails_where_the_operators_do(capsys, monkeypatch):
    monkeypatch.setattr("bertkern.doctor._load_error", lambda: "bertkern's operators are not built. Run ...")
    status, out, _ = run(capsys, "doctor")
    assert status == 1
    assert "  bertkern's operators are not built. Run ..." in out.splitlines()


def test_inspect(capsys, tiny_model):
    status, out, err = run(capsys, "inspect", str(tiny_model))
    assert status == 0, err
    assert "encoder.layer" in out
    assert "structure" in out.splitlines()[1] and "exactly removable: 0 of" in out
    status, out, err = run(capsys, "inspect", str(tiny_model), "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["layers"] and {"zeros", "structure", "densities", "times"} <= found["rows"][-1].keys()
    assert found["totals"]["speedup"].keys() == {"fp32", "int8"}


def test_quantize_saves_a_model_that_loads(capsys, tiny_model, tmp_path):
    import torch
    import transformers

    out = tmp_path / "int8"
    status, text, err = run(capsys, "quantize", str(tiny_model), str(out))
    assert status == 0, err
    assert "MB of weights" in text
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]
    assert err == "no tokenizer beside the model: only the weights are saved\n"
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
    for place in (out / "config.json", out / "config.json" / "below" / "it"):
        status, _, err = run(capsys, "quantize", str(tiny_model), str(place))
        assert status == 2
        assert f"OUT: expected a folder. Got the file {out / 'config.json'}." in err


@pytest.mark.parametrize("command, options", [("quantize", []), ("prune", ["--sparsity", "0.5"])])
def test_where_to_write_is_told_in_one_way_or_the_other(command, options, capsys, tiny_model, tmp_path):
    model, force = str(tiny_model), ["--force"]
    for at, argv in enumerate(
        [
            [model, "OUT", *options, *force],
            [*options, *force, model, "OUT"],
            [model, *options, *force, "OUT"],
            [model, *options, *force, "--out", "OUT"],
            ["--out", "OUT", model, *options],
            [model, "--out=OUT", *options],
        ]
    ):
        out = tmp_path / str(at)
        status, text, err = run(capsys, command, *(word.replace("OUT", str(out)) for word in argv))
        assert status == 0, err
        assert f"{out}: " in text and (out / "model.safetensors").exists()
    for argv in ([model, "a", "--out", "b"], ["--out", "a", model, "b"], [model, "--out", "a", "--out", "b"]):
        status, _, err = run(capsys, command, *argv, *options)
        assert status == 2 and "expected OUT once. Got a and b." in err
    status, _, err = run(capsys, command, model, *options)
    assert status == 2 and "the following arguments are required: OUT" in err
    _, text, _ = run(capsys, command, "--help")
    assert "MODEL OUT" in " ".join(text.split()) and "--out" not in text


def test_quantize_to_low_bits(capsys, tiny_model, tmp_path):
    import transformers

    options = ["--bits", "3", "--groups", "16", "--method", "mse", "--embedding-bits", "4", "--pooler"]
    options += ["--layer-bits", "layer.1=2", "--layer-bits", "layer.1.output=2,8,4,4,4,4,4,4,4,4,4,4,4,4,4,4"]
    status, text, err = run(
        capsys, "quantize", str(tiny_model), str(tmp_path / "low"), "--scheme", "groupwise", *options
    )
    assert status == 0, err
    assert "int3 n/16" in text and "int2/4/8 n/16" in text and "int4 n/97" in text
    sizes = re.search(r"([\d.]+) MB of weights, from ([\d.]+) MB", text)
    assert float(sizes[1]) < float(sizes[2]) / 3
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "low")
    assert model.config.quantization_config.config.layer_bits[0] == ("layer.1", 2)
    status, text, err = run(
        capsys,
        "quantize",
        str(tiny_model),
        str(tmp_path / "k"),
        "--scheme",
        "groupwise",
        "--group-size",
        "32",
        "--axis",
        "k",
        "--shared",
        "--symmetric",
        "--activation",
        "float",
        "--no-embeddings",
        "--head",
    )
    assert status == 0, err
    assert "int4 k/2, float activations" in text and re.search(r"classifier +1 +2 x 64 +int4 k/2", text)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--bits", "4"], "--bits belongs to --scheme groupwise"),
        (["--layer-bits", "a=3"], "--layer-bits belongs to --scheme groupwise"),
        (["--scheme", "groupwise", "--weight", "per_tensor"], "--weight belongs to --scheme int8"),
        (["--scheme", "groupwise", "--bits", "9"], "expected bits to be a whole number from 2 to 8. Got 9"),
        (["--scheme", "groupwise", "--layer-bits", "a=b"], "expected PATTERN=BITS, such as layer.0.*=3. Got 'a=b'"),
        (["--scheme", "groupwise", "--layer-bits", "a=9"], "layer_bits of a"),
        (["--scheme", "groupwise", "--groups", "8", "--group-size", "8"], "not allowed with argument"),
        (["--scheme", "groupwise", "--shared"], 'expected axis "k" with shared'),
        (["--scheme", "groupwise", "--no-embeddings", "--embedding-bits", "4"], "does not go together with"),
        (["--average-bits", "3"], "--average-bits belongs to --scheme groupwise"),
        (["--scheme", "groupwise", "--average-bits", "1"], "expected average_bits of at least 2"),
        (["--scheme", "groupwise", "--target-size-mb", "0.001"], "expected target_size_mb of at least"),
        (["--scheme", "groupwise", "--choices", "2,3"], "--choices goes together with --average-bits"),
        (["--scheme", "groupwise", "--average-bits", "3", "--choices", "2,x"], "expected BITS,..., such as 2,4"),
        (
            ["--scheme", "groupwise", "--average-bits", "3", "--bits", "4"],
            "--bits is, with a budget, for matrices outside of the encoder layers. Got none",
        ),
        (
            ["--scheme", "groupwise", "--average-bits", "3", "--head", "--bits", "4", "--layer-bits", "classifier=3"],
            "Got none that it would count for: leave it out, or add --pooler or --head",
        ),
        (
            ["--scheme", "groupwise", "--target-size-mb", "1", "--layer-bits", "layer.1=8"],
            "expected --layer-bits, with a budget, to be for what stands outside of the encoder layers. Got 'layer.1', "
            "which names bert.encoder.layer.1.attention.self.query.",
        ),
        (["--scheme", "groupwise", "--average-bits", "3", "--skip", "*.query"], "expected --skip, with a budget"),
        (["--scheme", "groupwise", "--method", "compensate"], "--method compensate needs --calibration"),
        (["--scheme", "groupwise", "--activation", "static"], "--activation static needs --calibration"),
        (["--scheme", "groupwise", "--calibration", "none.txt"], "expected a text file of sentences"),
    ],
)
def test_quantize_options_that_do_not_fit(capsys, tiny_model, tmp_path, options, message):
    status, _, err = run(capsys, "quantize", str(tiny_model), str(tmp_path / "out"), *options)
    assert status == 2 and message in err
    assert not (tmp_path / "out").exists()


def test_quantize_within_a_budget(capsys, tiny_model, tmp_path):
    low = ("--scheme", "groupwise", "--groups", "8", "--average-bits", "3")
    status, text, err = run(capsys, "quantize", str(tiny_model), str(tmp_path / "low"), *low)
    assert status == 0, err
    assert "the least squared error of the weights, without data" in text and "3.00 bits on average" in text
    assert "int2 n/8" in text and "int4 n/8" in text and "(--bits)" not in text


def test_with_a_budget_bits_are_those_outside_of_the_layers(capsys, tiny_model, tmp_path):
    low = ("quantize", str(tiny_model), str(tmp_path / "low"), "--scheme", "groupwise", "--groups", "2")
    low += ("--target-size-mb", "0.05", "--bits", "6", "--pooler", "--head", "--layer-bits", "classifier=5")
    status, text, err = run(capsys, *low)
    assert status == 0, err
    assert "Of 6 bits (--bits): bert.pooler.dense." in text and "have the bits of the config" in text
    rows = {line.split()[0]: line for line in text.splitlines() if " int" in line}
    assert "int6 n/2" in rows["bert.pooler.dense"] and "int5 n/2" in rows["classifier"]
    assert not any("int6" in line for name, line in rows.items() if "encoder" in name)


def test_quantize_by_sentences(capsys, copy, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *["a", "b", "c", "d", "e", "f", "g", "h"]]
    (copy / "vocab.txt").write_text("\n".join(words))
    pytest.importorskip("transformers").BertTokenizer(str(copy / "vocab.txt")).save_pretrained(copy)
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("\n".join(f"{a} {b} d" for a in "abcdefgh" for b in "abc") + "\n\n")
    out = tmp_path / "low"
    low = ("--scheme", "groupwise", "--group-size", "16", "--axis", "k", "--average-bits", "3", "--choices", "2,3,4")
    status, text, err = run(
        capsys, "quantize", str(copy), str(out), *low, "--method", "compensate", "--calibration", str(sentences)
    )
    assert status == 0, err
    assert "sensitivity" in text and "k/4" in text and (out / "tokenizer.json").exists()
    static = ("--scheme", "groupwise", "--activation", "static", "--calibration", str(sentences))
    status, text, err = run(capsys, "quantize", str(copy), str(tmp_path / "static"), *static)
    assert status == 0 and "int4 n/64 static" in text, err
    sentences.write_text(" \n")
    status, _, err = run(capsys, "quantize", str(copy), str(tmp_path / "x"), *low, "--calibration", str(sentences))
    assert status == 2 and "expected sentences, one a line" in err


@pytest.fixture
def copy(tiny_model, tmp_path) -> Path:
    """The tiny model in a folder that a test may spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


@pytest.mark.parametrize("before", [None, "old"])
def test_a_failure_leaves_the_output_as_it_was(before, capsys, tiny_model, tmp_path, monkeypatch):
    out = tmp_path / "deep" / "int8"
    if before:
        out.mkdir(parents=True)
        (out / "config.json").write_text(before)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bertkern.cli.models._save_tokenizer", interrupted)
        status, _, err = run(capsys, "quantize", str(tiny_model), str(out), "--force")
    assert (status, err) == (130, "bertkern: interrupted\n")
    assert [file.name for file in (tmp_path / "deep").iterdir()] == (["int8"] if before else [])
    assert not before or [file.read_text() for file in out.iterdir()] == [before]
    status, _, err = run(capsys, "quantize", str(tiny_model), str(out), "--force")
    assert status == 0, err
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]


def square(rows: int):
    import torch

    return torch.ones(rows, rows)


def change(**tensors):
    """Exchanges tensors of the model: name -> a function of the old one; None as its result drops it."""

    def spoil(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        stored = load_file(folder / "model.safetensors")
        for name, new in tensors.items():
            stored[name.replace("__", ".")] = new(stored.get(name.replace("__", ".")))
        stored = {name: tensor for name, tensor in stored.items() if tensor is not None}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def set_trap(folder: Path) -> None:
    import torch

    class Trap:
        def __reduce__(self):
            return exec, (f"open({str(folder / 'ran')!r}, 'w')",)

    (folder / "model.safetensors").unlink()
    torch.save({"trap": Trap()}, folder / "pytorch_model.bin")


def record(**values):
    """Changes the quantization_config of an int8 model."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bertkern", **values}
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


DENSE = "bert__encoder__layer__1__output__dense__weight"
SPOILED = {
    "truncated": (truncate, "its weights are truncated, damaged or holding other objects"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "its weights are truncated, damaged or"),
    "pickled": (set_trap, "its weights are truncated, damaged or holding other objects: .*nsupported"),
    "absent": (lambda f: (f / "model.safetensors").unlink(), "[Nn]o file named model.safetensors"),
    "missing": (
        change(**{DENSE: lambda _: None}),
        "do not fit the config: expected bert.*1.output.dense.weight. Got none",
    ),
    "extra": (
        change(bert__encoder__layer__7__output__dense__weight=lambda _: square(3)),
        "do not fit the config: expected no bert.encoder.layer.7.output.dense.weight. Got it",
    ),
    "shape": (
        change(**{DENSE: lambda w: w[:, :-1].contiguous()}),
        r"expected bert.encoder.layer.1.output.dense.weight of shape \[64, 128\]. Got \[64, 127\]",
    ),
    "no json": (lambda f: (f / "config.json").write_text("{"), "config.json names no known model: .*JSON"),
    "no type": (lambda f: (f / "config.json").write_text("{}"), "config.json names no known model: .*model_type"),
    "version": (record(version=2), "Int8Config: expected version 1. Got 2"),
    "field": (record(groups=128), "Int8Config: expected fields among .* Got \\['groups'\\]"),
    "int8": (record(), "the checkpoint does not fit: expected bert.*weight_codes. Got none"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_damaged_models_are_explained_in_one_line(kind, capsys, copy, tmp_path):
    spoil, message = SPOILED[kind]
    spoil(copy)
    for command in (["inspect", str(copy)], ["quantize", str(copy), str(tmp_path / "out")]):
        status, out, err = run(capsys, *command)
        assert status in (1, 2)
        assert len(err.splitlines()) == 1 and re.match(f"bertkern: MODEL: {copy}.*{message}", err), err
        assert out == ""
    assert not (tmp_path / "out").exists()
    assert not (copy / "ran").exists()


def test_weights_that_cannot_be_quantized(capsys, copy, tmp_path):
    change(**{DENSE: lambda w: w.fill_(float("inf"))})(copy)
    status, _, err = run(capsys, "quantize", str(copy), str(tmp_path / "out"))
    assert status == 1
    assert "expected bert.encoder.layer.1.output.dense.weight to be finite" in err
    assert not (tmp_path / "out").exists()


def test_heads_may_lack_and_old_names_may_stand(capsys, copy):
    change(
        classifier__weight=lambda _: None,
        bert__embeddings__position_ids=lambda _: square(1),
        cls__predictions__bias=lambda _: square(3),
    )(copy)
    status, _, err = run(capsys, "inspect", str(copy))
    assert status == 0, err
    first, second = err.splitlines()
    assert first == f"{copy} lacks classifier.weight: they start anew, untrained"
    assert second == f"{copy} holds cls.predictions.bias, which BertForSequenceClassification has no place for"


def without_heads(model):
    from tests import pruned_exports

    gone = {0: [1, 3], 1: [0]}
    return pruned_exports.without_heads(model, gone), {"pruned_heads": {str(k): v for k, v in gone.items()}}


def in_blocks(model):
    from tests import pruned_exports

    state = dict(model.state_dict())
    weight = state.pop("bert.encoder.layer.0.intermediate.dense.weight")
    parts = pruned_exports.block_sparse(weight, seed=0)
    return {**state, **{f"bert.encoder.layer.0.intermediate.dense.weight.{k}": v for k, v in parts.items()}}, {}


@pytest.mark.parametrize("export", [without_heads, in_blocks])
def test_checkpoints_of_papers_are_read(export, capsys, tiny_model, tmp_path):
    import torch
    import transformers

    import bertkern
    from tests.pruned_exports import config_of, write

    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_model).eval()
    state, more = export(model)
    write(tmp_path / "in", state, config_of(model, **more))
    expected = bertkern.quantize_(bertkern.load_checkpoint(tmp_path / "in"))
    status, out, err = run(capsys, "inspect", str(tmp_path / "in"))
    assert status == 0 and "error" not in err and "bert.encoder.layer" in out
    status, _, err = run(capsys, "quantize", str(tmp_path / "in"), str(tmp_path / "out"))
    assert status == 0, err
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected(ids).logits)
    status, out, err = run(capsys, "prune", str(tmp_path / "in"), "--sparsity", "0.5", "--out", str(tmp_path / "half"))
    assert status == 0 and "are zero: 50.0%" in out, err
    status, _, err = run(capsys, "inspect", str(tmp_path / "half"))
    assert status == 0, err
    name = next(name for name in state if name.endswith("bias") and "query" in name)
    write(tmp_path / "in", {k: v for k, v in state.items() if k != name}, config_of(model, **more))
    status, out, err = run(capsys, "inspect", str(tmp_path / "in"))
    assert (status, out) == (1, "") and re.match(f"bertkern: MODEL: {tmp_path}/in: .*{name}", err), err


def test_what_is_missing_is_named(capsys, monkeypatch, tiny_model):
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, _, err = run(capsys, "inspect", str(tiny_model))
    assert (status, err) == (1, "bertkern: transformers is not installed here. Run: pip install transformers\n")


def test_an_unexpected_error_is_one_line_too(capsys, monkeypatch, tiny_model):
    def fail(*_):
        raise AssertionError("first\nsecond")

    monkeypatch.setattr("bertkern.cli.models._check_fit", fail)
    status, _, err = run(capsys, "inspect", str(tiny_model))
    assert (status, err) == (1, "bertkern: AssertionError: first (BERTKERN_VERBOSE=1 shows all of it)\n")
    monkeypatch.setenv("BERTKERN_VERBOSE", "1")
    with pytest.raises(AssertionError):
        cli.main(["inspect", str(tiny_model)])


def test_quantize_keeps_a_sentence_transformer_whole(capsys, copy, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    models = pytest.importorskip("sentence_transformers.models")
    import torch
    import transformers

    (copy / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]))
    transformers.AutoTokenizer.from_pretrained(copy).save_pretrained(copy)
    transformers.BertModel(transformers.AutoConfig.from_pretrained(copy)).save_pretrained(copy)
    modules = [models.Transformer(str(copy)), models.Pooling(64, "max"), models.Normalize()]
    whole = tmp_path / "whole"
    st.SentenceTransformer(modules=modules, device="cpu").save(str(whole))
    status, _, err = run(capsys, "quantize", str(whole), str(tmp_path / "int8"))
    assert status == 0, err
    loaded = st.SentenceTransformer(str(tmp_path / "int8"), device="cpu")
    assert [type(module).__name__ for module in loaded] == ["Transformer", "Pooling", "Normalize"]
    assert loaded[0].auto_model.is_quantized
    vector = loaded.encode("a b c", convert_to_tensor=True)
    assert float(vector.norm()) == pytest.approx(1, abs=1e-5)
    expected = st.SentenceTransformer(str(whole), device="cpu").encode("a b c", convert_to_tensor=True)
    assert float(torch.dot(vector, expected)) > 0.99
