"""Plot of the attention benchmark: GMAC/s over shapes beside the peak, and the time over heads kept."""

from __future__ import annotations

from typing import Any

from .opening import precision
from .plots import GRID, INK, MUTED, OURS, headline
from .results import Run

MASK = ":mask"
RIVALS = ("#8d99ae", "#4f5d75", "#bfc7d5")


def draw(run: Run, plt: Any) -> Any:
    """A panel of GMAC/s a data type, and one of each of bertkern's providers with fewer heads."""
    whole = [name for name in run.providers("gmac_s") if ":" not in name]
    types = list(dict.fromkeys(precision(name) for name in whole))
    fewer = list(dict.fromkeys(name.partition(":")[0] for name in run.providers("time_share")))
    panels = len(types) + len(fewer)
    columns = min(2, panels)
    lines = -(-panels // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(6.2 * columns, 3.4 * lines), squeeze=False)
    axes = iter(grid.flat)
    for kind in types:
        _rates(next(axes), run, kind, [name for name in whole if precision(name) == kind])
    for name in fewer:
        _shares(next(axes), run, name, plt)
    for empty in axes:
        empty.remove()
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    headline(figure, run, f"Attention, {run.facts['model']}")
    return figure


def _rates(axes: Any, run: Run, kind: str, names: list[str]) -> None:
    points = run.x_values("gmac_s")
    rivals = iter(RIVALS * len(names))
    for name in names:
        rows = [run.find(name, "gmac_s", x) for x in points]
        at = [i for i, row in enumerate(rows) if row]
        color = OURS if name.startswith("bertkern") else next(rivals)
        axes.plot(at, [rows[i].median for i in at], marker="o", ms=4, lw=1.4, color=color, label=name)
    peaks = [row.config.get(f"{kind}_peak_gmac_s") for row in run.rows]
    if any(peaks):
        axes.axhline(max(filter(None, peaks)), color=INK, lw=0.8, ls="--", label=f"{kind} peak")
    axes.set_xticks(range(len(points)), points, rotation=35, ha="right")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{kind}, GMAC/s (batch x tokens)", loc="left", fontsize=10)
    _plain(axes)


def _shares(axes: Any, run: Run, name: str, plt: Any) -> None:
    """Time over heads kept, of the time on all; hollow marks are run-time masks."""
    rows = [row for row in run.rows if row.metric == "time_share" and row.provider.startswith(f"{name}:")]
    points = list(dict.fromkeys(row.x_value for row in rows))
    shades = plt.get_cmap("viridis")([i / max(1, len(points)) for i in range(len(points))])
    heads = max(row.config["heads"] for row in rows)
    for x, color in zip(points, shades, strict=True):
        here = [row for row in rows if row.x_value == x]
        gone = sorted((r.config["kept"], r.median) for r in here if MASK not in r.provider)
        axes.plot(*zip(*gone, (heads, 1.0), strict=True), color=color, marker="o", ms=3, lw=1.2, label=x)
        for row in here:
            if MASK in row.provider:
                axes.plot(row.config["kept"], row.median, color=color, marker="o", ms=6, mfc="none")
    axes.plot([0, heads], [0, 1], color=MUTED, lw=0.8, ls="--")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("heads kept; hollow: masked at run time")
    axes.set_title(f"{name}, share of the time on {heads} heads", loc="left", fontsize=10)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.legend(fontsize=7, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
