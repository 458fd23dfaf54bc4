"""torch by itself: eager fp32 and bf16, quantize_dynamic, torchao compiled. Also the base of every model engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import Engine
from .exporting import load_model


def load_batches(path: str) -> list[dict[str, np.ndarray]]:
    """Reads batches from npz arrays named `<input>_<index>`; returns them in order of their index."""
    batches: dict[int, dict[str, np.ndarray]] = {}
    with np.load(path) as arrays:
        for key, value in arrays.items():
            name, _, index = key.rpartition("_")
            batches.setdefault(int(index), {})[name] = value
    return [batches[i] for i in sorted(batches)]


class ModelEngine(Engine):
    """A model folder and a number of threads; `prepare` takes a file of batches, `run` calls the model on each.

    Subclasses define `load(folder)` and `call(batch) -> (last_hidden_state, pooler_output or None)`, both as arrays or
    tensors, and may define `convert(batch)`, done once, outside the timing.
    """

    packages = ("torch", "transformers")

    def __init__(self, model: str, threads: int):
        super().__init__()
        torch.set_num_threads(threads)
        self.threads = threads
        self.batches: list[Any] = []
        self.load(model)

    def load(self, folder: str) -> None:
        raise NotImplementedError

    def convert(self, batch: dict[str, np.ndarray]) -> Any:
        return batch

    def call(self, batch: Any) -> tuple[Any, Any]:
        raise NotImplementedError

    def prepare(self, inputs: str) -> None:
        raw = load_batches(inputs)
        self.masks = [b["attention_mask"] for b in raw]
        self.batches = [self.convert(b) for b in raw]

    def run(self) -> None:
        for batch in self.batches:
            self.call(batch)

    def outputs(self) -> dict[str, np.ndarray]:
        arrays = {}
        for i, (batch, mask) in enumerate(zip(self.batches, self.masks, strict=True)):
            hidden, pooled = self.call(batch)
            arrays[f"hidden_{i}"] = as_array(hidden)
            arrays[f"mask_hidden_{i}"] = mask
            if pooled is not None:
                arrays[f"pooled_{i}"] = as_array(pooled)
        return arrays


def as_array(value: Any) -> np.ndarray:
    """fp32 numpy, from a tensor or anything that numpy reads."""
    return value.detach().float().numpy() if isinstance(value, torch.Tensor) else np.array(value, np.float32)


class Eager(ModelEngine):
    """The model as transformers loads it; the reference of every other engine."""

    def load(self, folder: str) -> None:
        self.model = self.change(load_model(folder))

    def change(self, model: torch.nn.Module) -> Any:
        return model

    def convert(self, batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def call(self, batch: dict[str, torch.Tensor]) -> tuple[Any, Any]:
        with torch.inference_mode():
            out = self.model(**batch)
        return out.last_hidden_state, getattr(out, "pooler_output", None)

    def size_mb(self) -> float:
        """Weights as `save_pretrained` writes them."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            return sum(f.stat().st_size for f in Path(folder).glob("*.safetensors")) / 1e6


class EagerBf16(Eager):
    def change(self, model: torch.nn.Module) -> Any:
        return model.bfloat16()


class QuantizeDynamic(Eager):
    def change(self, model: torch.nn.Module) -> Any:
        import warnings

        warnings.simplefilter("ignore")
        self.notes["backend"] = torch.backends.quantized.engine
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)

    def size_mb(self) -> float:
        """The pickled state dict: quantize_dynamic has no other form on disk."""
        import io

        buffer = io.BytesIO()
        torch.save(self.model.state_dict(), buffer)
        return len(buffer.getvalue()) / 1e6


class TorchAo(Eager):
    """Compiled anew for each shape (static shapes are what serves this engine best), weights frozen."""

    packages = ("torch", "transformers", "torchao")

    def change(self, model: torch.nn.Module) -> Any:
        import torch._inductor.config as inductor
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        inductor.freezing = True
        inductor.cpp.enable_kernel_profile = False
        torch._dynamo.config.cache_size_limit = 64
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        self.notes["compile"] = "inductor, freezing"
        return torch.compile(model, dynamic=False)

    def call(self, batch: dict[str, torch.Tensor]) -> tuple[Any, Any]:
        with torch.no_grad():
            out = self.model(**batch)
        return out.last_hidden_state, getattr(out, "pooler_output", None)
