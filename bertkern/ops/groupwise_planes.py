"""Group-wise weights laid out for the GPU's kernels: planes of bits over strips of columns, and back.

The layout is described at the head of kernels/groupwise.py; the CUDA library's kernel (csrc/cuda/groupwise) reads the
same. It is made in plain PyTorch, on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..formats.groupwise import GroupwiseWeight, group_count, pack_codes

STRIP, PAD = 32, 128
WIDTHS = (8, 4, 2, 1)


@dataclass(frozen=True, eq=False)
class GroupwisePlanes:
    """A `GroupwiseWeight` [N, K] as the kernels read it.

    Attributes:
        codes: uint8, the planes of each part.
        members: int32, the features (axis "n") or groups (axis "k") of each part; empty where one part has all.
        bits: of each part.
        scale: fp32 [G, N]; along "n" [1, N], of each feature.
        shift: fp32 of the shape of scale: scale * (zero - 2^(bits - 1)). None where all are 0.
        column_sum: fp32 [N]: sums over K of scale * (code - 2^(bits - 1)).
        canonical: the weight itself, whose codes are empty: they are in the planes alone.

    Example:
        >>> planes = pack_for_triton(quantize_groupwise(torch.randn(5, 70), 4))
        >>> planes.codes[0].shape, planes.scale.shape
        (torch.Size([8192]), torch.Size([1, 5]))
    """

    codes: list[Tensor]
    members: list[Tensor]
    bits: list[int]
    scale: Tensor
    shift: Tensor | None
    column_sum: Tensor
    canonical: GroupwiseWeight

    @property
    def group(self) -> int:
        """Columns of a group; 0 where groups run along N."""
        return self.canonical.group_size if self.canonical.axis == "k" else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that the kernels read."""
        return sum(
            x.nbytes for x in (*self.codes, *self.members, self.scale, self.shift, self.column_sum) if x is not None
        )


def widths_of(bits: int) -> list[tuple[int, int]]:
    """The planes of codes of so many bits: (width, lowest bit), widest first."""
    found, low = [], 0
    for width in WIDTHS:
        if bits - low >= width:
            found.append((width, low))
            low += width
    return found


def strip_count(k: int, group: int, held: int) -> int:
    """Strips of a part of `held` groups of `group` columns, or of k columns (group 0): a multiple of 4."""
    wide = held * -(-group // STRIP) if group else -(-k // STRIP)
    return -(-wide // 4) * 4


def part_bytes(features: int, strips: int, bits: int) -> int:
    """Bytes of the planes of a part."""
    tiles = sum(-(-strips * width // 8) for width, _ in widths_of(bits))
    return tiles * -(-features // PAD) * PAD * STRIP


def _strips(codes: Tensor, group: int, strips: int) -> Tensor:
    """codes [P, K] of one part as [P, strips, 32]; group: columns of each group that there is, or 0."""
    rows, k = codes.shape
    if group:
        held = -(-k // group)
        each = -(-group // STRIP) * STRIP
        wide = codes.new_zeros(rows, held * group)
        wide[:, :k] = codes
        codes = torch.nn.functional.pad(wide.view(rows, held, group), (0, each - group)).view(rows, held * each)
    return torch.nn.functional.pad(codes, (0, strips * STRIP - codes.shape[1])).view(rows, strips, STRIP)


def _columns(strips: Tensor, group: int, k: int) -> Tensor:
    """The inverse of `_strips`."""
    rows = strips.shape[0]
    if not group:
        return strips.reshape(rows, -1)[:, :k]
    each = -(-group // STRIP) * STRIP
    held = -(-k // group)
    return strips.reshape(rows, -1)[:, : held * each].view(rows, held, each)[..., :group].reshape(rows, -1)[:, :k]


def _to_planes(strips: Tensor, bits: int) -> Tensor:
    """uint8 [P, S, 32] as the planes, one after the other."""
    rows, count, _ = strips.shape
    strips = torch.nn.functional.pad(strips, (0, 0, 0, 0, 0, -rows % PAD))
    made = []
    for width, low in widths_of(bits):
        share = 8 // width
        part = torch.nn.functional.pad(strips >> low & 2**width - 1, (0, 0, 0, -count % share))
        place = torch.arange(0, 8, width, dtype=torch.uint8, device=strips.device)[:, None]
        plane = (part.unflatten(1, (-1, share)) << place).sum(2, dtype=torch.uint8)
        made.append(plane.transpose(0, 1).reshape(-1))
    return torch.cat(made)


def _from_planes(planes: Tensor, bits: int, rows: int, count: int) -> Tensor:
    """The inverse of `_to_planes`."""
    wide = -(-rows // PAD) * PAD
    found, at = torch.zeros(rows, count, STRIP, dtype=torch.uint8, device=planes.device), 0
    for width, low in widths_of(bits):
        tiles = -(-count * width // 8)
        plane = planes[at : at + tiles * wide * STRIP].view(tiles, wide, 1, STRIP)[:, :rows].transpose(0, 1)
        at += tiles * wide * STRIP
        place = torch.arange(0, 8, width, dtype=torch.uint8, device=planes.device)[:, None]
        found |= (plane >> place & 2**width - 1).reshape(rows, -1, STRIP)[:, :count] << low
    return found


def _picked(codes: Tensor, members: Tensor | None, axis: str, size: int) -> Tensor:
    """The codes of one part, whose groups along K stand side by side and are whole, but for the last of the matrix."""
    if members is None:
        return codes
    if axis == "n":
        return codes[members.long()]
    groups = group_count(codes.shape, axis, size)
    wide = torch.nn.functional.pad(codes, (0, groups * size - codes.shape[1]))
    return wide.view(-1, groups, size)[:, members.long()].flatten(1)


def pack_for_triton(weight: GroupwiseWeight) -> GroupwisePlanes:
    """`weight` laid out for the kernels of kernels/groupwise.py, on its device.

    Raises:
        ValueError: `GroupwiseWeight.check` finds something wrong.

    Example:
        >>> weight = quantize_groupwise(torch.randn(6, 40), bits=3, group_size=16, axis="k")
        >>> torch.equal(unpack_from_triton(pack_for_triton(weight)).codes, weight.codes)
        True
    """
    weight.check()
    (n, k), axis, size = weight.shape, weight.axis, weight.group_size
    along_k = axis == "k"
    codes, device = weight.unpacked(), weight.codes.device
    of_member = weight.bits if along_k else weight.bits.repeat_interleave(size)[:n]
    # What is empty has a part too.
    bits = sorted(set(of_member.tolist())) or [8]
    planes, members = [], []
    for width in bits:
        held = torch.nonzero(of_member == width)[:, 0].to(torch.int32) if len(bits) > 1 else None
        picked = _picked(codes, held, axis, size)
        count = of_member.numel() if held is None else held.numel()
        group = size if along_k else 0
        planes.append(_to_planes(_strips(picked, group, strip_count(k, group, count)), width))
        if held is not None:
            members.append(held)
    middle = 2.0 ** (weight.bits.float() - 1)
    scale = weight.scale.expand(n, -1).T if along_k else weight.spread(weight.scale)[:, 0][None]
    shift = weight.scale * (weight.zeros() - middle)
    some = bool((shift != 0).any())
    shift = shift.expand(n, -1).T if along_k else weight.spread(shift)[:, 0][None]
    centred = codes.double() - weight.spread(middle.double())
    column_sum = (centred * weight.spread(weight.scale.double())).sum(1).float()
    return GroupwisePlanes(
        planes,
        members,
        bits,
        scale.contiguous(),
        shift.contiguous() if some else None,
        column_sum,
        replace(weight, codes=torch.empty(0, dtype=torch.uint8, device=device)),
    )


def plane_codes(
    codes: Sequence[Tensor], members: Sequence[Tensor], bits: Sequence[int], shape: tuple[int, int], group: int
) -> Tensor:
    """The codes that the planes hold, one a byte: uint8 [N, K]."""
    n, k = shape
    groups = -(-k // group) if group else 0
    found = torch.zeros(n, groups * group or k, dtype=torch.uint8, device=codes[0].device)
    for number, (planes, width) in enumerate(zip(codes, bits, strict=True)):
        held = members[number].long() if members else None
        count = (groups if group else n) if held is None else held.numel()
        rows, columns = (n, count * group) if group else (count, k)
        strips = _from_planes(planes, width, rows, strip_count(k, group, count))
        part = _columns(strips, group, columns)
        if held is None:
            found[:, :columns] = part
        elif group:
            found.view(n, groups, group)[:, held] = part.view(n, count, group)
        else:
            found[held] = part
    return found[:, :k]


def unpack_from_triton(planes: GroupwisePlanes) -> GroupwiseWeight:
    """The weight that `pack_for_triton` was given, bit for bit."""
    like = planes.canonical
    codes = plane_codes(planes.codes, planes.members, planes.bits, like.shape, planes.group)
    return pack_codes(codes, like.scale, like.zero, like.bits, like.axis, like.group_size)
