"""The tables of the Q-BERT benchmark."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from .results import Row, Run


def tables(run: Run) -> list[tuple[str, Table]]:
    """A table a task, lines of bits and groups by columns of methods, and one of speeds."""
    made = [(_title(run, metric, task), _scores(run, metric, task)) for metric, task in _tasks(run)]
    if run.providers("sentences_s"):
        made.append((f"sentences a second, {run.x_values('sentences_s')[0]} at a time", _speeds(run)))
    return made


def methods(run: Run, task: str) -> list[str]:
    """The methods that have lines of their own columns: all but those of the float model."""
    names = dict.fromkeys(row.provider for row in run.rows if row.config.get("task") == task)
    return [name for name in names if name not in ("as is", "trained")]


def score(run: Run, method: str, metric: str, task: str, form: str) -> Row | None:
    """The row of a score."""
    return run.find(method, metric, f"{task} {form}")


def _tasks(run: Run) -> list[tuple[str, str]]:
    found = ((row.metric, row.config["task"]) for row in run.rows if row.metric in ("spearman", "accuracy"))
    return list(dict.fromkeys(found))


def _title(run: Run, metric: str, task: str) -> str:
    whole, trained = (score(run, method, metric, task, "fp32") for method in ("as is", "trained"))
    parts = [f"fp32 {whole.median:.4f}"] if whole else []
    parts += [f"trained on as long as qat {_value(trained)}"] if trained else []
    return f"{task}, {metric}: " + ", ".join(parts)


def _scores(run: Run, metric: str, task: str) -> Table:
    columns = methods(run, task)
    table = Table(box=None, padding=(0, 1, 0, 0))
    for i, column in enumerate(("", "bits", "MB", *columns)):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    prefix = f"{task} "
    forms = [x.removeprefix(prefix) for x in run.x_values(metric) if x.startswith(prefix)]
    for form in forms:
        found = [score(run, method, metric, task, form) for method in columns]
        first = next((row for row in found if row), None)
        if first is None:
            continue
        best = max(row.median for row in found if row)
        size = run.find(first.provider, "size_mb", first.x_value)
        cells = [Text(_value(row), "bold" if row.median == best else "") if row else Text("-", "dim") for row in found]
        table.add_row(form, f"{first.config['average_bits']:.2g}", f"{size.median:.1f}", *cells)
    return table


def _value(row: Row) -> str:
    """The median, and how far it is to the lowest and the highest seed."""
    scores = row.config["scores"]
    return f"{row.median:.4f}" + (f" {min(scores):.3f}-{max(scores):.3f}" if len(scores) > 1 else "")


def _speeds(run: Run) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for i, column in enumerate(("engine", "sentences/s", "times torch-fp32")):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in (row for row in run.rows if row.metric == "sentences_s"):
        gain = run.find(f"torch-fp32 / {row.provider}", "ratio", row.x_value)
        table.add_row(row.provider, f"{row.median:,.0f}", f"{gain.median:.2f}x" if gain else "")
    return table
