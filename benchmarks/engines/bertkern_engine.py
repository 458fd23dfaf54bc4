"""bertkern itself: the int8 and low-bit models and the exact one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModel

import bertkern

from .. import peak
from ..groupings import config_of, parse_groupings
from ..models import fill_heads, gone_from
from .torch_engine import Eager


class Exact(Eager):
    keep_padding = False

    def change(self, model: torch.nn.Module) -> Any:
        return self.describe(bertkern.accelerate(model, keep_padding=self.keep_padding))

    def describe(self, model: torch.nn.Module) -> torch.nn.Module:
        self.notes["isa"] = peak.isa()
        return model

    def report(self) -> str:
        return str(bertkern.report(self.model))

    def versions(self) -> dict[str, str]:
        return {"bertkern": bertkern.__version__, **super().versions()}


class Int8(Exact):
    def change(self, model: torch.nn.Module) -> Any:
        bertkern.quantize_(model, bertkern.Int8Config(), keep_padding=self.keep_padding)
        return self.describe(model)


class Groupwise(Exact):
    """Low-bit weights; `grouping` as in `groupings`, of one number of bits."""

    def __init__(self, model: str, threads: int, grouping: str = "4n128"):
        self.grouping = parse_groupings(grouping)[0]
        super().__init__(model, threads)

    def change(self, model: torch.nn.Module) -> Any:
        bertkern.quantize_(model, config_of(self.grouping), keep_padding=self.keep_padding)
        return self.describe(model)


class ExactPadded(Exact):
    """Computes what stands after a sentence's last token, too."""

    keep_padding = True


class Int8Padded(Int8):
    keep_padding = True


class ExactMasked(Exact):
    """The whole model with a mask at run time on the heads that a pattern took from the others.

    Their weights are zeros in the folder, which bertkern would drop, so they get random ones: as the outputs are
    compared with those of the pruned model, a head that were not masked would show.
    """

    def load(self, folder: str) -> None:
        gone = gone_from(folder)
        if gone is None:
            raise ValueError("expected a model with the pattern heads@SHARE")
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        torch.manual_seed(0)
        self.mask = torch.ones(len(gone), model.config.num_attention_heads)
        with torch.no_grad():
            for layer, mask, heads in zip(model.encoder.layer, self.mask, gone, strict=True):
                fill_heads(layer, heads, deviation=0.02)
                mask[heads] = 0.0
        self.model = self.change(model)

    def call(self, batch: dict[str, torch.Tensor]) -> tuple[Any, Any]:
        with bertkern.head_mask(self.model, self.mask):
            return super().call(batch)


class Int8Masked(ExactMasked, Int8):
    pass
