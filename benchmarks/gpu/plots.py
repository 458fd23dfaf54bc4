"""Plots of sections: a PNG an operator."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..plots import GRID, MUTED, _pyplot
from ..results import Row, Run

STYLES = {"bertkern": {"linewidth": 2.0}, "": {"linewidth": 1.1, "linestyle": "--"}}


def save(run: Run, folder: Path) -> list[Path]:
    """Draws what the run measured; nothing of runs without times. Raises RuntimeError without matplotlib."""
    made = []
    kernels = dict.fromkeys(row.kernel for row in run.rows if row.metric == "latency_ms" and row.kernel != "peak")
    plt = _pyplot() if kernels else None
    for kernel in kernels:
        rows = [row for row in run.rows if row.kernel == kernel]
        figure = _lines(rows, plt) if kernel == "sparse" else _bars(rows, plt)
        figure.suptitle(f"{kernel} on {run.device}, ms", x=0.01, ha="left", fontsize=13, fontweight="bold")
        figure.text(0.01, -0.01, f"{run.isa} | {run.date}", ha="left", va="top", fontsize=7.5, color=MUTED)
        folder.mkdir(parents=True, exist_ok=True)
        made.append(folder / f"gpu-{kernel}.png")
        figure.savefig(made[-1], dpi=150, bbox_inches="tight", facecolor="white")
        plt.close(figure)
    return made


def _names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row.provider for row in rows if row.metric == "latency_ms"))


def _style(name: str) -> dict[str, Any]:
    return STYLES["bertkern" if name.startswith("bertkern") else ""]


def _lines(rows: list[Row], plt: Any) -> Any:
    """A panel a layer and block: milliseconds over zeros."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if row.metric == "latency_ms":
            panel, _, zeros = row.x_value.partition("@")
            panels.setdefault(panel, {}).setdefault(row.provider, []).append((float(zeros), row.median))
    columns = min(4, len(panels))
    height = -(-len(panels) // columns)
    figure, grid = plt.subplots(height, columns, figsize=(3.6 * columns, 3.0 * height), squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (panel, lines) in zip(grid.flat, panels.items(), strict=False):
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), label=name, marker="o", markersize=3, **_style(name))
        axes.set_title(panel, loc="left", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("zeros")
        axes.grid(color=GRID)
    grid.flat[0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return figure


def _bars(rows: list[Row], plt: Any) -> Any:
    """A group of bars a point, one a provider."""
    names, points = _names(rows), list(dict.fromkeys(row.x_value for row in rows if row.metric == "latency_ms"))
    found = {(row.provider, row.x_value): row.median for row in rows if row.metric == "latency_ms"}
    figure, axes = plt.subplots(figsize=(max(6.0, 0.35 * len(points) * len(names) ** 0.5 + 3), 4.2))
    width = 0.84 / max(1, len(names))
    for place, name in enumerate(names):
        at = [i + place * width for i, x in enumerate(points) if (name, x) in found]
        axes.bar(at, [found[name, x] for x in points if (name, x) in found], width, label=name)
    axes.set_xticks([i + 0.42 for i in range(len(points))], points, rotation=60, ha="right", fontsize=7)
    axes.set_yscale("log")
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.legend(fontsize=7, frameon=False)
    return figure
