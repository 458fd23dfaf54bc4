"""Who computes an operator: a table, a row a provider. Another one is another row and a function that makes it.

`make(problem)` gives a provider's weights and the call that takes them. What it raises is said in the run's `absent`.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .problems import Problem

Made = tuple[Any, Callable[[Any], Tensor]]
BF16, F16, F32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
# bertkern's operators ask it which kernels run: Triton's or the CUDA library's.
VARIABLE = "BERTKERN_GPU_PROVIDER"


@dataclass(frozen=True)
class Provider:
    """A row of the table.

    Attributes:
        op: of `problems.MAKE`.
        name: the column; ours begin with "bertkern".
        make: see above.
        peak: whose share its arithmetic is: bf16, int8 or fp8.
        floor_db: agreement with float64 that is asked for, as a signal to noise ratio.
        needs: modules, and operators of namespace `bertkern` as "ops:NAME", without which it is absent.
        kernels: what $BERTKERN_GPU_PROVIDER is to be: triton or cuda.
        compiled: takes part only in cases that ask for torch.compile.
        card: needs a CUDA device.
        skips: multiplies only what is not zero.
    """

    op: str
    name: str
    make: Callable[[Problem], Made]
    peak: str = "bf16"
    floor_db: float = 40.0
    needs: tuple[str, ...] = ()
    kernels: str = ""
    compiled: bool = False
    card: bool = False
    skips: bool = False

    def lacks(self, device: str) -> str | None:
        """Why it cannot take part here, or None."""
        if self.card and device != "cuda":
            return "needs a CUDA device"
        for need in self.needs:
            if need.startswith("ops:"):
                import bertkern  # noqa: F401 - registers the operators

                name = need.removeprefix("ops:")
                if not hasattr(torch.ops.bertkern, name):
                    return f"bertkern has no operator {name} here"
            elif not _found(need):
                return f"{need} is not installed"
        return None

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Within it, bertkern's operators run its kernels."""
        before = os.environ.get(VARIABLE)
        if self.kernels:
            os.environ[VARIABLE] = self.kernels
        try:
            yield
        finally:
            if self.kernels:
                os.environ.pop(VARIABLE) if before is None else os.environ.__setitem__(VARIABLE, before)


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a submodule, the package itself
        return False


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """By torch.compile, its kernels searched for; graphs are captured by whoever times."""
    return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)


# --- linear layers -------------------------------------------------------------------------------------------------


def _activated(y: Tensor, gelu: bool) -> Tensor:
    return F.gelu(y) if gelu else y


def _torch_linear(dtype: torch.dtype, by_compiler: bool = False) -> Callable[[Problem], Made]:
    def make(p: Problem) -> Made:
        x = p.x.to(dtype)

        def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return _activated(F.linear(x, weight, bias), p.given.get("gelu", False))

        call = compiled(run) if by_compiler else run
        return (p.weight.to(dtype), p.bias.to(dtype)), lambda w: call(x, *w)

    return make


def int8_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric codes of each row and their steps [rows, 1]."""
    step = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (x / step).round().clamp(-127, 127).to(torch.int8), step


def fp8_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 of each row and their steps [rows, 1]."""
    step = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / torch.finfo(FP8).max
    return (x / step).to(FP8), step


def _int_mm(p: Problem) -> Made:
    """Bare products by cuBLASLt, then scales, bias and GELU by torch: as one would write it."""
    (x, x_step), (weight, step) = int8_of(p.x), int8_of(p.weight)
    steps = step.T.contiguous()

    def call(w: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        y = torch._int_mm(x, w[0].t()).float() * x_step * w[1] + w[2]
        return _activated(y, p.gelu).bfloat16()

    return (weight, steps, p.bias), call


def _int_mm_bare(p: Problem) -> Made:
    """Products alone, which no layer is done with; checked after scaling, timed without."""
    (x, x_step), (weight, step) = int8_of(p.x), int8_of(p.weight)
    p.facts["finish"] = lambda y: _activated(y.double() * x_step * step.T + p.bias, p.gelu)
    return weight, lambda w: torch._int_mm(x, w.t())


def _scaled_mm(p: Problem) -> Made:
    (x, x_step), (weight, step) = fp8_of(p.x), fp8_of(p.weight)

    def call(w: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        y = torch._scaled_mm(x, w[0].t(), scale_a=x_step, scale_b=w[1], bias=w[2], out_dtype=BF16)
        return _activated(y, p.gelu)

    return (weight, step.T.contiguous(), p.bias.bfloat16()), call


def _ours_int8(kind: torch.dtype) -> Callable[[Problem], Made]:
    def make(p: Problem) -> Made:
        from bertkern.ops.int8_triton import int8_linear_cuda, pack_int8_weight

        cut = int8_of if kind == torch.int8 else fp8_of
        (x, x_step), (codes, step) = cut(p.x), cut(p.weight)
        packed, _ = pack_int8_weight(codes)
        x_step = x_step.flatten()
        weights = (packed, step.flatten(), p.bias)
        return weights, lambda w: int8_linear_cuda(x, x_step, *w, activation=int(p.gelu), out_dtype=BF16)

    return make


def _library_int8(kind: torch.dtype) -> Callable[[Problem], Made]:
    """The CUDA library's kernel, whatever bertkern would choose."""

    def make(p: Problem) -> Made:
        from bertkern.ops.int8_triton import pack_int8_weight

        cut = int8_of if kind == torch.int8 else fp8_of
        (x, x_step), (codes, step) = cut(p.x), cut(p.weight)
        packed, _ = pack_int8_weight(codes)
        x_step, op = x_step.flatten(), torch.ops.bertkern.cuda_qgemm.default

        def call(w: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            weight, steps, bias = w
            return op(
                x, x_step, None, weight, steps, None, bias, None, None, int(p.gelu), 0.0, 0.0, 0, BF16
            )[0]  # fmt: skip

        return (packed, step.flatten(), p.bias), call

    return make


# --- sparse layers -------------------------------------------------------------------------------------------------


def _ours_sparse(p: Problem) -> Made:
    from bertkern.formats import BsrWeight
    from bertkern.ops.block_sparse import block_index, block_sparse_linear

    weight = BsrWeight.from_dense(p.weight, (p.block, p.block))
    n = p.weight.shape[0]
    return (weight.values, block_index(weight), p.bias), lambda w: block_sparse_linear(p.x, w[0], w[1], n, w[2])


def _torch_bsr(p: Problem) -> Made:
    weight = p.weight.to_sparse_bsr((p.block, p.block))
    return (weight, p.bias), lambda w: F.linear(p.x, *w)


# --- 4-bit layers --------------------------------------------------------------------------------------------------


def _ours_groupwise(p: Problem) -> Made:
    from bertkern.ops.groupwise_planes import pack_for_triton
    from bertkern.ops.groupwise_triton import groupwise_linear_cuda

    planes = pack_for_triton(p.codes)
    return (planes, p.bias), lambda w: groupwise_linear_cuda(p.x, *w, quantized=False)


def _torch_int4(p: Problem) -> Made:
    """torch's own 4-bit kernel, which torchao also calls: asymmetric codes around 8, in bf16."""
    if p.bits != 4:
        raise ValueError("4 bits alone")
    codes = p.codes.unpacked().to(p.device, torch.int32)
    scale, zero = p.codes.scale.to(p.device).float(), p.codes.zeros().to(p.device).float()
    (n, _), x = p.weight.shape, p.x.bfloat16()
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    # w = (code - 8) scale + middle
    both = torch.stack([scale, (8 - zero) * scale], -1).transpose(0, 1).contiguous().bfloat16()
    assert both.shape[1] == n
    bias = p.bias.bfloat16()
    return (packed, both), lambda w: torch.ops.aten._weight_int4pack_mm(x, w[0], p.group, w[1]) + bias


def _bitsandbytes(p: Problem) -> Made:
    """NF4 of the same weight, in blocks of the group's size: other codes of as many bits."""
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(p.weight, blocksize=p.group, quant_type="nf4")
    p.facts["own"] = F.linear(p.x.double(), bnb.dequantize_4bit(packed, state).double(), p.bias.double())
    import bitsandbytes

    bias = p.bias.half()
    return packed, lambda w: bitsandbytes.matmul_4bit(p.x, w.t(), state, bias=bias)


def _torchao(p: Problem) -> Made:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = torch.nn.Linear(*p.weight.shape[::-1], device=p.device, dtype=BF16)
    with torch.no_grad():
        layer.weight.copy_(p.weight)
        layer.bias.copy_(p.bias)
    quantize_(layer, Int4WeightOnlyConfig(group_size=p.group))
    x = p.x.bfloat16()
    return (layer.weight, layer.bias), lambda w: F.linear(x, *w)


def _gemlite(p: Problem) -> Made:
    from gemlite.helper import A16Wn

    codes = p.codes.unpacked().to(p.device, torch.uint8)
    scale, zero = p.codes.scale.to(p.device).half(), p.codes.zeros().to(p.device).half()
    layer = A16Wn(device=p.device, dtype=F16).from_weights(codes, scale, zero, p.bits, p.group, p.bias.half())
    held = layer.W_q, layer.scales, layer.zeros

    def call(w: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        layer.W_q, layer.scales, layer.zeros = w
        return layer(p.x)

    return held, call


# --- attention -----------------------------------------------------------------------------------------------------


def _ours_attention(kernels: str) -> Callable[[Problem], Made]:
    def make(p: Problem) -> Made:
        from bertkern.ops.attention_triton import attention_cuda

        # Where there is but one, nothing can be asked for.
        several = p.device == "cuda" and "provider" in inspect.signature(attention_cuda).parameters
        options = {"provider": kernels} if several else {}
        return p.qkv, lambda qkv: attention_cuda(*qkv.unbind(1), p.ends, p.length, **options)

    return make


def _sdpa(dtype: torch.dtype) -> Callable[[Problem], Made]:
    def make(p: Problem) -> Made:
        padded = p.qkv.to(dtype).unflatten(0, (p.batch, p.length)).permute(2, 0, 3, 1, 4).contiguous()
        p.facts["finish"] = lambda y: y.transpose(1, 2).flatten(0, 1)
        return padded, lambda qkv: F.scaled_dot_product_attention(*qkv.unbind(0))

    return make


# --- rows ----------------------------------------------------------------------------------------------------------


def _torch_rows(by_compiler: bool) -> Callable[[Problem], Made]:
    def make(p: Problem) -> Made:
        def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.layer_norm(x + residual, weight.shape, weight, bias, 1e-12)

        call = compiled(run) if by_compiler else run
        return (p.weight.bfloat16(), p.bias.bfloat16()), lambda w: call(p.x, p.residual, *w)

    return make


def _library_rows(p: Problem) -> Made:
    op = torch.ops.bertkern.add_layernorm_live.default
    return (p.weight, p.bias), lambda w: op(p.x, p.residual, *w, None, 1e-12)


def _ours_rows(p: Problem) -> Made:
    from bertkern.ops.rowwise_triton import add_layernorm_cuda

    return (p.weight, p.bias), lambda w: add_layernorm_cuda(p.x, p.residual, *w, 1e-12)


INT8_DB, FP8_DB, HALF_DB = 30.0, 25.0, 40.0
TABLE = (
    # "auto": Triton or the CUDA library, as a user's call has it.
    Provider("gemm", "bertkern-auto-int8", _ours_int8(torch.int8), "int8", INT8_DB, ("bertkern.ops.int8_triton",)),
    Provider("gemm", "bertkern-cuda-int8", _library_int8(torch.int8), "int8", INT8_DB,
             ("bertkern.ops.int8_triton", "ops:cuda_qgemm"), card=True),
    Provider("gemm", "bertkern-auto-fp8", _ours_int8(FP8), "fp8", FP8_DB, ("bertkern.ops.int8_triton",)),
    Provider("gemm", "bertkern-cuda-fp8", _library_int8(FP8), "fp8", FP8_DB,
             ("bertkern.ops.int8_triton", "ops:cuda_qgemm"), card=True),
    Provider("gemm", "torch-bf16", _torch_linear(BF16)),
    Provider("gemm", "torch-fp16", _torch_linear(F16)),
    Provider("gemm", "torch-compile-bf16", _torch_linear(BF16, True), compiled=True, card=True),
    Provider("gemm", "torch-int_mm", _int_mm, "int8", INT8_DB),
    Provider("gemm", "cublaslt-int8-bare", _int_mm_bare, "int8", INT8_DB),
    Provider("gemm", "torch-scaled_mm-fp8", _scaled_mm, "fp8", FP8_DB),
    Provider("sparse", "bertkern-triton-bf16", _ours_sparse, kernels="triton", skips=True),
    Provider("sparse", "bertkern-cuda-bf16", _ours_sparse, kernels="cuda", skips=True, card=True,
             needs=("ops:block_sparse_linear_mma",)),
    Provider("sparse", "torch-bf16", _torch_linear(BF16)),
    Provider("sparse", "torch-bsr-bf16", _torch_bsr, skips=True, card=True),
    Provider("groupwise", "bertkern-triton-int4", _ours_groupwise, kernels="triton"),
    Provider("groupwise", "bertkern-cuda-int4", _ours_groupwise, kernels="cuda", card=True,
             needs=("ops:groupwise_linear_mma",)),
    Provider("groupwise", "torch-fp16", _torch_linear(F16)),
    Provider("groupwise", "torch-int4", _torch_int4, floor_db=30.0, card=True),
    Provider("groupwise", "bitsandbytes-nf4", _bitsandbytes, needs=("bitsandbytes",), card=True),
    Provider("groupwise", "torchao-int4", _torchao, floor_db=15.0, needs=("torchao",), card=True),
    Provider("groupwise", "gemlite-int4", _gemlite, needs=("gemlite",), card=True),
    Provider("attention", "bertkern-triton-bf16", _ours_attention("triton")),
    Provider("attention", "bertkern-cuda-bf16", _ours_attention("cuda"), card=True,
             needs=("ops:attention_cuda_forward",)),
    Provider("attention", "torch-sdpa-bf16", _sdpa(BF16)),
    Provider("attention", "torch-sdpa-fp16", _sdpa(F16)),
    Provider("rowwise", "bertkern-triton-bf16", _ours_rows, needs=("bertkern.ops.rowwise_triton",)),
    Provider("rowwise", "bertkern-cuda-bf16", _library_rows, card=True, needs=("ops:add_layernorm_live",)),
    Provider("rowwise", "torch-bf16", _torch_rows(False)),
    Provider("rowwise", "torch-compile-bf16", _torch_rows(True), compiled=True, card=True),
)  # fmt: skip


def of(op: str) -> list[Provider]:
    """The table's rows of an operator."""
    return [provider for provider in TABLE if provider.op == op]


def agreement_db(problem: Problem, got: Tensor) -> float:
    """Signal to noise ratio of a result to what is expected of it; -1 where something is not finite."""
    finish, expected = problem.facts.pop("finish", None), problem.facts.pop("own", problem.expected)
    got = (finish(got) if finish else got).double()
    if got.shape != expected.shape:
        raise ValueError(f"expected a result of shape {list(expected.shape)}. Got {list(got.shape)}.")
    if not bool(got.isfinite().all()):
        return -1.0
    noise, signal = float((got - expected).square().sum()), float(expected.square().sum())
    return 200.0 if noise == 0 else min(200.0, 10 * torch.log10(torch.tensor(signal / noise)).item())
