"""A linear layer of 8-bit codes, activations and weights, for GPUs, as operators that autograd and torch.compile know.

    int8_linear_cuda        y = activation(round(s S (a - z) W^T + b)) + residual     floats
    int8_requantize_cuda    the codes of y on a static grid, and each row's step

a [..., K] are int8 or uint8 codes of steps s and zero points z, a row's own or one for all, W [N, K] int8 codes of
steps S; or both are float8 e4m3, without zero points. On CUDA they are Triton kernels (kernels/int8_gemm.py), or where
that library was built, for few rows and for GPUs without an instruction of their own in Triton, a CUDA one
(csrc/cuda/gemm); everything else is plain PyTorch, with the same integers. None asks the GPU for anything, so a CUDA
graph may hold the operators.

No card has run the kernels yet: Triton's are tested in its interpreter, CUDA's on the host, and both are compiled.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _cuda, _gradients, _triton
from .arguments import explained
from .block_sparse import FLOATS, _expect, _tensor_cores

LINEAR, REQUANTIZE = "int8_linear_cuda", "int8_requantize_cuda"
FP8 = torch.float8_e4m3fn
# Of 255 * 127 as a product: more could leave int32.
LARGEST_K = 65536


class _Call(NamedTuple):
    """What both operators take, in their order."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    weight: Tensor
    weight_scale: Tensor
    weight_sums: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    count: Tensor | None
    activation: int
    output_scale: float

    @property
    def rows(self) -> int:
        return self.codes.shape[:-1].numel()


# --- packing -------------------------------------------------------------------------------------------------------


@explained
def pack_int8_weight(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [N, K], int8 or float8 e4m3, as the operators read them fastest, and the sums of their rows, int32 [N].

    Rows come to begin at multiples of 16 bytes: [N, K rounded up to 16], filled up with zeros. The sums of float8 codes
    are zeros: nothing needs them.

    Raises:
        RuntimeError: another dtype or shape.

    Example:
        >>> weight, sums = pack_int8_weight(torch.ones(2, 5, dtype=torch.int8))
        >>> weight.shape, sums
        (torch.Size([2, 16]), tensor([5, 5], dtype=torch.int32))
    """
    fits = codes.dim() == 2 and codes.dtype in (torch.int8, FP8)
    said = f"{codes.dtype} of shape {list(codes.shape)}"
    _expect("pack_int8_weight", "codes", "int8 or float8_e4m3fn of shape [N, K]", said, fits)
    padded = F.pad(codes.view(torch.int8), (0, -codes.shape[1] % 16)).contiguous()
    sums = codes.sum(1, dtype=torch.int32) if codes.dtype == torch.int8 else padded.new_zeros(len(padded)).int()
    return padded.view(codes.dtype), sums


# --- checks --------------------------------------------------------------------------------------------------------


def _check(op: str, call: _Call) -> None:
    """Shapes, dtypes, devices and sizes; never the data of a tensor."""
    codes, weight = call.codes, call.weight
    kinds = (torch.int8, torch.uint8, FP8)
    _expect(op, "codes", f"of dtype {', '.join(map(str, kinds))}", codes.dtype, codes.dtype in kinds)
    _expect(op, "codes", "of shape [..., K]", list(codes.shape), codes.dim() > 0)
    (k, rows), dtype = (codes.shape[-1], call.rows), FP8 if codes.dtype == FP8 else torch.int8
    said = f"{weight.dtype} of shape {list(weight.shape)}"
    fits = weight.dtype == dtype and weight.dim() == 2 and weight.shape[1] >= k
    _expect(op, "weight", f"{dtype} of shape [N, {k} or more]", said, fits)
    n = weight.shape[0]
    _expect(op, "codes", f"with K at most {LARGEST_K}", k, k <= LARGEST_K)
    for name, tensor, dtype, length in (
        ("scale", call.scale, torch.float32, rows),
        ("zero_point", call.zero_point, torch.int32, rows),
        ("weight_scale", call.weight_scale, torch.float32, n),
    ):
        if tensor is not None:
            said = f"{tensor.dtype} of shape {list(tensor.shape)}"
            fits = tensor.dtype == dtype and tensor.dim() <= codes.dim() and tensor.numel() in (1, length)
            _expect(op, name, f"{dtype} of {length} elements or one", said, fits)
    for name, tensor, dtype, shape in (
        ("weight_sums", call.weight_sums, torch.int32, [n]),
        ("bias", call.bias, torch.float32, [n]),
        ("count", call.count, torch.int32, [1]),
    ):
        if tensor is not None:
            said = f"{tensor.dtype} of shape {list(tensor.shape)}"
            fits = tensor.dtype == dtype and list(tensor.shape) == shape
            _expect(op, name, f"{dtype} of shape {shape}", said, fits)
    needed = codes.dtype == torch.uint8 or call.zero_point is not None
    given = "none" if call.weight_sums is None else "one"
    _expect(op, "weight_sums", "beside zero points and uint8 codes", given, not needed or call.weight_sums is not None)
    fits = call.zero_point is None or codes.dtype != FP8
    _expect(op, "zero_point", "to be None beside float8 codes", "one", fits)
    floats = FLOATS[:3]
    if call.residual is not None:
        shape = [*codes.shape[:-1], n]
        _expect(op, "residual", f"of shape {shape}", list(call.residual.shape), list(call.residual.shape) == shape)
        dtype = call.residual.dtype
        _expect(op, "residual", f"of dtype {', '.join(map(str, floats))}", dtype, dtype in floats)
    _expect(op, "activation", "from 0 to 5", call.activation, 0 <= call.activation <= 5)
    step = call.output_scale
    _expect(op, "output_scale", "finite and at least 0", step, 0 <= step < math.inf)
    for tensor in (call.scale, call.zero_point, weight, call.weight_scale, call.weight_sums, call.bias, call.residual,
                   call.count):  # fmt: skip
        if tensor is not None:
            _expect(op, "all tensors", f"on {codes.device}", tensor.device, tensor.device == codes.device)


def _check_linear(call: _Call, out_dtype: torch.dtype) -> None:
    _check(LINEAR, call)
    floats = FLOATS[:3]
    _expect(LINEAR, "out_dtype", f"to be {', '.join(map(str, floats))}", out_dtype, out_dtype in floats)


def _check_requantize(call: _Call, out_scale: float, out_zero_point: int, out_dtype: torch.dtype) -> None:
    op, kinds = REQUANTIZE, (torch.int8, torch.uint8)
    _check(op, call)
    _expect(op, "out_scale", "finite and above 0", out_scale, 0 < out_scale < math.inf)
    _expect(op, "out_dtype", f"to be {', '.join(map(str, kinds))}", out_dtype, out_dtype in kinds)
    low, high = (-128, 127) if out_dtype == torch.int8 else (0, 255)
    _expect(op, "out_zero_point", f"in [{low}, {high}]", out_zero_point, low <= out_zero_point <= high)


# --- plain PyTorch -------------------------------------------------------------------------------------------------


def _column(x: Tensor) -> Tensor:
    return x.reshape(-1, 1)


def _rounded(y: Tensor, call: _Call) -> Tensor:
    """What follows the products and the bias, in fp32."""
    if call.output_scale:
        step = torch.tensor(call.output_scale, dtype=torch.float32, device=y.device)
        y = (y * (1 / step)).round().clamp(-127, 127) * step
    y = _gradients._ACTIVATIONS[call.activation](y)
    return y if call.residual is None else y + call.residual.reshape(y.shape).float()


def _plain(call: _Call) -> Tensor:
    """y fp32 [rows, N]."""
    k = call.codes.shape[-1]
    codes, weight = call.codes.reshape(call.rows, k).double(), call.weight[:, :k].double()
    if call.zero_point is not None:
        codes = codes - _column(call.zero_point)
    # Below 2^53 float64 adds whole numbers exactly.
    y = (codes @ weight.T).float() * (_column(call.scale) * call.weight_scale.reshape(-1))
    return _rounded(y if call.bias is None else y + call.bias, call)


def _as_codes(y: Tensor, step: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    """Nearest codes of y fp32: of int8 without a zero point [-127, 127], else all; NaN becomes the lowest."""
    low, high = (-128, 127) if dtype == torch.int8 else (0, 255)
    low += dtype == torch.int8 and zero_point == 0
    inverse = 1 / torch.tensor(step, dtype=torch.float32, device=y.device)
    codes = (y * inverse).round() + zero_point
    return codes.nan_to_num(nan=low, posinf=high, neginf=low).clamp(low, high).to(dtype)


# --- what the kernels read -----------------------------------------------------------------------------------------


def _aligned(x: Tensor, width: int, zeros: bool) -> Tensor:
    """x [rows, k] as [rows, width], width >= k, rows beginning at multiples of 16 bytes; a copy where they do not.

    `zeros`: what it has from k on must be zero; elsewhere it is anything, in x's memory.
    """
    (rows, k), stride = x.shape, x.stride(0)
    whole = stride % 16 == 0 and x.data_ptr() % 16 == 0 and x.stride(1) == 1 and (width == k or not zeros)
    if whole and (rows - 1) * stride + width <= x.untyped_storage().nbytes() - x.storage_offset():
        return x.as_strided((rows, width), (stride, 1))
    wide = (x.new_zeros if zeros else x.new_empty)(rows, width)
    wide[:, :k] = x
    return wide


def _laid_out(call: _Call) -> _Call:
    """The call for kernels: codes [T, K], weight [N, K or more], K a multiple of 16 and rows aligned to 16 bytes."""
    k, rows = call.codes.shape[-1], call.rows
    width = k + -k % 16
    codes = call.codes.reshape(rows, k)
    # int8 codes may meet zeros of the weight, whatever they are; a NaN of float8 is more than that.
    return call._replace(
        codes=_aligned(codes, width, codes.dtype == FP8),
        weight=_aligned(call.weight, max(width, call.weight.shape[1]), True),
        residual=None if call.residual is None else call.residual.reshape(rows, call.weight.shape[0]),
    )


# --- Triton and CUDA -------------------------------------------------------------------------------------------------


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        return _triton.kernels("int8_gemm")
    except ImportError as error:
        warnings.warn(f"{LINEAR}: runs in plain PyTorch, slowly: {error}", stacklevel=2)
        return None


@functools.cache
def _say(reason: str) -> None:
    warnings.warn(f"{LINEAR}: runs in plain PyTorch, slowly: {reason}", stacklevel=3)


def _built(capability: tuple[int, int], float8: bool) -> bool:
    """Whether there is a CUDA kernel; PTX for older cards has none for float8."""
    if _cuda.missing(capability) is not None:
        return False
    facts = _cuda.build_facts() or {"targets": ()}
    return not float8 or any(_cuda._binary_fits(target, capability) for target in facts["targets"])


def _cuda_kernel(capability: tuple[int, int], codes: Tensor) -> bool:
    """Whether the CUDA kernel is for these codes rather than Triton's.

    Triton has the own instructions of compute capability 9 and 10; for few rows, which wait for memory, the CUDA kernel
    needs no second pass. It has float8 from 12.0 on. Integers are the same in both; float8 stays with one for all rows.
    """
    if not _built(capability, codes.dtype == FP8):
        return False
    if capability[0] in (9, 10):
        return codes.dtype != FP8 and codes.shape[:-1].numel() <= 32
    return codes.dtype != FP8 or capability[0] >= 12


def _by_cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The CUDA operator, in the order of `kernels.int8_linear`."""
    call, (out_dtype, *codes) = _Call(*arguments[:11]), arguments[11:]
    out_scale, out_zero_point = codes or (0.0, 0)
    return torch.ops.bertkern.cuda_qgemm.default(*call, out_scale, out_zero_point, out_dtype)


def _launcher(call: _Call) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """What computes the call, laid out, on its GPU; None: plain PyTorch, and why is said once."""
    codes = call.codes
    if not codes.is_cuda or not call.rows or not call.weight.shape[0]:
        return None
    if not _tensor_cores(codes.device):
        _say("the GPU is older than compute capability 8.0")
        return None
    capability = torch.cuda.get_device_capability(codes.device)
    if codes.dtype == FP8 and capability < (8, 9):
        _say("float8 needs a GPU of compute capability 8.9 or newer")
        return None
    if _cuda_kernel(capability, codes):
        return _by_cuda
    found = _kernels()
    return None if found is None else found.int8_linear


# --- the operators -------------------------------------------------------------------------------------------------

_COMMON = (
    "Tensor codes, Tensor scale, Tensor? zero_point, Tensor weight, Tensor weight_scale, Tensor? weight_sums, "
    "Tensor? bias, Tensor? residual, Tensor? count, int activation, float output_scale"
)


@torch.library.custom_op(f"bertkern::{LINEAR}", mutates_args=(), schema=f"({_COMMON}, ScalarType out_dtype) -> Tensor")
def _linear(*arguments):
    *common, out_dtype = arguments
    call = _Call(*common)
    _check_linear(call, out_dtype)
    found = _launcher(call)
    if found is not None:
        y, _ = found(*_laid_out(call), out_dtype)
    else:
        with torch.autocast(call.codes.device.type, enabled=False):
            y = _plain(call).to(out_dtype)
    return y.view(*call.codes.shape[:-1], call.weight.shape[0])


@torch.library.custom_op(
    f"bertkern::{REQUANTIZE}",
    mutates_args=(),
    schema=f"({_COMMON}, float out_scale, int out_zero_point, ScalarType out_dtype) -> (Tensor, Tensor)",
)
def _requantize(*arguments):
    *common, out_scale, out_zero_point, out_dtype = arguments
    call = _Call(*common)
    _check_requantize(call, out_scale, out_zero_point, out_dtype)
    found = _launcher(call)
    if found is not None:
        y, steps = found(*_laid_out(call), out_dtype, out_scale, out_zero_point)
    else:
        with torch.autocast(call.codes.device.type, enabled=False):
            y = _as_codes(_plain(call), out_scale, out_zero_point, out_dtype)
            # A code cannot say NaN: the row's step does.
            steps = torch.where(call.scale.reshape(-1).isfinite(), out_scale, torch.nan).float().expand(len(y)).clone()
    shape = call.codes.shape[:-1]
    return y.view(*shape, call.weight.shape[0]), steps.view(shape)


# Tracing checks too: what does not fit is said there, not by compiled code.


@_linear.register_fake
def _(*arguments):
    *common, out_dtype = arguments
    call = _Call(*common)
    _check_linear(call, out_dtype)
    return call.codes.new_empty(*call.codes.shape[:-1], call.weight.shape[0], dtype=out_dtype)


@_requantize.register_fake
def _(*arguments):
    *common, out_scale, out_zero_point, out_dtype = arguments
    call = _Call(*common)
    _check_requantize(call, out_scale, out_zero_point, out_dtype)
    shape = call.codes.shape[:-1]
    return (
        call.codes.new_empty(*shape, call.weight.shape[0], dtype=out_dtype),
        call.codes.new_empty(shape, dtype=torch.float32),
    )


def _unrounded(*arguments: Any) -> Tensor:
    """What gradients are of: rounding counts as identity."""
    call = _Call(*arguments[:-1])._replace(output_scale=0.0)
    return _plain(call).view(*call.codes.shape[:-1], call.weight.shape[0])


_gradients._differentiable(LINEAR, _unrounded)
_gradients._rounds(REQUANTIZE)


@explained
def int8_linear_cuda(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    zero_point: Tensor | None = None,
    weight_sums: Tensor | None = None,
    activation: int = 0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    output_scale: float = 0.0,
    count: Tensor | None = None,
) -> Tensor:
    """activation((codes - zero_point) W^T * (scale * weight_scale) + bias) + residual, [..., N].

    Sums of int8 are exact, and scales and bias come as `bertkern.ops.qgemm` takes them, each rounded: without an
    activation the kernels give its very bits. Sums of float8 are in fp32, in an order that only the layer's shape
    decides. A row whose scale is NaN gives NaN.

    Args:
        codes: [..., K] int8, uint8 or float8_e4m3fn. Rows that begin at multiples of 16 bytes are not copied; what
            lies between the end of a row and the next such multiple is read, and counts for nothing, where it belongs
            to the tensor's storage.
        scale: fp32, of each row (as many elements as rows) or one.
        weight: [N, K] or [N, P] with P >= K, int8 codes, or float8 beside float8, zeros from K on: `pack_int8_weight`.
        weight_scale: fp32 [N] or [1].
        bias: fp32 [N].
        zero_point: int32, of each row or one; None: 0.
        weight_sums: int32 [N], the sums of the weight's rows; needed beside zero points and by uint8 codes.
        activation: see bertkern.nn.activations.
        residual: [..., N] in fp32, bf16 or fp16.
        out_dtype: of the result, fp32, bf16 or fp16.
        output_scale: 0, or the step to which sums are rounded before the activation, as int8 (see
            `bertkern.ops.pack_qlinear`).
        count: int32 [1], how many of the rows, of all leading dimensions, are wanted: what the others hold afterwards
            is not said. None: all.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, K above 65536.

    Example:
        >>> weight, sums = pack_int8_weight(torch.full((2, 3), 4, dtype=torch.int8))
        >>> codes, step = torch.ones(1, 3, dtype=torch.int8), torch.full((1,), 0.5)
        >>> int8_linear_cuda(codes, step, weight, step, zero_point=torch.tensor([3]).int(), weight_sums=sums)
        tensor([[-6., -6.]])
    """
    return torch.ops.bertkern.int8_linear_cuda.default(
        codes, scale, zero_point, weight, weight_scale, weight_sums, bias, residual, count, activation, output_scale,
        out_dtype,
    )  # fmt: skip


@explained
def int8_requantize_cuda(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_scale: float,
    out_zero_point: int = 0,
    out_dtype: torch.dtype = torch.int8,
    zero_point: Tensor | None = None,
    weight_sums: Tensor | None = None,
    activation: int = 0,
    residual: Tensor | None = None,
    output_scale: float = 0.0,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `int8_linear_cuda` gives, y, as codes round(y / out_scale) + out_zero_point, and steps fp32 [...].

    A row whose scale is not finite has NaN for its step; elsewhere the step is out_scale. int8 codes lie in [-127, 127]
    where out_zero_point is 0, else in [-128, 127], uint8 ones in [0, 255].

    Args:
        out_scale: the step, above 0.
        out_zero_point: within the range of out_dtype.
        out_dtype: int8 or uint8.

    Raises:
        RuntimeError: as `int8_linear_cuda`.

    Example:
        >>> weight, _ = pack_int8_weight(torch.full((2, 3), 4, dtype=torch.int8))
        >>> codes, step = torch.ones(1, 3, dtype=torch.int8), torch.full((1,), 0.5)
        >>> int8_requantize_cuda(codes, step, weight, step, out_scale=0.25)
        (tensor([[12, 12]], dtype=torch.int8), tensor([0.2500]))
    """
    return torch.ops.bertkern.int8_requantize_cuda.default(
        codes, scale, zero_point, weight, weight_scale, weight_sums, bias, residual, count, activation, output_scale,
        out_scale, out_zero_point, out_dtype,
    )  # fmt: skip
