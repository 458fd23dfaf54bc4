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
