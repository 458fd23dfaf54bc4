"""Which heads a model can do without: the least important go first, as long as a metric allows."""

import csv
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bertkern.head_masks import Places, head_mask, places
from bertkern.heads import expect_prunable, prune_heads

from ..observation import evaluating
from .config import HeadPruneConfig
from .importance import Loss, head_importance

Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class HeadPoint:
    """The model with some heads masked.

    Attributes:
        removed: how many heads that the model had are masked.
        kept: how many each of its layers has left.
        metric: what the metric said; None without one.
    """

    removed: int
    kept: tuple[int, ...]
    metric: float | None

    @property
    def heads(self) -> int:
        """How many heads are left."""
        return sum(self.kept)


@dataclass(frozen=True)
class HeadPruning:
    """What `choose_heads` found.

    Attributes:
        heads: those to remove, ascending, by layer, in the numbering that the model was built with: what
            `bertkern.prune_heads` takes. Layers that lose nothing are not there.
        curve: every step that was tried, the model as it was first; a step beyond the tolerance last.
        scores: of the first ranking, fp64 [layers, heads]; ALBERT: a row for every distinct layer, the mean of
            its runs.
    """

    heads: dict[int, list[int]]
    curve: tuple[HeadPoint, ...]
    scores: Tensor = field(compare=False)

    def save_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the curve: a line for every step, its columns heads, removed, share, metric, and kept by layer."""
        whole = self.curve[0].heads
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            layers = [f"layer {i}" for i in range(len(self.curve[0].kept))]
            writer.writerow(["heads", "removed", "share removed", "metric", *layers])
            for point in self.curve:
                metric = "" if point.metric is None else repr(point.metric)
                writer.writerow([point.heads, point.removed, repr(point.removed / whole), metric, *point.kept])

    def plot(self, path: str | os.PathLike[str] | None = None, *, metric: str = "metric") -> Any:
        """The curve as a matplotlib figure, which is also written to `path` if there is one.

        Args:
            metric: the name of the axis.

        Raises:
            ValueError: a curve without a metric.
        """
        if self.curve[0].metric is None:
            raise ValueError("plot: expected a curve with a metric. Got one without: pass metric= to choose_heads.")
        # No pyplot: it would keep the figure, and look for a display.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        whole, chosen = self.curve[0].heads, sum(map(len, self.heads.values()))
        axes.plot([100 * point.removed / whole for point in self.curve], [p.metric for p in self.curve], marker="o")
        label = f"{whole - chosen} of {whole} heads stay"
        axes.axvline(100 * chosen / whole, color="0.6", linestyle="--", label=label)
        axes.set_xlabel("heads removed, %")
        axes.set_ylabel(metric)
        axes.legend()
        if path is not None:
            figure.savefig(path)
        return figure

    def to_dict(self) -> dict[str, Any]:
        """The heads, the curve and the scores as JSON values."""
        points = [{"removed": p.removed, "kept": list(p.kept), "metric": p.metric} for p in self.curve]
        heads = {str(layer): list(gone) for layer, gone in self.heads.items()}
        return {"heads": heads, "curve": points, "scores": self.scores.tolist()}


def choose_heads(
    model: nn.Module,
    config: HeadPruneConfig,
    dataloader: Iterable[Any] | None = None,
    *,
    metric: Metric | None = None,
    loss: Loss | None = None,
    progress: bool = True,
) -> HeadPruning:
    """Which heads to remove from `model`, and what that does to a metric. Heads are masked meanwhile, none is removed.

    The least important heads go first, wherever they are, a step's number at a time; of equal ones the first by layer
    and number. A layer with no more than config.min_heads keeps them. ALBERT's layers count once, as their weights do.

    Args:
        model: a transformers model of a known family or of ALBERT, or a module around one; as it is, accelerated or
            quantized.
        config: how far, and by which ranking.
        dataloader, loss: of `head_importance`; iterated anew for every ranking.
        metric: metric(model), called in evaluation mode without gradients for the model as it is and after every step.

    Raises:
        TypeError, ValueError: what `head_importance` raises; a tolerance without a metric, a fraction that min_heads
            does not allow, a metric that is no number or NaN.

    Example::

        config = bk.HeadPruneConfig(fraction=0.5, tolerance=0.01)
        found = bk.choose_heads(model, config, train_loader, metric=accuracy)
        found.save_csv("heads.csv")
        bk.prune_heads(model, found.heads)

    Source: arXiv 1905.10650, section 4.
    """
    if not isinstance(config, HeadPruneConfig):
        raise TypeError(f"choose_heads: expected a HeadPruneConfig. Got {type(config).__name__}.")
    if config.tolerance is not None and metric is None:
        raise ValueError("choose_heads: expected a metric with a tolerance. Got none.")
    if metric is not None and not callable(metric):
        raise TypeError(f"choose_heads: expected metric to be callable. Got {type(metric).__name__}.")
    if config.rescore and isinstance(dataloader, Iterator):
        raise TypeError("choose_heads: expected dataloader to be iterable several times with rescore. Got an iterator.")
    found = places(model, "choose_heads")
    search = _Search(model, found, config)
    target = search.target()

    def rank() -> Tensor:
        return search.by_layer(
            head_importance(
                model, dataloader, method=config.method, normalize=config.normalize, loss=loss, progress=progress
            )
        )

    scores = rank()
    order = search.order(scores)
    curve = [search.point(metric)]
    allowed = list(search.gone)
    with tqdm(total=target, desc="remove heads", unit="head", disable=not progress) as bar:
        while len(search.gone) < target:
            if config.rescore and search.gone:
                with head_mask(model, search.mask()):
                    order = search.order(rank())
            count = min(search.goal(len(curve)), target) - len(search.gone)
            search.remove(order, count)
            bar.update(count)
            curve.append(search.point(metric))
            if config.tolerance is not None and _loss_of(curve, config) > config.tolerance:
                break
            allowed = list(search.gone)
    heads: dict[int, list[int]] = {}
    for layer, head in sorted(allowed):
        heads.setdefault(layer, []).append(head)
    return HeadPruning(heads, tuple(curve), scores)


def prune_heads_by_importance(
    model: nn.Module,
    config: HeadPruneConfig,
    dataloader: Iterable[Any] | None = None,
    *,
    metric: Metric | None = None,
    loss: Loss | None = None,
    progress: bool = True,
) -> HeadPruning:
    """Removes the heads that `choose_heads` finds from `model`, by `bertkern.prune_heads`, in place.

    Args, raises: as of `choose_heads`, and what `bertkern.prune_heads` refuses, such as an int8 model: at once.

    Returns:
        What was found: the heads, which are gone now, and the curve.

    Example::

        found = bk.prune_heads_by_importance(model, bk.HeadPruneConfig(fraction=0.4), train_loader)

    Source: arXiv 1905.10650, section 4.
    """
    # Before the search, which may take long.
    expect_prunable("prune_heads_by_importance", model)
    found = choose_heads(model, config, dataloader, metric=metric, loss=loss, progress=progress)
    if found.heads:
        prune_heads(model, found.heads)
    return found


class _Search:
    """The state of a greedy removal: which heads of which distinct layers are gone."""

    def __init__(self, model: nn.Module, found: Places, config: HeadPruneConfig) -> None:
        self.model, self.found, self.config = model, found, config
        self.left = [list(place.kept) for place in found.layers]
        self.gone: list[tuple[int, int]] = []
        self.whole = sum(map(len, self.left))
        if not self.whole:
            raise ValueError("choose_heads: expected a model with heads. Got one that has lost all of them.")

    def goal(self, step: int) -> int:
        """How many heads are to be gone after `step` steps."""
        return max(len(self.gone) + 1, round(step * self.config.step * self.whole))

    def target(self) -> int:
        """How many heads are to go at most."""
        most = sum(max(0, len(heads) - self.config.min_heads) for heads in self.left)
        if self.config.fraction is None:
            return most
        target = round(self.config.fraction * self.whole)
        if target > most:
            raise ValueError(
                f"choose_heads: expected a fraction of at most {most / self.whole:.4g}, which leaves every layer "
                f"min_heads = {self.config.min_heads}. Got {self.config.fraction}."
            )
        return target

    def by_layer(self, scores: Tensor) -> Tensor:
        """Scores of every run of a layer -> the mean over the layer's runs."""
        return torch.stack([scores[list(place.rows)].mean(0) for place in self.found.layers])

    def order(self, scores: Tensor) -> list[tuple[int, int]]:
        """The heads that are left, the least important first."""
        heads = [(layer, head) for layer, left in enumerate(self.left) for head in left]
        return sorted(heads, key=lambda at: (float(scores[at]), at))

    def remove(self, order: list[tuple[int, int]], count: int) -> None:
        """Lets the first `count` heads of `order` go that are there and that their layer can spare."""
        for layer, head in order:
            if count and head in self.left[layer] and len(self.left[layer]) > self.config.min_heads:
                self.left[layer].remove(head)
                self.gone.append((layer, head))
                count -= 1

    def mask(self) -> Tensor:
        """0 for every head that is gone, [rows, heads]."""
        mask = torch.ones(self.found.rows, self.found.heads)
        for layer, head in self.gone:
            mask[list(self.found.layers[layer].rows), head] = 0
        return mask

    def point(self, metric: Metric | None) -> HeadPoint:
        kept, value = tuple(map(len, self.left)), None
        if metric is not None:
            with evaluating(self.model), torch.no_grad(), head_mask(self.model, self.mask()):
                value = metric(self.model)
            try:
                value = float(value)
            except (TypeError, ValueError):
                raise TypeError(f"choose_heads: expected a number of metric. Got {type(value).__name__}.") from None
            if math.isnan(value):
                raise ValueError(f"choose_heads: expected a number of metric. Got NaN, {len(self.gone)} heads gone.")
        return HeadPoint(len(self.gone), kept, value)


def _loss_of(curve: list[HeadPoint], config: HeadPruneConfig) -> float:
    """By how much the last point's metric is worse than the first's."""
    change = curve[0].metric - curve[-1].metric
    return change if config.greater_is_better else -change
