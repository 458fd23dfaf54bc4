"""The Q-BERT benchmark without its models: rows, what is kept between runs, tables, plots, the pairs that train."""

import json
from io import StringIO

import pytest
import torch

from benchmarks import fetch, plots, qbert, readme_table, tables
from benchmarks.groupings import config_of, parse_groupings
from benchmarks.results import Run, load
from tests.tiny_models import inputs, tiny


@pytest.fixture
def scored(tmp_path, monkeypatch) -> list[qbert.Case]:
    """Scores are made up, what is asked for is listed, the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[qbert.Case] = []

    def made_up(self: qbert.Scores, case: qbert.Case) -> dict:
        asked.append(case)
        bits = None if case.form == qbert.FLOAT else sum(case.widths) / len(case.widths)
        metric = "spearman" if case.task == "STS-B" else "accuracy"
        score = 0.8 - 0.1 / (bits or 99) + case.seed / 100
        return {"score": score, "size_mb": (bits or 32) * 2.5, "average_bits": bits, "metric": metric}

    monkeypatch.setattr(qbert.Scores, "of", made_up)
    return asked


def test_forms():
    mixed = qbert.Case("STS-B", "2/4n128 reversed", "mse")
    assert mixed.widths == (2, 4) and mixed.order == "reversed"
    assert mixed.grouping == parse_groupings("2n128")[0]
    plain = qbert.Case("STS-B", "3k64", "mse")
    assert plain.widths == (3,) and plain.order == "" and str(plain.grouping) == "3k64"
    config = config_of(plain.grouping, method="mse")
    assert (config.bits, config.axis, config.group_size, config.method) == (3, "k", 64, "mse")
    assert config_of(mixed.grouping).groups == 128


def test_rows_are_each_once_and_cover_the_tables():
    rows = list(qbert.cases(quick=False))
    assert len(set(rows)) == len(rows)
    sts = [row for row in rows if row.task == "STS-B"]
    for method in qbert.AFTER:
        assert {row.form for row in sts if row.method == method} == {
            *qbert.GROUPINGS,
            *(f"{form} {order}" for form in qbert.MIXED for order in qbert.ORDERS),
        }
    for row in rows:
        drawn = row.method in ("qat", "trained") or row.form.endswith("random")
        same = {
            other.seed for other in rows if (other.task, other.form, other.method) == (row.task, row.form, row.method)
        }
        assert same == (set(qbert.SEEDS) if drawn else {0})
    trained = {task: {row.form for row in rows if row.method == "qat" and row.task == task} for task in qbert.TASKS}
    assert trained["STS-B"] == {*qbert.TRAINED, *qbert.TRAINED_ONCE} and trained["Rotten Tomatoes"] == {*qbert.TRAINED}
    assert len(list(qbert.cases(quick=True))) < 0.2 * len(rows)


def test_a_stopped_run_goes_on(scored, tmp_path):
    first = qbert.run(only=["STS-B 4n128"], threads=1)
    assert [str(case) for case in scored] == [
        *(f"STS-B 4n128 {method}" for method in qbert.AFTER),
        *(["STS-B 4n128 qat"] * 3),
    ]
    lines = (tmp_path / "bertkern" / "qbert" / "rows.jsonl").read_text().splitlines()
    assert len(lines) == 6 and json.loads(lines[0])["size_mb"] == 10
    again = qbert.run(only=["STS-B 4n128", "STS-B 4n384 mse"], threads=1)
    assert [str(case) for case in scored[6:]] == ["STS-B 4n384 mse"]
    row = again.find("qat", "spearman", "STS-B 4n128")
    assert row == first.find("qat", "spearman", "STS-B 4n128") or row.median == 0.785
    assert row.config["scores"] == [0.775, 0.785, 0.795] and row.config["average_bits"] == 4


def test_a_killed_run_goes_on_and_what_is_finished_is_shown(scored, tmp_path):
    with pytest.raises(ValueError, match=r"finished: expected rows of an earlier run in .*rows.jsonl. Got none"):
        qbert.run(only=["STS-B 4n128"], finished=True, threads=1)
    qbert.run(only=["STS-B 4n128 m"], threads=1)
    path = tmp_path / "bertkern" / "qbert" / "rows.jsonl"
    path.write_text(path.read_text()[:-20])
    told = []
    shown = qbert.run(only=["STS-B 4n128"], finished=True, threads=1, report=told.append)
    assert len(scored) == 2 and [row.provider for row in shown.rows] == ["minmax", "minmax"]
    qbert.run(only=["STS-B 4n128 m"], threads=1, report=told.append)
    assert [str(case) for case in scored[2:]] == ["STS-B 4n128 mse"]
    assert told[0].startswith("1 of 2 rows are there already") and "STS-B 4n128 mse, seed 0: 0.7" in told[1]
    shown = qbert.run(only=["STS-B 4n128"], finished=True, threads=1)
    assert len(scored) == 3 and [row.provider for row in shown.rows] == ["minmax"] * 2 + ["mse"] * 2


def test_rows_may_be_kept_in_a_file_that_travels(scored, tmp_path):
    place = tmp_path / "new" / "rows.jsonl"
    qbert.run(only=["STS-B 4n128 m"], kept_rows=place, threads=1)
    assert len(place.read_text().splitlines()) == 2
    shown = qbert.run(only=["STS-B 4n128"], finished=True, kept_rows=place, threads=1)
    assert len(scored) == 2 and [row.provider for row in shown.rows] == ["minmax"] * 2 + ["mse"] * 2
    with pytest.raises(ValueError, match=r"finished: expected rows of an earlier run in .*qbert.rows.jsonl"):
        qbert.run(only=["STS-B 4n128"], finished=True, threads=1)


@pytest.mark.parametrize("line", ("[1]", '{"key": 1}', "3"))
def test_kept_rows_that_are_none(scored, tmp_path, line):
    (tmp_path / "other.jsonl").write_text(line + "\n")
    for place, message in (
        (tmp_path, "expected a file. Got the folder"),
        (tmp_path / "other.jsonl" / "rows.jsonl", "expected a folder to write into"),
        (tmp_path / "other.jsonl", "expected rows of this benchmark"),
    ):
        with pytest.raises(ValueError, match=f"kept_rows: {message}"):
            qbert.run(only=["STS-B 4n128 m"], kept_rows=place, threads=1)
    assert not scored


def test_tables_and_plot_and_files(scored, tmp_path):
    from rich.console import Console

    run = qbert.run(only=["n128", "fp32", "k64"], threads=2)
    random = run.find("qat", "spearman", "STS-B 2/4n128 random")
    assert random.config["seeds"] == 3
    run.add("qbert", "torch-fp32", "sentences_s", ("sentences a call", "32"), (100.0, 90.0, 110.0))
    run.add("qbert", "bertkern-groupwise:4n128", "sentences_s", ("sentences a call", "32"), (321.0, 300.0, 330.0))
    run.add("qbert", "torch-fp32 / bertkern-groupwise:4n128", "ratio", ("sentences a call", "32"), (3.21, 3.0, 3.3))
    console = Console(width=150, record=True, file=StringIO())
    tables.show(run, console)
    text = console.export_text()
    assert "STS-B, spearman: fp32 0.7990, trained on as long as qat 0.8090 0.799-0.819" in text
    assert "2/4n128 sensitivity" in text and "3.21x" in text and "Rotten Tomatoes, accuracy" in text
    assert plots.save(run, tmp_path / "qbert.png").stat().st_size > 5000
    assert isinstance(load(run.save(tmp_path)[0]), Run)
    page = readme_table.table(tmp_path)
    assert "| all-MiniLM-L6-v2, spearman on STS-B | bits | MB | minmax | mse | compensate | qat |" in page
    assert "| fp32 | 32 | 80 | 0.7990 | 0.7990 | 0.7990 | 0.8090 |" in page
    assert "| **2k64** | 2 | 5 | 0.7500 | 0.7500 | 0.7500 | 0.7600 |" in page and "Rotten Tomatoes" not in page


def test_unknown_rows(scored):
    with pytest.raises(ValueError, match=r"only: expected part of a row such as 'STS-B fp32 as is'. Got '5n128'"):
        qbert.run(only=["5n128"])


def test_command_line(scored, capsys):
    from bertkern.cli import main

    main(["bench", "qbert", "--quick", "--only", "STS-B 2k64 mse", "--threads", "1"])
    assert [(str(case), case.quick) for case in scored] == [("STS-B 2k64 mse", True)]
    assert "2k64" in capsys.readouterr().out


def test_pairs_are_compared_by_their_real_tokens():
    from benchmarks.qbert_tasks import Pairs

    model = tiny("BertModel")
    batch = inputs(model, batch=4)
    pairs = {name: tensor.unflatten(0, (2, 2)) for name, tensor in batch.items()}
    out = Pairs(model)(**pairs, labels=torch.tensor([0.5, 1.0]))
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    means = torch.stack([row[mask > 0].mean(0) for row, mask in zip(states, batch["attention_mask"], strict=True)])
    expected = torch.cosine_similarity(means[[0, 2]], means[[1, 3]], dim=-1)
    assert torch.allclose(out["logits"], expected, atol=1e-5)
    assert torch.allclose(out["loss"], (expected - torch.tensor([0.5, 1.0])).square().mean(), atol=1e-6)
    out["loss"].backward()
    assert model.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("order", qbert.ORDERS)
def test_mixed_bits_follow_the_hessian_of_pairs(order, tmp_path):
    from benchmarks.qbert_tasks import Pairs

    class Task:
        trainable = staticmethod(Pairs)

        @staticmethod
        def batches(count: int) -> list[dict[str, torch.Tensor]]:
            batch = inputs(model, batch=4)
            pairs = {name: tensor.unflatten(0, (2, 2)) for name, tensor in batch.items()}
            return [{**pairs, "labels": torch.tensor([0.5, 1.0])}] * count

    model = tiny("BertModel")
    scores = qbert.Scores(tmp_path, True, None)
    scores._tasks["STS-B"] = Task()
    config, average = scores._config(qbert.Case("STS-B", f"2/4n128 {order}", "minmax", quick=True), model)
    assert average == 3 and config.groups == 128 and config.method == "minmax"
    assert sorted(dict(config.layer_bits).items()) in (
        [("encoder.layer.0", 2), ("encoder.layer.1", 4)],
        [("encoder.layer.0", 4), ("encoder.layer.1", 2)],
    )
    found = scores._hessian("STS-B", None).sensitivity  # kept: no model is asked
    most = max(found, key=found.get)
    assert order == "random" or (dict(config.layer_bits)[most] == 4) == (order == "sensitivity")


def test_batches_hold_every_example_once_and_what_is_about_as_long():
    from benchmarks.qbert_tasks import BATCH, bucketed

    examples = [("x" * (i * 37 % 101), "y" * (i * 17 % 53), float(i)) for i in range(1000)]
    made = bucketed(examples, 3)
    assert sorted(example for batch in made for example in batch) == sorted(examples)
    assert len(made) == -(-1000 // BATCH) and made == bucketed(examples, 3) != bucketed(examples, 4)

    def spread(batches: list) -> float:
        lengths = [[max(len(first), len(second)) for first, second, _ in batch] for batch in batches]
        return sum(max(batch) - min(batch) for batch in lengths) / len(lengths)

    assert spread(made) < 0.25 * spread([examples[i : i + BATCH] for i in range(0, 1000, BATCH)])


def test_parts_of_the_benchmark_are_read_by_name(tmp_path):
    (tmp_path / "sts-train.csv").write_text("a\tb\tc\td\t2.5\tone\ttwo\n")
    assert fetch.sts_pairs(tmp_path, "train") == [("one", "two", 2.5)]
