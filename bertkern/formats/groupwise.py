"""Group-wise low-bit weights: w = (q - zero) * scale, codes q of 2 to 8 bits, a scale and a zero point a group.

Groups are runs of output features (axis "n": the paper of Q-BERT), or runs of input features (axis "k": its authors'
code, and GPTQ-like formats), and each group has bits of its own. Zero points are real numbers, so that a grid may lie
anywhere; whole ones give grids that hold 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .canonical import LARGEST

BITS = (2, 3, 4, 5, 6, 7, 8)
AXES = ("n", "k")
# Weights that are packed or unpacked at a time: some megabytes of temporaries, whatever the shape.
BLOCK = 2**20


@dataclass(frozen=True, eq=False, repr=False)
class GroupwiseWeight:
    """A matrix [N, K] of codes in groups of `group_size` neighbours along an axis; the last group may be shorter.

    Attributes:
        codes: uint8 [bytes]. Row n is a little-endian bit stream: its K codes one after the other, each as many bits
            as its group has, the first code in the lowest bits of the first byte. Rows begin at whole bytes and follow
            each other without a gap. (At 4 bits: byte i of a row is code 2i + 16 * code 2i+1.)
        scale: fp32, above 0: [G] along axis "n"; along "k" [N, G], or [1, G] where all rows share the groups' scales.
        zero: fp32 of the shape of scale; None: 2^(bits - 1), the middle of the codes, as symmetric weights have it.
        bits: uint8 [G], each from 2 to 8.
        shape: (N, K).
        axis: "n" or "k".
        group_size: neighbours in a group; G = ceil(N or K / group_size).

    Example:
        >>> weight = quantize_groupwise(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), 2)
        >>> weight.codes, weight.dequantize()
        (tensor([228], dtype=torch.uint8), tensor([[0., 1., 2., 3.]]))

    Source: arXiv 1909.05840, section 3.3.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: Tensor
    shape: tuple[int, int]
    axis: str = "n"
    group_size: int = 1

    TENSORS: ClassVar[tuple[str, ...]] = ("codes", "scale", "zero", "bits")

    def __post_init__(self) -> None:
        if isinstance(self.shape, (tuple, list)):
            object.__setattr__(self, "shape", tuple(self.shape))

    # --------------------------------------------------------------------------------------------- what it stands for
    @property
    def groups(self) -> int:
        """G."""
        return group_count(self.shape, self.axis, self.group_size)

    def unpacked(self) -> Tensor:
        """The codes, one a byte: uint8 [N, K]."""
        n, k = self.shape
        out = np.zeros((n, k), np.uint8)
        stream = self.codes.detach().cpu().numpy()
        at = 0
        for rows, bits in _runs(self):
            width = int(bits.sum() + 7) // 8
            kept = np.arange(8) < bits[:, None]
            for first in range(rows.start, rows.stop, max(1, BLOCK // max(1, k))):
                block = slice(first, min(rows.stop, first + max(1, BLOCK // max(1, k))))
                count = block.stop - block.start
                part = stream[at : at + count * width].reshape(count, width)
                at += count * width
                wide = np.zeros((count, k, 8), np.uint8)
                wide[:, kept] = np.unpackbits(part, axis=1, bitorder="little")[:, : int(bits.sum())]
                out[block] = np.packbits(wide, axis=2, bitorder="little")[:, :, 0]
        return torch.from_numpy(out).to(self.codes.device)

    def zeros(self) -> Tensor:
        """The zero points, of the shape of scale, whether stored or not."""
        if self.zero is not None:
            return self.zero
        return (2.0 ** (self.bits.float() - 1)).expand(self.scale.shape)

    def spread(self, values: Tensor) -> Tensor:
        """Values of the shape of scale, or [G], as they belong to the elements: broadcastable to [N, K]."""
        side = self.shape[0] if self.axis == "n" else self.shape[1]
        wide = values.repeat_interleave(self.group_size, -1)[..., :side]
        return wide[:, None] if self.axis == "n" else wide

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(q - zero) * scale, [N, K], computed in fp32 (float64 where that is the dtype)."""
        wide = torch.promote_types(dtype, torch.float32)
        codes = self.unpacked().to(wide)
        return ((codes - self.spread(self.zeros().to(wide))) * self.spread(self.scale.to(wide))).to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def average_bits(self) -> float:
        """Of the codes alone; 0 of an empty matrix."""
        per_element = self.spread(self.bits.float()).expand(self.shape)
        return float(per_element.mean()) if per_element.numel() else 0.0

    # ------------------------------------------------------------------------------------------------------- files
    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors by name, for a file; `shape`, `axis` and `group_size` go beside them."""
        found = {name: getattr(self, name) for name in self.TENSORS}
        return {prefix + name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        shape: Sequence[int],
        axis: str,
        group_size: int,
        prefix: str = "",
    ) -> GroupwiseWeight:
        """The weight of the tensors `<prefix><name>` in a file, checked; `zero` may be missing.

        Raises:
            ValueError: a tensor is missing, or `check` finds something wrong.
        """
        for name in cls.TENSORS:
            if name != "zero" and prefix + name not in tensors:
                raise ValueError(f"GroupwiseWeight: expected a tensor {prefix}{name}. Got {sorted(tensors)}.")
        found = {name: tensors.get(prefix + name) for name in cls.TENSORS}
        return cls(**found, shape=shape, axis=axis, group_size=group_size).check()

    def check(self) -> GroupwiseWeight:
        """This weight, if its tensors are what they must be; on the meta device their dtypes and shapes count, of codes
        no more than that they are bytes.

        Raises:
            ValueError: the text names the first thing that is wrong, and what was expected.
        """
        n, k = _expect_shape("GroupwiseWeight", self.shape)
        _expect_grouping("GroupwiseWeight", self.axis, self.group_size)
        groups, known = self.groups, self.bits.device.type != "meta"
        if self.bits.dtype != torch.uint8 or list(self.bits.shape) != [groups]:
            raise ValueError(
                f"GroupwiseWeight: expected bits uint8 of shape [G] = [{groups}]. "
                f"Got {self.bits.dtype} of shape {list(self.bits.shape)}."
            )
        if known and groups and not bool(((self.bits >= 2) & (self.bits <= 8)).all()):
            raise ValueError(f"GroupwiseWeight: expected bits from 2 to 8. Got {sorted(set(self.bits.tolist()))}.")
        allowed = [[groups]] if self.axis == "n" else [[n, groups], [1, groups]]
        for name in ("scale", "zero"):
            tensor = getattr(self, name)
            if tensor is None and name == "zero":
                continue
            if tensor.dtype != torch.float32 or list(tensor.shape) not in allowed:
                raise ValueError(
                    f"GroupwiseWeight: expected {name} float32 of shape {' or '.join(map(str, allowed))}. "
                    f"Got {tensor.dtype} of shape {list(tensor.shape)}."
                )
            if known and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"GroupwiseWeight: expected a finite {name}. Got NaN or Inf.")
        if self.zero is not None and self.zero.shape != self.scale.shape:
            raise ValueError(
                f"GroupwiseWeight: expected zero of the shape of scale, {list(self.scale.shape)}. "
                f"Got {list(self.zero.shape)}."
            )
        if known and not bool((self.scale > 0).all()):
            raise ValueError("GroupwiseWeight: expected scales above 0. Got others.")
        size = self.codes.numel()
        if known:
            size = sum((rows.stop - rows.start) * (int(bits.sum() + 7) // 8) for rows, bits in _runs(self))
        if self.codes.dtype != torch.uint8 or list(self.codes.shape) != [size]:
            raise ValueError(
                f"GroupwiseWeight: expected codes uint8 of shape [{size}], as bits say for {[n, k]}. "
                f"Got {self.codes.dtype} of shape {list(self.codes.shape)}."
            )
        return self

    def to(self, device: torch.device | str) -> GroupwiseWeight:
        """All tensors on a device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def __repr__(self) -> str:
        bits = sorted(set(self.bits.tolist()))
        return (
            f"GroupwiseWeight({self.shape}, {'/'.join(map(str, bits))} bits, "
            f"{self.groups} groups of {self.group_size} along {self.axis})"
        )


def pack_codes(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: Tensor | Sequence[int] | int,
    axis: str = "n",
    group_size: int = 1,
) -> GroupwiseWeight:
    """The weight of codes that lie one a byte.

    Args:
        codes: integers [N, K], each in [0, 2^bits) of its group.
        scale, zero: see `GroupwiseWeight`.
        bits: of each group, or of all.

    Raises:
        ValueError: a shape or a value that does not fit.
    """
    if codes.dim() != 2:
        raise ValueError(f"pack_codes: expected codes of shape [N, K]. Got {list(codes.shape)}.")
    if codes.is_floating_point() and not bool((codes == codes.round()).all()):
        raise ValueError("pack_codes: expected whole codes. Got fractions.")
    n, k = _expect_shape("pack_codes", tuple(codes.shape))
    _expect_grouping("pack_codes", axis, group_size)
    groups = group_count((n, k), axis, group_size)
    wide = expect_bits("pack_codes", bits, groups)
    made = GroupwiseWeight(
        torch.empty(0, dtype=torch.uint8),
        scale.detach().float().contiguous(),
        None if zero is None else zero.detach().float().contiguous(),
        wide.to(codes.device),
        (n, k),
        axis,
        group_size,
    )
    top = made.spread(2 ** wide.to(codes.device).long())
    if codes.numel() and not bool(((codes >= 0) & (codes < top)).all()):
        raise ValueError("pack_codes: expected codes in [0, 2^bits). Got others.")
    plain = codes.detach().to(torch.uint8).cpu().numpy()
    stream = []
    for rows, row_bits in _runs(made):
        for first in range(rows.start, rows.stop, max(1, BLOCK // max(1, k))):
            part = plain[first : min(rows.stop, first + max(1, BLOCK // max(1, k)))]
            stream.append(_stream(part, row_bits).reshape(-1))
    packed = np.concatenate(stream) if stream else np.zeros(0, np.uint8)
    return replace(made, codes=torch.from_numpy(packed).to(codes.device)).check()


def _stream(codes: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """The bytes of rows of codes, uint8 [R, K], of `bits` [K] each."""
    width = int(bits[0]) if len(bits) else 8
    if 8 % width == 0 and bool((bits == width).all()):
        # Whole codes in every byte, as nearly always.
        each = 8 // width
        codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each)))
        made = codes[:, ::each].copy()
        for i in range(1, each):
            made |= codes[:, i::each] << (width * i)
        return made
    kept = np.arange(8) < bits[:, None]
    flat = np.unpackbits(codes[:, :, None], axis=2, bitorder="little")[:, kept]
    return np.packbits(flat, axis=1, bitorder="little")


def group_ranges(weight: Tensor, axis: str = "n", group_size: int = 1, shared: bool = False) -> tuple[Tensor, Tensor]:
    """The smallest and the largest weight of each group, of the shape of `GroupwiseWeight.scale`.

    Args:
        weight: [N, K].
        shared: along "k": one range a group for all rows, [1, G].
    """
    n, k = _expect_shape("group_ranges", tuple(weight.shape))
    _expect_grouping("group_ranges", axis, group_size)
    groups = group_count((n, k), axis, group_size)
    w = weight.detach().float()
    w = w if axis == "n" else w.T
    short = groups * group_size - w.shape[0]
    # A group that is short repeats the last row, which changes no range.
    w = torch.cat([w, w[-1:].expand(short, -1)]) if short else w
    w = w.reshape(groups, group_size, -1)
    if axis == "n":
        return w.amin((1, 2)), w.amax((1, 2))
    low, high = w.amin(1).T, w.amax(1).T
    return (low.amin(0, keepdim=True), high.amax(0, keepdim=True)) if shared else (low, high)


def grid(
    low: Tensor,
    high: Tensor,
    bits: Tensor | int,
    symmetric: bool = False,
    whole_zero: bool = False,
    steps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(scale, zero) of the grid of 2^bits points that reaches from `low` to `high`.

    Args:
        low, high: of each group, of the shape of scale.
        bits: of each group [G], or of all.
        symmetric: points (q - 2^(bits - 1)) * scale with scale = max(-low, high) / (2^(bits - 1) - 1); the lowest code
            is not used then.
        whole_zero: the zero point is rounded, and the range reaches to 0, so that 0 is a point.
        steps: 2^bits as fp32, where it is known.
    """
    if steps is None:
        steps = 2.0 ** torch.as_tensor(bits, dtype=torch.float32, device=low.device)
    if symmetric:
        scale = torch.maximum(-low, high) / (steps / 2 - 1)
        return _above_zero(scale), (steps / 2).expand(low.shape).clone()
    if whole_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _above_zero((high - low) / (steps - 1), torch.maximum(low.abs(), high.abs()))
    zero = -low / scale
    return scale, zero.round() if whole_zero else zero


def round_to_grid(
    weight: Tensor, scale: Tensor, zero: Tensor, bits: Tensor | int, axis: str = "n", group_size: int = 1
) -> Tensor:
    """The nearest codes, uint8 [N, K], of weight [N, K] on the grids of its groups: clamp(round(w / scale + zero))."""
    side = weight.shape[0] if axis == "n" else weight.shape[1]

    def spread(values: Tensor) -> Tensor:
        wide = values.repeat_interleave(group_size, -1)[..., :side]
        return wide[:, None] if axis == "n" else wide

    groups = group_count(tuple(weight.shape), axis, group_size)
    top = spread(2.0 ** expect_bits("round_to_grid", bits, groups).float().to(weight.device) - 1)
    codes = torch.round(weight.detach().float() / spread(scale) + spread(zero))
    return torch.minimum(codes.clamp_(min=0), top).to(torch.uint8)


def quantize_groupwise(
    weight: Tensor,
    bits: Tensor | Sequence[int] | int = 4,
    group_size: int | None = None,
    axis: str = "n",
    *,
    symmetric: bool = False,
    shared: bool = False,
    whole_zero: bool = False,
    ranges: tuple[Tensor, Tensor] | None = None,
) -> GroupwiseWeight:
    """Rounds weight [N, K] to the nearest points between the smallest and the largest weight of each group.

    Args:
        bits: of all groups, or of each.
        group_size: rows (axis "n") or columns ("k") in a group; None: one group.
        symmetric, whole_zero: see `grid`.
        shared: along "k": all rows share the groups' ranges, as in the authors' code.
        ranges: (low, high) of each group, of the shape of scale, instead; what lies outside becomes the nearest end.

    Raises:
        ValueError: a weight that is no matrix or not finite, or bits or a group size that do not fit.

    Source: arXiv 1909.05840, eq. 5 and section 3.3.
    """
    if weight.dim() != 2:
        raise ValueError(f"quantize_groupwise: expected weight of shape [N, K]. Got {list(weight.shape)}.")
    side = weight.shape[0] if axis == "n" else weight.shape[1]
    group_size = max(1, side) if group_size is None else group_size
    _expect_grouping("quantize_groupwise", axis, group_size)
    if weight.numel() == 0:
        raise ValueError(f"quantize_groupwise: expected a weight with elements. Got {list(weight.shape)}.")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("quantize_groupwise: expected finite weights. Got NaN or Inf.")
    wide = expect_bits("quantize_groupwise", bits, group_count(tuple(weight.shape), axis, group_size)).to(weight.device)
    low, high = group_ranges(weight, axis, group_size, shared) if ranges is None else ranges
    scale, zero = grid(low, high, wide, symmetric, whole_zero)
    codes = round_to_grid(weight, scale, zero, wide, axis, group_size)
    if symmetric:
        codes.clamp_(min=1)
    return pack_codes(codes, scale, None if symmetric else zero, wide, axis, group_size)


def table_rows(weight: GroupwiseWeight) -> Tensor:
    """An embedding table whose rows hold all that they need: uint8 [R, 8 + bytes of H codes].

    Bytes 0 to 3 are the row's scale, 4 to 7 its zero point, both fp32; the row's codes follow as in `GroupwiseWeight`.

    Raises:
        ValueError: groups along K, rows of different bits, or rows of fewer than 8 codes.
    """
    rows, width = weight.shape
    bits = sorted(set(weight.bits.tolist()))
    if weight.axis != "n" or len(bits) != 1 or width < 8:
        raise ValueError(
            "table_rows: expected groups of rows, of equal bits, and at least 8 columns. "
            f"Got groups along {weight.axis} of {bits} bits and {width} columns."
        )
    spread = (weight.spread(values).reshape(-1, 1).contiguous() for values in (weight.scale, weight.zeros()))
    parts = [*(values.view(torch.uint8) for values in spread), weight.codes.view(rows, -1)]
    return torch.cat(parts, 1)


def read_rows(rows: Tensor, width: int) -> Tensor:
    """The values fp32 [..., width] of rows of `table_rows`, uint8 [..., 8 + bytes]: (q - zero) * scale."""
    numbers = rows[..., :8].contiguous().view(torch.float32)
    bits = next(b for b in BITS if -(-width * b // 8) == rows.shape[-1] - 8)
    codes = rows[..., 8:]
    if bits != 8:
        one = torch.arange(8, dtype=torch.uint8, device=rows.device)
        flat = (codes[..., None] >> one & 1).flatten(-2)[..., : width * bits]
        codes = (flat.unflatten(-1, (width, bits)) << one[:bits]).sum(-1, dtype=torch.uint8)
    return (codes.float() - numbers[..., 1:]) * numbers[..., :1]


def group_count(shape: Sequence[int], axis: str, group_size: int) -> int:
    """Groups of a matrix [N, K]."""
    side = shape[0] if axis == "n" else shape[1]
    return -(-side // group_size)


def group_size_of(side: int, groups: int) -> int:
    """The size at which `side` neighbours make `groups` groups, the last of which may be shorter.

    Raises:
        ValueError: no size gives so many.
    """
    size = -(-side // groups) if 1 <= groups <= side else 0
    if not size or -(-side // size) != groups:
        raise ValueError(f"group_size_of: expected a number of groups that {side} can be cut into. Got {groups}.")
    return size


def expect_bits(caller: str, bits: Any, groups: int) -> Tensor:
    """Bits of each group, uint8 [G], of a number or of one a group."""
    found = torch.as_tensor(bits)
    if found.is_floating_point() or found.dtype == torch.bool or found.dim() > 1:
        raise ValueError(f"{caller}: expected bits to be a whole number from 2 to 8, or one a group. Got {bits!r}.")
    if found.dim() == 1 and found.numel() != groups:
        raise ValueError(f"{caller}: expected bits of {groups} groups. Got {found.numel()}.")
    if found.numel() and not bool(((found >= 2) & (found <= 8)).all()):
        raise ValueError(f"{caller}: expected bits from 2 to 8. Got {sorted(set(found.reshape(-1).tolist()))}.")
    return found.to(torch.uint8).expand(groups).contiguous()


def _above_zero(scale: Tensor, size: Tensor | None = None) -> Tensor:
    # A group of one value, or a range too small to count in steps of: the scale is the value's own size, or 1.
    tiny = torch.finfo(torch.float32).tiny
    other = torch.ones_like(scale) if size is None else torch.where(size < tiny, torch.ones_like(scale), size)
    floor = tiny if size is None else (size * 2**-20).clamp(min=tiny)
    return torch.where(scale < floor, other, scale)


def _runs(weight: GroupwiseWeight) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows that have the same number of bits at every column, and those bits [K]."""
    n, k = weight.shape
    bits = weight.bits.cpu().numpy().astype(np.int64)
    if weight.axis == "k":
        if n:
            yield slice(0, n), np.repeat(bits, weight.group_size)[:k]
        return
    # Neighbouring groups of as many bits are one: a table may have a group for each of its rows.
    ends = [*np.flatnonzero(np.diff(bits, prepend=0)), len(bits)]
    for start, stop in pairwise(ends):
        yield slice(int(start) * weight.group_size, min(n, int(stop) * weight.group_size)), np.full(k, bits[start])


def _expect_shape(caller: str, shape: Any) -> tuple[int, int]:
    fits = isinstance(shape, tuple) and len(shape) == 2 and all(type(side) is int for side in shape)
    if not fits or not all(0 <= side <= LARGEST for side in shape):
        raise ValueError(f"{caller}: expected shape to be two sizes (N, K). Got {shape!r}.")
    return shape


def _expect_grouping(caller: str, axis: str, group_size: int) -> None:
    if axis not in AXES:
        raise ValueError(f'{caller}: expected axis "n" or "k". Got {axis!r}.')
    if type(group_size) is not int or not 1 <= group_size <= LARGEST:
        raise ValueError(f"{caller}: expected a group_size of at least 1. Got {group_size!r}.")
