"""A linear layer in kept blocks and its gradients, as operators that autograd, torch.compile and autocast know.

    block_sparse_linear           y = x W^T + b         x [..., K] -> [..., N]
    block_sparse_input_gradient   dx = dy W             dy [..., N] -> [..., K]
    block_sparse_values_gradient  dvalues[b] = dy^T x   at the blocks that are kept alone -> [nnzb, br, bc]

Each is bilinear and the gradient of each is made of the other two, so any derivative is exact and reads kept blocks
only. On CUDA with blocks of 16 to 128 a side they are Triton kernels (kernels/block_sparse.py), or the forward pass is
one of the CUDA library (csrc/cuda/block_sparse), as bertkern/ops/linear_providers.py chooses; everything else, float64
among it, is plain PyTorch: a matrix product a block row.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _triton
from ..formats.bsr import BsrWeight
from . import linear_providers as providers
from .arguments import explained

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# --- the pattern ---------------------------------------------------------------------------------------------------


class _Pattern(NamedTuple):
    """The parts of an index (see `block_index`), and the sizes that it was cut with."""

    crow: Tensor
    col: Tensor
    row: Tensor
    ccol: Tensor
    number_row: Tensor
    number: Tensor
    shape: tuple[int, int]
    block: tuple[int, int]


def _sizes(shape: Sequence[int], block: Sequence[int], kept: int) -> list[int]:
    rows, columns = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    return [rows + 1, kept, kept, columns + 1, kept, kept]


def _cut(index: Tensor, shape: tuple[int, int], values_shape: Sequence[int]) -> _Pattern:
    kept, *block = values_shape
    return _Pattern(*index.split(_sizes(shape, block, kept)), shape, (block[0], block[1]))


def block_index(weight: BsrWeight) -> Tensor:
    """The pattern of `weight` for the operators below: one int32 tensor, on the weight's device.

    crow [R + 1], col [nnzb] and row [nnzb] tell the blocks of each block row; ccol [C + 1] and number [nnzb] those of
    each block column, by their place in values, and number_row [nnzb] their block rows. The operators read by it
    without looking again, so it is made of a checked weight, here.

    Raises:
        ValueError: `BsrWeight.check` finds something wrong.
    """
    crow, col, values = weight.check().crow, weight.col, weight.values
    columns = -(-weight.shape[1] // values.shape[2])
    row = torch.repeat_interleave(crow.diff())
    number = torch.argsort(col, stable=True)
    ccol = torch.zeros(columns + 1, dtype=torch.int64, device=col.device)
    torch.cumsum(torch.bincount(col, minlength=columns), 0, out=ccol[1:])
    parts = (crow, col, row, ccol, row[number], number)
    return torch.cat([part.to(torch.int32) for part in parts])


def index_size(shape: Sequence[int], block: Sequence[int], kept: int) -> int:
    """How many numbers `block_index` gives for a weight of this shape with `kept` blocks."""
    return sum(_sizes(shape, block, kept))


# --- plain PyTorch -------------------------------------------------------------------------------------------------


def _upright(x: Tensor, blocks: int, side: int) -> Tensor:
    """x [T, width] as [blocks, side, T], zero beyond the width: the rows of a block then lie side by side."""
    made = x.new_zeros(blocks * side, x.shape[0])
    made[: x.shape[1]] = x.t()
    return made.view(blocks, side, x.shape[0])


def _flat(blocks: Tensor, width: int) -> Tensor:
    """The inverse of `_upright`."""
    return blocks.flatten(0, 1)[:width].t().contiguous()


def _multiply(x: Tensor, values: Tensor, bias: Tensor | None, pattern: _Pattern, transposed: bool) -> Tensor:
    """x W^T + bias, or x W, for x [T, width]: one product for each block row (column) of W."""
    if transposed:
        starts, inner, (inside, side), width = pattern.ccol, pattern.number_row, pattern.block, pattern.shape[1]
    else:
        starts, inner, (side, inside), width = pattern.crow, pattern.col, pattern.block, pattern.shape[0]
    ends = starts.tolist()
    x = _upright(x, (pattern.crow if transposed else pattern.ccol).numel() - 1, inside)
    y = x.new_zeros(len(ends) - 1, side, x.shape[2])
    if bias is not None:
        y += torch.nn.functional.pad(bias, (0, y.shape[0] * side - width)).view(-1, side, 1)
    for out, begin, end in zip(y, ends[:-1], ends[1:], strict=True):
        if begin == end:
            continue
        if transposed:
            weight = values[pattern.number[begin:end]].permute(2, 0, 1)
        else:
            weight = values[begin:end].permute(1, 0, 2)
        operand = x[inner[begin:end]].flatten(0, 1)
        torch.addmm(out, weight.reshape(side, -1), operand, out=out)
    return _flat(y, width)


def _multiply_sampled(dy: Tensor, x: Tensor, pattern: _Pattern) -> Tensor:
    """dy^T x at the kept blocks for dy [T, N] and x [T, K]: one product for each block row."""
    (n, k), (br, bc) = pattern.shape, pattern.block
    rows, columns = pattern.crow.numel() - 1, pattern.ccol.numel() - 1
    ends = pattern.crow.tolist()
    dy, x = _upright(dy, rows, br), _upright(x, columns, bc)
    made = x.new_empty(pattern.col.numel(), br, bc)
    for part, begin, end in zip(dy, ends[:-1], ends[1:], strict=True):
        if begin == end:
            continue
        found = part @ x[pattern.col[begin:end]].flatten(0, 1).t()
        made[begin:end] = found.view(br, end - begin, bc).permute(1, 0, 2)
    # 0 x NaN is NaN, and what lies outside of the weight stays zero.
    if n % br:
        made[ends[-2] :, n % br :] = 0
    if k % bc:
        made[:, :, k % bc :].masked_fill_((pattern.col == columns - 1)[:, None, None], 0)
    return made


# --- Triton --------------------------------------------------------------------------------------------------------


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        return _triton.kernels("block_sparse")
    except ImportError as error:
        warnings.warn(f"block_sparse_linear: runs in plain PyTorch, slowly: {error}", stacklevel=2)
        return None


@functools.cache
def _tensor_cores(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _triton_for(values: Tensor, block: tuple[int, int]) -> ModuleType | None:
    """The kernels, where they fit."""
    if not values.is_cuda or not _tensor_cores(values.device):
        return None
    found = _kernels()
    return found if found is not None and found.supported(block, values.dtype) else None


def _weight_index(found: ModuleType, pattern: _Pattern) -> Any:
    return found.WeightIndex(**{name: getattr(pattern, name) for name in found.WeightIndex._fields})


# --- the CUDA library ----------------------------------------------------------------------------------------------

SIDES = (32, 64, 128)


def _misfit(x: Tensor, block: tuple[int, int], dtypes: Sequence[torch.dtype]) -> str | None:
    """Why the CUDA library's kernels do not take x and a weight in such blocks, or None."""
    if block[0] not in SIDES or block[1] not in SIDES:
        return f"there is no kernel for blocks of {block[0]} x {block[1]}"
    return providers.dtype_misfit(x, dtypes) or providers.rows_misfit(x)


@providers.fake("block_sparse_linear_mma")
def _(x, values, bias, index, n, activation=0, residual=None, out_dtype=None) -> Tensor:
    return x.new_empty(*x.shape[:-1], n, dtype=out_dtype or x.dtype)


# --- the operators -------------------------------------------------------------------------------------------------


def _expect(op: str, what: str, expected: str, got: object, fits: bool) -> None:
    if not fits:
        raise RuntimeError(f"{op}: expected {what} {expected}. Got {got}.")


def _check(op: str, tensors: dict[str, Tensor], values_shape: Sequence[int], index: Tensor, n: int, k: int) -> None:
    """`tensors` share a dtype; the first of them and `index` share a device; `index` is as long as the sizes ask."""
    (first, x), *others = tensors.items()
    _expect(op, first, f"of dtype {', '.join(map(str, FLOATS))}", x.dtype, x.dtype in FLOATS)
    for name, tensor in others:
        _expect(op, name, f"of {first}'s dtype {x.dtype}", tensor.dtype, tensor.dtype == x.dtype)
    for name, tensor in (*others, ("index", index)):
        _expect(op, name, f"on {x.device}", tensor.device, tensor.device == x.device)
    got = list(values_shape)
    _expect(op, "values", "of shape [nnzb, br, bc]", got, len(got) == 3 and got[1] > 0 and got[2] > 0)
    size = index_size((n, k), got[1:], got[0])
    wrong = f"{index.dtype} of shape {list(index.shape)}"
    _expect(op, "index", f"int32 of shape [{size}]", wrong, index.dtype == torch.int32 and index.shape == (size,))


def _check_linear(x: Tensor, values: Tensor, bias: Tensor | None, index: Tensor, n: int) -> None:
    op = "block_sparse_linear"
    _expect(op, "x", "of shape [..., K]", list(x.shape), x.dim() > 0)
    tensors = {"x": x, "values": values} | ({} if bias is None else {"bias": bias})
    _check(op, tensors, values.shape, index, n, x.shape[-1])
    if bias is not None:
        _expect(op, "bias", f"of shape [N] = [{n}]", list(bias.shape), bias.shape == (n,))


def _check_input_gradient(grad: Tensor, values: Tensor, index: Tensor, k: int) -> None:
    op = "block_sparse_input_gradient"
    _expect(op, "grad", "of shape [..., N]", list(grad.shape), grad.dim() > 0)
    _check(op, {"grad": grad, "values": values}, values.shape, index, grad.shape[-1], k)


def _check_values_gradient(grad: Tensor, x: Tensor, index: Tensor, kept: int, br: int, bc: int) -> None:
    op = "block_sparse_values_gradient"
    _expect(op, "grad", "of shape [..., N]", list(grad.shape), grad.dim() > 0)
    fits = x.dim() > 0 and x.shape[:-1] == grad.shape[:-1]
    _expect(op, "x", f"of shape [..., K] over grad's {list(grad.shape[:-1])}", list(x.shape), fits)
    _check(op, {"grad": grad, "x": x}, (kept, br, bc), index, grad.shape[-1], x.shape[-1])


def _matrix(x: Tensor) -> Tensor:
    # -1 is ambiguous where a width is 0.
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


@torch.library.custom_op(
    "bertkern::block_sparse_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor? bias, Tensor index, int n, int provider=0) -> Tensor",
)
def _linear(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Tensor, n: int, provider: int = providers.AUTO
) -> Tensor:
    _check_linear(x, values, bias, index, n)
    pattern = _cut(index, (n, x.shape[-1]), values.shape)
    misfit = _misfit(x, pattern.block, providers.HALF) if x.is_cuda else None
    if providers.by_cuda("block_sparse_linear", providers.BLOCK_SPARSE, provider, x, misfit, pattern.block[0]):
        return torch.ops.bertkern.block_sparse_linear_mma.default(x, values, bias, index, n)
    found = _triton_for(values, pattern.block)
    if found is not None:
        return found.block_sparse_linear(x, _weight_index(found, pattern), values, bias)
    return _multiply(_matrix(x), values, bias, pattern, False).view(*x.shape[:-1], n)


@torch.library.custom_op(
    "bertkern::block_sparse_input_gradient",
    mutates_args=(),
    schema="(Tensor grad, Tensor values, Tensor index, int k) -> Tensor",
)
def _input_gradient(grad: Tensor, values: Tensor, index: Tensor, k: int) -> Tensor:
    _check_input_gradient(grad, values, index, k)
    pattern = _cut(index, (grad.shape[-1], k), values.shape)
    found = _triton_for(values, pattern.block)
    if found is not None:
        return found.block_sparse_input_gradient(grad, _weight_index(found, pattern), values)
    return _multiply(_matrix(grad), values, None, pattern, True).view(*grad.shape[:-1], k)


@torch.library.custom_op(
    "bertkern::block_sparse_values_gradient",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor index, int kept, int br, int bc) -> Tensor",
)
def _values_gradient(grad: Tensor, x: Tensor, index: Tensor, kept: int, br: int, bc: int) -> Tensor:
    _check_values_gradient(grad, x, index, kept, br, bc)
    pattern = _cut(index, (grad.shape[-1], x.shape[-1]), (kept, br, bc))
    found = _triton_for(x, pattern.block)
    if found is not None:
        return found.block_sparse_values_gradient(grad, x, _weight_index(found, pattern))
    return _multiply_sampled(_matrix(grad), _matrix(x), pattern)


# Tracing checks too: what does not fit is said there, not by compiled code.


@_linear.register_fake
def _(x: Tensor, values: Tensor, bias: Tensor | None, index: Tensor, n: int, provider: int = 0) -> Tensor:
    _check_linear(x, values, bias, index, n)
    return x.new_empty(*x.shape[:-1], n)


@_input_gradient.register_fake
def _(grad: Tensor, values: Tensor, index: Tensor, k: int) -> Tensor:
    _check_input_gradient(grad, values, index, k)
    return grad.new_empty(*grad.shape[:-1], k)


@_values_gradient.register_fake
def _(grad: Tensor, x: Tensor, index: Tensor, kept: int, br: int, bc: int) -> Tensor:
    _check_values_gradient(grad, x, index, kept, br, bc)
    return x.new_empty(kept, br, bc)


def _save_linear(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, _, index, *_ = inputs
    ctx.save_for_backward(x, values, index)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple:
    x, values, index = ctx.saved_tensors
    for_x, for_values, for_bias = ctx.needs_input_grad[:3]
    return (
        _input_gradient(grad, values, index, x.shape[-1]) if for_x else None,
        _values_gradient(grad, x, index, *values.shape) if for_values else None,
        _matrix(grad).sum(0) if for_bias else None,
        *[None] * (len(ctx.needs_input_grad) - 3),  # an argument that has its default may be left out
    )


def _save_input_gradient(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _input_gradient_backward(ctx: Any, grad: Tensor) -> tuple:
    first, values, index = ctx.saved_tensors
    return (
        _linear(grad, values, None, index, first.shape[-1]) if ctx.needs_input_grad[0] else None,
        _values_gradient(first, grad, index, *values.shape) if ctx.needs_input_grad[1] else None,
        None,
        None,
    )


def _values_gradient_backward(ctx: Any, grad: Tensor) -> tuple:
    first, x, index = ctx.saved_tensors
    return (
        _linear(x, grad, None, index, first.shape[-1]) if ctx.needs_input_grad[0] else None,
        _input_gradient(first, grad, index, x.shape[-1]) if ctx.needs_input_grad[1] else None,
        *[None] * 4,
    )


_linear.register_autograd(_linear_backward, setup_context=_save_linear)
_input_gradient.register_autograd(_input_gradient_backward, setup_context=_save_input_gradient)
_values_gradient.register_autograd(_values_gradient_backward, setup_context=_save_input_gradient)


@explained
def block_sparse_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    provider: str = "auto",
) -> Tensor:
    """x W^T + b for a W of which only `values`, its kept blocks, exist; differentiable any number of times.

    Under autocast the operands are cast as those of F.linear are.

    Args:
        x: [..., K] fp32, bf16, fp16 or fp64.
        values: [nnzb, br, bc], dtype of x.
        index: of `block_index`.
        out_features: N.
        bias: [N], dtype of x.
        provider: of the forward pass on a GPU, see bertkern.ops.linear_providers.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: no such provider.

    Example:
        >>> weight = BsrWeight.from_dense(torch.eye(4), (2, 2))
        >>> block_sparse_linear(torch.ones(3, 4), weight.values, block_index(weight), 4).shape
        torch.Size([3, 4])
    """
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, values, bias = (
            tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
            for tensor in (x, values, bias)
        )
    return _linear(x, values, bias, index, out_features, providers.provider_code(provider))
