"""DeepSparse 1.8: an engine that skips zeros, ended and closed, in the last form that its registry has.

Of an interpreter of its own: it was built for numpy 1 (beside numpy 2 it misreads its inputs and returns nonsense), and
its requirements hold onnx back:

    pip install deepsparse==1.8.0 'numpy<2' onnx==1.14.1 onnxruntime==1.17.3 torch transformers

The graphs are what it compiles whole: opset 13, the mask added as floats; int8 as QLinearMatMul with static ranges.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from .exporting import INPUTS, artifacts, export_onnx, random_tokens, with_token_types
from .torch_engine import ModelEngine

os.environ.setdefault("NM_DISABLE_ANALYTICS", "True")

import deepsparse


class Fp32(ModelEngine):
    packages = ("deepsparse", "onnx")

    def load(self, folder: str) -> None:
        self.graph = self.file(folder)
        self.compiled: dict[tuple[int, int], Any] = {}

    def file(self, folder: str) -> Path:
        """Exports once; later runs find the file beside the model."""
        target = artifacts(folder, f"deepsparse-{deepsparse.__version__}") / "fp32.onnx"
        if not target.exists():
            fresh = target.with_name("fresh.onnx")
            export_onnx(folder, fresh, opset=13, added_mask=True)
            fresh.rename(target)
        return target

    def convert(self, batch: dict[str, np.ndarray]) -> tuple[Any, list[np.ndarray]]:
        """Compiles the graph for the batch's shape, which takes half a minute."""
        full = with_token_types(batch)
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
        self.left = random_tokens(16)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.left, None)
