"""How much every unit (weight, block, row) of a matrix counts."""

import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

_ORDERS = {"l1": 1.0, "l2": 2.0, "max": math.inf}


def magnitudes(weight: Tensor, block: tuple[int, int], norm: str) -> Tensor:
    """Mean magnitudes of blocks.

    Args:
        weight: [N, K], floating point.
        block: (rows, columns); blocks at the far edges may be smaller.
        norm: "l1" (mean of magnitudes), "l2" (root mean square) or "max".

    Returns:
        fp32 [ceil(N / rows), ceil(K / columns)], NaN where the block holds one.
    """
    if block == (1, 1):
        return weight.abs().float()
    (n, k), (rows, columns) = weight.shape, block
    down, across = math.ceil(n / rows), math.ceil(k / columns)
    padded = F.pad(weight, (0, across * columns - k, 0, down * rows - n))
    blocks = padded.reshape(down, rows, across, columns)
    order = _ORDERS[norm]
    # In float64, where squares of small weights do not vanish.
    sums = torch.linalg.vector_norm(blocks, order, dim=(1, 3), dtype=torch.float64)
    if norm == "max":
        return sums.float()
    heights = torch.full((down, 1), rows, dtype=torch.float64, device=weight.device)
    widths = torch.full((1, across), columns, dtype=torch.float64, device=weight.device)
    heights[-1], widths[:, -1] = n - (down - 1) * rows, k - (across - 1) * columns
    return (sums / (heights * widths) ** (1 / order)).float()


def random_scores(name: str, shape: tuple[int, int], seed: int) -> Tensor:
    """fp32 of `shape` in [0, 1): the same for a matrix whenever it is asked, whatever stands beside it."""
    # One 32-bit number of both: torch's generator takes no more bits of a seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.rand(shape, generator=generator)
