"""Writes layers as Q-BERT's authors, GPTQ and compressed-tensors do: the same keys, dtypes and shapes.

Each layout is written by plain loops from its description; nothing of bertkern is imported.
"""

import torch
from torch import Tensor


def stream(codes: list[int], bits: int) -> list[int]:
    """Words of 32 bits that hold codes one after the other, the lowest bits first; signed, as int32 has them."""
    whole = 0
    for i, code in enumerate(codes):
        whole |= code << (i * bits)
    words = [(whole >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def loose(codes: list[int], bits: int) -> list[int]:
    """Words that hold whole codes only."""
    each = 32 // bits
    return [stream(codes[i : i + each], bits)[0] if len(codes[i : i + each]) else 0 for i in range(0, len(codes), each)]


def random_codes(n: int, k: int, bits: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**bits, (n, k), generator=torch.Generator().manual_seed(seed))


def random_scales(n: int, groups: int, seed: int = 0) -> Tensor:
    return torch.rand(n, groups, generator=torch.Generator().manual_seed(seed)).half() * 0.05 + 0.01


def gptq(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, index: list[int], less: int = 1) -> dict[str, Tensor]:
    """A GPTQ layer of codes [N, K], scale and zero [N, G], and the group of each column."""
    columns = [stream(row, bits) for row in codes.tolist()]
    zeros = [[(z - less) % 2**bits for z in column] for column in zero.T.int().tolist()]
    return {
        "qweight": torch.tensor(columns, dtype=torch.int32).T.contiguous(),
        "qzeros": torch.tensor([stream(row, bits) for row in zeros], dtype=torch.int32),
        "scales": scale.T.contiguous(),
        "g_idx": torch.tensor(index, dtype=torch.int32),
    }


def packed(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, index: list[int] | None = None, words=stream
) -> dict[str, Tensor]:
    """A pack-quantized layer of unsigned codes [N, K]; zero [N, G] in unsigned codes."""
    made = {
        "weight_packed": torch.tensor([words(row, bits) for row in codes.tolist()], dtype=torch.int32),
        "weight_shape": torch.tensor(codes.shape),
        "weight_scale": scale,
    }
    if zero is not None:
        columns = [words([int(z) for z in column], bits) for column in zero.T.tolist()]
        made["weight_zero_point"] = torch.tensor(columns, dtype=torch.int32).T.contiguous()
    if index is not None:
        made["weight_g_idx"] = torch.tensor(index, dtype=torch.int32)
    return made


def exact(codes: Tensor, scale: Tensor, zero: Tensor, index: list[int]) -> Tensor:
    """float64 [N, K]: (q - zero) * scale, element by element."""
    made = torch.zeros(codes.shape, dtype=torch.float64)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            group = index[j]
            made[i, j] = (int(codes[i, j]) - float(zero[i, group])) * float(scale[i, group])
    return made


def qbert_ranges(weight: Tensor, groups: int, momentum: float = 0.99, shrink: float = 0.98) -> tuple[Tensor, Tensor]:
    """x_min and x_max [K] after a step: the ends of `groups` runs of columns, averaged with older, smaller ones."""
    k = weight.shape[1]
    length = k // groups
    low, high = weight.amin(0), weight.amax(0)
    for group in range(groups):
        run = slice(group * length, (group + 1) * length)
        low[run], high[run] = low[run].min(), high[run].max()
    return momentum * low * shrink + (1 - momentum) * low, momentum * high * shrink + (1 - momentum) * high


def qbert_rounded(weight: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """float64 [N, K]: what the authors' code computes with, codes clamped, column by column."""
    made = torch.zeros(weight.shape, dtype=torch.float64)
    most = 2**bits - 1
    for j in range(weight.shape[1]):
        at = j if low.numel() > 1 else 0
        scale = most / torch.clamp(high[at] - low[at], min=1e-10)
        shift = torch.round(scale * low[at])
        codes = torch.clamp(torch.round(scale * weight[:, j] - shift), 0, most)
        made[:, j] = (codes.double() + shift.double()) / scale.double()
    return made
