"""The pattern of the zeros in one matrix: blocks, whole rows and columns, n of every m."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Blocks, as rows x columns, whose density stands in every row; the best block is sought among all powers of two.
BLOCKS = (
    (1, 4),
    (4, 1),
    (1, 8),
    (8, 1),
    (1, 16),
    (16, 1),
    (4, 4),
    (8, 8),
    (4, 16),
    (16, 4),
    (16, 16),
    (32, 32),
    (64, 64),
    (128, 128),
)
_LARGEST = 128
# n of every m, strictest first.
_PATTERNS = ((1, 4), (1, 2), (2, 4))
# A matrix with a smaller share of zeros, beside whole rows and columns of them, is called dense: a few come by chance.
DENSE = 0.01
# Zeros that a block may leave in kept blocks, as a share of the zeros and of the nonzeros, and still explain a matrix.
_UNEXPLAINED = 0.1


class Structure(NamedTuple):
    """What is zero in a matrix; see the attributes of `inspection.Matrix`."""

    zeros: float
    dead_rows: int
    dead_columns: int
    block: tuple[int, int] | None
    densities: dict[str, float]
    patterns: tuple[str, ...]


def structure(weight: Tensor) -> Structure:
    """The structure of `weight` [N, K], whose entries can be read; there is at least one."""
    mask = (weight != 0).view(torch.uint8)
    nonzeros = int(mask.count_nonzero())
    zeros = 1 - nonzeros / mask.numel()
    if nonzeros == mask.numel():
        return Structure(zeros, 0, 0, None, {name_of(block): 1.0 for block in ((1, 1), *BLOCKS)}, ())
    live_rows, live_columns = mask.amax(1), mask.amax(0)
    blocks = Blocks(mask.contiguous())
    block = blocks.best(live_rows, live_columns, nonzeros) if nonzeros else None
    densities = blocks.densities([(1, 1), *BLOCKS, *([block] if block else [])])
    # With fewer zeros none can hold, even where the last groups are short.
    patterns = blocks.patterns() if nonzeros and zeros >= 0.25 else ()
    dead_rows, dead_columns = int((live_rows == 0).sum()), int((live_columns == 0).sum())
    return Structure(zeros, dead_rows, dead_columns, block, densities, patterns)


def name_of(block: tuple[int, int]) -> str:
    """The name of a block: "16x4"."""
    return f"{block[0]}x{block[1]}"


class Blocks:
    """Which blocks of a matrix hold anything, for blocks whose sides are powers of two.

    Args:
        mask: uint8 [N, K], 1 where the matrix is not zero.
    """

    def __init__(self, mask: Tensor) -> None:
        self.shape = mask.shape
        self._grids = {(1, 1): mask}

    def grid(self, rows: int, columns: int) -> Tensor:
        """uint8 [N / rows, K / columns], rounded up: 1 where the block holds anything."""
        if (rows, columns) not in self._grids:
            if rows > 1:
                fine = _padded(self.grid(rows // 2, columns), 0, 2)
                made = fine[0::2] | fine[1::2]
            else:
                # Two neighbours are one int16, so that whole vectors are compared.
                pairs = _padded(self.grid(rows, columns // 2), 1, 2).view(torch.int16)
                made = (pairs != 0).view(torch.uint8)
            self._grids[rows, columns] = made
        return self._grids[rows, columns]

    def density(self, rows: int, columns: int) -> float:
        """The share of blocks that hold anything."""
        grid = self.grid(rows, columns)
        return int(grid.count_nonzero()) / grid.numel()

    def densities(self, blocks: Iterable[tuple[int, int]]) -> dict[str, float]:
        """The densities of `blocks` by their names."""
        return {name_of(block): self.density(*block) for block in dict.fromkeys(blocks)}

    def best(self, live_rows: Tensor, live_columns: Tensor, nonzeros: int) -> tuple[int, int] | None:
        """The largest block that explains the zeros of live rows and columns; see Matrix.block."""
        live = int(live_rows.sum()) * int(live_columns.sum())
        zeros = live - nonzeros
        if zeros < DENSE * live:
            return None
        allowed = _UNEXPLAINED * min(zeros, nonzeros)
        best, left, seen = (1, 1), 0.0, {(1, 1)}
        queue = [(1, 1)]
        # A block that fails is part of none that does not, so few are ever looked at.
        while queue:
            rows, columns = queue.pop()
            for block in ((2 * rows, columns), (rows, 2 * columns)):
                larger = any(side >= 2 * whole for side, whole in zip(block, self.shape, strict=True))
                if block in seen or larger or max(block) > _LARGEST:
                    continue
                seen.add(block)
                uncovered = self._live(block, live_rows, live_columns) - nonzeros
                if uncovered <= allowed:
                    queue.append(block)
                    if (-block[0] * block[1], uncovered) < (-best[0] * best[1], left):
                        best, left = block, uncovered
        return best if best != (1, 1) else None

    def _live(self, block: tuple[int, int], rows: Tensor, columns: Tensor) -> float:
        """How many weights in live rows and columns lie in blocks that hold anything."""
        rows = _padded(rows[:, None], 0, block[0]).view(-1, block[0]).sum(1).double()
        columns = _padded(columns[:, None], 0, block[1]).view(-1, block[1]).sum(1).float()
        # Sums of a row are whole numbers below 2^24, exact in fp32.
        return float(rows @ (self.grid(*block).float() @ columns).double())

    def patterns(self) -> tuple[str, ...]:
        """The n:m patterns that hold everywhere; the last m are fewer where the side is no multiple of m."""
        made = []
        mask = self._grids[1, 1]
        most: dict[tuple[str, int], int] = {}
        for m in (2, 4):
            # The bytes of an int16 or int32 are m neighbours; the product's highest byte is their sum.
            words = _padded(mask, 1, m).view(torch.int16 if m == 2 else torch.int32)
            sums = words * (0x0101 if m == 2 else 0x01010101) >> (8 if m == 2 else 24)
            most["K", m] = int(sums.max())
            columns = _padded(mask, 0, m)
            most["N", m] = int(sum(columns[i::m] for i in range(m)).max())
        for side, size in (("K", self.shape[1]), ("N", self.shape[0])):
            made += [(n / m, f"{n}:{m} along {side}") for n, m in _PATTERNS if size >= m and most[side, m] <= n]
        return tuple(name for _, name in sorted(made, key=lambda item: item[0]))


def _padded(x: Tensor, dim: int, multiple: int) -> Tensor:
    """`x` [R, C] with zeros behind, so that its size along `dim` is a multiple; contiguous."""
    more = -x.shape[dim] % multiple
    if more:
        x = nn.functional.pad(x, (0, more) if dim == 1 else (0, 0, 0, more))
    return x.contiguous()
