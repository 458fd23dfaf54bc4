"""How the sparsity grows while a model trains."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class PruneSchedule:
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
        if type(self.version) is not int or self.version != 1:
            raise ValueError(f"PruneSchedule: expected version 1. Got {self.version!r}.")
        for name, low in (("begin", 0), ("end", 0), ("frequency", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise ValueError(
                    f"PruneSchedule: expected {name} to be a whole number of at least {low}. Got {value!r}."
                )
        if self.end < self.begin:
            raise ValueError(f"PruneSchedule: expected end to be at least begin = {self.begin}. Got {self.end}.")
        if not _is_number(self.initial) or not 0 <= self.initial <= 1:
            raise ValueError(f"PruneSchedule: expected initial to be a number from 0 to 1. Got {self.initial!r}.")
        if not _is_number(self.exponent) or not 0 < self.exponent < float("inf"):
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

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON values that `from_dict` reads."""
        return {"kind": self.KIND, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PruneSchedule":
        """The schedule of `to_dict`'s record.

        Raises:
            ValueError: an unknown kind, version or field, or a value that is not allowed.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"PruneSchedule: expected a mapping. Got {type(values).__name__}.")
        values = dict(values)
        kind = values.pop("kind", cls.KIND)
        if kind != cls.KIND:
            raise ValueError(f'PruneSchedule: expected kind "{cls.KIND}". Got {kind!r}.')
        if "version" in values and values["version"] != 1:
            raise ValueError(f"PruneSchedule: expected version 1. Got {values['version']!r}.")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"PruneSchedule: expected fields among {sorted(known)}. Got {unknown}.")
        return cls(**values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
