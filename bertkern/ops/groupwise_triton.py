"""A linear layer of group-wise low-bit weights, for GPUs, as an operator that autograd and torch.compile know.

    groupwise_linear_cuda    y = activation(x W^T + b) + residual      x [..., K] -> [..., N]

On CUDA, int8 activations of any float dtype, and fp16 and bf16 ones as they are, run as Triton kernels
(kernels/groupwise.py), for codes of 2 to 8 bits along either axis. For fp16 and bf16 ones and 2, 3, 4 and 8 bits the
CUDA library has a kernel that is made for few rows (csrc/cuda/groupwise); bertkern/ops/linear_providers.py chooses.
Everything else is plain PyTorch with the dequantized weight. Nothing asks the GPU for anything, so a CUDA graph may
hold the operator.

No card has run the kernels yet: they are tested in Triton's interpreter and compiled for sm_80, 90 and 100.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _gradients, _triton
from . import linear_providers as providers
from .arguments import explained
from .block_sparse import FLOATS, _expect, _tensor_cores
from .groupwise_planes import GroupwisePlanes, part_bytes, plane_codes, strip_count
from .rowwise_triton import _quantize

OP = "groupwise_linear_cuda"


class _Call(NamedTuple):
    """The operator's arguments, in its order."""

    x: Tensor
    codes: list[Tensor]
    members: list[Tensor]
    scale: Tensor
    shift: Tensor | None
    column_sum: Tensor
    bias: Tensor | None
    residual: Tensor | None
    bits: list[int]
    group: int
    activation: int
    quantized: bool
    input_scale: float
    input_zero_point: int
    out_dtype: torch.dtype
    provider: int = providers.AUTO

    @property
    def shape(self) -> tuple[int, int]:
        return self.scale.shape[-1], self.x.shape[-1]


# --- checks --------------------------------------------------------------------------------------------------------


def _check(call: _Call) -> None:
    """Shapes, dtypes, devices and sizes; never the data of a tensor."""
    x, floats = call.x, FLOATS[:3]
    _expect(OP, "x", f"of dtype {', '.join(map(str, floats))}", x.dtype, x.dtype in floats)
    _expect(OP, "x", "of shape [..., K]", list(x.shape), x.dim() > 0)
    scale = call.scale
    fits = scale.dtype == torch.float32 and scale.dim() == 2
    _expect(OP, "scale", "float32 of shape [G, N]", f"{scale.dtype} of shape {list(scale.shape)}", fits)
    n, k = call.shape
    groups = -(-k // call.group) if call.group > 0 else 1
    _expect(OP, "x", f"of shape [..., K] as {scale.shape[0]} groups of the weight have it", list(x.shape),
            call.group >= 0 and scale.shape[0] == groups)  # fmt: skip
    for name, tensor, shape in (("shift", call.shift, [groups, n]), ("column_sum", call.column_sum, [n]),
                                ("bias", call.bias, [n])):  # fmt: skip
        if tensor is not None:
            said = f"{tensor.dtype} of shape {list(tensor.shape)}"
            fits = tensor.dtype == torch.float32 and list(tensor.shape) == shape
            _expect(OP, name, f"float32 of shape {shape}", said, fits)
    if call.residual is not None:
        shape = [*x.shape[:-1], n]
        _expect(OP, "residual", f"of shape {shape}", list(call.residual.shape), list(call.residual.shape) == shape)
        dtype = call.residual.dtype
        _expect(OP, "residual", f"of dtype {', '.join(map(str, floats))}", dtype, dtype in floats)
    _expect(OP, "out_dtype", f"to be {', '.join(map(str, floats))}", call.out_dtype, call.out_dtype in floats)
    _expect(OP, "activation", "from 0 to 5", call.activation, 0 <= call.activation <= 5)
    step, zero = call.input_scale, call.input_zero_point
    _expect(OP, "input_scale", "finite and at least 0", step, 0 <= step < float("inf"))
    allowed = 0 <= zero <= 255 if step else zero in (0, 128)
    _expect(OP, "input_zero_point", "in [0, 255], beside an input_scale of 0 either 0 or 128", zero, allowed)
    _check_parts(call, n, k, groups)
    others = (*call.codes, *call.members, scale, call.shift, call.column_sum, call.bias, call.residual)
    for tensor in others:
        if tensor is not None:
            _expect(OP, "all tensors", f"on {x.device}", tensor.device, tensor.device == x.device)


def _check_parts(call: _Call, n: int, k: int, groups: int) -> None:
    parts = len(call.codes)
    fits = parts == len(call.bits) > 0 and len(call.members) == (parts if parts > 1 else 0)
    said = f"{parts} codes, {len(call.bits)} bits and {len(call.members)} members"
    _expect(OP, "codes, bits and members", "of each part", said, fits)
    _expect(OP, "bits", "from 2 to 8", call.bits, all(2 <= bits <= 8 for bits in call.bits))
    total = groups if call.group else n
    counts = [x.shape[0] if x.dtype == torch.int32 and x.dim() == 1 else -1 for x in call.members]
    if call.members:
        _expect(OP, "members", f"int32, {total} of all parts", counts, min(counts) >= 0 and sum(counts) == total)
    for codes, bits, count in zip(call.codes, call.bits, counts or [total], strict=True):
        strips = strip_count(k, call.group, count)
        size = part_bytes(n if call.group else count, strips, bits)
        said = f"{codes.dtype} of shape {list(codes.shape)}"
        _expect(OP, "codes", f"uint8 of shape [{size}]", said, codes.dtype == torch.uint8 and codes.shape == (size,))


# --- plain PyTorch -------------------------------------------------------------------------------------------------

# In the order of bertkern.nn.activations.
_ACTIVATIONS = (
    lambda x: x,
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    F.relu,
    torch.tanh,
    F.silu,
)


def _dense(call: _Call) -> Tensor:
    """The dequantized weight, fp32 [N, K]."""
    n, k = call.shape
    codes = plane_codes(call.codes, call.members, call.bits, (n, k), call.group).float()
    middle = codes.new_zeros(n, k)
    for number, bits in enumerate(call.bits):
        if not call.members:
            middle.fill_(2.0 ** (bits - 1))
        elif call.group:
            place = torch.arange(k, device=codes.device) // call.group
            middle[:, torch.isin(place, call.members[number])] = 2.0 ** (bits - 1)
        else:
            middle[call.members[number].long()] = 2.0 ** (bits - 1)

    def spread(values: Tensor) -> Tensor:
        return values.T.repeat_interleave(call.group, 1)[:, :k] if call.group else values.T

    weight = (codes - middle) * spread(call.scale)
    return weight if call.shift is None else weight - spread(call.shift)


def _rounded(x: Tensor, step: float, zero_point: int) -> Tensor:
    """x as its int8 codes stand for it; rows that are not finite become NaN."""
    codes, size, zero = _quantize(x, None, step, zero_point)
    shape = (*x.shape[:-1], 1)
    return (codes.float() - (zero.view(shape) if zero.numel() else 0)) * size.view(shape)


def _plain(x: Tensor, call: _Call) -> Tensor:
    """The result in fp32, of activations x fp32."""
    y = _ACTIVATIONS[call.activation](F.linear(x, _dense(call), call.bias))
    return y if call.residual is None else y + call.residual.float()


def _unrounded(*arguments: Any) -> Tensor:
    """What gradients are of: rounding an activation counts as identity."""
    call = _Call(*arguments)
    return _plain(call.x.float(), call)


# --- Triton --------------------------------------------------------------------------------------------------------


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        return _triton.kernels("groupwise")
    except ImportError as error:
        warnings.warn(f"{OP}: runs in plain PyTorch, slowly: {error}", stacklevel=2)
        return None


@functools.cache
def _say(reason: str) -> None:
    warnings.warn(f"{OP}: runs in plain PyTorch, slowly: {reason}", stacklevel=3)


def _triton_for(x: Tensor, quantized: bool) -> ModuleType | None:
    """The kernels, where they fit; why they do not is said once."""
    if not x.is_cuda:
        return None
    if not _tensor_cores(x.device):
        _say("the GPU is older than compute capability 8.0")
        return None
    found = _kernels()
    if found is None or quantized or found.supported(x.dtype):
        return found
    _say(f"there is no kernel for {x.dtype} activations that stay so; int8 ones have one")
    return None


def _launch(found: ModuleType, call: _Call) -> Tensor:
    (n, k), x = call.shape, call.x
    weight = found.Weight(
        call.codes, call.members or [None], call.bits, call.scale, call.shift, call.column_sum, (n, k), call.group
    )
    operand = x
    if call.quantized:
        groups = (call.scale.shape[0], call.group or k) if call.shift is not None else ()
        operand = found.quantize_activations(x, *groups, step=call.input_scale, zero_point=call.input_zero_point)
    residual = None if call.residual is None else call.residual.reshape(-1, n) if n else None
    y = found.groupwise_linear(operand, weight, call.bias, call.activation, residual, call.out_dtype)
    return y.view(*x.shape[:-1], n)


# --- the CUDA library ----------------------------------------------------------------------------------------------

_MMA_BITS = (2, 3, 4, 8)
_MMA_ROWS = 16 * 65535  # of a grid


def _misfit(call: _Call) -> str | None:
    """Why the CUDA library's kernels do not take a call, or None."""
    if call.quantized:
        return "it has kernels for fp16 and bf16 activations, not for those that are rounded to int8"
    wrong = sorted(set(call.bits) - set(_MMA_BITS))
    if wrong:
        return f"there is no kernel for codes of {wrong[0]} bits"
    if call.x.shape[:-1].numel() > _MMA_ROWS:
        return f"there are more than {_MMA_ROWS} rows"
    return providers.dtype_misfit(call.x, providers.HALF)


def _by_cuda(call: _Call) -> Tensor:
    return torch.ops.bertkern.groupwise_linear_mma.default(
        call.x, call.codes, call.members, call.scale, call.shift, call.bias, call.residual, call.bits, call.group,
        call.activation, call.out_dtype,
    )  # fmt: skip


@providers.fake("groupwise_linear_mma")
def _(x, codes, members, scale, shift, bias, residual, bits, group, activation=0, out_dtype=None) -> Tensor:
    return x.new_empty(*x.shape[:-1], scale.shape[1], dtype=out_dtype or x.dtype)


# --- the operator --------------------------------------------------------------------------------------------------

_SCHEMA = (
    "(Tensor x, Tensor[] codes, Tensor[] members, Tensor scale, Tensor? shift, Tensor column_sum, Tensor? bias, "
    "Tensor? residual, int[] bits, int group, int activation, bool quantized, float input_scale, "
    "int input_zero_point, ScalarType out_dtype, int provider=0) -> Tensor"
)


@torch.library.custom_op("bertkern::groupwise_linear_cuda", mutates_args=(), schema=_SCHEMA)
def _linear(*arguments):
    call = _Call(*arguments)
    _check(call)
    if providers.by_cuda(OP, providers.GROUPWISE, call.provider, call.x, _misfit(call) if call.x.is_cuda else None):
        return _by_cuda(call)
    found = _triton_for(call.x, call.quantized)
    if found is not None:
        return _launch(found, call)
    with torch.autocast(call.x.device.type, enabled=False):
        x = call.x.float()
        if call.quantized and x.numel():
            x = _rounded(x, call.input_scale, call.input_zero_point)
        return _plain(x, call).to(call.out_dtype)


# Tracing checks too: what does not fit is said there, not by compiled code.


@_linear.register_fake
def _(*arguments):
    call = _Call(*arguments)
    _check(call)
    return call.x.new_empty(*call.x.shape[:-1], call.shape[0], dtype=call.out_dtype)


_gradients._differentiable(OP, _unrounded)


@explained
def groupwise_linear_cuda(
    x: Tensor,
    weight: GroupwisePlanes,
    bias: Tensor | None = None,
    *,
    activation: int = 0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    quantized: bool = True,
    input_scale: float = 0.0,
    input_zero_point: int = 0,
    provider: str = "auto",
) -> Tensor:
    """activation(x W^T + b) + residual for a W of low-bit codes; once differentiable in x, bias and residual.

    A row that is not finite gives NaN beside int8 activations. The kernels give the same bits at every run, and their
    sums do not depend on the number of rows. Gradients are those of the dequantized weight in plain PyTorch.

    Args:
        x: [..., K] fp32, bf16 or fp16. Rows that begin at multiples of 16 bytes are read fastest.
        weight: of `pack_for_triton`, on x's device.
        bias: fp32 [N].
        activation: see bertkern.nn.activations.
        residual: [..., N], any dtype of x.
        out_dtype: of the result; None: that of x.
        quantized: whether x is rounded to int8, as bertkern.ops.linear rounds it; else it is multiplied as it is.
        input_scale, input_zero_point: of int8, see `bertkern.ops.pack_qlinear`.
        provider: see bertkern.ops.linear_providers; with "cuda-few" sums do depend on the number of rows.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: no such provider.

    Example:
        >>> weight = pack_for_triton(quantize_groupwise(torch.ones(64, 48), bits=4, group_size=8))
        >>> groupwise_linear_cuda(torch.ones(3, 48), weight).shape
        torch.Size([3, 64])
    """
    return torch.ops.bertkern.groupwise_linear_cuda.default(
        x, weight.codes, weight.members, weight.scale, weight.shift, weight.column_sum, bias, residual, weight.bits,
        weight.group, activation, quantized, input_scale, input_zero_point, out_dtype or x.dtype,
        providers.provider_code(provider),
    )  # fmt: skip
