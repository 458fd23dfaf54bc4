"""The benchmark of zeros: patterns, providers, break-even, pruned models. Nothing here judges a speed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import (
    encoder,
    engines,
    harness,
    models,
    opening,
    patterns,
    plots,
    readme_table,
    results,
    sparse,
    tables,
)
from benchmarks.harness import Samples, Spec, Worker, WorkerError
from benchmarks.patterns import Pattern

BLOCKS = patterns.parse_blocks("1x1,1x4,4x1,4x4,16x4,16x16,32x32")


def provider(name: str) -> engines.Engine:
    missing = engines.missing(f"sparse/{name}")
    if missing:
        pytest.skip(f"needs {missing}")
    return engines.create(f"sparse/{name}", threads=1)


# --- patterns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("zeros", [0.0, 0.05, 0.5, 0.8, 1.0])
def test_a_mask_has_the_zeros_that_it_says_in_whole_blocks(block, zeros):
    br, bc = block
    mask = Pattern(block, zeros).mask(br * 6, bc * 10)
    whole = mask.reshape(6, br, 10, bc).transpose(0, 2, 1, 3).reshape(60, br * bc)
    assert (whole.all(1) | ~whole.any(1)).all()
    assert whole.any(1).sum() == 60 - round(zeros * 60)


def test_a_mask_is_cut_at_the_edges_and_the_same_anywhere():
    pattern = Pattern((16, 4), 0.5)
    mask = pattern.mask(33, 7)
    assert mask.shape == (33, 7)
    np.testing.assert_array_equal(mask, pattern.mask(33, 7))
    assert (mask != pattern.mask(33, 7, seed=1)).any()
    assert (mask[:16, :4] == mask[0, 0]).all()


def test_patterns_are_spelled_in_one_way():
    assert str(Pattern.parse("16x4@0.80")) == models.parse_pattern(" 16x4@.8") == "16x4@0.8"
    assert Pattern.parse("1x1@0.9") == Pattern((1, 1), 0.9)
    assert models.parse_pattern("d26") == "d26"
    assert patterns.parse_zeros("0.9,0,.5,0.9,1") == [0.0, 0.5, 0.9, 1.0]


@pytest.mark.parametrize("text", ["", "16x4", "16x4@", "16x4@80", "0x4@0.5", "16@0.5", "16x4@-0.1", "1x1@nan", "d27"])
def test_bad_patterns(text):
    with pytest.raises(ValueError, match=r"pattern: expected dense, d26, heads@SHARE or ROWSxCOLUMNS@ZEROS.*Got"):
        models.parse_pattern(text)


def test_bad_options():
    with pytest.raises(ValueError, match=r"zeros: expected a share from 0 to 1, like 0.8. Got '80'"):
        patterns.parse_zeros("80")
    with pytest.raises(ValueError, match=r"zeros: expected a share from 0 to 1.*Got '1.5'"):
        patterns.parse_zeros("1.5")
    with pytest.raises(ValueError, match=r"block: expected ROWSxCOLUMNS.*Got '16'"):
        patterns.parse_blocks("16")
    with pytest.raises(ValueError, match=r"dtype: expected one of fp32, bf16, int8. Got 'fp64'"):
        sparse.parse_dtypes("fp64")
    with pytest.raises(ValueError, match=r"engine: expected one of bertkern-sparse-int8.*Got 'nothing'"):
        sparse.run(["nothing"])
    with pytest.raises(ValueError, match=r"python: expected an interpreter.*Got 'deepsparse=/no/such'"):
        harness.parse_python(["deepsparse=/no/such"])


# --- providers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", engines.SPARSES)
@pytest.mark.parametrize("zeros", [0.0, 0.7, 1.0])
def test_every_provider_is_right_at_every_block_it_knows(name, zeros):
    """Odd sizes: no block shape divides them. prepare() itself compares every output."""
    engine, reference = provider(name), engines.create("sparse/torch-fp32", threads=1)
    known = 0
    for block in BLOCKS:
        case = {"m": 5, "n": 83, "k": 71, "pattern": str(Pattern(block, zeros))}
        if not engine.knows(block):
            with pytest.raises(ValueError, match=r"has no blocks"):
                engine.prepare(**case)
            continue
        known += 1
        engine.prepare(**case)
        reference.prepare(**case)
        got = engines.agreement(reference.outputs(), engine.outputs())
        opening.check(name, got)
        assert got["sqnr_db"] > {"fp32": 100.0, "bf16": 40.0, "int8": 30.0}[engines.SPARSES[name].precision]
    assert known >= 1


@pytest.mark.parametrize("name", ["bertkern-sparse-int8", "bertkern-sparse-fp32", "bertkern-sparse-bf16"])
def test_one_lost_weight_is_found(name):
    engine = provider(name)
    pack = engine.pack

    def losing(canonical, bias):
        blocks = canonical[0] if isinstance(canonical, tuple) else canonical
        blocks.values[len(blocks.values) // 2].view(-1)[torch.argmax(blocks.values[len(blocks.values) // 2].abs())] = 0
        return pack(canonical, bias)

    engine.pack = losing
    with pytest.raises(ValueError, match=r"row \d+, output \d+ \(\d+ in all\): expected .* Got"):
        engine.prepare(m=4, n=64, k=256, pattern="16x4@0.5")


@pytest.mark.parametrize("name", ["torch-fp32", "torch-csr-fp32", "scipy-csr-fp32", "bertkern-sparse-int8"])
def test_outputs_are_row_major_and_a_wrong_one_is_found(name):
    engine = provider(name)
    engine.prepare(m=3, n=40, k=24, pattern="1x1@0.5")
    out = engine.value(engine.run())
    assert out.shape == (3, 40)
    assert out.is_contiguous()
    call = engine.call

    def wrong(x, packed):
        out = call(x, packed)
        out[1, 7] += 1.0
        return out

    engine.call = wrong
    with pytest.raises(ValueError, match=r"row 1, output 7 \(1 in all\)"):
        engine.prepare(m=3, n=40, k=24, pattern="1x1@0.5")


@pytest.mark.parametrize("name", ["bertkern-int8", "bertkern-sparse-int8", "torch-fp32", "torch-csr-fp32"])
def test_cold_weights_are_as_many_copies_as_it_takes(name):
    engine = provider(name)
    engine.prepare(m=1, n=64, k=64, pattern="1x1@0.5", cold=100_000)
    assert sum(engine.size(packed) for packed in engine.packed) >= 100_000
    assert len({id(packed) for packed in engine.packed}) == len(engine.packed)
    engine.prepare(m=2, n=64, k=64, pattern="1x1@0.5")
    assert len(engine.packed) == 1


def test_sparse_weights_are_packed_sparse():
    dense, blocks = provider("bertkern-int8"), provider("bertkern-sparse-int8")
    for engine in (dense, blocks):
        engine.prepare(m=2, n=256, k=256, pattern="16x16@0.9")
    assert blocks.size(blocks.packed[0]) < 0.3 * dense.size(dense.packed[0])


# --- ratios and the break-even --------------------------------------------------------------------------------------


def test_break_even_is_interpolated_between_the_last_loss_and_the_first_gain():
    assert sparse.break_even([(0.0, 0.5), (0.5, 2.0)]) == pytest.approx(0.25)
    assert sparse.break_even([(0.0, 0.9), (0.1, 1.1), (0.5, 0.99), (0.9, 4.0)]) == pytest.approx(0.5, abs=0.01)
    assert sparse.break_even([(0.1, 1.0), (0.5, 2.0)]) == 0.1
    assert sparse.break_even([(0.0, 0.2), (0.9, 0.9)]) is None
    assert sparse.break_even([]) is None


def test_pairs_put_sparse_kernels_beside_dense_ones_and_rivals():
    specs = ["bertkern-sparse-int8", "bertkern-int8", "onnxruntime-int8", "torch-fp32", "bertkern-fp32"]
    assert sparse.pairs(specs) == [
        ("bertkern-int8", "bertkern-sparse-int8"),
        ("onnxruntime-int8", "bertkern-sparse-int8"),
        ("torch-fp32", "bertkern-sparse-int8"),
    ]
    assert sparse.pairs(["scipy-csr-fp32", "bertkern-sparse-fp32", "torch-fp32", "bertkern-sparse-int8@avx2"]) == [
        ("torch-fp32", "scipy-csr-fp32"),
        ("scipy-csr-fp32", "bertkern-sparse-fp32"),
        ("torch-fp32", "bertkern-sparse-fp32"),
    ]


@pytest.fixture(scope="module")
def run() -> results.Run:
    """A real run on tiny shapes, all providers that are installed here."""
    said = []
    run = sparse.run(
        rows=[1, 5],
        layers=[(48, 40)],
        blocks=[(1, 1), (16, 4), (8, 8)],
        zeros=[0.0, 0.9],
        dtypes=["int8", "fp32"],
        rounds=1,
        seconds=0.001,
        cold=50_000,
        report=said.append,
    )
    assert [line for line in said if "absent, needs" not in line] == []
    return run


def test_a_run_measures_every_provider_on_every_case_it_knows(run):
    assert run.name == "sparse-1t"
    wanted = {name for name, entry in engines.SPARSES.items() if entry.precision != "bf16"}
    assert set(run.providers("latency_ms")) | set(run.absent) == wanted
    assert run.x_values("latency_ms")[:3] == ["1x48x40 1x1@0", "1x48x40 1x1@0.9", "1x48x40 16x4@0"]
    for x in run.x_values("latency_ms"):
        here = {row.provider for row in run.rows if row.metric == "latency_ms" and row.x_value == x}
        assert {"bertkern-sparse-int8", "bertkern-int8", "bertkern-sparse-fp32", "torch-fp32"} <= here
        assert ("torch-csr-fp32" in here) == (" 1x1@" in x)
        assert ("torch-bsr-fp32" in here) == (" 8x8@" in x)
    row = run.find("bertkern-sparse-int8", "latency_ms", "1x48x40 16x4@0.9")
    assert row.config["weights"] == "cold"
    assert row.config["sqnr_db"] > 25
    assert run.find("bertkern-int8 / bertkern-sparse-int8", "ratio", "5x48x40 16x4@0.9").median > 0


def test_shares_count_what_is_left(run):
    rows = [row for row in run.rows if row.metric == "share_of_peak"]
    if not rows:
        pytest.skip("no peak probe here")
    assert all(row.x_value.startswith("5x") for row in rows)
    x = "5x48x40 16x4@0.9"
    share, time = (run.find("bertkern-sparse-int8", metric, x) for metric in ("share_of_peak", "latency_ms"))
    left = 5 * Pattern((16, 4), 0.9).mask(48, 40).sum()
    assert share.median == pytest.approx(left / (time.median * 1e6) / share.config["peak_gmac_s"], rel=0.01)
    share, time = (run.find("bertkern-int8", metric, x) for metric in ("share_of_peak", "latency_ms"))
    assert share.median == pytest.approx(5 * 48 * 40 / (time.median * 1e6) / share.config["peak_gmac_s"], rel=0.01)


def made_run() -> results.Run:
    """Dense at 1 ms; 16x4 at (1 - zeros) * 1.25 ms, so even at 20 %; unstructured never ahead."""
    run = results.Run("sparse-1t", "a processor, 2 cores", "avx512vnni", 1, facts={"rounds": 3})
    samples = {}
    workers = [type("W", (), {"spec": spec})() for spec in ("bertkern-int8", "bertkern-sparse-int8")]
    cases = [(128, 96, 64, Pattern(b, z)) for b in ((1, 1), (16, 4)) for z in (0.0, 0.5, 0.9)]
    for case in cases:
        times = {"bertkern-int8": 1.0, "bertkern-sparse-int8": 1.25 * (1 - case[3].zeros)}
        if case[3].block == (1, 1):
            times["bertkern-sparse-int8"] = 9.0
        samples = {spec: Samples(ms=[ms] * 3) for spec, ms in times.items()}
        agreement = {spec: {"sqnr_db": 40.0, "cosine": 1.0} for spec in times}
        opened = {spec: {"versions": {}} for spec in times}
        sparse._record(run, case, samples, agreement, opened, {spec: [236.0] for spec in times})
    sparse._record_break_even(run, cases, workers)
    return run


def test_the_break_even_is_recorded_where_there_is_one():
    run = made_run()
    row = run.find("bertkern-int8 / bertkern-sparse-int8", "break_even", "128x96x64 16x4")
    # Between 0 % at 0.8 and 50 % at 1.6 of dense, on a logarithmic scale.
    assert row.median == pytest.approx(0.5 * np.log(1.25) / np.log(2), rel=1e-3)
    assert run.find("bertkern-int8 / bertkern-sparse-int8", "break_even", "128x96x64 1x1") is None


def test_a_run_is_shown_drawn_and_read_again(run, tmp_path):
    from rich.console import Console

    pytest.importorskip("matplotlib")
    for one in (run, made_run()):
        console = Console(width=160, record=True, file=(tmp_path / "screen").open("w"))
        tables.show(one, console)
        text = console.export_text()
        assert "bertkern-sparse-int8" in text
        assert "90% zeros" in text
        assert plots.save(one, tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
        assert results.load(one.save(tmp_path)[0]) == one
    assert "8.00x" in text, "the speed-up at 90 % zeros"
    assert "break-even" in text
    assert "16%" in text


def test_the_readme_takes_the_speed_ups_from_the_results(tmp_path):
    made_run().save(tmp_path)
    text = readme_table.table(tmp_path)
    assert "| **bertkern-sparse-int8** 16x4 | 0.80x | 1.60x | 8.00x | 16% |" in text
    assert "| **bertkern-sparse-int8** 1x1 | 0.11x | 0.11x | 0.11x | - |" in text


# --- whole models ---------------------------------------------------------------------------------------------------


def test_specs_say_engine_cap_and_pattern():
    assert Spec.parse("torch-fp32") == ("torch-fp32", "", "")
    assert Spec.parse("bertkern-int8@avx2:16x4@0.8") == ("bertkern-int8", "avx2", "16x4@0.8")
    assert Spec.parse("bertkern-int8:dense") == ("bertkern-int8", "", "dense")
    assert opening.precision("bertkern-int8@avx2:1x1@0.9") == "int8"


def test_interpreters_go_by_the_beginning_of_a_name():
    import sys

    python = {"": "/rivals", "deepsparse": "/deep"}
    assert harness.interpreter(python, "deepsparse-int8") == "/deep"
    assert harness.interpreter(python, "torch-fp32") == "/rivals"
    assert harness.interpreter({"deepsparse": "/deep"}, "torch-fp32") == sys.executable
    assert harness.interpreter(None, "torch-fp32") == sys.executable
    assert harness.parse_python([sys.executable, f"deepsparse={sys.executable}"]) == {
        "": sys.executable,
        "deepsparse": sys.executable,
    }


def test_ratios_of_pruned_models_name_rivals_on_both_and_the_twin():
    specs = ["bertkern-int8", "bertkern-int8:dense", "torch-int8", "torch-int8:dense", "torch-int8:1x1@0.9"]
    assert opening.rivals(specs, "16x4@0.8") == [
        ("bertkern-int8:dense", "bertkern-int8"),
        ("torch-int8", "bertkern-int8"),
        ("torch-int8:dense", "bertkern-int8"),
        ("torch-int8:dense", "bertkern-int8:dense"),
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A checkpoint of BERT with the layers, heads and units of BERT-base, 24 wide."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bench") / "tiny"
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    BertModel(BertConfig(**sizes, vocab_size=1100, max_position_embeddings=16)).eval().save_pretrained(folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_here(folder: str, seed: int, source: str, pattern: str) -> None:
    models.write_pruned(source, folder, pattern, seed)


def test_a_pruned_model_has_zeros_in_every_linear_layer_but_the_pooler(tiny, cache):
    from transformers import AutoModel

    whole = models.resolve(str(tiny), lambda **_: None)
    model = models.pruned(whole, "4x4@0.75", make_here)
    assert (model.name, model.kept) == ("tiny-4x4@0.75", 0.25)
    assert models.pruned(whole, "dense", make_here) is whole
    again = models.pruned(whole, "4x4@0.75", lambda **_: pytest.fail("it is there"))
    assert again == model
    loaded = AutoModel.from_pretrained(model.folder)
    shares = {n: float((m.weight == 0).float().mean()) for n, m in loaded.named_modules() if hasattr(m, "in_features")}
    assert len(shares) == 12 * 6 + 1
    assert shares.pop("pooler.dense") == 0.0
    assert all(share == pytest.approx(0.75, abs=0.02) for share in shares.values())
    first, second = (loaded.encoder.layer[0].attention.self.query, loaded.encoder.layer[0].attention.self.key)
    assert ((first.weight == 0) != (second.weight == 0)).any(), "every matrix has zeros of its own"


def test_d26_removes_the_published_heads_and_units(tiny, cache):
    from transformers import AutoModel

    whole = models.resolve(str(tiny), lambda **_: None)
    model = models.pruned(whole, "d26", make_here)
    zeros = AutoModel.from_pretrained(model.folder, dtype=torch.float32).eval()
    # As the torch engines and exporters load it.
    from benchmarks.engines.exporting import load_model

    ragged = load_model(str(model.folder))
    widths = [(layer.attention.self.value.out_features // 2, layer.intermediate.dense.out_features)
              for layer in ragged.encoder.layer]  # fmt: skip
    assert widths == list(zip(models.D26_HEADS, models.D26_UNITS, strict=True))
    kept = sum(m.weight.numel() for n, m in ragged.encoder.named_modules() if hasattr(m, "in_features"))
    assert model.kept == pytest.approx(kept / whole.macs_per_token)
    ids = torch.randint(0, 1100, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(ragged(ids).last_hidden_state, zeros(ids).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_d26_keeps_the_published_share_of_bert_base():
    folder = Path(__file__).parent
    base = models.Model("bert-base", folder, 30522, 512, 12 * (4 * 768 * 768 + 2 * 768 * 3072))
    left = 4 * 768 * 64 * sum(models.D26_HEADS) + 2 * 768 * sum(models.D26_UNITS)
    assert left / base.macs_per_token == pytest.approx(0.26, abs=0.005)


def test_d26_does_not_fit_any_model(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "bert", "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536})
    )
    with pytest.raises(ValueError, match=r"pattern d26: expected a model of BERT-base's shape. Got small"):
        models.pruned(models.Model("small", tmp_path, 1, 1, 1), "d26", make_here)


def test_engines_run_a_pruned_model_beside_the_whole_one(tiny, cache):
    said = []
    run = encoder.run(
        ["bertkern-int8", "bertkern-int8:dense", "bertkern-fp32:1x1@0.9", "bertkern-int8:dense"],  # twice is once
        encoder.parse_shapes("2x7"),
        model=str(tiny),
        threads=1,
        rounds=1,
        seconds=0.001,
        pattern="d26",
        report=said.append,
    )
    assert said == []
    assert run.name == "encoder-tiny-d26-1t"
    assert len(run.providers("latency_ms")) == 3
    row = run.find("bertkern-int8", "time_share", "2x7")
    assert row.config["kept"] == pytest.approx(
        (4 * 24 * 2 * 64 + 2 * 24 * 6293) / (12 * (4 * 24**2 + 2 * 24 * 3072)), 1e-3
    )
    dense, pruned = (run.find(name, "latency_ms", "2x7").median for name in ("bertkern-int8:dense", "bertkern-int8"))
    assert row.median == pytest.approx(pruned / dense, rel=0.01)
    assert run.providers("time_share") == ["bertkern-int8"], "the others have no twin on the whole model"
    assert run.providers("ratio") == ["bertkern-int8:dense / bertkern-int8"]
    configs = {name: run.find(name, "latency_ms", "2x7").config["model"] for name in run.providers("latency_ms")}
    assert configs["bertkern-int8:dense"] == "tiny"
    assert configs["bertkern-fp32:1x1@0.9"] == "tiny-1x1@0.9"
    assert run.find("bertkern-fp32:1x1@0.9", "latency_ms", "2x7").config["sqnr_db"] > 90


def test_a_model_is_compared_with_torch_on_the_same_weights(tiny, cache):
    """The outputs of the whole model do not pass for those of the pruned one."""
    with Worker("torch-fp32", threads=1) as worker, Worker("torch-fp32:dense", threads=1) as whole:
        resolved = models.resolve(str(tiny), lambda **_: None)
        model = models.pruned(resolved, "1x1@0.9", make_here)
        inputs, expected = str(cache / "inputs.npz"), str(cache / "expected.npz")
        np.savez(inputs, **{f"{k}_0": v for k, v in encoder.Case(1, 9).inputs(1100).items()})
        for one, folder in ((worker, model.folder), (whole, resolved.folder)):
            one.ask("open", engine="model/torch-fp32", model=str(folder), threads=1)
            one.ask("prepare", inputs=inputs)
        worker.ask("save", path=expected)
        opening.check("torch-fp32", worker.ask("compare", path=expected))
        with pytest.raises(WorkerError, match=r"outputs differ"):
            opening.check("torch-fp32", whole.ask("compare", path=expected))


# --- the command line -----------------------------------------------------------------------------------------------


def test_bench_sparse_writes_json_csv_and_a_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from bertkern.cli import main

    options = "--rows 3 --layers 32x24 --blocks 16x4 --zeros 0,0.75 --dtypes int8 --rounds 1 --name tiny"
    engines_ = "bertkern-sparse-int8,bertkern-int8,torch-fp32"
    assert main(["bench", "sparse", *options.split(), "--engines", engines_, "--out", str(tmp_path)]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"sparse-1t-tiny.{kind}" for kind in ("csv", "json", "png")
    ]
    made = results.load(tmp_path / "sparse-1t-tiny.json")
    assert made.providers("latency_ms") == ["bertkern-sparse-int8", "bertkern-int8"], "--dtypes leaves torch-fp32 out"
    assert "3x32x24" in capsys.readouterr().out


def test_threads_are_those_of_every_provider_and_of_the_probes(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    from benchmarks import one_layer
    from bertkern.cli import main

    asked = []

    class Listening(Worker):
        def ask(self, do, **arguments):
            asked.append((self.spec, do, arguments.get("threads"), self.threads))
            return super().ask(do, **arguments)

    monkeypatch.setattr(one_layer, "Worker", Listening)
    monkeypatch.setattr(opening, "Worker", Listening)
    options = "--rows 1,3 --layers 32x24 --blocks 16x4 --zeros 0.75 --dtypes int8 --rounds 1 --threads 2"
    assert main(["bench", "sparse", *options.split(), "--out", str(tmp_path)]) == 0
    made = results.load(tmp_path / "sparse-2t.json")
    assert (made.name, made.threads) == ("sparse-2t", 2)
    assert {row.config["threads"] for row in made.rows} == {2}
    assert "2 threads" in capsys.readouterr().out
    assert {threads for *_, threads in asked} == {2}
    assert {threads for _, do, threads, _ in asked if do in ("open", "quiet", "peak")} == {2}


def test_one_layer_runs_on_one_thread_unless_asked():
    import inspect

    from benchmarks import gemm, groupwise

    assert {inspect.signature(module.run).parameters["threads"].default for module in (gemm, groupwise, sparse)} == {1}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sparse", "--zeros", "80"), "zeros: expected a share"),
        (("sparse", "--blocks", "16"), "block: expected ROWSxCOLUMNS"),
        (("sparse", "--dtypes", "int4"), "dtype: expected one of"),
        (("sparse", "--rows", "0"), "rows: expected a whole number"),
        (("sparse", "--rows", "²"), "rows: expected a whole number"),
        (("sparse", "--layers", "0x5"), "layer: expected OUTxIN, like 3072x768. Got '0x5'"),
        (("sparse", "--layers", "3072*768"), "layer: expected OUTxIN"),
        (("sparse", "--layers", "64x64,²x64"), "layer: expected OUTxIN"),
        (("sparse", "--engines", "torch-bf16"), "one at least of the dtypes int8, fp32. Got torch-bf16 (bf16)"),
        (
            ("attention", "--engines", "torch-bf16", "--dtypes", "fp32"),
            "one at least of the dtypes fp32. Got torch-bf16",
        ),
        (("sparse", "--engines", "bertkern-int8:16x4@0.5"), "expected a name without a pattern. Got 'bertkern-int8:16"),
        # Before anything is measured.
        (("sparse", "--plot", "."), "--plot: expected a file. Got the folder '.'"),
        (("sparse", "--plot", "times"), "--plot: expected a name that ends in .png, .svg, .pdf. Got times"),
        (("sparse", "--json", "."), "--json: expected a file. Got the folder '.'"),
        (("sparse", "--json", "setup.py/x.json"), "--json: expected a folder. Got the file"),
        (("sparse", "--out", "setup.py"), "--out: expected a folder. Got the file"),
        (("sparse", "--out", "build", "--name", "a/b"), "--name: expected a part of a file's name. Got 'a/b'"),
        (("memory", "--threads", "2"), "bench memory: --threads belongs to another benchmark"),
        (("sparse", "--shapes", "1x16"), "bench sparse: --shapes belongs to another benchmark"),
        (("gemm", "--zeros", "0.5"), "bench gemm: --zeros belongs to another benchmark"),
        (("encoder", "--pattern", "16x4"), "pattern: expected dense, d26, heads@SHARE or ROWSxCOLUMNS@ZEROS"),
        (("encoder", "--python", "x=/no/such"), "python: expected an interpreter"),
    ],
)
def test_mistakes_on_the_command_line(arguments, said, capsys):
    from bertkern.cli import main

    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err
