"""Every operator of `torch.ops.bertkern`: shapes for tracing (fakes) and gradients. Schemas: csrc/bindings.cpp.

Importing this module loads the compiled library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _lib  # noqa: F401  (registers the operators)

ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "tanh": 4, "silu": 5}


def _packed_size(n: int, k: int, kind: str) -> int:
    rows = (n + 31) // 32 * 32
    per_dword = {"s8": 4, "bf16": 2, "f32": 1}[kind]
    return 64 + rows * ((k + per_dword - 1) // per_dword) * 4 + (4 if kind == "s8" else 1) * rows * 4


@torch.library.register_fake("bertkern::pack_linear")
def _(weight: Tensor, bias: Tensor | None) -> Tensor:
    kind = "bf16" if weight.dtype == torch.bfloat16 else "f32"
    return weight.new_empty(_packed_size(*weight.shape, kind), dtype=torch.uint8)


@torch.library.register_fake("bertkern::pack_qlinear")
def _(weight_codes, weight_scale, bias, input_scale=0.0, input_zero_point=0, output_scale=0.0) -> Tensor:
    return weight_codes.new_empty(_packed_size(*weight_codes.shape, "s8"), dtype=torch.uint8)


@torch.library.register_fake("bertkern::linear")
def _(x, packed, out_features, activation=0, residual=None, out_dtype=None) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype or x.dtype)


@torch.library.register_fake("bertkern::quantize_rows")
def _(x, scale=0.0, zero_point=0, unsigned=False) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.uint8 if unsigned else torch.int8)
    return codes, x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("bertkern::qgemm")
def _(codes, scale, zero_point, packed, out_features, activation=0, residual=None, out_dtype=None) -> Tensor:
    return codes.new_empty((codes.shape[0], out_features), dtype=out_dtype or torch.float32)


@torch.library.register_fake("bertkern::qgemm_requantize")
def _(codes, scale, zero_point, packed, out_features, activation=0, out_scale=0.0, out_zero_point=0):
    out = codes.new_empty((codes.shape[0], out_features), dtype=torch.uint8 if out_zero_point else torch.int8)
    return out, codes.new_empty(codes.shape[0], dtype=torch.float32)


@torch.library.register_fake("bertkern::qgemm_seconds")
def _(codes, scale, packed, out_features, activation, requantize, out_dtype, calls) -> Tensor:
    return codes.new_empty(calls, dtype=torch.float64)


@torch.library.register_fake("bertkern::add_layernorm")
def _(x, residual, weight, bias, eps) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("bertkern::embed")
def _(ids, tables, scales, weight, bias, eps, out_dtype=None) -> Tensor:
    return weight.new_empty((*ids[0].shape, weight.shape[0]), dtype=out_dtype or torch.float32)


@torch.library.register_fake("bertkern::encoder")
def _(x, mask, position_bias, linears, norms, heads, activation, eps, keep_padding=False, all_hidden_states=False):
    return x.new_empty((len(heads), *x.shape) if all_hidden_states else x.shape)


def _inference_only(name: str, advice: str):
    def backward(ctx, *grads):
        raise RuntimeError(f"bertkern::{name} has no gradient of its own. {advice}")

    torch.library.register_autograd(f"bertkern::{name}", backward)


_UNFUSED = "Call model.train(), or bertkern.restore(model), to differentiate through the layers."
for _name in ("linear", "qgemm", "add_layernorm", "embed", "encoder"):
    _inference_only(_name, _UNFUSED)
