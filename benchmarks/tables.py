"""A run as tables for the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .harness import quantile
from .results import Row, Run


def render(run: Run) -> Group:
    """The run's facts and its tables, best of each column in bold."""
    kinds = {"gemm": _gemm, "sparse": _sparse, "groupwise": _groupwise, "demo": _demo, "sentences": _demo}
    from .tables_qbert import tables as qbert

    draw = (kinds | {"memory": _memory, "qbert": qbert}).get(run.name.partition("-")[0], _sheet)
    parts: list[RenderableType] = [Text(facts_line(run), style="dim")]
    for title, table in draw(run):
        parts += ["", Text(title, style="bold"), table]
    if run.absent:
        parts += ["", Text("\n".join(f"{name}: {why}" for name, why in run.absent.items()), style="dim")]
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
    return " | ".join([*facts, run.date])


def milliseconds(value: float) -> str:
    """Three digits, whatever the size."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _cell(row: Row | None, best: float) -> Text:
    """The median; under it p20-p80, and the share of turns that counted where some did not."""
    if row is None:
        return Text("-", style="dim")
    spread = f"{milliseconds(row.p20)}-{milliseconds(row.p80)}"
    accepted = row.config.get("accepted", 1.0)
    if accepted < 1.0:
        spread += f" {accepted:.0%}"
    return Text.assemble((milliseconds(row.median), "bold" if row.median == best else ""), "\n", (spread, "dim"))


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap="\n" not in column)
    return table


RATIO = ("ratio", "times faster, by pairs of turns", "{:.2f}x")
PEAK = ("share_of_peak", "share of the int8 peak (linear layers alone)", "{:.0%}")
# By kind of run, what stands under the milliseconds: metric, title, form.
SHEETS = {
    "encoder": (RATIO, PEAK, ("time_share", "share of the same engine's time on the whole model", "{:.1%}")),
    "heads": (RATIO, PEAK, ("time_share", "share of the same engine's time with all heads", "{:.1%}")),
    "padding": (RATIO, PEAK, ("time_share", "share of the same engine's time where it computes padding", "{:.1%}")),
    "attention": (
        RATIO,
        ("gmac_s", "GMAC/s, softmax not counted", "{:.1f}"),
        ("share_of_peak", "share of the data type's peak", "{:.0%}"),
        ("time_share", "share of the same provider's time on all heads", "{:.2f}"),
    ),
    "importance": (("cost", "forward and backward passes", "{:.2f}"),),
    "hessian": (("minutes", "minutes", "{:.2f}"),),
}


def _sheet(run: Run) -> list[tuple[str, Table]]:
    """Milliseconds, and whatever else the run has, each a table of providers by points of the axis."""
    kind = run.name.partition("-")[0]
    points, names = run.x_values("latency_ms"), run.providers("latency_ms")
    latency = _table("engine", *points)
    best = {x: min(row.median for row in run.rows if row.metric == "latency_ms" and row.x_value == x) for x in points}
    for name in names:
        latency.add_row(name, *(_cell(run.find(name, "latency_ms", x), best[x]) for x in points))
    tables = [("milliseconds: median, under it p20-p80 and the share of turns that counted if not all", latency)]
    for metric, title, form in SHEETS.get(kind, SHEETS["encoder"]):
        if not run.providers(metric):
            continue
        table = _table("", *points)
        for name in run.providers(metric):
            found = [run.find(name, metric, x) for x in points]
            table.add_row(name, *(form.format(row.median) if row else "" for row in found))
            asked = [f"<= {form.format(row.config['asked'])}" if row and "asked" in row.config else "" for row in found]
            if any(asked):
                table.add_row(*(Text(text, style="dim") for text in ("  asked", *asked)))
        if metric == "time_share" and kind in ("encoder", "heads"):
            kept = {row.config["model"]: row.config["kept"] for row in run.rows if row.metric == metric}
            title += "; multiply-adds kept: " + ", ".join(f"{name} {share:.1%}" for name, share in kept.items())
        if metric == "time_share" and kind == "padding":
            title += "; real tokens: " + ", ".join(f"{x} {share:.1%}" for x, share in run.facts["real"].items())
        tables.append((title, table))
    checks = _table("", *points)
    for name in names:
        found = [run.find(name, "latency_ms", x) for x in points]
        values = [f"{row.config['sqnr_db']:.1f}" if row and "sqnr_db" in row.config else "" for row in found]
        if any(values):
            checks.add_row(name, *values)
    return [*tables, (f"agreement with {run.facts.get('reference', 'fp32 torch')}: SQNR, dB", checks)]


def _gemm(run: Run) -> list[tuple[str, Table]]:
    points, names = run.x_values("latency_ms"), run.providers("latency_ms")
    table = _table("M x N x K", *names)
    for x in points:
        cells = []
        for name in names:
            row = run.find(name, "latency_ms", x)
            share, rate = run.find(name, "share_of_peak", x), run.find(name, "gb_s", x)
            note = f"{share.median:.0%}" if share else f"{rate.median:.1f} GB/s" if rate else ""
            cells.append(Text.assemble(milliseconds(row.median), "\n", (note, "dim")) if row else "")
        table.add_row(x.replace(" ", "\n", 1), *cells)
    return [("milliseconds: median; under it the share of the int8 peak, or GB/s with cold weights at M=1", table)]


def _sparse(run: Run) -> list[tuple[str, Table]]:
    """A table a layer and number of rows, one line a provider and block, and the break-even of all of them."""
    points = [SparsePoint.parse(x) for x in run.x_values("latency_ms")]
    tables = []
    for layer in dict.fromkeys(point.layer for point in points):
        here = [point for point in points if point.layer == layer]
        zeros = sorted({point.zeros for point in here})
        table = _table("", "block", *(f"{z:.0%} zeros" for z in zeros))
        blocks = list(dict.fromkeys(point.block for point in here))
        for name in run.providers("latency_ms"):
            found = {block: [run.find(name, "latency_ms", f"{layer} {block}@{z:g}") for z in zeros] for block in blocks}
            if not any(run.find(f"bertkern-{name.rpartition('-')[2]} / {name}", "ratio", str(p)) for p in here):
                # A dense kernel: blocks are all the same to it.
                columns = [[row for row in rows if row] for rows in zip(*found.values(), strict=True)]
                times = [quantile([row.median for row in rows], 0.5) if rows else None for rows in columns]
                table.add_row(name, "any", *(milliseconds(time) if time else "" for time in times))
                continue
            for block, rows in found.items():
                gains = [_gain(run, name, f"{layer} {block}@{z:g}") for z in zeros]
                if any(rows):
                    cells = zip(rows, gains, strict=True)
                    table.add_row(
                        name,
                        block,
                        *(Text.assemble(milliseconds(r.median), (f" {g}", "dim")) if r else "" for r, g in cells),
                    )
        tables.append((f"{layer} (M x N x K), milliseconds, and times our dense kernel of the data type", table))
    if run.providers("break_even"):
        layers, blocks = (list(dict.fromkeys(getattr(point, part) for point in points)) for part in ("layer", "block"))
        table = _table("slow / fast", "block", *layers)
        for name in run.providers("break_even"):
            for block in blocks:
                rows = [run.find(name, "break_even", f"{layer} {block}") for layer in layers]
                if any(rows):
                    table.add_row(name, block, *(share_of_zeros(row) if row else "-" for row in rows))
        tables.append(("break-even: zeros from which on the fast one stays ahead; -: nowhere in the sweep", table))
    return tables


def _groupwise(run: Run) -> list[tuple[str, Table]]:
    """A line a case; under the milliseconds of others how many times ours of int8 activations is faster."""
    names = run.providers("latency_ms")
    table = _table(
        "M x N x K, grouping", *(name.replace("bertkern-groupwise", "bertkern\ngroupwise") for name in names)
    )
    for x in run.x_values("latency_ms"):
        cells = []
        for name in names:
            row, gain = run.find(name, "latency_ms", x), run.find(f"{name} / bertkern-groupwise-int8", "ratio", x)
            note = f"{gain.median:.2f}x" if gain else ""
            cells.append(Text.assemble(milliseconds(row.median), "\n", (note, "dim")) if row else "")
        table.add_row(x, *cells)
    return [("milliseconds: median; under others', times slower than bertkern-groupwise-int8", table)]


@dataclass(frozen=True)
class SparsePoint:
    """A point of the sparse benchmark's axis: `128x3072x768 16x4@0.8`."""

    layer: str
    block: str
    zeros: float

    def __str__(self) -> str:
        return f"{self.layer} {self.block}@{self.zeros:g}"

    @staticmethod
    def parse(x_value: str) -> SparsePoint:
        layer, _, pattern = x_value.partition(" ")
        block, _, zeros = pattern.partition("@")
        return SparsePoint(layer, block, float(zeros))


def _gain(run: Run, name: str, x: str) -> str:
    """How many times faster than our dense kernel a sparse one is; empty for dense ones."""
    row = run.find(f"bertkern-{name.rpartition('-')[2]} / {name}", "ratio", x)
    return f"{row.median:.{2 if row.median < 10 else 1}f}x" if row else ""


def share_of_zeros(row: Row) -> str:
    """A break-even in percent; `<=` where the kernel is ahead from the start of the sweep."""
    return ("<= " if row.median == row.config["from"] > 0 else "") + f"{row.median:.0%}"


def _demo(run: Run) -> list[tuple[str, Table]]:
    names, calls = run.providers("spearman"), run.x_values("sentences_s")
    sizes = [run.find(name, "size_mb", "weights") for name in names]
    columns = ["Spearman\nSTS-B", *(["weights\nMB"] if any(sizes) else [])]
    columns += [f"sentences/s\n{x} at a time" for x in calls]
    table = _table("engine", *columns)
    for name, size in zip(names, sizes, strict=True):
        spearman = run.find(name, "spearman", "STS-B")
        rates = [run.find(name, "sentences_s", x) for x in calls]
        table.add_row(
            name,
            f"{spearman.median:.4f}",
            *([f"{size.median:.1f}" if size else "-"] if any(sizes) else []),
            *(f"{rate.median:,.0f}" if rate else "-" for rate in rates),
        )
    pairs = [name.partition(" / ") for name in run.providers("ratio")]
    several = len({fast for _, _, fast in pairs}) > 1
    for slow, between, fast in pairs:
        found = [run.find(f"{slow}{between}{fast}", "ratio", x) for x in calls]
        cells = [""] * (len(columns) - len(calls)) + [f"{row.median:.2f}x" if row else "" for row in found]
        table.add_row(Text(f"{f'{fast} ' if several else ''}times {slow}", style="dim"), *cells)
    return [(f"{run.facts['model']}, {run.facts['pairs']:,} pairs of sentences", table)]


def _memory(run: Run) -> list[tuple[str, Table]]:
    table = _table("", "highest", "at the end", "allowed: model + layer")
    for way in run.providers("memory_mb"):
        mb = {row.x_value: row.median for row in run.rows if row.provider == way}
        allowed = f"{mb['model']:,.0f} + {mb['layer']:,.0f}"
        table.add_row(way, f"{mb['peak']:,.0f}", f"{mb['after']:,.0f}", allowed)
    made = [("resident MB while BERT-base is quantized, above the process without a model", table)]
    if run.providers("encoder_mb"):
        places = list(dict.fromkeys(row.x_value for row in run.rows if row.metric == "encoder_mb"))
        labels = [{"memory": "resident"}.get(where, where) for where in places]
        table = _table("", *(title for label in labels for title in (label, "share of fp32")))
        for form in run.providers("encoder_mb"):
            cells = []
            for where in places:
                mb, whole = (run.find(each, "encoder_mb", where).median for each in (form, "fp32"))
                cells += [f"{mb:.1f}", f"{mb / whole:.4f}"]
            table.add_row(form, *cells)
        made.append(("the encoder of BERT-base alone: its file, and what it takes in memory after it has run", table))
    return made
