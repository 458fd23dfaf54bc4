"""Which weights of a matrix are zero: random blocks, the same ones in every process. Needs numpy alone."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

BLOCKS = "1x1,1x4,4x1,4x4,16x4,16x16,32x32,64x64,128x128"
ZEROS = "0,0.05,0.1,0.25,0.5,0.75,0.8,0.85,0.9,0.95"


def parse_blocks(text: str) -> list[tuple[int, int]]:
    """`1x1,16x4` as (rows, columns) pairs: outputs x inputs of a weight [N, K]. Raises ValueError."""
    blocks = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)x(\d+)", part.strip())
        if not match or not int(match[1]) or not int(match[2]):
            raise ValueError(f"block: expected ROWSxCOLUMNS, like 16x4. Got {part!r}.")
        blocks.append((int(match[1]), int(match[2])))
    return blocks


def parse_zeros(text: str) -> list[float]:
    """`0,0.5,0.95` as shares of a matrix, ascending. Raises ValueError."""
    shares = []
    for part in text.split(","):
        match = re.fullmatch(r"[01]|[01]?\.\d+", part.strip())
        if not match or float(match[0]) > 1.0:
            raise ValueError(f"zeros: expected a share from 0 to 1, like 0.8. Got {part!r}.")
        shares.append(float(match[0]))
    return sorted(set(shares))


@dataclass(frozen=True)
class Pattern:
    """This share of the blocks of a matrix is zero, drawn evenly over all of it."""

    block: tuple[int, int]
    zeros: float

    def __str__(self) -> str:
        return f"{self.name}@{self.zeros:g}"

    @property
    def name(self) -> str:
        """The block alone: `16x4`."""
        return f"{self.block[0]}x{self.block[1]}"

    @staticmethod
    def parse(text: str) -> Pattern:
        """`16x4@0.8`; `1x1@0.9` is unstructured. Raises ValueError."""
        block, _, zeros = text.strip().partition("@")
        try:
            (one,), (share,) = parse_blocks(block), parse_zeros(zeros)
        except ValueError:
            raise ValueError(f"pattern: expected ROWSxCOLUMNS@ZEROS, like 16x4@0.8 or 1x1@0.9. Got {text!r}.") from None
        return Pattern(one, share)

    def mask(self, n: int, k: int, seed: int = 0) -> np.ndarray:
        """bool [n, k], True where weights stay; blocks that reach over the edges are cut off there."""
        br, bc = self.block
        rows, columns = -(-n // br), -(-k // bc)
        keep = np.ones(rows * columns, bool)
        gone = round(self.zeros * keep.size)
        keep[np.random.default_rng([seed, n, k, br, bc]).permutation(keep.size)[:gone]] = False
        return keep.reshape(rows, columns).repeat(br, 0).repeat(bc, 1)[:n, :k]
