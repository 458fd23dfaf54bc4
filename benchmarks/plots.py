"""Plots of a run: one panel a shape, one bar an engine, so that each panel keeps its own scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .results import Run
from .tables import SparsePoint, facts_line, milliseconds

OURS, THEIRS, INK, MUTED, GRID = "#d1495b", "#8d99ae", "#22262e", "#6b7280", "#e5e7eb"


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError("plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "xtick.color": MUTED, "ytick.color": INK}
    )
    return plt


def save(run: Run, path: Path) -> Path:
    """Draws the run into a PNG file. Raises RuntimeError without matplotlib, ValueError for an empty run."""
    if not run.rows:
        raise ValueError(f"{run.name}: nothing was measured, so there is nothing to draw.")
    path.parent.mkdir(parents=True, exist_ok=True)
    from .plots_attention import draw as attention
    from .plots_qbert import draw as qbert

    draw = {"gemm": _gemm, "sparse": _sparse, "demo": _demo, "sentences": _demo, "memory": _memory}
    draw |= {"attention": attention, "groupwise": _groupwise, "qbert": qbert}
    figure = draw.get(run.name.partition("-")[0], _latency)(run, _pyplot())
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")
    return path


def _bars(axes: Any, names: list[str], values: list[float], labels: list[str], spread: Any = None) -> None:
    colors = [OURS if name.startswith("bertkern") else THEIRS for name in names]
    at = range(len(names))
    axes.barh(at, values, color=colors, height=0.72)
    if spread:
        axes.errorbar(values, at, xerr=spread, fmt="none", ecolor=INK, elinewidth=0.8, capsize=2)
    ends = [v + s for v, s in zip(values, spread[1], strict=True)] if spread else values
    for y, end, label in zip(at, ends, labels, strict=True):
        axes.annotate(label, (end, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(list(at), names)
    axes.invert_yaxis()
    axes.set_xlim(0, max(ends) * 1.22)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def headline(figure: Any, run: Run, title: str) -> None:
    """A title above, the facts of the run below."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.text(0.01, -0.01, facts_line(run), ha="left", va="top", fontsize=7.5, color=MUTED)


def _latency(run: Run, plt: Any) -> Any:
    shapes = run.x_values("latency_ms")
    columns = min(3, len(shapes))
    lines = -(-len(shapes) // columns)
    height = 0.32 * len(run.providers("latency_ms")) + 0.8
    figure, grid = plt.subplots(lines, columns, figsize=(4.3 * columns, height * lines), squeeze=False)
    for axes in grid.flat[len(shapes) :]:
        axes.remove()
    for axes, shape in zip(grid.flat, shapes, strict=False):
        rows = sorted((r for r in run.rows if r.metric == "latency_ms" and r.x_value == shape), key=lambda r: r.median)
        spread = [[r.median - r.p20 for r in rows], [r.p80 - r.median for r in rows]]
        _bars(
            axes, [r.provider for r in rows], [r.median for r in rows], [milliseconds(r.median) for r in rows], spread
        )
        axes.set_title(shape, loc="left", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / figure.get_figheight()))
    each = "" if run.name.startswith(("importance", "hessian")) else " a batch"
    title = f"{run.facts.get('model', '')}, milliseconds{each} ({run.rows[0].x_name}); shorter is better"
    headline(figure, run, title)
    return figure


def _groupwise(run: Run, plt: Any) -> Any:
    """One panel a number of rows: times our int8 kernel over the groupings, one line a layer."""
    points = [(*x.partition(" ")[0].split("x", 1), x.partition(" ")[2], x) for x in run.x_values("latency_ms")]
    rows = sorted({int(m) for m, *_ in points})
    groupings = list(dict.fromkeys(grouping for *_, grouping, _ in points))
    figure, grid = plt.subplots(1, len(rows), figsize=(3.4 * len(rows), 3.4), squeeze=False, sharey=True)
    for axes, m in zip(grid.flat, rows, strict=True):
        for layer in dict.fromkeys(layer for _, layer, *_ in points):
            found = [(g, x) for number, which, g, x in points if int(number) == m and which == layer]
            gains = [(g, run.find("bertkern-int8 / bertkern-groupwise-int8", "ratio", x)) for g, x in found]
            known = [(groupings.index(g), gain.median) for g, gain in gains if gain]
            if known:
                axes.plot(*zip(*known, strict=True), marker="o", markersize=4, linewidth=1.2, label=layer)
        axes.axhline(1, color=MUTED, linewidth=0.8)
        axes.set_xticks(range(len(groupings)), groupings, rotation=60)
        axes.set_title(f"M = {m}", loc="left", fontsize=10)
        axes.grid(color=GRID, linewidth=0.8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    if grid.flat[-1].lines[1:]:
        grid.flat[-1].legend(title="layer, N x K", fontsize=7.5, title_fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    headline(figure, run, "Group-wise weights, int8 activations: times our int8 kernel; higher is better")
    return figure


def _gemm(run: Run, plt: Any) -> Any:
    """One panel an epilogue: share of the int8 peak over M, one line a layer; without shares, milliseconds."""
    metric = "share_of_peak" if run.providers("share_of_peak") else "latency_ms"
    points = [(*x.split(" ", 1), x) for x in run.x_values(metric)]
    epilogues = list(dict.fromkeys(epilogue for _, epilogue, _ in points))
    provider = next((p for p in run.providers(metric) if p.startswith("bertkern")), run.providers(metric)[0])
    figure, grid = plt.subplots(1, len(epilogues), figsize=(4.3 * len(epilogues), 3.6), squeeze=False, sharey=True)
    for axes, epilogue in zip(grid.flat, epilogues, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for shape, kind, x in points:
            row = run.find(provider, metric, x)
            if kind == epilogue and row:
                m, layer = shape.split("x", 1)
                lines.setdefault(layer, []).append((int(m), row.median))
        for layer, values in lines.items():
            values.sort()
            axes.plot(*zip(*values, strict=True), marker="o", markersize=4, linewidth=1.4, label=layer)
        axes.set_xscale("log", base=2)
        ticks = sorted({m for values in lines.values() for m, _ in values})
        axes.set_xticks(ticks, [str(m) for m in ticks])
        axes.set_title(epilogue, loc="left", fontsize=10)
        axes.set_xlabel("rows M")
        axes.grid(color=GRID, linewidth=0.8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    if metric == "share_of_peak":
        grid.flat[0].set_ylim(0, 1)
        grid.flat[0].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    else:
        grid.flat[0].set_yscale("log")
    grid.flat[-1].legend(title="layer, N x K", fontsize=7.5, title_fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    what = "share of the int8 peak" if metric == "share_of_peak" else "milliseconds"
    headline(figure, run, f"One linear layer, {provider}: {what}")
    return figure


def _sparse(run: Run, plt: Any) -> Any:
    """One panel a data type, layer and M: speed-up over zeros, one line a block shape; rivals dashed."""
    lines: dict[tuple[str, str], dict[tuple[str, str], list[tuple[float, float]]]] = {}
    for row in run.rows:
        slow, _, fast = row.provider.partition(" / ")
        if row.metric == "ratio" and slow == f"bertkern-{fast.rpartition('-')[2]}":
            point = SparsePoint.parse(row.x_value)
            panel = lines.setdefault((slow, point.layer), {})
            panel.setdefault((fast, point.block), []).append((point.zeros, row.median))
    if not lines:
        raise ValueError(f"{run.name}: no sparse kernel was measured beside the dense one of its data type.")
    blocks = list(dict.fromkeys(block for panel in lines.values() for _, block in panel))
    shades = plt.get_cmap("viridis")([i / max(1, len(blocks)) for i in range(len(blocks))])
    colors = dict(zip(blocks, shades, strict=True))
    columns = min(4, len(lines))
    height = -(-len(lines) // columns)
    figure, grid = plt.subplots(height, columns, figsize=(3.6 * columns, 3.2 * height), squeeze=False)
    for axes in grid.flat[len(lines) :]:
        axes.remove()
    rivals = [p for p in dict.fromkeys(p for panel in lines.values() for p, _ in panel) if not p.startswith("bertkern")]
    dashes = dict(zip(rivals, ("--", ":", "-."), strict=False))
    for axes, ((slow, layer), panel) in zip(grid.flat, lines.items(), strict=False):
        for (fast, block), points in panel.items():
            zeros, gains = zip(*sorted(points), strict=True)
            style = {"ls": dashes[fast], "lw": 0.9} if fast in dashes else {"marker": "o", "ms": 3, "lw": 1.4}
            axes.plot(zeros, gains, color=colors[block], **style)
        _speed_up_axes(axes, [gain for points in panel.values() for _, gain in points])
        axes.set_title(f"{slow.rpartition('-')[2]}, {layer}", loc="left", fontsize=10)
    keys = [plt.Line2D([], [], color=colors[block], marker="o", ms=3, label=block) for block in blocks]
    keys += [plt.Line2D([], [], color=MUTED, ls=style, label=name) for name, style in dashes.items()]
    figure.legend(handles=keys, loc="upper left", bbox_to_anchor=(1.0, 0.93), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    headline(figure, run, "One linear layer (M x N x K): times our dense kernel of the data type, over zeros")
    return figure


def _speed_up_axes(axes: Any, gains: list[float]) -> None:
    axes.axhline(1.0, color=INK, linewidth=0.8)
    axes.set_yscale("log", base=2)
    axes.set_ylim(max(0.06, min([0.5, *gains])), max([2.0, *gains]) * 1.25)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("zeros")
    axes.grid(color=GRID, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _demo(run: Run, plt: Any) -> Any:
    """Speed one by one and in batches, and agreement with human scores."""
    calls = run.x_values("sentences_s")
    panels = [("sentences_s", x, f"sentences a second, {x} at a time", "{:,.0f}") for x in calls]
    panels.append(("spearman", "STS-B", "Spearman, STS Benchmark test set", "{:.4f}"))
    height = 0.34 * len(run.providers("spearman")) + 1.1
    figure, grid = plt.subplots(1, len(panels), figsize=(4.3 * len(panels), height), squeeze=False)
    for axes, (metric, x, title, form) in zip(grid.flat, panels, strict=True):
        rows = [r for r in run.rows if r.metric == metric and r.x_value == x]
        _bars(axes, [r.provider for r in rows], [r.median for r in rows], [form.format(r.median) for r in rows])
        axes.set_title(title, loc="left", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / height))
    headline(figure, run, f"{run.facts['model']} on the sentences of the STS Benchmark")
    return figure


def _memory(run: Run, plt: Any) -> Any:
    ways = run.providers("memory_mb")
    bars = [(f"{way}: {moment}", run.find(way, "memory_mb", moment)) for way in ways for moment in ("peak", "after")]
    bars.insert(0, ("the fp32 model", run.find(ways[0], "memory_mb", "model")))
    forms = run.providers("encoder_mb")
    places = dict.fromkeys(row.x_value for row in run.rows if row.metric == "encoder_mb")
    shares = [
        (f"{form}: {where}", run.find(form, "encoder_mb", where).median / run.find("fp32", "encoder_mb", where).median)
        for form in forms
        if form != "fp32"
        for where in places
    ]
    figure, grid = plt.subplots(
        1, 1 + bool(shares), figsize=(6.5 * (1 + bool(shares)), 1 + 0.26 * len(bars)), squeeze=False
    )
    values = [row.median for _, row in bars]
    _bars(grid.flat[0], [name for name, _ in bars], values, [f"{value:,.0f}" for value in values])
    grid.flat[0].set_title("resident MB while it is quantized", loc="left", fontsize=10)
    if shares:
        values = [share for _, share in shares]
        _bars(grid.flat[1], [name for name, _ in shares], values, [f"{value:.3f}" for value in values])
        grid.flat[1].set_title("its encoder alone, share of fp32", loc="left", fontsize=10)
    headline(figure, run, "Memory of a quantized BERT-base")
    figure.tight_layout()
    return figure
