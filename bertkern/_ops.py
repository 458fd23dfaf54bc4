"""Every operator of `torch.ops.bertkern`: its shapes for tracing (fakes). Schemas: csrc/bindings.cpp.

Importing this module loads the compiled library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import _cuda, _gradients, _lib, _mobilebert  # noqa: F401  (register gradients and the operators)

ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "tanh": 4, "silu": 5}


# Of `cpu_isa`, AVX2 and AVX-512 F: there 8 features of int8 weights share a list of dwords (csrc/cpu/gemm/gemm.h).
_ORDERING, _LISTED = (1, 2), 8


def _packed_size(n: int, k: int, kind: str, vectors: int = 1) -> int:
    rows = (n + 31) // 32 * 32
    per_dword = {"s8": 4, "bf16": 2, "f32": 1}[kind]
    return 64 + rows * ((k + per_dword - 1) // per_dword) * 4 + vectors * rows * 4


def _lists_size(n: int, k: int) -> int:
    """Index and table of int8 weights that the active ISA orders: csrc/cpu/gemm/linear.h."""
    if torch.ops.bertkern.cpu_isa() not in _ORDERING:
        return 0
    lists = (n + 31) // 32 * (32 // _LISTED)
    return (lists * ((k + 3) // 4) + 1) // 2 * 4 + (lists + 1) * 8


def _shapes(name: str) -> Callable[[Callable[..., Any]], None]:
    """Registers the shapes of an operator's results, for tracing and for tensors on the meta device."""

    def register(shapes: Callable[..., Any]) -> None:
        def checked(*arguments: Any) -> Any:
            # Kernels are asked only where all tensors have data: a stray one on meta leads here.
            devices = {str(item.device) for item in pytree.tree_leaves(arguments) if isinstance(item, Tensor)}
            if len(devices) > 1:
                raise RuntimeError(f"{name}: expected tensors on one device. Got {' and '.join(sorted(devices))}.")
            return shapes(*arguments)

        torch.library.register_fake(f"bertkern::{name}", checked)

    return register


@_shapes("pack_linear")
def _(weight: Tensor, bias: Tensor | None) -> Tensor:
    kind = "bf16" if weight.dtype == torch.bfloat16 else "f32"
    return weight.new_empty(_packed_size(*weight.shape, kind), dtype=torch.uint8)


@_shapes("pack_qlinear")
def _(weight_codes, weight_scale, bias, input_scale=0.0, input_zero_point=0, output_scale=0.0) -> Tensor:
    # Rows with zero points of their own need no first sums: see csrc/cpu/gemm/linear.h.
    own = input_scale == 0 and input_zero_point == 0
    size = _packed_size(*weight_codes.shape, "s8", 3 if own else 4) + _lists_size(*weight_codes.shape)
    return weight_codes.new_empty(size, dtype=torch.uint8)


@_shapes("pack_sparse_linear")
def _(crow, col, values, n, k, weight_scale, bias, input_scale=0.0, input_zero_point=0, output_scale=0.0, form=0):
    if not isinstance(values, FakeTensor):
        raise RuntimeError("pack_sparse_linear: expected tensors with data, which decide the packed size. Got none.")
    size = torch.library.get_ctx().new_dynamic_size()
    return values.new_empty(size, dtype=torch.uint8)


@_shapes("pack_groupwise")
def _(codes, scale, zero, bits, n, k, axis, group_size, bias, operand, input_scale=0.0, input_zero_point=0) -> Tensor:
    if not isinstance(codes, FakeTensor):
        raise RuntimeError("pack_groupwise: expected tensors with data, which decide the packed size. Got none.")
    return codes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


@_shapes("unpack_groupwise")
def _(packed, bits) -> Tensor:
    if not isinstance(packed, FakeTensor):
        raise RuntimeError("unpack_groupwise: expected packed weights with data, which hold their shape. Got none.")
    return packed.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


@_shapes("unpack_linear")
def _(packed) -> tuple[Tensor, Tensor, Tensor]:
    raise RuntimeError("unpack_linear: expected packed weights with data, which hold their shape. Got none.")


@_shapes("linear")
def _(x, packed, out_features, activation=0, residual=None, out_dtype=None) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype or x.dtype)


@_shapes("quantize_rows")
def _(x, scale=0.0, zero_point=0, unsigned=False) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.uint8 if unsigned else torch.int8)
    return codes, x.new_empty(x.shape[:-1], dtype=torch.float32)


@_shapes("qgemm")
def _(codes, scale, zero_point, packed, out_features, activation=0, residual=None, out_dtype=None) -> Tensor:
    return codes.new_empty((codes.shape[0], out_features), dtype=out_dtype or torch.float32)


@_shapes("qgemm_requantize")
def _(codes, scale, zero_point, packed, out_features, activation=0, out_scale=0.0, out_zero_point=0):
    out = codes.new_empty((codes.shape[0], out_features), dtype=torch.uint8 if out_zero_point else torch.int8)
    return out, codes.new_empty(codes.shape[0], dtype=torch.float32)


@_shapes("qgemm_seconds")
def _(codes, scale, packed, out_features, activation, requantize, out_dtype, calls) -> Tensor:
    return codes.new_empty(calls, dtype=torch.float64)


@_shapes("add_layernorm")
def _(x, residual, weight, bias, eps) -> Tensor:
    return x.new_empty(x.shape)


@_shapes("embed")
def _(ids, tables, scales, weight, bias, eps, out_dtype=None) -> Tensor:
    return weight.new_empty((*ids[0].shape, weight.shape[0]), dtype=out_dtype or torch.float32)


@_shapes("attention")
def _(q, k, v, cu_seqlens, key_counts=None, bias=None, head_mask=None, scale=0.0, causal=False) -> Tensor:
    return q.new_empty(q.shape)


@_shapes("qattention")
def _(
    q,
    k,
    v,
    q_scale,
    k_scale,
    v_scale,
    cu_seqlens,
    key_counts=None,
    bias=None,
    head_mask=None,
    scale=0.0,
    causal=False,
    out_dtype=None,
) -> Tensor:
    return q.new_empty(q.shape, dtype=out_dtype or torch.float32)


@_shapes("attention_requantize")
def _(
    q,
    k,
    v,
    q_scale,
    k_scale,
    v_scale,
    cu_seqlens,
    key_counts=None,
    bias=None,
    head_mask=None,
    scale=0.0,
    causal=False,
    out_scale=0.0,
    out_zero_point=0,
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape, dtype=torch.uint8 if out_zero_point else torch.int8)
    return out, q.new_empty(q.shape[0], dtype=torch.float32)


def _encoded(op: str, x: Tensor, mask: Tensor | None, layers: int, all_hidden_states: bool, packed: bool) -> Tensor:
    shape = x.shape
    if packed:
        tokens = x.shape[0] * x.shape[1]
        if mask is not None:
            if not isinstance(x, FakeTensor):
                raise RuntimeError(f"{op}: expected a mask with data, which decides the packed size. Got none.")
            tokens = torch.library.get_ctx().new_dynamic_size()
        shape = (tokens, x.shape[2])
    return x.new_empty((layers, *shape) if all_hidden_states else shape)


@_shapes("encoder")
def _(
    x,
    mask,
    position_bias,
    linears,
    norms,
    heads,
    activation,
    eps,
    keep_padding=False,
    all_hidden_states=False,
    empty_attends=False,
    exact_attention=False,
    head_mask=None,
    packed=False,
):
    return _encoded("encoder", x, mask, len(heads), all_hidden_states, packed)


@_shapes("mobilebert_encoder")
def _(
    x,
    mask,
    linears,
    norms,
    eps,
    heads,
    bottleneck,
    activation,
    keep_padding=False,
    all_hidden_states=False,
    empty_attends=False,
    exact_attention=False,
    head_mask=None,
    packed=False,
):
    return _encoded("mobilebert_encoder", x, mask, len(heads), all_hidden_states, packed)


@_shapes("trigram_embed")
def _(ids, tables, scales, packed, weight, bias, eps=None, trigram=True, out_dtype=None) -> Tensor:
    return weight.new_empty((*ids[0].shape, weight.shape[0]), dtype=out_dtype or torch.float32)


def _codes_of_rows(x: Tensor, step: float, zero_point: int) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes of x's shape in rows of whole 16 bytes, fp32 scales and int32 zero points, none where symmetric."""
    width, rows = x.shape[-1], x.shape[:-1].numel()
    codes = x.new_empty((*x.shape[:-1], (width + 15) // 16 * 16), dtype=torch.int8)[..., :width]
    symmetric = zero_point == 128 or (step > 0 and zero_point == 0)
    zero = x.new_empty(0 if symmetric else rows, dtype=torch.int32)
    return codes, x.new_empty(rows, dtype=torch.float32), zero


def register_cuda() -> None:
    """Shapes of the operators that only GPUs have (csrc/cuda/bindings.cpp), once their library is loaded."""

    @_shapes("quantize_codes")
    def _(x, live, step, zero_point):
        return _codes_of_rows(x, step, zero_point)

    @_shapes("add_layernorm_live")
    def _(x, residual, weight, bias, live, eps):
        return x.new_empty(x.shape)

    @_shapes("add_layernorm_codes")
    def _(x, residual, weight, bias, live, eps, step, zero_point):
        return x.new_empty(x.shape), *_codes_of_rows(x, step, zero_point)

    @_shapes("attention_cuda_forward")
    def _(q, k, v, cu_seqlens, key_counts, numbers, factors, bias, max_length, causal, scale):
        return q.new_empty(q.shape), q.new_empty(2, q.shape[1], q.shape[0], dtype=torch.float32)


if _cuda.reason is None:
    register_cuda()
