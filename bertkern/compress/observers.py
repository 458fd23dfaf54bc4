"""Ways to settle on one activation range from many batches."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Observer(Protocol):
    """Sees the activations of one tensor of the model, batch by batch, and gives their range in the end."""

    def update(self, x: Tensor) -> None:
        """Takes in one batch: finite values, any shape, not empty."""

    def range(self) -> float:
        """The range max|x| to quantize with."""


class AbsMax:
    """The largest |x| seen: nothing is clipped, one outlier coarsens all the rest."""

    def __init__(self) -> None:
        self._largest = 0.0

    def update(self, x: Tensor) -> None:
        self._largest = max(self._largest, float(x.abs().amax()))

    def range(self) -> float:
        return self._largest


class MovingAverage:
    """Q8BERT's own rule: the first batch's max|x|, then range <- range - (1 - decay) (range - max|x|).

    The decay of training (0.9999) would not leave the first of a few hundred batches; hence another default.
    """

    def __init__(self, decay: float = 0.95) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"MovingAverage: expected decay to be from 0 to 1. Got {decay}.")
        self.decay = decay
        self._average: float | None = None

    def update(self, x: Tensor) -> None:
        live = float(x.abs().amax())
        average = live if self._average is None else self._average
        self._average = average - (1 - self.decay) * (average - live)

    def range(self) -> float:
        return self._average or 0.0


class Percentile:
    """The |x| that `percentile` per cent of all values stay below: clips outliers, to be finer on the rest.

    Counts values in a histogram whose top doubles (neighbouring bins merge) when a larger value comes, so memory does
    not depend on the data and the answer is at most two bins of 1/`bins` of the largest value too high.
    """

    def __init__(self, percentile: float = 99.99, bins: int = 8192) -> None:
        if not 0 < percentile <= 100:
            raise ValueError(f"Percentile: expected percentile to be above 0 and at most 100. Got {percentile}.")
        if bins < 2 or bins % 2:
            raise ValueError(f"Percentile: expected bins to be even and at least 2. Got {bins}.")
        self.percentile = percentile
        self.bins = bins
        self._top = 0.0
        self._largest = 0.0
        self._counts = torch.zeros(bins, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        size = x.abs().float()
        largest = float(size.amax())
        self._largest = max(self._largest, largest)
        self._top = self._top or max(largest, 1e-6)
        while largest > self._top:
            merged = self._counts.view(-1, 2).sum(1)
            self._counts = torch.cat([merged, torch.zeros_like(merged)])
            self._top *= 2
        self._counts += torch.histc(size, self.bins, 0, self._top).cpu().double()

    def range(self) -> float:
        cumulated = self._counts.cumsum(0)
        wanted = cumulated[-1] * (self.percentile / 100)
        bin_index = int(torch.searchsorted(cumulated, wanted))
        return min((bin_index + 1) * self._top / self.bins, self._largest)


OBSERVERS: dict[str, Callable[[], Observer]] = {
    "absmax": AbsMax,
    "percentile": Percentile,
    "ema": MovingAverage,
}


def named_observer(observer: str | Callable[[], Observer]) -> Callable[[], Observer]:
    """What makes the observer that a user asked for, by name or by what makes it.

    Raises:
        ValueError: an unknown name.
    """
    if not isinstance(observer, str):
        return observer
    if observer not in OBSERVERS:
        raise ValueError(f"calibrate: expected observer to be one of {', '.join(OBSERVERS)}. Got {observer!r}.")
    return OBSERVERS[observer]
