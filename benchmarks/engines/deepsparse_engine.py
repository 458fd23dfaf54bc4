"""DeepSparse 1.8: an engine that skips zeros, ended and closed, in the last form that its registry has.

Of an interpreter of its own: it was built for numpy 1 (beside numpy 2 it misreads its inputs and returns nonsense), and
its requirements hold onnx back:

    pip install deepsparse==1.8.0 'numpy<2' onnx==1.14.1 onnxruntime==1.17.3 torch transformers

The graphs are what it compiles whole: opset 13, the mask added as floats; int8 as QLinearMatMul with static ranges.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .exporting import INPUTS, OUTPUTS, artifacts, load_model
from .torch_engine import ModelEngine

os.environ.setdefault("NM_DISABLE_ANALYTICS", "True")

import deepsparse

CALIBRATION = (16, 64)  # sequences of random tokens


class Additive(torch.nn.Module):
    """A model behind positional inputs, its mask as it is added to the scores: no logic on masks is traced."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (last_hidden_state, pooler_output)."""
        added = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        out = self.model(input_ids=input_ids, attention_mask=added, token_type_ids=token_type_ids)
        return out.last_hidden_state, out.pooler_output


class Fp32(ModelEngine):
    packages = ("deepsparse", "onnx")

    def load(self, folder: str) -> None:
        self.graph = self.file(folder)
        self.compiled: dict[tuple[int, int], Any] = {}

    def file(self, folder: str) -> Path:
        """Exports once; later runs find the file beside the model."""
        target = artifacts(folder, f"deepsparse-{deepsparse.__version__}") / "fp32.onnx"
        if not target.exists():
            ids = torch.ones(2, 8, dtype=torch.int64)
            axes = {name: {0: "batch", 1: "length"} for name in (*INPUTS, "hidden")} | {"pooled": {0: "batch"}}
            fresh = target.with_name("fresh.onnx")
            torch.onnx.export(
                Additive(load_model(folder, attn_implementation="eager")).eval(),
                (ids, ids, ids * 0),
                str(fresh),
                input_names=list(INPUTS),
                output_names=list(OUTPUTS),
                dynamic_axes=axes,
                opset_version=13,
                dynamo=False,
            )
            fresh.rename(target)
        return target

    def convert(self, batch: dict[str, np.ndarray]) -> tuple[Any, list[np.ndarray]]:
        """Compiles the graph for the batch's shape, which takes half a minute."""
        full = {"token_type_ids": np.zeros_like(batch["input_ids"]), **batch}
        arrays = [np.ascontiguousarray(full[name], np.int64) for name in INPUTS]
        shape = arrays[0].shape
        if shape not in self.compiled:
            self.compiled[shape] = deepsparse.engine.Engine(
                str(self.graph), batch_size=shape[0], num_cores=self.threads, input_shapes=[list(shape)] * len(arrays)
            )
            self.notes["fraction_of_supported_ops"] = self.compiled[shape].fraction_of_supported_ops
        return self.compiled[shape], arrays

    def call(self, batch: tuple[Any, list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        engine, arrays = batch
        hidden, pooled = engine.run(arrays)
        return hidden, pooled


class Int8(Fp32):
    """Calibrated on random tokens: a speed figure, not an accuracy one. Products of two activations stay fp32."""

    def file(self, folder: str) -> Path:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        source = super().file(folder)
        target = source.with_name("int8.onnx")
        if not target.exists():
            fresh = source.with_name("fresh.onnx")
            quantize_static(
                str(source),
                str(fresh),
                _Samples(),
                quant_format=QuantFormat.QOperator,
                op_types_to_quantize=["MatMul"],
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )
            fresh.rename(target)
        return target


class _Samples:
    """onnxruntime's CalibrationDataReader, as far as it is used."""

    def __init__(self) -> None:
        self.left = self._samples()

    def _samples(self) -> Iterator[dict[str, np.ndarray]]:
        rng = np.random.default_rng(0)
        for _ in range(CALIBRATION[0]):
            ids = rng.integers(1000, 30000, (1, CALIBRATION[1]))
            yield {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.left, None)
