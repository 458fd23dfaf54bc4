"""How a group-wise weight is cut, as the benchmarks spell it."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np


class Grouping(NamedTuple):
    """Bits of the groups, in turn, and the groups: their number along N, or their length along K.

    `4n128`: 4 bits, 128 groups of output features; `2+4n128`: 2 and 4 bits in turn; `4k64`: groups of 64 along K.
    """

    bits: tuple[int, ...]
    axis: str
    size: int

    def __str__(self) -> str:
        return f"{'+'.join(map(str, self.bits))}{self.axis}{self.size}"

    def group_size(self, n: int) -> int:
        """Neighbours in a group of a weight with n output features."""
        return -(-n // min(self.size, n)) if self.axis == "n" else self.size

    def bits_of(self, n: int, k: int) -> np.ndarray:
        """Of each group, uint8."""
        side = n if self.axis == "n" else k
        return np.resize(np.array(self.bits, np.uint8), -(-side // self.group_size(n)))

    def draw(self, n: int, k: int) -> np.ndarray:
        """Codes uint8 [n, k], the same in every process; w = (code - 2^(bits - 1)) * SCALE."""
        rng = np.random.default_rng(n * 31 + k)
        bits = self.bits_of(n, k).repeat(self.group_size(n))[: n if self.axis == "n" else k]
        top = (1 << bits.astype(np.int64))[:, None] if self.axis == "n" else (1 << bits.astype(np.int64))[None, :]
        return (rng.integers(0, 256, (n, k)) * top // 256).astype(np.uint8)


SCALE = 0.01


def config_of(grouping: Grouping, **more: Any) -> Any:
    """The bertkern.GroupwiseConfig of one number of bits in these groups; needs bertkern."""
    from bertkern import GroupwiseConfig

    groups = {"groups": grouping.size} if grouping.axis == "n" else {"group_size": grouping.size}
    return GroupwiseConfig(bits=grouping.bits[0], axis=grouping.axis, **groups, **more)


def parse_groupings(text: str) -> list[Grouping]:
    """`4n128,2k64` as a list. Raises ValueError."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"([2-8](?:\+[2-8])*)([nk])([1-9]\d*)", part.strip())
        if match is None:
            raise ValueError(f"grouping: expected BITSnGROUPS or BITSkLENGTH, like 4n128 or 2+4k64. Got {part!r}.")
        found.append(Grouping(tuple(map(int, match[1].split("+"))), match[2], int(match[3])))
    return found
