"""One linear layer with zeros in its weight: bertkern's kernels for blocks beside dense ones and sparse libraries.

Every provider draws the same data, takes row-major tokens [M, K] and gives row-major ones [M, N], bias added. Sparse
libraries multiply from the other side, weight x tokens: the transposes that this needs belong to their time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..patterns import Pattern
from . import linear_engine
from .linear_engine import Linear, draw

MOST_COPIES = 1024  # of weights so small that more of them would only take time to make


class Zeros(Linear):
    """Base: a case with zeros, as many copies of the weight as a cold one takes, and an exact check of every output.

    Subclasses define `canonical(weight) -> anything` (once a case), `pack(canonical, bias)` (once a copy), `blocks`
    where they know only some, and what they multiply where that is not fp32: `multiplied(x, weight)`.
    """

    # How far an output may lie from the exact product of what is multiplied: of the sum of magnitudes, and of itself.
    tolerance: tuple[float, float] | None = (4e-6, 0.0)

    def prepare(self, m: int, n: int, k: int, pattern: str, cold: int = 0) -> None:
        """M rows, weight [n, k] with zeros; copies of it, in turn, take at least `cold` bytes.

        Raises ValueError for a pattern that the provider does not know, and where an output is wrong.
        """
        zeros = Pattern.parse(pattern)
        self.block = zeros.block
        if not self.knows(zeros.block):
            raise ValueError(f"has no blocks {zeros.name}")
        x, weight, bias = draw(m, n, k)
        weight *= torch.from_numpy(zeros.mask(n, k))
        self.n, self.epilogue, self.next = n, "fp32", 0
        self.input = self.feed(x)
        canonical = self.canonical(weight)
        self.packed = [self.pack(canonical, bias)]
        copies = min(MOST_COPIES, 2 + cold // max(1, self.size(self.packed[0]))) if cold else 1
        self.packed += [self.pack(canonical, bias) for _ in range(copies - 1)]
        if self.tolerance is not None:
            self.verify(x, weight, bias)

    def verify(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Compares each output with the product in double precision: one lost weight shows."""
        x, weight = (part.double() for part in self.multiplied(x, weight))
        expected = torch.addmm(bias.double(), x, weight.t())
        sums, itself = self.tolerance
        allowed = sums * (x.abs() @ weight.abs().t() + bias.abs()) + itself * expected.abs()
        with torch.inference_mode():
            got = self.value(self.run()).double()
        wrong = ~((got - expected).abs() <= allowed)
        if bool(wrong.any()):
            row, out = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"row {row}, output {out} ({int(wrong.sum())} in all): expected {expected[row, out]:.7g} "
                f"+- {allowed[row, out]:.1g}. Got {got[row, out]:.7g}."
            )

    def knows(self, block: tuple[int, int]) -> bool:
        return True

    def multiplied(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, weight

    def canonical(self, weight: torch.Tensor) -> Any:
        return weight

    def size(self, packed: Any) -> int:
        """Bytes of one copy."""
        parts = packed if isinstance(packed, tuple) else (packed,)
        return sum(part.numel() * part.element_size() for part in parts)


# --- bertkern -------------------------------------------------------------------------------------------------------


class DenseInt8(Zeros, linear_engine.BertkernKernel):
    """The product on int8 codes, timed inside the operator."""

    def multiplied(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scale = self.input
        w = self.quantized
        return codes.double() * scale.double()[:, None], w.codes.double() * w.scale.double()[:, None]

    def canonical(self, weight: torch.Tensor) -> Any:
        from bertkern.formats.int8 import quantize_weight

        self.quantized = quantize_weight(weight)
        return self.quantized

    def pack(self, canonical: Any, bias: torch.Tensor) -> torch.Tensor:
        return self.ops.pack_qlinear(canonical.codes, canonical.scale, bias)


class SparseInt8(DenseInt8):
    def canonical(self, weight: torch.Tensor) -> Any:
        from bertkern.formats import BsrWeight

        quantized = super().canonical(weight)
        return BsrWeight.from_dense(quantized.codes, self.block), quantized.scale

    def pack(self, canonical: Any, bias: torch.Tensor) -> torch.Tensor:
        blocks, scale = canonical
        return torch.ops.bertkern.pack_sparse_linear(blocks.crow, blocks.col, blocks.values, *blocks.shape, scale, bias)


class DenseFp32(Zeros, linear_engine.BertkernLinear):
    def pack(self, canonical: Any, bias: torch.Tensor) -> torch.Tensor:
        return self.ops.pack_linear(canonical, bias)

    def call(self, x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.ops.linear(x, packed, self.n)


class SparseFp32(DenseFp32):
    def canonical(self, weight: torch.Tensor) -> Any:
        from bertkern.formats import BsrWeight

        return BsrWeight.from_dense(weight, self.block)

    def pack(self, canonical: Any, bias: torch.Tensor) -> torch.Tensor:
        return torch.ops.bertkern.pack_sparse_linear(
            canonical.crow, canonical.col, canonical.values, *canonical.shape, None, bias
        )


class Bf16(Zeros):
    """Rounds x and the weight before, the output after."""

    tolerance = (4e-6, 2.0**-8)

    def multiplied(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.bfloat16(), weight.bfloat16()

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16()

    def canonical(self, weight: torch.Tensor) -> Any:
        return super().canonical(weight.bfloat16())


class DenseBf16(Bf16, DenseFp32):
    pass


class SparseBf16(Bf16, SparseFp32):
    pass


# --- rivals ---------------------------------------------------------------------------------------------------------


class TorchFp32(Zeros, linear_engine.TorchFp32):
    def pack(self, canonical: torch.Tensor, bias: torch.Tensor) -> Any:
        return canonical.clone(), bias


class TorchBf16(Bf16, TorchFp32):
    """torch rounds the bias too."""

    def pack(self, canonical: torch.Tensor, bias: torch.Tensor) -> Any:
        return canonical.clone(), bias.bfloat16()

    def verify(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().verify(x, weight, bias.bfloat16().float())


class TorchCsr(Zeros):
    """x goes in as a transposed view, which costs nothing; adding the bias writes the rows out."""

    def knows(self, block: tuple[int, int]) -> bool:
        return block == (1, 1)  # of any other block it would make the same

    def canonical(self, weight: torch.Tensor) -> torch.Tensor:
        import warnings

        warnings.simplefilter("ignore")  # torch calls the layout a beta
        return weight.to_sparse_csr()

    def pack(self, canonical: torch.Tensor, bias: torch.Tensor) -> Any:
        return canonical.clone(), bias

    def size(self, packed: Any) -> int:
        weight = packed[0]
        return super().size((weight.values(), weight.col_indices(), weight.crow_indices()))

    def call(self, x: torch.Tensor, packed: Any) -> torch.Tensor:
        weight, bias = packed
        with torch.inference_mode():
            return torch.add(torch.mm(weight, x.t())[: self.n].t(), bias, out=x.new_empty(len(x), self.n))


class TorchBsr(TorchCsr):
    """Blocks must divide its matrices: where they do not, weight and x are filled up with zeros, the latter in time."""

    def knows(self, block: tuple[int, int]) -> bool:
        return block[0] == block[1] > 1  # MKL has no others

    def canonical(self, weight: torch.Tensor) -> torch.Tensor:
        super().canonical(weight[:1, :1])
        side, (n, k) = self.block[0], weight.shape
        return torch.nn.functional.pad(weight, (0, -k % side, 0, -n % side)).to_sparse_bsr(self.block)

    def call(self, x: torch.Tensor, packed: Any) -> torch.Tensor:
        missing = packed[0].shape[1] - x.shape[1]
        return super().call(torch.nn.functional.pad(x, (0, missing)) if missing else x, packed)


class ScipyCsr(TorchCsr):
    """SciPy copies the transposed x row by row itself."""

    packages = ("scipy", "numpy")

    def feed(self, x: torch.Tensor) -> np.ndarray:
        return x.numpy()

    def canonical(self, weight: torch.Tensor) -> Any:
        from scipy.sparse import csr_matrix

        return csr_matrix(weight.numpy())

    def pack(self, canonical: Any, bias: torch.Tensor) -> Any:
        return canonical.copy(), bias.numpy()

    def size(self, packed: Any) -> int:
        weight = packed[0]
        return weight.data.nbytes + weight.indices.nbytes + weight.indptr.nbytes

    def call(self, x: np.ndarray, packed: Any) -> np.ndarray:
        weight, bias = packed
        return np.add((weight @ x.T).T, bias, order="C")

    def value(self, out: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(out)


class OnnxRuntimeInt8(Zeros):
    """quantize_dynamic of one MatMul and its bias, a scale for each output: a dense kernel, zeros or not."""

    packages = ("onnxruntime", "onnx")
    tolerance = None  # it quantizes x inside: the comparison with fp32 is what there is

    def feed(self, x: torch.Tensor) -> dict[str, np.ndarray]:
        return {"x": x.numpy()}

    def canonical(self, weight: torch.Tensor) -> torch.Tensor:
        self.model = None
        return weight.t().contiguous()

    def pack(self, canonical: torch.Tensor, bias: torch.Tensor) -> Any:
        import onnxruntime as ort

        self.model = self.model or self.quantized(canonical, bias)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        session = ort.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])
        return session, canonical.numel()

    def quantized(self, weight: torch.Tensor, bias: torch.Tensor) -> bytes:
        """The model as a file's bytes; weight [k, n]."""
        import tempfile
        from pathlib import Path

        from onnx import TensorProto, helper, numpy_helper, save
        from onnxruntime.quantization import QuantType, quantize_dynamic

        k, n = weight.shape
        weights = [numpy_helper.from_array(weight.numpy(), "w"), numpy_helper.from_array(bias.numpy(), "b")]
        nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
        ends = [helper.make_tensor_value_info(*end) for end in (("x", 1, ["m", k]), ("y", TensorProto.FLOAT, ["m", n]))]
        graph = helper.make_graph(nodes, "linear", ends[:1], ends[1:], weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "fp32.onnx"), Path(folder, "int8.onnx")
            save(model, source)
            quantize_dynamic(str(source), str(target), per_channel=True, weight_type=QuantType.QInt8)
            return target.read_bytes()

    def size(self, packed: Any) -> int:
        return packed[1]

    def call(self, x: dict[str, np.ndarray], packed: Any) -> np.ndarray:
        return packed[0].run(None, x)[0]

    def value(self, out: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(out)
