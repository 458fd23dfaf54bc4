"""How the sparsity grows while a model trains."""

from dataclasses import dataclass
from typing import ClassVar

from bertkern.versioned import Versioned, is_number


@dataclass(frozen=True, kw_only=True)
class PruneSchedule(Versioned):
    """When masks grow, and how far, counted in optimizer steps that are done.

    At the steps t = begin, begin + frequency, ... and end, a matrix with the final sparsity s_f gets

        s_f + (s_i - s_f) (1 - (t - begin) / (end - begin)) ^ exponent

    Before `begin` nothing is pruned, after `end` masks are fixed.

    Attributes:
        begin: the first step that prunes; 0 prunes before the first step.
        end: the step that reaches the final sparsity. Equal to `begin`: all at once.
        frequency: how many steps lie between two prunings.
        initial: s_i. A matrix whose final sparsity is lower starts with its final one.
        exponent: 3 prunes most while most is redundant; 1 is linear.
        version: of this record; a file of an unknown version is refused.

    Example:
        >>> PruneSchedule(begin=0, end=100, frequency=10).sparsity(50, final=0.8)
        0.7000000000000001
        >>> PruneSchedule.one_shot(200).sparsity(199, final=0.8)
        0.0

    Source: arXiv 1710.01878, equation 1; 0 to 10,000 steps as in arXiv 2002.08307.
    """

    begin: int = 0
    end: int = 10_000
    frequency: int = 100
    initial: float = 0.0
    exponent: float = 3.0
    version: int = 1

    KIND: ClassVar[str] = "prune_schedule"

    @classmethod
    def linear(cls, *, begin: int = 0, end: int, frequency: int = 100, initial: float = 0.0) -> "PruneSchedule":
        """The same share more at every pruning."""
        return cls(begin=begin, end=end, frequency=frequency, initial=initial, exponent=1.0)

    @classmethod
    def one_shot(cls, step: int = 0) -> "PruneSchedule":
        """All at once after `step` steps."""
        return cls(begin=step, end=step)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("begin", 0), ("end", 0), ("frequency", 1)):
            self._expect_whole(name, low)
        if self.end < self.begin:
            raise ValueError(f"PruneSchedule: expected end to be at least begin = {self.begin}. Got {self.end}.")
        self._expect_share("initial", self.initial)
        if not is_number(self.exponent) or not 0 < self.exponent < float("inf"):
            raise ValueError(f"PruneSchedule: expected exponent to be a number above 0. Got {self.exponent!r}.")

    def sparsity(self, step: int, final: float) -> float:
        """The sparsity that a pruning after `step` steps gives a matrix that ends with `final`."""
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return final
        left = 1 - (step - self.begin) / (self.end - self.begin)
        return final + (min(self.initial, final) - final) * left**self.exponent

    def prunes_at(self, step: int) -> bool:
        """Whether masks grow after `step` steps."""
        due = self.begin <= step <= self.end and (step - self.begin) % self.frequency == 0
        return due or step == self.end

    def last_pruning(self, step: int) -> int | None:
        """The latest step up to `step` at which masks grew; None before the first."""
        if step < self.begin:
            return None
        return self.end if step >= self.end else step - (step - self.begin) % self.frequency
