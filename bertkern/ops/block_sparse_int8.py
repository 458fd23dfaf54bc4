"""A linear layer of int8 codes in kept blocks, on a GPU, as an operator that torch.compile knows.

    block_sparse_linear_int8    y = activation(sum + b) + residual
    sum[t, n] = (sum of codes[t, k] w[n, k] - zero[t] * column_sum[n]) * (scale[t] * weight_scale[n])

Sums are exact integers, and what follows is rounded operation by operation: without an activation every kernel gives
the bits of `int8_linear_cuda`, however many rows there are. They are Triton's (kernels/block_sparse.py) or the CUDA
library's (csrc/cuda/block_sparse), as bertkern/ops/linear_providers.py chooses, or plain PyTorch, which is all else.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import linear_providers as providers
from .arguments import explained
from .block_sparse import _cut, _expect, _kernels, _misfit, _Pattern, _tensor_cores, _weight_index, index_size
from .groupwise_triton import _ACTIVATIONS

OP = "block_sparse_linear_int8"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class _Call(NamedTuple):
    """The operator's arguments, in its order."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    values: Tensor
    weight_scale: Tensor
    column_sum: Tensor | None
    bias: Tensor | None
    index: Tensor
    n: int
    activation: int
    residual: Tensor | None
    out_dtype: torch.dtype
    count: Tensor | None = None
    provider: int = providers.AUTO


def _check(call: _Call) -> None:
    """Shapes, dtypes, devices and sizes; never the data of a tensor."""
    codes, n = call.codes, call.n
    _expect(OP, "codes", "of dtype torch.int8", codes.dtype, codes.dtype == torch.int8)
    _expect(OP, "codes", "of shape [..., K]", list(codes.shape), codes.dim() > 0)
    rows, block = codes.shape[:-1].numel(), list(call.values.shape)
    fits = call.values.dtype == torch.int8 and len(block) == 3 and block[1] > 0 and block[2] > 0
    _expect(OP, "values", "int8 of shape [nnzb, br, bc]", f"{call.values.dtype} of shape {block}", fits)
    size = index_size((n, codes.shape[-1]), block[1:], block[0])
    wanted = (
        ("index", call.index, torch.int32, size),
        ("scale", call.scale, torch.float32, rows),
        ("zero", call.zero, torch.int32, rows),
        ("weight_scale", call.weight_scale, torch.float32, n),
        ("column_sum", call.column_sum, torch.int32, n),
        ("bias", call.bias, torch.float32, n),
        ("count", call.count, torch.int32, 1),
    )
    for name, tensor, dtype, count in wanted:
        if tensor is not None:
            said = f"{tensor.dtype} of shape {list(tensor.shape)}"
            _expect(OP, name, f"{dtype} of {count} elements", said, tensor.dtype == dtype and tensor.numel() == count)
    beside = (call.zero is None) == (call.column_sum is None)
    _expect(OP, "column_sum", "beside zero", "one of them", beside)
    if call.residual is not None:
        shape = [*codes.shape[:-1], n]
        _expect(OP, "residual", f"of shape {shape}", list(call.residual.shape), list(call.residual.shape) == shape)
        dtype = call.residual.dtype
        _expect(OP, "residual", f"of dtype {', '.join(map(str, FLOATS))}", dtype, dtype in FLOATS)
    _expect(OP, "out_dtype", f"to be {', '.join(map(str, FLOATS))}", call.out_dtype, call.out_dtype in FLOATS)
    _expect(OP, "activation", "from 0 to 5", call.activation, 0 <= call.activation <= 5)
    for tensor in (call.values, *(tensor for _, tensor, *_ in wanted), call.residual):
        if tensor is not None:
            _expect(OP, "all tensors", f"on {codes.device}", tensor.device, tensor.device == codes.device)


def _plain(call: _Call, pattern: _Pattern) -> Tensor:
    """y fp32 [T, N]."""
    n, k = pattern.shape
    br, bc = pattern.block
    down, across = pattern.crow.numel() - 1, pattern.ccol.numel() - 1
    dense = torch.zeros(down, across, br, bc, dtype=torch.float64, device=call.values.device)
    dense[pattern.row.long(), pattern.col.long()] = call.values.double()
    dense = dense.transpose(1, 2).reshape(down * br, across * bc)[:n, :k]
    # Below 2^53 float64 adds whole numbers exactly.
    whole = call.codes.reshape(-1, k).double() @ dense.T
    if call.zero is not None:
        whole = whole - call.zero.view(-1, 1).double() * call.column_sum.double()
    y = whole.float() * (call.scale.view(-1, 1) * call.weight_scale)
    y = _ACTIVATIONS[call.activation](y if call.bias is None else y + call.bias)
    return y if call.residual is None else y + call.residual.reshape(y.shape).float()


def _by_triton(found: ModuleType, call: _Call, pattern: _Pattern) -> Tensor:
    codes, (n, k) = call.codes, pattern.shape
    return found.block_sparse_linear_int8(
        codes.reshape(-1, k), call.scale.reshape(-1), _weight_index(found, pattern), call.values, call.weight_scale,
        call.bias, call.out_dtype, zero=None if call.zero is None else call.zero.reshape(-1),
        weight_sums=call.column_sum, activation=call.activation,
        residual=None if call.residual is None else call.residual.reshape(-1, n), count=call.count,
    )  # fmt: skip


@torch.library.custom_op(
    "bertkern::block_sparse_linear_int8",
    mutates_args=(),
    schema="(Tensor codes, Tensor scale, Tensor? zero, Tensor values, Tensor weight_scale, Tensor? column_sum, "
    "Tensor? bias, Tensor index, int n, int activation, Tensor? residual, ScalarType out_dtype, Tensor? count=None, "
    "int provider=0) -> Tensor",
)
def _linear(*arguments):
    call = _Call(*arguments)
    _check(call)
    codes, shape = call.codes, (*call.codes.shape[:-1], call.n)
    pattern = _cut(call.index, (call.n, codes.shape[-1]), call.values.shape)
    misfit = _misfit(codes, pattern.block, providers.CODES) if codes.is_cuda else None
    if providers.by_cuda(OP, providers.BLOCK_SPARSE, call.provider, codes, misfit, pattern.block[0]):
        return torch.ops.bertkern.block_sparse_linear_int8_mma.default(*call[:-1])
    found = _kernels() if codes.is_cuda and _tensor_cores(codes.device) else None
    if found is not None and pattern.block[0] in found.SIDES and pattern.block[1] in found.SIDES:
        y = _by_triton(found, call, pattern)
    else:
        y = _plain(call, pattern)
    return y.to(call.out_dtype).reshape(shape)


@providers.fake("block_sparse_linear_int8_mma")
def _(
    codes, scale, zero, values, weight_scale, column_sum, bias, index, n, activation=0, residual=None, out_dtype=None,
    count=None,
):  # fmt: skip
    return codes.new_empty(*codes.shape[:-1], n, dtype=out_dtype or torch.float32)


@_linear.register_fake
def _(*arguments):
    call = _Call(*arguments)
    _check(call)
    return call.codes.new_empty(*call.codes.shape[:-1], call.n, dtype=call.out_dtype)


@explained
def block_sparse_linear_int8(
    codes: Tensor,
    scale: Tensor,
    values: Tensor,
    weight_scale: Tensor,
    index: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    *,
    zero: Tensor | None = None,
    column_sum: Tensor | None = None,
    activation: int = 0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    count: Tensor | None = None,
    provider: str = "auto",
) -> Tensor:
    """activation(x W^T + b) + residual, [..., N], of x = (codes - zero) * scale and a W of codes in kept blocks.

    Args:
        codes: int8 [..., K]. Rows that begin at multiples of 16 bytes are read fastest.
        scale: fp32, of each row.
        values: int8 [nnzb, br, bc].
        weight_scale: fp32 [N].
        index: of `block_index`.
        out_features: N.
        bias: fp32 [N].
        zero: int32, of each row; None: 0.
        column_sum: int32 [N], the sum of each row of W's codes, beside `zero`.
        activation: see bertkern.nn.activations.
        residual: [..., N] in any float dtype.
        count: int32 [1], how many of the rows are wanted: what the others hold afterwards is not said. None: all.
        provider: on a GPU, see bertkern.ops.linear_providers.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: no such provider.

    Example:
        >>> weight = BsrWeight.from_dense(torch.eye(4, dtype=torch.int8), (2, 2))
        >>> x, ones = torch.ones(3, 4, dtype=torch.int8), torch.ones(4)
        >>> block_sparse_linear_int8(x, ones[:3], weight.values, ones, block_index(weight), 4).shape
        torch.Size([3, 4])
    """
    return torch.ops.bertkern.block_sparse_linear_int8.default(
        codes, scale, zero, values, weight_scale, column_sum, bias, index, out_features, activation, residual,
        out_dtype, count, providers.provider_code(provider),
    )  # fmt: skip
