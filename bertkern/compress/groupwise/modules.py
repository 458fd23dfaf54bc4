"""Layers that train and evaluate in floating point as if their weights had few bits and their inputs eight.

State, kept in fp32 whatever the dtype of the model: `_step`, the number of training steps seen; where ranges are not
made anew of every weight, `weight_low` and `weight_high`, of the shape of `GroupwiseWeight.scale`; of static
activations `input_low` and `input_high`, [1].
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertkern.config import GroupwiseConfig
from bertkern.formats.groupwise import GroupwiseWeight, expect_bits, grid, group_count
from bertkern.formats.rounding import METHODS, Grid, find_ranges

from ..adopting import Adopted
from .fake_quant import fake_static, fake_tokens, fake_weight
from .grids import Grids

# The search of method "mse" is too slow for every step; weights move little in so many.
REFRESH = 100


@dataclass(frozen=True)
class Settings:
    """How one layer is quantized.

    Attributes:
        config: of the model; bits, groups and activations of the layer are told here.
        bits: of all groups, or of each.
        axis, group_size: see `GroupwiseWeight`.
        activation: "dynamic", "static" or "float".
        start_step: training steps that run in floating point before.
        keeps_range: whether the weight's ranges are state, instead of made anew of every weight.
        weight_decay: d of range <- range - (1 - d) (range - the weight's own); 0 follows at once.
        input_decay: the same for the range of static activations.
    """

    config: GroupwiseConfig
    bits: int | tuple[int, ...]
    axis: str
    group_size: int
    activation: str = "dynamic"
    start_step: int = 0
    keeps_range: bool = False
    weight_decay: float = 0.0
    input_decay: float = 0.99

    @property
    def on(self) -> Grid:
        """Which grids there are."""
        return Grid(self.config.symmetric, self.config.whole_zero)


class _FakeQuant(Adopted):
    """What the two layers share."""

    settings: Settings
    weight_low: Tensor
    weight_high: Tensor
    STATE = ("_step", "weight_low", "weight_high", "input_low", "input_high")

    def grids(self) -> Grids:
        """The grids of the weight as evaluation has them."""
        bits = self._bits()
        kept = self.settings.keeps_range and bool(self._step > self.settings.start_step)
        return self._grids((self.weight_low, self.weight_high) if kept else self._live_range(bits), bits)

    def groupwise_weight(self) -> GroupwiseWeight:
        """The low-bit weight that the layer simulates."""
        grids = self.grids()
        return grids.pack(grids.nearest(self.weight.detach().float()))

    def _begin(self, settings: Settings) -> None:
        super()._begin(settings)
        if settings.keeps_range:
            n, groups = self.weight.shape[0], len(self._bits())
            rows = () if settings.axis == "n" else (1,) if settings.config.shared else (n,)
            for name in ("weight_low", "weight_high"):
                self.register_buffer(name, self._new_range(*rows, groups))

    def release(self) -> nn.Module:
        self.__dict__.pop("_known", None)
        return super().release()

    def _bits(self) -> Tensor:
        return self._constants()[0]

    def _constants(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each group its bits, 2^bits and the highest code; made once, for small layers wait for little else."""
        known, s = self.__dict__.get("_known"), self.settings
        if known is None or known[0].device != self.weight.device:
            groups = group_count(tuple(self.weight.shape), s.axis, s.group_size)
            with torch.inference_mode(False):  # tensors made in it are of no use to a later training step
                bits = expect_bits(type(self).__name__, s.bits, groups).to(self.weight.device)
                steps = 2.0 ** bits.float()
                known = self.__dict__["_known"] = (bits, steps, steps - 1)
        return known

    def _grids(self, ends: tuple[Tensor, Tensor], bits: Tensor) -> Grids:
        s, on = self.settings, self.settings.on
        shape, (_, steps, top) = tuple(self.weight.shape), self._constants()
        return Grids(*grid(*ends, bits, *on, steps), bits, shape, s.axis, s.group_size, on.symmetric, top)

    def _live_range(self, bits: Tensor) -> tuple[Tensor, Tensor]:
        s, c = self.settings, self.settings.config
        shared = c.shared and s.axis == "k"
        return find_ranges(METHODS[c.method], self.weight, bits, s.group_size, s.axis, s.on, shared)

    def _followed_grids(self) -> Grids:
        """The grids of a training step, after the ranges have taken in the weight."""
        s, bits = self.settings, self._bits()
        if not s.keeps_range:
            return self._grids(self._live_range(bits), bits)
        since = int(self._step) - s.start_step
        if s.config.method != "mse" or since % REFRESH == 0:
            decay = s.weight_decay if since else 0.0
            for kept, live in zip((self.weight_low, self.weight_high), self._live_range(bits), strict=True):
                kept.sub_((1 - decay) * (kept - live))
        # Copies: the buffers move on at the next step, what this step's graph was built with must not.
        return self._grids((self.weight_low.clone(), self.weight_high.clone()), bits)

    def extra_repr(self) -> str:
        s = self.settings
        bits = s.bits if isinstance(s.bits, int) else "/".join(map(str, sorted(set(s.bits))))
        return f"{super().extra_repr()}, bits={bits}, axis={s.axis}, group_size={s.group_size}"


class FakeQuantGroupwiseLinear(_FakeQuant, nn.Linear):
    """A linear layer that computes with the low-bit weight and the int8 inputs which `GroupwiseLinear` would have.

    Gradients pass straight through the rounding. In training, static ranges follow the batches: the first one's ends,
    then range <- range - (1 - input_decay) (range - ends); before the first quantized step such a layer has no range
    yet and is a plain one, also in evaluation. A batch with Inf or NaN leaves the ranges as they are.

    Made by `prepare_qat`.
    """

    plain = nn.Linear

    def _begin(self, settings: Settings) -> None:
        super()._begin(settings)
        if settings.activation == "static":
            for name in ("input_low", "input_high"):
                self.register_buffer(name, self._new_range())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] to [..., out_features] in x's dtype."""
        if not self.training:
            return self._quantized(x, self.grids()) if self.has_range() else super().forward(x)
        if self._warming_up():
            y = super().forward(x)
        else:
            if self.settings.activation == "static":
                self._follow_input(x)
            y = self._quantized(x, self._followed_grids())
        self._step += 1
        return y

    def has_range(self) -> bool:
        """Whether the range of static activations is known; True of others."""
        return self.settings.activation != "static" or bool(self.input_low < self.input_high)

    def input_range(self) -> tuple[float, float]:
        """(low, high) of static activations."""
        return float(self.input_low), float(self.input_high)

    def _quantized(self, x: Tensor, grids: Grids) -> Tensor:
        s = self.settings
        if s.activation == "dynamic" and x.numel():
            x = fake_tokens(x)
        elif s.activation == "static" and self.has_range():
            x = fake_static(x, *self.input_range(), s.config.activation_unsigned)
        return F.linear(x, fake_weight(self.weight, grids), self.bias)

    def _follow_input(self, x: Tensor) -> None:
        if not x.numel():
            return
        low, high = (end.float() for end in torch.aminmax(x.detach()))
        ends = low.clamp(max=0), high.clamp(min=0)
        if not bool(torch.isfinite(ends[0]) & torch.isfinite(ends[1])):
            return
        decay = self.settings.input_decay if self.has_range() else 0.0
        for kept, live in zip((self.input_low, self.input_high), ends, strict=True):
            kept.sub_((1 - decay) * (kept - live))


class FakeQuantGroupwiseEmbedding(_FakeQuant, nn.Embedding):
    """An embedding table whose rows are read as `GroupwiseEmbedding` would hold them, each a group.

    Made by `prepare_qat`.
    """

    plain = nn.Embedding

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] int64 to rows [..., embedding_dim] in the table's dtype."""
        rows = super().forward(ids)
        warming_up = self.training and self._warming_up()
        if self.training:
            self._step += 1
        if warming_up or not rows.numel():
            return rows
        # Rounding and gathering commute, so only the rows that are read are rounded.
        s, c = self.settings, self.settings.config
        flat = rows.reshape(-1, rows.shape[-1])
        bits = torch.full((len(flat),), s.bits, dtype=torch.uint8, device=flat.device)
        if c.method == "minmax":
            scale, zero = self._rows_grid(flat, bits)
        else:
            # A search or an order takes longer than to find rows that are read more than once, as nearly all are.
            read, place = ids.reshape(-1).unique(return_inverse=True)
            scale, zero = (part[place] for part in self._rows_grid(self.weight.detach()[read], bits[: len(read)]))
        return fake_weight(flat, Grids(scale, zero, bits, tuple(flat.shape), "n", 1, c.symmetric)).view(rows.shape)

    def _rows_grid(self, rows: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        s = self.settings
        return grid(*find_ranges(METHODS[s.config.method], rows.detach(), bits, 1, "n", s.on, False), bits, *s.on)
