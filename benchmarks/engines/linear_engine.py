"""One linear layer: bertkern's int8 product beside torch's. Every provider draws the same data from a case's shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.functional import gelu, linear

from .. import peak
from . import Engine

EPILOGUES = ("fp32", "bf16", "gelu+q8")  # bias + fp32 out, bias + bf16 out, bias + GELU + requantization by row


def draw(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [m, k], weight [n, k] and bias [n], fp32: the same in every process."""
    rng = np.random.default_rng(m * 7919 + n * 31 + k)
    x = torch.from_numpy(rng.standard_normal((m, k), np.float32))
    weight = torch.from_numpy(rng.standard_normal((n, k), np.float32)) * 0.05
    return x, weight, torch.from_numpy(rng.standard_normal(n, np.float32))


class Linear(Engine):
    """Base: data, rotation over copies of the weight, and the fp32 formula.

    Subclasses define `pack(weight, bias) -> anything`, `feed(x) -> anything` (done outside the timing) and
    `call(input, packed) -> output`; `epilogues` lists what they have.
    """

    packages = ("torch",)
    epilogues: tuple[str, ...] = EPILOGUES

    def __init__(self, threads: int):
        super().__init__()
        self.threads = threads
        torch.set_num_threads(threads)

    def prepare(self, m: int, n: int, k: int, epilogue: str, copies: int = 1) -> None:
        """M rows, weight [n, k]; `copies` > 1 rotates over as many weights, so that none is in a cache when used."""
        if epilogue not in self.epilogues:
            raise ValueError(f"has no epilogue {epilogue!r}")
        x, weight, bias = draw(m, n, k)
        self.n, self.epilogue, self.next = n, epilogue, 0
        self.input = self.feed(x)
        self.packed = [self.pack(weight.clone(), bias) for _ in range(copies)]

    def run(self) -> Any:
        self.next = (self.next + 1) % len(self.packed)
        return self.call(self.input, self.packed[self.next])

    def outputs(self) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return {"y": self.value(self.run()).float().numpy()}

    def value(self, out: Any) -> torch.Tensor:
        return out

    def feed(self, x: torch.Tensor) -> Any:
        return x

    def pack(self, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        return weight, bias

    def call(self, x: Any, packed: Any) -> Any:
        raise NotImplementedError


class TorchFp32(Linear):
    """F.linear, then GELU where asked; it has nothing to requantize to, which only favours it."""

    def call(self, x: torch.Tensor, packed: Any) -> torch.Tensor:
        with torch.inference_mode():
            y = linear(x, *packed)
            return gelu(y) if self.epilogue == "gelu+q8" else y


class TorchBf16(TorchFp32):
    epilogues = ("bf16", "gelu+q8")

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16()

    def pack(self, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        return weight.bfloat16(), bias.bfloat16()


class TorchInt8(Linear):
    """What quantize_dynamic puts in a Linear's place: fp32 in, fp32 out, quantizes its input on every call."""

    epilogues = ("fp32", "gelu+q8")

    def pack(self, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        import warnings

        warnings.simplefilter("ignore")
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data, layer.bias.data = weight, bias
        layer.qconfig = torch.ao.quantization.default_dynamic_qconfig
        return torch.ao.nn.quantized.dynamic.Linear.from_float(layer)

    def call(self, x: torch.Tensor, packed: Any) -> torch.Tensor:
        with torch.inference_mode():
            y = packed(x)
            return gelu(y) if self.epilogue == "gelu+q8" else y


class Bertkern(Linear):
    """int8 codes in: the product alone, as it runs inside the encoder."""

    packages = ("torch",)

    def __init__(self, threads: int):
        super().__init__(threads)
        from bertkern import ops

        self.ops = ops
        self.notes["isa"] = peak.isa()

    def versions(self) -> dict[str, str]:
        import bertkern

        return {"bertkern": bertkern.__version__, **super().versions()}

    def feed(self, x: torch.Tensor) -> Any:
        return self.ops.quantize_rows(x)

    def pack(self, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        from bertkern.formats.int8 import quantize_weight

        w = quantize_weight(weight)
        return self.ops.pack_qlinear(w.codes, w.scale, bias)

    def call(self, x: Any, packed: Any) -> Any:
        codes, scale = x
        if self.epilogue == "gelu+q8":
            return self.ops.qgemm_requantize(codes, scale, 0, packed, self.n, activation="gelu")
        dtype = torch.bfloat16 if self.epilogue == "bf16" else None
        return self.ops.qgemm(codes, scale, 0, packed, self.n, out_dtype=dtype)

    def value(self, out: Any) -> torch.Tensor:
        return out if isinstance(out, torch.Tensor) else out[0].float() * out[1].reshape(-1, 1)


class BertkernKernel(Bertkern):
    """The same product timed inside the operator: without the call through Python and dispatch, and the allocation."""

    def turn(self, seconds: float) -> list[float]:
        codes, scale = self.input
        options = {
            "activation": "gelu" if self.epilogue == "gelu+q8" else "none",
            "requantize": self.epilogue == "gelu+q8",
            "out_dtype": torch.bfloat16 if self.epilogue == "bf16" else torch.float32,
        }

        def time(calls: int) -> list[float]:
            return self.ops.qgemm_seconds(codes, scale, self.packed, self.n, calls=calls, **options)

        warm = len(self.packed) + 3
        once = max(time(warm)[-1], 1e-7)
        return [s * 1e3 for s in time(max(1, min(100_000, int(seconds / once))))]


class BertkernLinear(Bertkern):
    """fp32 in: quantizes its rows itself, like torch's quantized Linear."""

    def feed(self, x: torch.Tensor) -> Any:
        return x

    def call(self, x: Any, packed: Any) -> Any:
        if self.epilogue == "gelu+q8":
            return self.ops.quantize_rows(self.ops.linear(x, packed, self.n, activation="gelu"))
        dtype = torch.bfloat16 if self.epilogue == "bf16" else None
        return self.ops.linear(x, packed, self.n, out_dtype=dtype)
