"""OpenVINO: bf16 inference of the fp32 model, and NNCF's post-training int8."""

from __future__ import annotations

import numpy as np
import openvino as ov

from .exporting import INPUTS, Positional, artifacts, example, load_model, random_tokens, with_token_types
from .torch_engine import ModelEngine


class Bf16(ModelEngine):
    packages = ("openvino",)
    precision = "bf16"

    def load(self, folder: str) -> None:
        options = {
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self.precision,
        }
        self.compiled = ov.Core().compile_model(self.graph(folder), "CPU", options)
        self.request = self.compiled.create_infer_request()

    def graph(self, folder: str) -> ov.Model:
        """Converts once; later runs read the file beside the model."""
        target = artifacts(folder, f"openvino-{ov.__version__.split('-')[0]}") / "model.xml"
        if not target.exists():
            model = load_model(folder, attn_implementation="eager")
            graph = ov.convert_model(Positional(model), example_input=example())
            for port, name in zip(graph.inputs, INPUTS, strict=True):
                port.get_tensor().set_names({name})
                port.get_node().set_partial_shape(ov.PartialShape([-1, -1]))
            graph.validate_nodes_and_infer_types()
            ov.save_model(graph, target, compress_to_fp16=False)
        return ov.Core().read_model(target)

    def convert(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return with_token_types(batch)

    def call(self, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        out = self.request.infer(batch, share_inputs=True, share_outputs=True)
        return out[0], out[1]


class Int8(Bf16):
    """NNCF's default recipe for transformers, calibrated on random tokens: a speed figure, not an accuracy one."""

    packages = ("openvino", "nncf")
    precision = "f32"

    def graph(self, folder: str) -> ov.Model:
        import nncf

        target = artifacts(folder, f"openvino-{ov.__version__.split('-')[0]}") / "int8.xml"
        if not target.exists():
            graph = super().graph(folder)
            samples = list(random_tokens(16))
            dataset = nncf.Dataset(samples)
            graph = nncf.quantize(graph, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples))
            ov.save_model(graph, target, compress_to_fp16=False)
        return ov.Core().read_model(target)
