"""Layers that train and evaluate in floating point as if they ran on integers.

State is named as in NLP Architect, so that its training checkpoints load as they are: `_step`, the number of training
steps seen, and `input_thresh`, `output_thresh`, the ranges max|x| (not scales), each of shape [1] and kept in fp32
whatever the dtype of the model.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adopting import Adopted
from .config import PAPER_SETTINGS, OpSettings
from .fake_quant import fake_quantize, max_abs, quantize, rounded_bias, scale_of, step_of


class _FakeQuant(Adopted):
    """What the two layers share: settings, the step counter, and the codes of their weight."""

    settings: OpSettings
    STATE = ("_step", "input_thresh", "output_thresh")

    def weight_scale(self) -> Tensor:
        """The multiplier of the weight, fp32 scalar: M / max|weight|."""
        return scale_of(max_abs(self.weight), self.settings.weight_bits)

    def weight_step(self) -> Tensor:
        """The step between two codes of the weight, fp32 scalar, as the int8 layers store it."""
        return 1 / self.weight_scale()

    def weight_codes(self) -> Tensor:
        """The weight's codes as floating-point numbers, fp32 at least, in the shape of the weight."""
        return quantize(self.weight.detach(), self.weight_scale(), self.settings.weight_bits)

    def fake_quantized_weight(self) -> Tensor:
        """The weight on its grid of codes, with straight-through gradient."""
        return fake_quantize(self.weight, self.weight_scale(), self.settings.weight_bits)

    def extra_repr(self) -> str:
        s = self.settings
        return f"{super().extra_repr()}, mode={s.mode}, weight_bits={s.weight_bits}"


class FakeQuantLinear(_FakeQuant, nn.Linear):
    """A linear layer that simulates int8 inputs, weights and (optionally) outputs, as Q8BERT trains it.

    In training the input, the weight and the output are rounded to their codes, gradients pass straight through, and
    in mode "ema" the ranges follow the data: at step `start_step` they are the batch's max|x|, after that
    range <- range - (1 - ema_decay) (range - max|x|). A batch with Inf or NaN leaves the ranges as they are.
    In evaluation the integer product itself is simulated, with a bias of 32 bits; gradients are not to be taken there.
    Before the first quantized step a layer of mode "ema" has no range yet and is a plain one, also in evaluation.

    Mode "dynamic" takes the range of the whole live tensor, so a result depends on its batch; the int8 kernels take a
    range per token instead, which is never coarser.

    Under gradient checkpointing a layer runs twice a step: `_step` counts runs, as in NLP Architect.

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear.
        settings: how to quantize.

    >>> layer = FakeQuantLinear(8, 4, settings=OpSettings(start_step=10))
    >>> layer(torch.randn(3, 8)).shape
    torch.Size([3, 4])

    Source: Zafrir et al. 2019, Q8BERT, arXiv 1910.06188.
    """

    plain = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        settings: OpSettings = PAPER_SETTINGS,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._begin(settings)

    @classmethod
    def from_linear(cls, linear: nn.Linear, settings: OpSettings = PAPER_SETTINGS) -> "FakeQuantLinear":
        """A new layer that shares the parameters of `linear`."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, "meta", settings=settings)
        layer.weight, layer.bias = linear.weight, linear.bias
        for name in layer._ranges():
            layer._buffers[name] = layer._new_range()
        return layer.train(linear.training)

    def _begin(self, settings: OpSettings) -> None:
        super()._begin(settings)
        self.register_buffer("input_thresh", self._new_range())
        if settings.requantize_output:
            self.register_buffer("output_thresh", self._new_range())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] to [..., out_features] in x's dtype."""
        if self.settings.mode == "none":
            return super().forward(x)
        if self.training:
            y = super().forward(x) if self._warming_up() else self._train_quantized(x)
            self._step += 1
            return y
        return self._simulate(x) if self.has_ranges() else super().forward(x)

    def has_ranges(self) -> bool:
        """Whether the activation ranges are known: always in mode "dynamic", else from the first quantized step on."""
        return self.settings.mode != "ema" or bool(self.input_thresh > 0)

    def set_ranges(self, input: float, output: float | None = None) -> None:
        """Stores calibrated ranges max|x|; later training goes on from them."""
        self.input_thresh.fill_(input)
        if self.settings.requantize_output:
            self.output_thresh.fill_(output)
        self._step.fill_(self.settings.start_step + 1)

    def _train_quantized(self, x: Tensor) -> Tensor:
        s = self.settings
        y = F.linear(
            fake_quantize(x, 1 / self._activation_step(x, "input_thresh"), s.activation_bits),
            self.fake_quantized_weight(),
            self.bias,
        )
        if s.requantize_output:
            y = fake_quantize(y, 1 / self._activation_step(y, "output_thresh"), s.activation_bits)
        return y

    def _simulate(self, x: Tensor) -> Tensor:
        # Every operation as the int8 kernels have it, in their order: the same input gives the same bits while the sums
        # of products stay below 2^24, where fp32 is exact.
        s = self.settings
        # The codes' products reach 49 million at K = 3072: autocast must not carry them in half precision.
        with torch.autocast(x.device.type, enabled=False):
            step = self._activation_step(x, "input_thresh")
            codes = quantize(x, 1 / step, s.activation_bits)
            step = step * self.weight_step()
            y = F.linear(codes, self.weight_codes()) * step
            if self.bias is not None:
                y = y + rounded_bias(self.bias, step)
            if s.requantize_output:
                step = self._activation_step(y, "output_thresh")
                y = quantize(y, 1 / step, s.activation_bits) * step
        return y.to(x.dtype)

    def _activation_step(self, x: Tensor, range_name: str) -> Tensor:
        """The step between two codes of x, after its range has taken x in when training; fp32 [1] or a scalar."""
        if self.settings.mode == "dynamic":
            return step_of(max_abs(x), self.settings.activation_bits)
        threshold = getattr(self, range_name)
        if self.training:
            self._follow(threshold, max_abs(x))
        # A copy: the buffer moves on at the next step, the value that this step's graph was built with must not.
        return step_of(threshold.detach().clone(), self.settings.activation_bits)

    def _follow(self, threshold: Tensor, live: Tensor) -> None:
        with torch.no_grad():
            moved = threshold - (1 - self.settings.ema_decay) * (threshold - live)
            first = (self._step == self.settings.start_step) | (threshold <= 0)
            moved = torch.where(first, live, moved)
            threshold.copy_(torch.where(torch.isfinite(live), moved, threshold))

    def extra_repr(self) -> str:
        s = self.settings
        return (
            f"{super().extra_repr()}, activation_bits={s.activation_bits}, ema_decay={s.ema_decay}, "
            f"requantize_output={s.requantize_output}"
        )


class FakeQuantEmbedding(_FakeQuant, nn.Embedding):
    """An embedding table whose rows are read as if they were stored in int8, one scale for the table.

    Args:
        num_embeddings, embedding_dim and the rest: as in torch.nn.Embedding.
        settings: how to quantize; both modes are one here, for a table has no activation range.

    >>> FakeQuantEmbedding(30, 8, settings=OpSettings())(torch.tensor([[1, 2]])).shape
    torch.Size([1, 2, 8])

    Source: Zafrir et al. 2019, Q8BERT, arXiv 1910.06188.
    """

    plain = nn.Embedding

    def __init__(self, *args: Any, settings: OpSettings = PAPER_SETTINGS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._begin(settings)

    @classmethod
    def from_embedding(cls, table: nn.Embedding, settings: OpSettings = PAPER_SETTINGS) -> "FakeQuantEmbedding":
        """A new layer that shares the parameter of `table`."""
        layer = cls(
            table.num_embeddings,
            table.embedding_dim,
            table.padding_idx,
            table.max_norm,
            table.norm_type,
            table.scale_grad_by_freq,
            table.sparse,
            _weight=table.weight.detach(),
            settings=settings,
        )
        layer.weight = table.weight
        return layer.train(table.training)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] int64 to rows [..., embedding_dim] in the table's dtype."""
        if self.settings.mode == "none":
            return super().forward(ids)
        warming_up = self.training and self._warming_up()
        if self.training:
            self._step += 1
        if warming_up:
            return super().forward(ids)
        # Rounding and gathering commute, so only the rows that are read are rounded.
        return fake_quantize(super().forward(ids), self.weight_scale(), self.settings.weight_bits)
