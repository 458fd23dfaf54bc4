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
    ("bertkern-groupwise", "bertkern:Groupwise", "torch transformers bertkern", "int8",
     "quantize_(model, GroupwiseConfig(bits=4)); for qbert in the groups of its rows"),
    ("bertkern-int8-padded", "bertkern:Int8Padded", "torch transformers bertkern", "int8", "keep_padding=True"),
    ("bertkern-fp32-padded", "bertkern:ExactPadded", "torch transformers bertkern", "fp32", "keep_padding=True"),
    ("bertkern-int8-masked", "bertkern:Int8Masked", "torch transformers bertkern", "int8", "head_mask at run time"),
    ("bertkern-fp32-masked", "bertkern:ExactMasked", "torch transformers bertkern", "fp32", "head_mask at run time"),
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

# Providers of one linear layer with low-bit weights: `bench groupwise`.
GROUPWISE = _table(
    ("bertkern-groupwise-int8", "groupwise:Groupwise", "torch bertkern", "int8", "int8 activations, timed inside"),
    ("bertkern-int8", "groupwise:Int8", "torch bertkern", "int8", "qgemm on int8 weights, timed inside"),
    ("bertkern-groupwise-fp32", "groupwise:GroupwiseFp32", "torch bertkern", "fp32", "fp32 activations"),
    ("bertkern-groupwise-bf16", "groupwise:GroupwiseBf16", "torch bertkern", "bf16", "bf16 activations"),
    ("torch-fp32", "groupwise:TorchFp32", "torch", "fp32", "F.linear on the dense weights"),
    ("torch-int4", "groupwise:TorchInt4", "torch", "bf16", "_weight_int4pack_mm_for_cpu, 4 bits along K"),
    ("onnxruntime-int4", "groupwise:OnnxRuntimeInt4", "torch onnx onnxruntime", "int8",
     "MatMulNBits, 4 bits along K, int8 activations"),
)  # fmt: skip

# Providers of attention alone: `bench attention`.
ATTENTIONS = _table(
    ("bertkern-fp32", "attention:Packed", "torch bertkern", "fp32", "ops.attention, tokens packed [T, H, d]"),
    ("bertkern-bf16", "attention:PackedBf16", "torch bertkern", "bf16", "ops.attention, tokens packed [T, H, d]"),
    ("torch-fp32", "attention:Sdpa", "torch", "fp32", "scaled_dot_product_attention, [B, H, L, d]"),
    ("torch-bf16", "attention:SdpaBf16", "torch", "bf16", "scaled_dot_product_attention, [B, H, L, d]"),
    ("torch-eager-fp32", "attention:Formula", "torch", "fp32", "softmax(q k^T) v by its matrix of scores"),
    ("torch-eager-bf16", "attention:FormulaBf16", "torch", "bf16", "softmax(q k^T) v by its matrix of scores"),
    ("reference", "attention:Reference", "torch", "fp32", "the tests' formula in float64"),
)  # fmt: skip

# A whole model behind sentence-transformers: `bench sentences`.
SENTENCES = _table(
    ("bertkern-int8", "sentence:BertkernInt8", "torch sentence_transformers bertkern", "int8", "quantize_(model)"),
    ("bertkern-fp32", "sentence:BertkernFp32", "torch sentence_transformers bertkern", "fp32", "accelerate(model)"),
    ("torch-fp32", "sentence:Torch", "torch sentence_transformers", "fp32", "its default backend"),
    ("onnxruntime-int8", "sentence:Onnx", "torch sentence_transformers optimum.onnxruntime onnxruntime", "int8",
     "its ONNX backend; export_dynamic_quantized_onnx_model"),
    ("openvino-int8", "sentence:OpenVino", "torch sentence_transformers optimum.intel openvino nncf datasets", "int8",
     "its OpenVINO backend; export_static_quantized_openvino_model"),
)  # fmt: skip

# Derivatives of BERT-base: `bench importance`, `bench hessian`.
GRADIENTS = _table(
    ("bertkern-importance", "gradient:Importance", "torch transformers bertkern", "fp32", "head_importance(model)"),
    ("torch-backward", "gradient:Backward", "torch transformers", "fp32", "loss and its gradients of all weights"),
    ("reference", "gradient:Reference", "torch transformers", "fp32", "a factor a head, one sentence at a time"),
    ("bertkern-hessian", "gradient:Hessian", "torch transformers bertkern", "fp32", "hessian_sensitivity(model)"),
    ("hessian-reference", "gradient:HessianReference", "torch transformers", "fp32", "power iteration in float64"),
)  # fmt: skip

FAMILIES = {
    "model": MODELS,
    "linear": LINEARS,
    "sparse": SPARSES,
    "groupwise": GROUPWISE,
    "attention": ATTENTIONS,
    "sentence": SENTENCES,
    "gradient": GRADIENTS,
}
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
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # of a submodule, the package itself
            found = None
        if found is None:
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
