"""What the matrices of a layer cost at each number of bits: bytes as stored, and the error of rounding them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from bertkern.config.groupwise import whole_by_default
from bertkern.formats.groupwise import AXES, BITS, group_count
from bertkern.formats.rounding import METHODS, round_weight

from .places import Place

# Bytes of a scale or of a zero point, of the number of bits of a group.
_FLOAT, _COUNT = 4, 1


@dataclass(frozen=True)
class Grouping:
    """How matrices are cut into groups, and what each group has; see `bertkern.formats.GroupwiseWeight`.

    Attributes:
        groups: into how many a matrix is cut, of ceil(side / groups) neighbours, where group_size is None.
        group_size: neighbours in a group.
        axis: "n" or "k".
        symmetric: no zero points.
        shared: along "k": all rows share the groups' scales.
        whole_zero: zero points are whole; None: unless the method is "mse".
        method: by which the range of a group is found; see `bertkern.formats.round_weight`.
    """

    groups: int = 128
    group_size: int | None = None
    axis: str = "n"
    symmetric: bool = False
    shared: bool = False
    whole_zero: bool | None = None
    method: str = "minmax"

    def __post_init__(self) -> None:
        if self.whole_zero is None:
            object.__setattr__(self, "whole_zero", whole_by_default(self.method))

    def check(self, caller: str) -> "Grouping":
        """Itself.

        Raises:
            ValueError: a field out of range.
        """
        for name in ("groups",) if self.group_size is None else ("group_size",):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{caller}: expected {name} to be a whole number of at least 1. Got {value!r}.")
        if self.axis not in AXES:
            raise ValueError(f'{caller}: expected axis "n" or "k". Got {self.axis!r}.')
        if self.shared and self.axis == "n":
            raise ValueError(f'{caller}: expected axis "k" with shared. Got "n".')
        if self.method not in METHODS:
            raise ValueError(f"{caller}: expected method to be one of {tuple(METHODS)}. Got {self.method!r}.")
        return self

    def size(self, shape: tuple[int, int]) -> int:
        """Neighbours in a group of a matrix [N, K]."""
        if self.group_size is not None:
            return self.group_size
        side = shape[0] if self.axis == "n" else shape[1]
        return -(-side // self.groups)

    def nbytes(self, shape: tuple[int, int], bits: int) -> int:
        """Bytes of all tensors of a matrix [N, K] of `bits`: codes, scales, zero points and bits.

        Example:
            >>> Grouping().nbytes((768, 768), 4)  # 294,912 of codes, 128 groups of 9 bytes
            296064
        """
        n, k = shape
        groups = group_count(shape, self.axis, self.size(shape))
        scales = groups * (n if self.axis == "k" and not self.shared else 1)
        return n * (-(-k * bits // 8)) + scales * _FLOAT * (1 if self.symmetric else 2) + groups * _COUNT

    def error(self, weight: Tensor, bits: int) -> float:
        """The sum of squares of what rounding `weight` [N, K] to its groups' grids changes."""
        how = {name: getattr(self, name) for name in ("method", "symmetric", "whole_zero", "shared")}
        made = round_weight(weight, bits, self.size(tuple(weight.shape)), self.axis, **how)
        return float((made.dequantize() - weight.float()).double().square().sum())


def expect_choices(caller: str, choices: Iterable[int]) -> tuple[int, ...]:
    """Numbers of bits, ascending, each once.

    Raises:
        ValueError: none, or ones that no code has.
    """
    made = tuple(choices) if isinstance(choices, Iterable) and not isinstance(choices, str) else ()
    if not made or any(type(bits) is not int or bits not in BITS for bits in made) or len(set(made)) != len(made):
        raise ValueError(f"{caller}: expected choices to be different numbers of bits from 2 to 8. Got {choices!r}.")
    return tuple(sorted(made))


def shapes_of(found: Mapping[str, Place], caller: str) -> dict[str, tuple[tuple[int, int], ...]]:
    """The shapes of each layer's matrices."""
    return {name: tuple(tuple(w.shape) for w in place.matrices(caller).values()) for name, place in found.items()}
