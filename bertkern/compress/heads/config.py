"""How heads are ranked, and how many go: frozen, versioned, JSON both ways."""

from dataclasses import dataclass
from typing import ClassVar

from bertkern.versioned import Versioned, is_number

METHODS = ("paper", "released", "magnitude")


@dataclass(frozen=True, kw_only=True)
class HeadPruneConfig(Versioned):
    """Greedy removal of attention heads, the least important first.

    Attributes:
        fraction: the share of the model's heads that go, rounded to a whole number; None: as many as the tolerance and
            min_heads allow.
        tolerance: how much worse than that of the model as it is the metric may get; the removal ends before the first
            step that exceeds it. None: the metric is recorded and decides nothing.
        step: the share of the model's heads that go at once: k steps take k times as many, rounded, and each at least
            one.
        min_heads: how many heads a layer keeps at least; 0 lets a layer lose all.
        rescore: whether the heads that are left are ranked anew after every step.
        method: of the ranking: "paper", "released" or "magnitude"; see `head_importance`.
        normalize: of the ranking; see `head_importance`.
        greater_is_better: whether the metric is an accuracy, not a loss.
        version: of this record; a file of an unknown version is refused.

    Example:
        >>> HeadPruneConfig.from_dict(HeadPruneConfig(fraction=0.4).to_dict()).fraction
        0.4

    Source: arXiv 1905.10650, section 4: 5 % more at every step.
    """

    fraction: float | None = None
    tolerance: float | None = None
    step: float = 0.05
    min_heads: int = 1
    rescore: bool = False
    method: str = "paper"
    normalize: bool | None = None
    greater_is_better: bool = True
    version: int = 1

    KIND: ClassVar[str] = "head_prune"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fraction is None and self.tolerance is None:
            raise ValueError("HeadPruneConfig: expected a fraction or a tolerance. Got neither.")
        if self.fraction is not None and not (is_number(self.fraction) and 0 <= self.fraction <= 1):
            raise ValueError(f"HeadPruneConfig: expected fraction to be a number from 0 to 1. Got {self.fraction!r}.")
        if self.tolerance is not None and not (is_number(self.tolerance) and 0 <= self.tolerance < float("inf")):
            raise ValueError(f"HeadPruneConfig: expected tolerance to be a number from 0 on. Got {self.tolerance!r}.")
        if not (is_number(self.step) and 0 < self.step <= 1):
            raise ValueError(f"HeadPruneConfig: expected step to be a number above 0 and up to 1. Got {self.step!r}.")
        if type(self.min_heads) is not int or self.min_heads < 0:
            raise ValueError(
                f"HeadPruneConfig: expected min_heads to be a whole number of at least 0. Got {self.min_heads!r}."
            )
        if self.method not in METHODS:
            raise ValueError(f"HeadPruneConfig: expected method to be one of {METHODS}. Got {self.method!r}.")
        for name, allowed in (
            ("rescore", (True, False)),
            ("normalize", (True, False, None)),
            ("greater_is_better", (True, False)),
        ):
            if not any(getattr(self, name) is value for value in allowed):
                raise ValueError(
                    f"HeadPruneConfig: expected {name} to be one of {allowed}. Got {getattr(self, name)!r}."
                )
