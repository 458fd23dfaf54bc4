"""What a kernel's file says of each form that it launches: read by the tests, the plan and the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

# What a block may have of shared memory on every card since sm_80, the small ones (sm_86, 89, 120) included.
SHARED_BYTES = 99 * 1024
# How fp32 operands are multiplied: exactly, as three products of TF32; AMD's matrix cores take fp32 as it is.
PRECISION = tl.constexpr("tf32x3" if torch.version.hip is None else "ieee")
# Triton's names of what a tensor holds.
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
}
# The instructions that multiply operands of a dtype, by compute capability; {} in sm_90's is how wide the result is.
_MULTIPLYING = {
    torch.float16: {80: "HMMA.16816.F32", 90: "HGMMA.64x{}x16.F32", 100: "UTCHMMA"},
    torch.bfloat16: {80: "HMMA.16816.F32.BF16", 90: "HGMMA.64x{}x16.F32.BF16", 100: "UTCHMMA"},
    torch.float32: {80: "HMMA.1688.F32.TF32", 90: "HGMMA.64x{}x8.F32.TF32", 100: "UTCHMMA"},
    # sm_80 has no float8.
    torch.float8_e4m3fn: {90: "QGMMA.64x{}x32.F32.E4M3.E4M3", 100: "UTCQMMA"},
    torch.int8: {
        80: "IMMA.16832.S8.S8",
        90: "IGMMA.64x{}x32.S8.S8",
        # Triton knows sm_100's own one from 3.8 on.
        100: "UTCIMMA" if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else "IMMA.16832.S8.S8",
    },
}
# Of kernels without products.
NO_PRODUCTS: Mapping[int, frozenset[str]] = dict.fromkeys((80, 90, 100), frozenset())


def opcodes(dtype: torch.dtype, rows: int, *widths: int) -> dict[int, frozenset[str]]:
    """What each generation multiplies with, where a tile has `rows` rows and sm_90's instructions are of these widths.

    Fewer than 64 rows take sm_80's instruction everywhere.
    """
    names = _MULTIPLYING[dtype]
    if rows < 64:
        return dict.fromkeys(names, frozenset({names[80]}))
    return {capability: frozenset(name.format(width) for width in widths) for capability, name in names.items()}


@dataclass(frozen=True, eq=False)
class Entry:
    """One compiled form of a kernel.

    Attributes:
        name: unique in its table.
        function: the `@triton.jit` function.
        signature: Triton's type of every argument that is passed at run time, in any order.
        constexprs: the other arguments.
        options: num_warps, num_stages and what else Triton's compiler takes.
        aligned: run-time arguments that are multiples of 16: bytes for pointers, elements for strides.
        opcodes: the SASS instructions that do the multiplying, by compute capability (80, 90, 100).
        shapes: problems for the interpreter: (T, N, K) of a linear layer, the sequences' lengths of attention.
        fetches_ahead: whether operands come ahead of their use, in 16 bytes at a time: where rows begin at multiples.
    """

    name: str
    function: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    options: Mapping[str, Any]
    aligned: tuple[str, ...]
    opcodes: Mapping[int, frozenset[str]]
    shapes: tuple[tuple[int, ...], ...]
    fetches_ahead: bool = True

    def compile(self, capability: int) -> CompiledKernel:
        """The kernel for a compute capability, 10 * major + minor; needs no GPU."""
        return self.compile_for(GPUTarget("cuda", capability, 32))

    def compile_for(self, target: GPUTarget) -> CompiledKernel:
        """The kernel for a target of Triton's, also AMD's; needs no GPU."""
        names = self.function.arg_names
        unknown = set(names) ^ (set(self.signature) | set(self.constexprs))
        if unknown:
            raise ValueError(f"{self.name}: expected each of {names} once. Got {sorted(unknown)} wrong.")
        signature = {name: self.signature.get(name, "constexpr") for name in names}
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in self.aligned}
        source = ASTSource(self.function, signature, dict(self.constexprs), attributes)
        return triton.compile(source, target=target, options=dict(self.options))
