"""The plot of the Q-BERT benchmark: scores by bits, a panel a task and grouping, a line a method."""

from __future__ import annotations

from typing import Any

from .plots import GRID, INK, MUTED, OURS, THEIRS, headline
from .results import Run
from .tables_qbert import methods

COLORS = {"minmax": THEIRS, "mse": "#457b9d", "compensate": OURS, "qat": "#2a9d8f"}


def draw(run: Run, plt: Any) -> Any:
    """The figure of a run."""
    scores = [row for row in run.rows if row.metric in ("spearman", "accuracy")]
    panels = dict.fromkeys((row.config["task"], groups) for row in scores if (groups := _groups(row.x_value)))
    panels = list(panels) or [(row.config["task"], "") for row in scores[:1]]
    columns = min(5, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(3 * columns, 2.6 * lines), squeeze=False, sharex=True)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (task, groups) in zip(grid.flat, panels, strict=False):
        here = [row for row in scores if row.config["task"] == task]
        for row in (row for row in here if row.x_value == f"{task} fp32" and row.provider == "as is"):
            axes.axhline(row.median, color=INK, linewidth=0.8, linestyle=":")
        for method in methods(run, task):
            line = sorted((row for row in here if row.provider == method and _groups(row.x_value) == groups), key=_bits)
            if line:
                at, values = [_bits(row) for row in line], [row.median for row in line]
                color = COLORS.get(method, MUTED)
                axes.plot(at, values, marker="o", markersize=3.5, linewidth=1.4, color=color, label=method)
        axes.set_title(f"{task}, {groups}", fontsize=9, loc="left")
        axes.set_xlabel("bits")
        axes.set_xticks([2, 3, 4, 8])
        axes.grid(color=GRID, linewidth=0.8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    handles = {label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles, loc="upper right", ncol=len(handles), frameon=False, fontsize=8)
    headline(figure, run, "Scores by bits and groups; dotted: fp32")
    figure.tight_layout()
    return figure


def _groups(x_value: str) -> str:
    """`n128` of `STS-B 4n128`; empty for the float model and mixed bits."""
    form = x_value.rpartition(" ")[2]
    return form[1:] if form[:1].isdigit() and form[1:2] in ("n", "k") else ""


def _bits(row: Any) -> float:
    return row.config.get("average_bits", 32.0)
