"""The plot of the Q-BERT benchmark: a line of panels a task, one a grouping with scores by bits, one of mixed bits."""

from __future__ import annotations

from typing import Any

from .plots import GRID, INK, MUTED, OURS, THEIRS, headline
from .results import Row, Run
from .tables_qbert import methods

COLORS = {"minmax": THEIRS, "mse": "#457b9d", "compensate": OURS, "qat": "#2a9d8f"}
ORDERS = ("sensitivity", "random", "reversed")  # the expected best first
MIXED = "mixed bits"
# Scores that are further below fp32 than so are drawn at the lower edge: rounding that breaks the model would else
# take all of the scale.
DEEPEST = 0.3


def draw(run: Run, plt: Any) -> Any:
    """The figure of a run."""
    scores = [row for row in run.rows if row.metric in ("spearman", "accuracy")]
    tasks = list(dict.fromkeys(row.config["task"] for row in scores))
    panels = list(dict.fromkeys(groups for row in scores if (groups := _groups(row)))) or [""]
    size = (2.7 * len(panels), 2.7 * len(tasks))
    figure, grid = plt.subplots(len(tasks), len(panels), figsize=size, squeeze=False, sharey="row")
    for line, task in zip(grid, tasks, strict=True):
        here = [row for row in scores if row.config["task"] == task]
        whole = next((row.median for row in here if row.x_value == f"{task} fp32" and row.provider == "as is"), None)
        low = min(row.median for row in here)
        floor = low if whole is None else max(low, whole - DEEPEST)
        for axes, groups in zip(line, panels, strict=True):
            rows = [row for row in here if _groups(row) == groups]
            _panel(axes, rows, groups, methods(run, task), floor)
            if whole is not None:
                axes.axhline(whole, color=INK, linewidth=0.8, linestyle=":")
            axes.set_title(f"{task}, {groups}", fontsize=9, loc="left")
        high = max(row.median for row in here)
        margin = 0.06 * (high - floor) or 0.01
        line[0].set_ylim(floor - margin, high + margin)
    handles = {label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles, loc="upper right", ncol=len(handles), frameon=False, fontsize=8)
    headline(figure, run, "Scores by bits and groups; dotted: fp32")
    figure.tight_layout()
    return figure


def _panel(axes: Any, rows: list[Row], groups: str, names: list[str], floor: float) -> None:
    """One line a method over bits; of mixed bits over who gets them."""
    places = {x: i for i, x in enumerate(sorted({row.x_value for row in rows}, key=_mixture))}
    for method in names:
        line = sorted((row for row in rows if row.provider == method), key=_bits)
        if not line:
            continue
        at = [places[row.x_value] for row in line] if groups == MIXED else [_bits(row) for row in line]
        if groups == MIXED:
            # Neighbours are no steps of a scale: points alone, methods side by side.
            at = [place + 0.16 * (names.index(method) - (len(names) - 1) / 2) for place in at]
        values = [max(row.median, floor) for row in line]
        scores = [row.config["scores"] for row in line]  # of seeds
        spread = [
            [max(0.0, v - max(min(all_of), floor)) for v, all_of in zip(values, scores, strict=True)],
            [max(0.0, max(all_of) - v) for v, all_of in zip(values, scores, strict=True)],
        ]
        color = COLORS.get(method, MUTED)
        style = {"linestyle": "none"} if groups == MIXED else {"linewidth": 1.4}
        axes.errorbar(
            at, values, yerr=spread, marker="o", markersize=3.5, elinewidth=0.8, color=color, label=method, **style
        )
        lost = [x for x, row in zip(at, line, strict=True) if row.median < floor]
        axes.plot(lost, [floor] * len(lost), marker="v", markersize=6, linestyle="none", color=color)
    if groups == MIXED:
        axes.set_xticks(list(places.values()), ["\n".join(_mixture_name(x)) for x in places], fontsize=6.5)
    else:
        axes.set_xticks(sorted({_bits(row) for row in rows}))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("bits")
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(labelleft=True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _groups(row: Row) -> str:
    """`n128` of `STS-B 4n128`, `mixed bits` of those; empty for the float model."""
    form = row.x_value.removeprefix(row.config["task"]).strip()
    if "/" in form:
        return MIXED
    return form[1:] if form[:1].isdigit() and form[1:2] in ("n", "k") else ""


def _bits(row: Row) -> float:
    return row.config.get("average_bits", 32.0)


def _mixture_name(x_value: str) -> tuple[str, str]:
    """(2/4n128, reversed)."""
    form, _, order = x_value.rpartition(" ")
    return form.rpartition(" ")[2], order


def _mixture(x_value: str) -> tuple[str, int]:
    """What mixed bits are sorted by."""
    form, order = _mixture_name(x_value)
    return form, ORDERS.index(order) if order in ORDERS else 0
