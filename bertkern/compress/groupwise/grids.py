"""The grids of a matrix's groups while codes and grids are still sought."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bertkern.formats.groupwise import GroupwiseWeight, pack_codes


@dataclass(frozen=True, eq=False)
class Grids:
    """Of a matrix [N, K]: a scale, a zero point and bits for each group, as `GroupwiseWeight` has them.

    Attributes:
        scale, zero: fp32 [G] along axis "n", [N, G] or [1, G] along "k".
        bits: [G].
        symmetric: the zero point is the middle of the codes and stays there, the lowest code is not used.
        known_top: what `top` is, where that is known.
    """

    scale: Tensor
    zero: Tensor
    bits: Tensor
    shape: tuple[int, int]
    axis: str
    group_size: int
    symmetric: bool = False
    known_top: Tensor | None = None

    @property
    def lowest(self) -> int:
        """The lowest code in use."""
        return int(self.symmetric)

    @property
    def top(self) -> Tensor:
        """The highest code of each group: [G]."""
        return 2.0 ** self.bits.float() - 1 if self.known_top is None else self.known_top

    def spread(self, values: Tensor) -> Tensor:
        """Values of the shape of scale, or [G], as they belong to the elements: broadcastable to [N, K]."""
        side = self.shape[0] if self.axis == "n" else self.shape[1]
        wide = values.repeat_interleave(self.group_size, -1)[..., :side]
        return wide[:, None] if self.axis == "n" else wide

    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, zero and top of every element as views of shape [K, N]."""
        found = (self.spread(values).expand(self.shape).T for values in (self.scale, self.zero, self.top))
        scale, zero, top = found
        return scale, zero, top

    def nearest(self, weight: Tensor) -> Tensor:
        """The codes nearest to weight [N, K], as fp32."""
        return self._nearest(self._cut(weight), *self._beside_each()).reshape(self.shape)

    def values(self, codes: Tensor) -> Tensor:
        """What codes [N, K] stand for."""
        scale, zero = self._beside_each()
        return ((self._cut(codes) - zero) * scale).reshape(self.shape)

    def rounded(self, weight: Tensor) -> Tensor:
        """weight [N, K] at the nearest points of the grids."""
        scale, zero = self._beside_each()
        return self._nearest(self._cut(weight), scale, zero).sub_(zero).mul_(scale).reshape(self.shape)

    def _nearest(self, cut: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        codes = (cut / scale).add_(zero).round_().clamp_(min=self.lowest)
        return torch.minimum(codes, self._beside(self.top), out=codes)

    @property
    def _even(self) -> bool:
        """Whether all groups are whole, so that a matrix can be seen as groups without a copy of their grids."""
        return self.shape[0 if self.axis == "n" else 1] % self.group_size == 0

    def _cut(self, x: Tensor) -> Tensor:
        """x [N, K] as [G, size, K] or [N, G, size] where that goes."""
        if not self._even:
            return x
        return x.unflatten(0 if self.axis == "n" else 1, (-1, self.group_size))

    def _beside_each(self) -> tuple[Tensor, Tensor]:
        return self._beside(self.scale), self._beside(self.zero)

    def _beside(self, values: Tensor) -> Tensor:
        """Values of the shape of scale, or [G], broadcastable to what `_cut` makes."""
        if not self._even:
            return self.spread(values)
        return values.reshape(-1, 1, 1) if self.axis == "n" else values.unsqueeze(-1)

    def moved(self, scale: Tensor, zero: Tensor) -> Grids:
        """The same groups on other grids."""
        return replace(self, scale=scale, zero=zero)

    def pack(self, codes: Tensor) -> GroupwiseWeight:
        """The weight of these codes."""
        zero = None if self.symmetric else self.zero
        return pack_codes(codes.to(torch.uint8), self.scale, zero, self.bits, self.axis, self.group_size)
