"""The loss around a layer's weights, over the plane of the two directions in which it bends most."""

import csv
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm.auto import tqdm

from bertkern.reports import table
from bertkern.versioned import Versioned, is_number

from .curvature import Loss, differentiable
from .hessian import ITERATIONS, TOLERANCE, Search
from .places import chosen, places


@dataclass(frozen=True, kw_only=True)
class Landscape(Versioned):
    """What `loss_landscape` found; `print`, `plot` or `save_csv` it.

    Attributes:
        layer: its name in the base model.
        eigenvalues: of the two directions, the larger in magnitude first.
        errors: how far each may be off, estimated, as a share of it.
        offsets: how far the weights move along a direction of unit length, ascending, the same for both.
        losses: losses[i][j] at offsets[i] along the first and offsets[j] along the second; Inf and NaN where the loss
            is.
        examples: that each loss is the mean over.
        version: of this record; a file of an unknown version is refused.
    """

    layer: str
    eigenvalues: tuple[float, float]
    errors: tuple[float, float]
    offsets: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    examples: int
    version: int = 1

    KIND: ClassVar[str] = "loss_landscape"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eigenvalues", "errors", "offsets", "losses"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)):
                raise ValueError(f"{self._name}: expected {name} to be a list. Got {value!r}.")
            object.__setattr__(self, name, tuple(tuple(x) if isinstance(x, list) else x for x in value))
        if not isinstance(self.layer, str):
            raise ValueError(f"{self._name}: expected layer to be a name. Got {self.layer!r}.")
        for name in ("eigenvalues", "errors"):
            if len(getattr(self, name)) != 2 or not all(map(is_number, getattr(self, name))):
                raise ValueError(f"{self._name}: expected {name} to be two numbers. Got {getattr(self, name)!r}.")
        if not self.offsets or not all(map(is_number, self.offsets)) or list(self.offsets) != sorted(self.offsets):
            raise ValueError(f"{self._name}: expected offsets to be ascending numbers. Got {self.offsets!r}.")
        side = len(self.offsets)
        rows = [row if isinstance(row, tuple) else () for row in self.losses]
        if len(rows) != side or any(len(row) != side or not all(map(is_number, row)) for row in rows):
            raise ValueError(f"{self._name}: expected losses to be {side} rows of {side} numbers. Got others.")
        self._expect_whole("examples", 1)

    def save_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes a line for every point: its offsets along the first and second direction, and the loss."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["first", "second", "loss"])
            for first, row in zip(self.offsets, self.losses, strict=True):
                pairs = zip(self.offsets, row, strict=True)
                writer.writerows([repr(first), repr(second), repr(loss)] for second, loss in pairs)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """The surface and its contours as a matplotlib figure, which is also written to `path` if there is one."""
        # No pyplot: it would keep the figure, and look for a display.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4.2), layout="constrained")
        losses = torch.tensor(self.losses, dtype=torch.float64)
        # Beyond finite losses the surface has holes.
        losses[~losses.isfinite()] = math.nan
        first, second = torch.meshgrid(*[torch.tensor(self.offsets, dtype=torch.float64)] * 2, indexing="ij")
        grids = first.numpy(), second.numpy(), losses.numpy()
        surface = figure.add_subplot(1, 2, 1, projection="3d")
        surface.plot_surface(*grids, cmap="viridis")
        surface.set(xlabel="first", ylabel="second", title="loss")
        flat = figure.add_subplot(1, 2, 2)
        if losses.isfinite().all() and losses.max() > losses.min():
            figure.colorbar(flat.contourf(*grids, levels=20, cmap="viridis"), ax=flat, label="loss")
        else:
            figure.colorbar(flat.pcolormesh(*grids, shading="nearest", cmap="viridis"), ax=flat, label="loss")
        flat.plot(0, 0, marker="+", color="white")
        flat.set_xlabel(f"first direction, eigenvalue {self.eigenvalues[0]:.3g}")
        flat.set_ylabel(f"second direction, eigenvalue {self.eigenvalues[1]:.3g}")
        figure.suptitle(self.layer)
        if path is not None:
            figure.savefig(path)
        return figure

    def __str__(self) -> str:
        values = ", ".join(
            f"{value:.4g} (error up to {error:.1%})" for value, error in zip(self.eigenvalues, self.errors, strict=True)
        )
        title = f"Loss of {self.layer} over {self.examples} examples, eigenvalues {values}"
        shown = sorted({0, len(self.offsets) // 4, len(self.offsets) // 2, -(-3 * len(self.offsets) // 4) - 1})
        shown = sorted({*shown, len(self.offsets) - 1})
        head = ["first \\ second", *(f"{self.offsets[j]:.3g}" for j in shown)]
        rows = [[f"{self.offsets[i]:.3g}", *(f"{self.losses[i][j]:.4g}" for j in shown)] for i in shown]
        return "\n".join([title, *table(head, rows)])


def loss_landscape(
    model: nn.Module,
    batches: Iterable[Any],
    layer: str,
    *,
    loss: Loss | None = None,
    radius: float = 0.5,
    points: int = 15,
    fraction: float = 0.1,
    iterations: int = 2 * ITERATIONS,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    tokenizer: Callable[..., Any] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Landscape:
    """The loss over the plane that the top two eigenvectors of a layer's Hessian span, around the weights as they are.

    Both come from one run of Lanczos' method. The weights are exactly what they were afterwards.

    Args:
        layer: a name such as "encoder.layer.3".
        radius: how far the weights move at most along either direction, in the L2 norm.
        points: along a direction, odd so that the model as it is is one of them; points^2 losses are computed.
        fraction: the share of the examples that count, for the eigenvectors and the losses alike.
        The others: as of `hessian_sensitivity`.

    Raises:
        TypeError, ValueError: what `hessian_sensitivity` raises.

    Example::

        bk.loss_landscape(model, train_loader, "encoder.layer.9").plot("layer9.png")

    Source: arXiv 1909.05840, figures 2 and 3.
    """
    caller = "loss_landscape"
    if not is_number(radius) or not 0 < radius < math.inf:
        raise ValueError(f"{caller}: expected radius to be a number above 0. Got {radius!r}.")
    if type(points) is not int or points < 3 or points % 2 == 0:
        raise ValueError(f"{caller}: expected points to be an odd number of at least 3. Got {points!r}.")
    if type(iterations) is not int or iterations < 2:
        raise ValueError(f"{caller}: expected iterations to be a whole number of at least 2. Got {iterations!r}.")
    found = chosen(places(model, caller), [layer], caller)
    weights = found[layer].weights(caller)
    search = Search(model, batches, loss, fraction, tolerance, seed, tokenizer, batch_size, caller)
    # The middle is exactly 0.
    offsets = [radius * (2 * i - points + 1) / (points - 1) for i in range(points)]
    with torch.inference_mode(False), differentiable(model):
        curvature = search.curvature(found)
        ((_, start),) = search.starts(curvature, {})
        pairs = search.solve(curvature, layer, start, iterations, count=2)
        curvature.forget()
        if len(pairs.values) < 2:
            raise ValueError(f"{caller}: expected a loss that bends in two directions. Got a Hessian of fewer.")
        sizes = [weight.numel() for weight in weights]
        parts = [
            [part.view_as(weight) for part, weight in zip(vector.split(sizes), weights, strict=True)]
            for vector in pairs.vectors
        ]
        before = [weight.detach().clone() for weight in weights]
        losses = []
        bar = tqdm(total=points**2, desc="loss landscape", unit="loss", disable=not progress)
        with bar, torch.no_grad():
            try:
                for first in offsets:
                    losses.append([])
                    for second in offsets:
                        for weight, middle, one, two in zip(weights, before, *parts, strict=True):
                            weight.copy_(middle + first * one + second * two)
                        losses[-1].append(curvature.mean())
                        bar.update()
            finally:
                for weight, middle in zip(weights, before, strict=True):
                    weight.copy_(middle)
    return Landscape(
        layer=layer,
        eigenvalues=tuple(pairs.values),
        errors=tuple(pairs.errors),
        offsets=tuple(offsets),
        losses=tuple(map(tuple, losses)),
        examples=search.count,
    )
