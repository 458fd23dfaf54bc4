"""The engines that the benchmarks know, one file a library. Importing this package imports none of those libraries."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Entry:
    """An engine by name: where its class is, what it needs, what it is."""

    name: str
    target: str  # "module:class" under this package
    needs: tuple[str, ...]
    precision: str  # fp32, bf16 or int8: decides how close its outputs must be to fp32 torch
    about: str


def _table(*rows: tuple[str, str, str, str, str]) -> dict[str, Entry]:
    return {name: Entry(name, target, tuple(needs.split()), prec, about) for name, target, needs, prec, about in rows}


# Engines of a whole model: `bench encoder` and `demo`.
MODELS = _table(
    ("bertkern-int8", "bertkern:Int8", "torch transformers bertkern", "int8", "quantize_(model, Int8Config())"),
    ("bertkern-fp32", "bertkern:Exact", "torch transformers bertkern", "fp32", "accelerate(model)"),
    ("torch-fp32", "torch:Eager", "torch transformers", "fp32", "eager, scaled_dot_product_attention"),
    ("torch-bf16", "torch:EagerBf16", "torch transformers", "bf16", "model.bfloat16(), eager"),
    ("torch-int8", "torch:QuantizeDynamic", "torch transformers", "int8", "quantize_dynamic of every Linear"),
    ("torchao-int8", "torch:TorchAo", "torch transformers torchao", "int8", "dynamic int8, torch.compile"),
    ("onnxruntime-fp32", "onnxruntime:Fp32", "torch transformers onnx onnxruntime onnxscript", "fp32", "BERT fusions"),
    ("onnxruntime-int8", "onnxruntime:Int8", "torch transformers onnx onnxruntime onnxscript", "int8",
     "BERT fusions, dynamic int8 per channel"),
    ("ctranslate2-int8", "ctranslate2:Int8", "torch transformers ctranslate2", "int8", "encoder, compute_type int8"),
    ("openvino-bf16", "openvino:Bf16", "torch transformers openvino", "bf16", "latency hint"),
    ("openvino-int8", "openvino:Int8", "torch transformers openvino nncf", "int8", "NNCF post-training, static ranges"),
    ("deepsparse-fp32", "deepsparse:Fp32", "torch transformers onnx deepsparse", "fp32", "skips zeros"),
    ("deepsparse-int8", "deepsparse:Int8", "torch transformers onnx onnxruntime deepsparse", "int8",
     "skips zeros; QLinearMatMul, static ranges"),
)  # fmt: skip

# Providers of one linear layer: `bench gemm`.
LINEARS = _table(
    ("bertkern-kernel", "linear:BertkernKernel", "torch bertkern", "int8", "qgemm on int8 codes, timed inside"),
    ("bertkern-int8", "linear:Bertkern", "torch bertkern", "int8", "qgemm on int8 codes"),
    ("bertkern-linear", "linear:BertkernLinear", "torch bertkern", "int8", "linear: quantizes its fp32 input itself"),
    ("torch-int8", "linear:TorchInt8", "torch", "int8", "dynamic quantized Linear: quantizes its fp32 input itself"),
    ("torch-fp32", "linear:TorchFp32", "torch", "fp32", "F.linear"),
    ("torch-bf16", "linear:TorchBf16", "torch", "bf16", "F.linear"),
)

# Providers of one linear layer whose weights are partly zero: `bench sparse`.
SPARSES = _table(
    ("bertkern-sparse-int8", "sparse:SparseInt8", "torch bertkern", "int8", "qgemm on packed blocks, timed inside"),
    ("bertkern-int8", "sparse:DenseInt8", "torch bertkern", "int8", "qgemm on dense weights, timed inside"),
    ("onnxruntime-int8", "sparse:OnnxRuntimeInt8", "torch onnx onnxruntime", "int8",
     "dense, quantizes its fp32 input itself"),
    ("bertkern-sparse-fp32", "sparse:SparseFp32", "torch bertkern", "fp32", "linear on packed blocks"),
    ("bertkern-fp32", "sparse:DenseFp32", "torch bertkern", "fp32", "linear on dense weights"),
    ("torch-fp32", "sparse:TorchFp32", "torch", "fp32", "F.linear on dense weights"),
    ("torch-csr-fp32", "sparse:TorchCsr", "torch", "fp32", "torch.sparse_csr, weight first; unstructured zeros"),
    ("torch-bsr-fp32", "sparse:TorchBsr", "torch", "fp32", "torch.sparse_bsr, weight first; square blocks"),
    ("scipy-csr-fp32", "sparse:ScipyCsr", "torch scipy", "fp32", "scipy.sparse, weight first; unstructured zeros"),
    ("bertkern-sparse-bf16", "sparse:SparseBf16", "torch bertkern", "bf16", "linear on packed blocks"),
    ("bertkern-bf16", "sparse:DenseBf16", "torch bertkern", "bf16", "linear on dense weights"),
    ("torch-bf16", "sparse:TorchBf16", "torch", "bf16", "F.linear on dense weights"),
)  # fmt: skip

FAMILIES = {"model": MODELS, "linear": LINEARS, "sparse": SPARSES}
ALL = {f"{family}/{name}": entry for family, table in FAMILIES.items() for name, entry in table.items()}

# An engine whose outputs are further than this from fp32 torch is not timed. The floors tell wrong from right, no more:
# on the random tokens of the encoder benchmark, whole-tensor int8 is coarse (the tables print each engine's SQNR).
SQNR_FLOOR_DB = {"fp32": 60.0, "bf16": 25.0, "int8": 5.0}
COSINE_FLOOR = {"fp32": 0.99999, "bf16": 0.995, "int8": 0.85}


class Engine:
    """What a worker drives. Subclasses set `packages`, fill `notes`, and define the three methods."""

    packages: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.notes: dict[str, Any] = {}

    def prepare(self, **case: Any) -> None:
        """Takes a case."""
        raise NotImplementedError

    def run(self) -> None:
        """The call that is timed."""
        raise NotImplementedError

    def outputs(self) -> dict[str, np.ndarray]:
        """Calls once more and returns named fp32 arrays; those named `mask_*` say which rows count."""
        raise NotImplementedError

    def size_mb(self) -> float | None:
        """Megabytes of the model as this engine saves it; None where that means nothing."""
        return None

    def report(self) -> str | None:
        """What the engine changed in the model, for people; None where it has nothing to say."""
        return None

    def versions(self) -> dict[str, str]:
        """Versions of the packages that do the work."""
        return {name: metadata.version(name) for name in self.packages}


def missing(key: str) -> str | None:
    """The first module that this interpreter lacks for the engine, or None."""
    for module in ALL[key].needs:
        if importlib.util.find_spec(module) is None:
            return module
    return None


def create(key: str, **options: Any) -> Engine:
    """Makes an engine from its key, `FAMILY/NAME`."""
    module, _, cls = ALL[key].target.partition(":")
    return getattr(importlib.import_module(f".{module}_engine", __package__), cls)(**options)


def agreement(reference: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> dict[str, float]:
    """How close outputs are to the reference over the rows that count.

    Returns: `cosine`, the lowest of the arrays' mean row cosines, and `sqnr_db`, the lowest of their signal to noise
    ratios (capped at 200; -1 where something is not finite). Raises ValueError where an array is missing or misshapen.
    """
    import numpy as np

    worst = {"cosine": 1.0, "sqnr_db": 200.0}
    for name, expected in reference.items():
        if name.startswith("mask_"):
            continue
        if name not in outputs or outputs[name].shape != expected.shape:
            got = outputs[name].shape if name in outputs else "nothing"
            raise ValueError(f"output {name!r}: expected shape {expected.shape}. Got {got}.")
        a = np.asarray(expected, np.float64).reshape(-1, expected.shape[-1])
        b = np.asarray(outputs[name], np.float64).reshape(a.shape)
        mask = reference.get("mask_" + name)
        if mask is not None:
            a, b = a[mask.reshape(-1) != 0], b[mask.reshape(-1) != 0]
        if not np.isfinite(b).all():
            return {"cosine": -1.0, "sqnr_db": -1.0}
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosine = float(np.mean((a * b).sum(1) / np.maximum(norms, 1e-30)))
        noise = float(((a - b) ** 2).sum())
        sqnr = 200.0 if noise == 0 else min(200.0, float(10 * np.log10((a**2).sum() / noise)))
        worst = {"cosine": min(worst["cosine"], cosine), "sqnr_db": min(worst["sqnr_db"], sqnr)}
    return worst
