"""bertkern itself: the int8 model and the exact one."""

from __future__ import annotations

from typing import Any

import torch

import bertkern

from .. import peak
from .torch_engine import Eager


class Exact(Eager):
    def change(self, model: torch.nn.Module) -> Any:
        return self.describe(bertkern.accelerate(model))

    def describe(self, model: torch.nn.Module) -> torch.nn.Module:
        self.notes["isa"] = peak.isa()
        return model

    def report(self) -> str:
        return str(bertkern.report(self.model))

    def versions(self) -> dict[str, str]:
        return {"bertkern": bertkern.__version__, **super().versions()}


class Int8(Exact):
    def change(self, model: torch.nn.Module) -> Any:
        bertkern.quantize_(model, bertkern.Int8Config())
        return self.describe(model)
