"""ONNX Runtime, with its own transformer optimizer, so that attention, GELU and LayerNorm run as fused operators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from .exporting import OUTPUTS, artifacts, export_onnx, with_token_types
from .torch_engine import ModelEngine


class Fp32(ModelEngine):
    packages = ("onnxruntime", "onnx")

    def load(self, folder: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(str(self.file(folder)), options, providers=["CPUExecutionProvider"])

    def file(self, folder: str) -> Path:
        return self.optimized(folder)

    def optimized(self, folder: str) -> Path:
        """Exports and fuses once; later runs find the file beside the model."""
        import json

        from onnxruntime.transformers import optimizer
        from onnxruntime.transformers.fusion_options import FusionOptions

        target = artifacts(folder, f"onnxruntime-{ort.__version__}") / "fused.onnx"
        counts = target.with_suffix(".json")
        if not counts.exists():
            plain = target.with_name("plain.onnx")
            export_onnx(folder, plain, opset=17)
            config = json.loads((Path(folder) / "config.json").read_text())
            fused = optimizer.optimize_model(
                str(plain),
                model_type="bert",
                num_heads=config["num_attention_heads"],
                hidden_size=config["hidden_size"],
                opt_level=1,
                optimization_options=FusionOptions("bert"),
            )
            fused.save_model_to_file(str(target))
            plain.unlink()
            counts.write_text(json.dumps({k: v for k, v in fused.get_fused_operator_statistics().items() if v}))
        self.notes["fused"] = json.loads(counts.read_text())
        return target

    def convert(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        wanted = {i.name for i in self.session.get_inputs()}
        full = with_token_types(batch)
        return {name: np.ascontiguousarray(full[name]) for name in wanted}

    def call(self, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        hidden, pooled = self.session.run(list(OUTPUTS), batch)
        return hidden, pooled


class Int8(Fp32):
    def file(self, folder: str) -> Path:
        from onnx import TensorProto
        from onnxruntime.quantization import QuantType, quantize_dynamic

        source = self.optimized(folder)
        target = source.with_name("int8.onnx")
        if not target.exists():
            # The fused operators are unknown to ONNX's shape inference; every tensor left by it is fp32.
            options = {"DefaultTensorType": TensorProto.FLOAT}
            quantize_dynamic(
                str(source), str(target), per_channel=True, weight_type=QuantType.QInt8, extra_options=options
            )
        import onnx

        kinds = [node.op_type for node in onnx.load(str(target), load_external_data=False).graph.node]
        self.notes["quantized"] = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
        return target
