"""A run as tables for the terminal."""

from __future__ import annotations

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .results import Row, Run


def render(run: Run) -> Group:
    """The run's facts and its tables, best of each column in bold."""
    draw = {"encoder": _encoder, "gemm": _gemm}.get(run.name.partition("-")[0], _encoder)
    parts = [Text(facts_line(run), style="dim"), *draw(run)]
    if run.absent:
        parts.append(Text("\n".join(f"{name}: {why}" for name, why in run.absent.items()), style="dim"))
    return Group(*parts)


def show(run: Run, console: Console | None = None) -> None:
    """Prints `render(run)`."""
    (console or Console()).print(render(run))


def facts_line(run: Run) -> str:
    """Machine, threads and method in one line."""
    facts = [run.device, run.isa, f"{run.threads} thread{'s' if run.threads > 1 else ''}"]
    facts += [f"{run.facts['model']}"] if "model" in run.facts else []
    peaks = [row.config["peak_gmac_s"] for row in run.rows if "peak_gmac_s" in row.config]
    if peaks:
        facts.append(f"int8 peak {max(peaks):.0f} GMAC/s")
    if "read_gb_s" in run.facts:
        facts.append(f"read probe {run.facts['read_gb_s']:.0f} GB/s")
    if run.facts.get("probe", "int8") != "int8":
        facts.append(f"no int8 probe: {run.facts['probe']} tells quiet from disturbed, no shares of the peak")
    return " | ".join([*facts, run.date])


def milliseconds(value: float) -> str:
    """Three digits, whatever the size."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _cell(row: Row | None, best: float) -> Text | str:
    """`12.6 (12.4-12.9)`, and the share of turns that counted where some did not."""
    if row is None:
        return ""
    text = f"{milliseconds(row.median)} ({milliseconds(row.p20)}-{milliseconds(row.p80)})"
    accepted = row.config.get("accepted", 1.0)
    if accepted < 1.0:
        text += f" {accepted:.0%}"
    return Text(text, style="bold" if row.median == best else "")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def _encoder(run: Run) -> list[Table]:
    shapes, names = run.x_values("latency_ms"), run.providers("latency_ms")
    latency = _table("milliseconds: median (p20-p80), share of turns that counted if not all", "engine", *shapes)
    best = {
        x: min(row.median for row in run.rows if row.metric == "latency_ms" and row.x_value == x) for x in shapes
    }
    for name in names:
        latency.add_row(name, *(_cell(run.find(name, "latency_ms", x), best[x]) for x in shapes))
    tables = [latency]
    for metric, title, form in (
        ("ratio", "times faster, by pairs of turns", "{:.2f}x"),
        ("share_of_peak", "share of the int8 peak (linear layers alone)", "{:.0%}"),
    ):
        if not run.providers(metric):
            continue
        table = _table(title, "", *shapes)
        for name in run.providers(metric):
            found = [run.find(name, metric, x) for x in shapes]
            table.add_row(name, *(form.format(row.median) if row else "" for row in found))
        tables.append(table)
    checks = _table("agreement with fp32 torch: SQNR, dB", "", *shapes)
    for name in names:
        found = [run.find(name, "latency_ms", x) for x in shapes]
        checks.add_row(name, *(f"{row.config['sqnr_db']:.1f}" if row else "" for row in found))
    return [*tables, checks]


def _gemm(run: Run) -> list[Table]:
    points, names = run.x_values("latency_ms"), run.providers("latency_ms")
    table = _table("milliseconds: median; share of the int8 peak, or GB/s with cold weights at M=1", "M x N x K", *names)
    for x in points:
        cells = []
        for name in names:
            row = run.find(name, "latency_ms", x)
            share, rate = run.find(name, "share_of_peak", x), run.find(name, "gb_s", x)
            note = f" {share.median:.0%}" if share else f" {rate.median:.1f} GB/s" if rate else ""
            cells.append(milliseconds(row.median) + note if row else "")
        table.add_row(x, *cells)
    return [table]
