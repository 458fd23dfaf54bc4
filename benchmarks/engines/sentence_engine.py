"""A whole sentence encoder behind sentence-transformers' `encode`: torch, its ONNX and OpenVINO backends, bertkern.

The int8 files are those that its own functions make: `export_dynamic_quantized_onnx_model` for this processor, and
`export_static_quantized_openvino_model`, which calibrates on sentences. Its default ones lie on the hub (SST-2), so
film reviews of the same origin take their place; everything else is as it comes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from .. import peak
from . import Engine
from .exporting import artifacts

LONGEST = 256  # tokens; as the model's own configuration has it


class Sentences(Engine):
    """Base: `encode` on a list of sentences, which it sorts by length and pads batch by batch.

    Subclasses define `load(folder) -> SentenceTransformer`; `folder` has a transformers model with its tokenizer.
    """

    packages = ("sentence-transformers", "transformers", "torch")

    def __init__(self, model: str, threads: int):
        super().__init__()
        os.environ["HF_HUB_OFFLINE"] = "1"  # all is here, and asking takes time
        torch.set_num_threads(threads)
        self.threads = threads
        self.model = self.load(model)

    def load(self, folder: str) -> SentenceTransformer:
        raise NotImplementedError

    def prepare(self, path: str, batch: int) -> None:
        """A JSON file with a list of sentences."""
        self.sentences, self.batch = json.loads(Path(path).read_text()), batch

    def run(self) -> np.ndarray:
        return self.model.encode(self.sentences, batch_size=self.batch, show_progress_bar=False)

    def outputs(self) -> dict[str, np.ndarray]:
        """Vectors of unit length, [sentences, hidden]."""
        return {"vectors": np.asarray(self.run(), np.float32)}


def assembled(folder: str, backend: str = "torch", **options: Any) -> SentenceTransformer:
    """A transformers model with mean pooling, to unit length."""
    try:
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    except ImportError:
        from sentence_transformers.models import Normalize, Pooling, Transformer

    transformer = Transformer(folder, backend=backend, max_seq_length=LONGEST, model_kwargs=options)
    hidden = json.loads((Path(folder) / "config.json").read_text())["hidden_size"]
    return SentenceTransformer(modules=[transformer, Pooling(hidden), Normalize()], device="cpu", backend=backend)


class Torch(Sentences):
    def load(self, folder: str) -> SentenceTransformer:
        return assembled(folder)


class BertkernFp32(Torch):
    def load(self, folder: str) -> SentenceTransformer:
        import bertkern

        self.notes["isa"] = peak.isa()
        return bertkern.accelerate(super().load(folder))

    def versions(self) -> dict[str, str]:
        import bertkern

        return {"bertkern": bertkern.__version__, **super().versions()}


class BertkernInt8(BertkernFp32):
    def load(self, folder: str) -> SentenceTransformer:
        import bertkern

        self.notes["isa"] = peak.isa()
        return bertkern.quantize_(Torch.load(self, folder), bertkern.Int8Config())


class Onnx(Sentences):
    """The file for AVX-512 VNNI where the processor has it, else for AVX2."""

    packages = (*Sentences.packages, "onnxruntime", "optimum-onnx")

    def load(self, folder: str) -> SentenceTransformer:
        import onnxruntime as ort
        from sentence_transformers import export_dynamic_quantized_onnx_model

        isa = peak.isa()
        form = "avx512_vnni" if isa in ("avx512vnni", "avx512bf16", "amx") else "avx2"
        target = artifacts(folder, f"sentence-transformers-onnxruntime-{ort.__version__}")
        name = f"model_qint8_{form}.onnx" if form != "avx2" else "model_quint8_avx2.onnx"
        if not (target / "onnx" / name).exists():
            whole = assembled(folder, "onnx", provider="CPUExecutionProvider", export=True)
            whole.save_pretrained(str(target))
            export_dynamic_quantized_onnx_model(whole, form, str(target))
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        self.notes["file"] = name
        return assembled(str(target), "onnx", provider="CPUExecutionProvider", file_name=name, session_options=options)


class OpenVino(Sentences):
    packages = (*Sentences.packages, "openvino", "optimum-intel", "nncf")

    def load(self, folder: str) -> SentenceTransformer:
        import openvino
        from sentence_transformers import export_static_quantized_openvino_model

        target = artifacts(folder, f"sentence-transformers-openvino-{openvino.__version__.split('-')[0]}")
        name = "openvino_model_qint8_quantized.xml"
        if not (target / "openvino" / name).exists():
            whole = assembled(folder, "openvino", export=True)
            whole.save_pretrained(str(target))
            data = _reviews(target / "calibration")
            export_static_quantized_openvino_model(
                whole,
                None,
                str(target),
                dataset_name=str(data),
                dataset_config_name="default",
                dataset_split="train",
                column_name="sentence",
            )
        self.notes["file"] = name
        config = {"INFERENCE_NUM_THREADS": self.threads}
        return assembled(str(target), "openvino", file_name=f"openvino/{name}", ov_config=config)


def _reviews(folder: Path) -> Path:
    """A folder with film reviews in one CSV file, which `datasets` reads."""
    import csv

    from .. import fetch
    from ..q8bert import reviews

    training, _ = reviews(fetch.fetch(fetch.REVIEWS))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence"])
        writer.writerows([text] for text, _ in training[:1000])
    return folder
