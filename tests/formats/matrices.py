"""Matrices of every kind that a canonical form must hold exactly, and a comparison that knows NaN."""

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8]
BLOCKS = [(1, 1), (1, 4), (4, 1), (16, 4), (16, 16), (32, 32), (64, 64), (128, 128), (13, 7), (3, 8), (2, 6)]
SHAPES = [(64, 128), (717, 768), (833, 26), (26, 312), (1, 1), (1, 131), (131, 1), (129, 5)]
EMPTY = [(0, 0), (0, 7), (7, 0)]


def random(shape, density: float = 0.3, block=(1, 1), dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random numbers in about `density` of the blocks, zeros elsewhere, with zeros within the blocks too."""
    generator = torch.Generator().manual_seed(seed + shape[0] * 31 + shape[1])
    kept = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1]), generator=generator) < density
    mask = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]
    values = torch.randint(-100, 101, shape, generator=generator)
    return (values * mask).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether both have the same dtype, shape and elements, NaN being equal to itself."""
    assert a.dtype == b.dtype and a.shape == b.shape, (a.dtype, a.shape, b.dtype, b.shape)
    return bool(((a == b) | ((a != a) & (b != b))).all())


def strange(weight: Tensor) -> Tensor:
    """`weight` with NaN, both infinities, a denormal and the largest number in it."""
    weight = weight.clone()
    finfo = torch.finfo(weight.dtype)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), finfo.smallest_normal / 4, finfo.max])
    odd = odd.to(weight.dtype)
    flat = weight.view(-1)
    places = torch.linspace(0, len(flat) - 1, len(odd)).long()
    flat[places] = odd
    return weight
