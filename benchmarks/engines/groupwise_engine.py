"""One linear layer with group-wise low-bit weights. Every provider holds the same weights, exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear

from ..groupings import SCALE, Grouping, parse_groupings
from .linear_engine import Bertkern, Linear


class Groups(Linear):
    """Base: codes, scales and what they stand for. Subclasses define `hold(codes, bias) -> packed`."""

    def prepare(self, m: int, n: int, k: int, grouping: str, copies: int = 1) -> None:
        """M rows, weight [n, k]; `copies` > 1 rotates over as many weights, so that none is in a cache when used."""
        (self.grouping,) = parse_groupings(grouping)
        self.check(self.grouping, n, k)
        rng = np.random.default_rng(m * 7919 + n * 31 + k)
        x = torch.from_numpy(rng.standard_normal((m, k), np.float32))
        bias = torch.from_numpy(rng.standard_normal(n, np.float32))
        codes = torch.from_numpy(self.grouping.draw(n, k))
        self.n, self.k, self.epilogue, self.next = n, k, "fp32", 0
        self.input = self.feed(x)
        self.packed = [self.hold(codes.clone(), bias) for _ in range(copies)]

    def check(self, grouping: Grouping, n: int, k: int) -> None:
        """Raises ValueError where the kernel has no such grouping."""

    def middle(self) -> torch.Tensor:
        """2^(bits - 1) of each element, broadcastable."""
        bits = torch.from_numpy(self.grouping.bits_of(self.n, self.k)).repeat_interleave(
            self.grouping.group_size(self.n)
        )
        middle = 2.0 ** (bits - 1)
        return middle[: self.n, None] if self.grouping.axis == "n" else middle[None, : self.k]

    def dense(self, codes: torch.Tensor) -> torch.Tensor:
        return (codes.float() - self.middle()) * SCALE

    def hold(self, codes: torch.Tensor, bias: torch.Tensor) -> Any:
        raise NotImplementedError


class TorchFp32(Groups):
    """F.linear on the dense weights; the reference."""

    def hold(self, codes: torch.Tensor, bias: torch.Tensor) -> Any:
        return self.dense(codes), bias

    def call(self, x: torch.Tensor, packed: Any) -> torch.Tensor:
        with torch.inference_mode():
            return linear(x, *packed)


class Ours(Groups, Bertkern):
    """Base of our own: int8 codes in."""

    def weight(self, codes: torch.Tensor) -> Any:
        from bertkern.formats.groupwise import pack_codes

        grouping, n, k = self.grouping, self.n, self.k
        size, bits = grouping.group_size(n), torch.from_numpy(grouping.bits_of(n, k))
        shape = (len(bits),) if grouping.axis == "n" else (n, len(bits))
        return pack_codes(codes, torch.full(shape, SCALE), (2.0 ** (bits - 1)).expand(shape), bits, grouping.axis, size)


class Groupwise(Ours):
    """The product alone, as it runs inside the encoder, timed inside the operator."""

    def hold(self, codes: torch.Tensor, bias: torch.Tensor) -> Any:
        return self.ops.pack_groupwise(self.weight(codes), bias)

    def turn(self, seconds: float) -> list[float]:
        codes, scale = self.input

        def time(calls: int) -> list[float]:
            return self.ops.qgemm_seconds(codes, scale, self.packed, self.n, calls=calls)

        once = max(time(len(self.packed) + 3)[-1], 1e-7)
        return [s * 1e3 for s in time(max(1, min(100_000, int(seconds / once))))]


class Int8(Groupwise):
    """Our own int8 kernel on the same weights, per output channel where they fit."""

    def hold(self, codes: torch.Tensor, bias: torch.Tensor) -> Any:
        centred = (codes.float() - self.middle()).clamp(-127, 127).to(torch.int8)
        return self.ops.pack_qlinear(centred, torch.full((self.n,), SCALE), bias)


class GroupwiseFp32(Ours):
    """fp32 in, weights dequantized a panel at a time; through the Python call."""

    operand = torch.float32

    def feed(self, x: torch.Tensor) -> Any:
        return x.to(self.operand)

    def hold(self, codes: torch.Tensor, bias: torch.Tensor) -> Any:
        return self.ops.pack_groupwise(self.weight(codes), bias, operand=self.operand)

    def call(self, x: Any, packed: Any) -> Any:
        return self.ops.linear(x, packed, self.n)


class GroupwiseBf16(GroupwiseFp32):
    """The same with bf16 in and out."""

    operand = torch.bfloat16


class FourBits(Groups):
    """Base of kernels that have 4 bits in groups along K."""

    def check(self, grouping: Grouping, n: int, k: int) -> None:
        if grouping.bits != (4,) or k % self.length(grouping):
            raise ValueError(f"has no grouping {str(grouping)!r}")

    def length(self, grouping: Grouping) -> int:
        return grouping.size if grouping.axis == "k" else 64


class TorchInt4(FourBits):
    """torch's own 4-bit CPU linear: bf16 in, weights dequantized inside; bias as a separate addition."""

    def feed(self, x: torch.Tensor) -> Any:
        return x.bfloat16()

    def hold(self, codes: torch.Tensor, bias: torch.Tensor) -> Any:
        length = self.length(self.grouping)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
        scales = torch.full((self.k // length, self.n, 1), SCALE, dtype=torch.bfloat16)
        # w = (code - 8) * scale + zero
        return packed, length, torch.cat([scales, torch.zeros_like(scales)], -1), bias.bfloat16()

    def call(self, x: Any, packed: Any) -> Any:
        with torch.inference_mode():
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, *packed[:3]).add_(packed[3])


class OnnxRuntimeInt4(FourBits):
    """MatMulNBits with accuracy_level 4: fp32 in, int8 activations inside."""

    packages = ("onnxruntime", "onnx")

    def feed(self, x: torch.Tensor) -> Any:
        return {"x": x.numpy()}

    def hold(self, codes: torch.Tensor, bias: torch.Tensor) -> Any:
        import onnxruntime as ort
        from onnx import TensorProto, helper, numpy_helper

        length = self.length(self.grouping)
        blocks = codes.numpy().reshape(self.n, self.k // length, length)
        pairs = (blocks[..., ::2] | blocks[..., 1::2] << 4).astype(np.uint8)
        scales = np.full(self.n * (self.k // length), SCALE, np.float32)
        arrays = {"w": pairs, "s": scales, "b": bias.numpy()}
        node = helper.make_node(
            "MatMulNBits",
            ["x", "w", "s", "", "", "b"],
            ["y"],
            domain="com.microsoft",
            K=self.k,
            N=self.n,
            bits=4,
            block_size=length,
            accuracy_level=4,
        )
        ends = [
            helper.make_tensor_value_info(*end)
            for end in (("x", TensorProto.FLOAT, ["m", self.k]), ("y", TensorProto.FLOAT, ["m", self.n]))
        ]
        weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
        graph = helper.make_graph([node], "linear", ends[:1], ends[1:], weights)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def call(self, x: Any, packed: Any) -> Any:
        return packed.run(None, x)[0]

    def value(self, out: Any) -> torch.Tensor:
        return torch.from_numpy(out)
