"""Attention over packed sequences, for GPUs, as an operator that autograd, torch.compile and autocast know.

    attention_cuda                   out = factor * softmax(scale q k^T + bias) v, a sequence and a head at a time
    attention_cuda_gradients         dq, dk, dv
    attention_cuda_bias_gradient     dbias, where it is asked for
    attention_cuda_mask_gradient     dhead_mask, where it is asked for: what importance scores of heads are made of

On CUDA with heads of up to 128 they are Triton kernels (kernels/attention.py), the forward pass also a CUDA kernel of
the compiled library (csrc/cuda/attention; fp16 and bf16); everything else, float64 among it, is plain PyTorch over
padded sequences. `provider` says who computes. None asks the GPU for lengths, so a CUDA graph of a batch and a
max_length serves any lengths.

No card has run the kernels yet: those of Triton are tested in its interpreter and compiled for sm_80, 90 and 100, the
CUDA kernel's source runs on the host and is compiled for sm_80, 90a, 100a and 120.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _triton
from .arguments import explained
from .block_sparse import FLOATS, _expect, _tensor_cores
from .providers import lacking

OP = "attention_cuda"
# Who may be asked to compute, as the operators count them. By "auto" Triton does, as long as no card has measured that
# the CUDA kernel is faster; the choice depends on dtype and d, never on lengths, which must not change any bits.
PROVIDERS = {"auto": 0, "triton": 1, "cuda": 2, "torch": 3}


class _Asked(NamedTuple):
    """The arguments beside q, k and v, in the operators' order."""

    cu_seqlens: Tensor
    head_mask: Tensor | None
    bias: Tensor | None
    heads: Sequence[int] | None
    max_length: int
    causal: bool
    scale: float
    provider: int = 0


# --- checks --------------------------------------------------------------------------------------------------------


def _check(q: Tensor, k: Tensor, v: Tensor, asked: _Asked) -> None:
    """Shapes, dtypes, devices and the numbers of heads; never the data of a tensor that is on a GPU."""
    cu, mask, bias = asked[:3]
    _expect(OP, "q", f"of dtype {', '.join(map(str, FLOATS))}", q.dtype, q.dtype in FLOATS)
    _expect(OP, "q", "of shape [T, H, d]", list(q.shape), q.dim() == 3 and q.shape[2] > 0)
    for name, x in (("k", k), ("v", v)):
        _expect(OP, name, f"of q's shape [T, H, d] = {list(q.shape)}", list(x.shape), x.shape == q.shape)
        _expect(OP, name, f"of q's dtype {q.dtype}", x.dtype, x.dtype == q.dtype)
    others = {"k": k, "v": v, "cu_seqlens": cu, "head_mask": mask, "bias": bias}
    for name, x in others.items():
        _expect(OP, name, f"on {q.device}", x.device if x is not None else None, x is None or x.device == q.device)
    said = f"{cu.dtype} of shape {list(cu.shape)}"
    fits = cu.dtype == torch.int32 and cu.dim() == 1 and cu.shape[0] > 0
    _expect(OP, "cu_seqlens", "int32 of shape [sequences + 1]", said, fits)
    _expect(OP, "max_length", "0 or more", asked.max_length, asked.max_length >= 0)
    for name, x in (("head_mask", mask), ("bias", bias)):
        if x is not None:
            small = (*FLOATS[:3], q.dtype)
            _expect(OP, name, f"of dtype {', '.join(map(str, FLOATS[:3]))} or q's", x.dtype, x.dtype in small)
    _check_heads(q.shape[1], cu.shape[0] - 1, asked)


def _check_heads(here: int, sequences: int, asked: _Asked) -> None:
    mask, bias, heads, length = asked.head_mask, asked.bias, asked.heads, asked.max_length
    originally = here
    if heads is not None:
        fits = len(heads) == here and len(set(heads)) == here and all(head >= 0 for head in heads)
        _expect(OP, "heads", f"to be the different numbers of the {here} heads", list(heads), fits)
        tables = [x.shape[1] for x in (mask, bias) if x is not None and x.dim() > 1]
        originally = max([*tables, max(heads, default=-1) + 1])
    if mask is not None:
        shape, got = [sequences, originally], list(mask.shape)
        _expect(OP, "head_mask", f"of shape [sequences, heads] = {shape} or [{originally}]", got, got == shape)
    if bias is not None:
        got, shape = list(bias.shape), [sequences, originally, length, length]
        fits = len(got) == 4 and got[0] in (1, sequences) and got[1] in (1, originally) and got[2:] == shape[2:]
        expected = f"that broadcasts to [sequences, heads, max_length, max_length] = {shape}"
        _expect(OP, "bias", expected, f"shape {got}", fits)


def _check_lengths(tokens: int, asked: _Asked) -> None:
    """What cu_seqlens says, where looking costs nothing."""
    if asked.cu_seqlens.device.type != "cpu":
        return
    ends = asked.cu_seqlens.tolist()
    lengths = [end - begin for begin, end in pairwise(ends)]
    fits = ends[0] == 0 and min(lengths, default=0) >= 0 and ends[-1] <= tokens
    _expect(OP, "cu_seqlens", f"to rise from 0 to at most T = {tokens}", ends, fits)
    longest, most = max(lengths, default=0), asked.max_length
    _expect(OP, "max_length", f"of {longest} or more, as the longest sequence has", most, longest <= most)


# --- plain PyTorch -------------------------------------------------------------------------------------------------


class _Padded(NamedTuple):
    """Everything at [sequences, H, max_length, ..], in the dtype that is computed in."""

    index: Tensor
    live: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    weight: Tensor
    factor: Tensor | None

    def pack(self, y: Tensor, like: Tensor) -> Tensor:
        """y [sequences, H, max_length, d] as [T, H, d]."""
        tokens = like.shape[0]
        out = y.new_zeros(tokens + 1, *like.shape[1:])
        out[torch.where(self.live, self.index, tokens)] = y.transpose(1, 2)
        return out[:tokens].to(like.dtype, memory_format=torch.contiguous_format, copy=True)

    def scaled(self, y: Tensor) -> Tensor:
        """y times its head's factor; 0 x NaN of a skipped head is 0."""
        return y if self.factor is None else torch.where(self.factor == 0, 0, y * self.factor)


def _pad(x: Tensor, index: Tensor, live: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return wide[index].masked_fill(~live[..., None, None], 0).transpose(1, 2)


def _here(table: Tensor, heads: Sequence[int] | None) -> Tensor:
    """Of a table over original heads, those that are there."""
    return table if heads is None or table.shape[1] == 1 else table[:, list(heads)]


def _padded(q: Tensor, k: Tensor, v: Tensor, asked: _Asked) -> _Padded:
    length, cu = asked.max_length, asked.cu_seqlens.long()
    position = torch.arange(length, device=q.device)
    live = position < cu.diff()[:, None]
    index = (cu[:-1, None] + position).clamp(0, q.shape[0] - 1)
    query, key, value = (_pad(x, index, live) for x in (q, k, v))
    score = query @ key.transpose(-1, -2) * asked.scale
    if asked.bias is not None:
        score = score + _here(asked.bias, asked.heads).to(score.dtype)
    seen = live[:, None, None, :]
    if asked.causal:
        seen = seen & (position <= position[:, None])
    score = score.masked_fill(~seen, float("-inf"))
    weight = score.softmax(-1).masked_fill((score == float("-inf")).all(-1, keepdim=True), 0)
    factor = asked.head_mask
    if factor is not None:
        factor = _here(factor, asked.heads).to(score.dtype)[..., None, None]
    return _Padded(index, live, query, key, value, weight, factor)


def _nothing(q: Tensor, asked: _Asked) -> bool:
    return q.numel() == 0 or asked.cu_seqlens.shape[0] == 1 or asked.max_length == 0


def _spread(found: Tensor, like: Tensor, heads: Sequence[int] | None) -> Tensor:
    """A gradient of the heads that are there, in the place and dtype of the table over the original ones."""
    if heads is not None and like.shape[1] > 1:
        index = torch.tensor(list(heads), device=like.device)
        found = found.new_zeros(found.shape[0], like.shape[1], *found.shape[2:]).index_copy_(1, index, found)
    return found.sum_to_size(like.shape).to(like.dtype)


def _plain_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, asked: _Asked) -> tuple[_Padded, Tensor, Tensor]:
    """The padded tensors, grad among them, and the gradient of the scores."""
    padded = _padded(q, k, v, asked)
    dout = _pad(grad, padded.index, padded.live)
    dweight = padded.scaled(dout @ padded.v.transpose(-1, -2))
    return padded, dout, padded.weight * (dweight - (padded.weight * dweight).sum(-1, keepdim=True))


# --- Triton --------------------------------------------------------------------------------------------------------


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        return _triton.kernels("attention")
    except ImportError as error:
        warnings.warn(f"{OP}: runs in plain PyTorch, slowly: {error}", stacklevel=2)
        return None


def _triton_for(q: Tensor) -> ModuleType | None:
    """The kernels, where they fit."""
    if not q.is_cuda or not _tensor_cores(q.device):
        return None
    found = _kernels()
    return found if found is not None and found.supported(q.shape[2], q.dtype) else None


# --- the CUDA kernel -----------------------------------------------------------------------------------------------


def _cuda_fits(q: Tensor, scale: float) -> bool:
    """Whether the compiled library's kernel takes such tensors, and runs on their device."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or not 0 < q.shape[2] <= 128:
        return False
    return 0 < scale < float("inf") and _tensor_cores(q.device) and lacking(q.device) is None


def _cuda_forward(
    q: Tensor, k: Tensor, v: Tensor, asked: _Asked, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out and the statistics that the Triton kernels' gradients read; counts: how many first tokens are keys."""
    numbers = None if asked.heads is None else _numbers(tuple(asked.heads), q.device)
    factors = None if asked.head_mask is None else asked.head_mask.float()
    return torch.ops.bertkern.attention_cuda_forward(
        q, k, v, asked.cu_seqlens, counts, numbers, factors, asked.bias, asked.max_length, asked.causal, asked.scale
    )


def provider(q: Tensor, scale: float = 1.0, asked: int | str = "auto") -> str:
    """Who computes the forward pass for such a q [T, H, d]: "triton", "cuda" or "torch", plain PyTorch.

    `asked` is one of `PROVIDERS`, by name or number. The gradients are Triton's wherever it fits and plain PyTorch is
    not asked for.

    Raises:
        RuntimeError: what is asked for is unknown, or does not fit here.
    """
    names = {number: name for name, number in PROVIDERS.items()}
    name = asked if isinstance(asked, str) else names.get(asked)
    _expect(OP, "provider", f"one of {', '.join(PROVIDERS)}", asked, name in PROVIDERS)
    if name == "torch":
        return name
    fitting = [
        *(["triton"] if name != "cuda" and _triton_for(q) is not None else []),
        *(["cuda"] if name != "triton" and _cuda_fits(q, scale) else []),
    ]
    if name == "auto":
        return next(iter(fitting), "torch")
    expected = f"auto or torch for heads of {q.shape[2]} in {q.dtype} on {q.device} here"
    _expect(OP, "provider", expected, name, name in fitting)
    return str(name)


def _triton_for_gradients(q: Tensor, asked: _Asked) -> ModuleType | None:
    return None if asked.provider == PROVIDERS["torch"] else _triton_for(q)


@functools.lru_cache(maxsize=1024)
def _numbers(heads: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(heads, dtype=torch.int32, device=device)


def _sequences(found: ModuleType, asked: _Asked) -> Any:
    numbers = None if asked.heads is None else _numbers(tuple(asked.heads), asked.cu_seqlens.device)
    return found.Sequences(
        asked.cu_seqlens, asked.max_length, asked.scale, asked.causal, numbers, asked.head_mask, asked.bias
    )


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` without autocast, which would cast the products of plain PyTorch."""

    @functools.wraps(function)
    def run(first: Tensor, *arguments: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *arguments)

    return run


# --- the operators -------------------------------------------------------------------------------------------------

_ASKED = "Tensor cu_seqlens, Tensor? head_mask, Tensor? bias, int[]? heads, SymInt max_length, bool causal, float scale"
_OPERANDS = f"Tensor q, Tensor k, Tensor v, {_ASKED}, int provider=0"


@torch.library.custom_op(
    "bertkern::attention_cuda", mutates_args=(), schema=f"({_OPERANDS}) -> (Tensor out, Tensor statistics)"
)
@_as_it_is
def _attention(q, k, v, *arguments):
    asked = _Asked(*arguments)
    _check(q, k, v, asked)
    _check_lengths(q.shape[0], asked)
    by = provider(q, asked.scale, asked.provider)
    if by == "cuda":
        return _cuda_forward(q, k, v, asked)
    if by == "triton":
        found = _triton_for(q)
        assert found is not None
        return found.attention(q, k, v, _sequences(found, asked))
    # Plain gradients begin anew: they need no statistics.
    statistics = q.new_zeros(2, q.shape[1], q.shape[0], dtype=torch.float32)
    if _nothing(q, asked):
        return q.new_zeros(q.shape), statistics
    padded = _padded(q, k, v, asked)
    return padded.pack(padded.scaled(padded.weight @ padded.v), q), statistics


@torch.library.custom_op(
    "bertkern::attention_cuda_gradients",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor out, Tensor statistics, {_OPERANDS})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor delta)",
)
@_as_it_is
def _gradients(grad, out, statistics, q, k, v, *arguments):
    asked = _Asked(*arguments)
    found = _triton_for_gradients(q, asked)
    if found is not None:
        return found.attention_gradients(grad, q, k, v, out, statistics, _sequences(found, asked))
    # Nor does the bias's gradient need delta here.
    delta = q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32)
    if _nothing(q, asked):
        return q.new_zeros(q.shape), q.new_zeros(q.shape), q.new_zeros(q.shape), delta
    padded, dout, dscore = _plain_gradients(grad, q, k, v, asked)
    dq = dscore @ padded.k * asked.scale
    dk = dscore.transpose(-1, -2) @ padded.q * asked.scale
    dv = padded.scaled(padded.weight.transpose(-1, -2) @ dout)
    return padded.pack(dq, q), padded.pack(dk, q), padded.pack(dv, q), delta


@torch.library.custom_op(
    "bertkern::attention_cuda_bias_gradient",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor statistics, Tensor delta, {_OPERANDS}) -> Tensor",
)
@_as_it_is
def _bias_gradient(grad, statistics, delta, q, k, v, *arguments):
    asked = _Asked(*arguments)
    found = _triton_for_gradients(q, asked)
    if found is not None:
        return found.attention_bias_gradient(grad, q, k, v, statistics, delta, _sequences(found, asked))
    if _nothing(q, asked):
        return asked.bias.new_zeros(asked.bias.shape)
    return _spread(_plain_gradients(grad, q, k, v, asked)[2], asked.bias, asked.heads)


@torch.library.custom_op(
    "bertkern::attention_cuda_mask_gradient", mutates_args=(), schema=f"(Tensor grad, {_OPERANDS}) -> Tensor"
)
@_as_it_is
def _mask_gradient(grad, q, k, v, *arguments):
    asked = _Asked(*arguments)
    found = _triton_for_gradients(q, asked)
    if found is not None:
        return found.attention_factors_gradient(grad, q, k, v, _sequences(found, asked))
    if _nothing(q, asked):
        return asked.head_mask.new_zeros(asked.head_mask.shape)
    padded = _padded(q, k, v, asked)
    along = (_pad(grad, padded.index, padded.live) * (padded.weight @ padded.v)).sum((-1, -2))
    return _spread(along, asked.head_mask, asked.heads)


# Tracing checks too: what does not fit is said there, not by compiled code.


@_attention.register_fake
def _(q, k, v, *arguments):
    _check(q, k, v, _Asked(*arguments))
    return q.new_empty(q.shape), q.new_empty(2, q.shape[1], q.shape[0], dtype=torch.float32)


@_gradients.register_fake
def _(grad, out, statistics, q, k, v, *arguments):
    delta = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape), delta


@_bias_gradient.register_fake
def _(grad, statistics, delta, q, k, v, *arguments):
    bias = _Asked(*arguments).bias
    return bias.new_empty(bias.shape)


@_mask_gradient.register_fake
def _(grad, q, k, v, *arguments):
    mask = _Asked(*arguments).head_mask
    return mask.new_empty(mask.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, cu_seqlens, head_mask, bias, *rest = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, head_mask, bias)
    ctx.rest = rest


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
    q, k, v, out, statistics, *tensors = ctx.saved_tensors
    operands, needed = (q, k, v, *tensors, *ctx.rest), ctx.needs_input_grad
    for_mask = _mask_gradient(grad, *operands) if needed[4] else None
    found, for_bias = (None, None, None), None
    if any(needed[:3]) or needed[5]:
        *found, delta = _gradients(grad, out, statistics, *operands)
        for_bias = _bias_gradient(grad, statistics, delta, *operands) if needed[5] else None
    return (*found, None, for_mask, for_bias, *[None] * len(ctx.rest))


_attention.register_autograd(_backward, setup_context=_save)


@explained
def attention_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    *,
    head_mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    heads: Sequence[int] | None = None,
    provider: str = "auto",
) -> Tensor:
    """Attention of every token of packed sequences to the tokens of its own sequence; once differentiable.

    Only heads that are there are computed, and of those none whose factor is 0. A query whose keys are all hidden by
    -inf gets zeros, and so do tokens that stand in no sequence, or past max_length in theirs. On a GPU cu_seqlens is
    never looked at from the host: sequences that do not rise, or overlap, give numbers of no meaning, and nothing
    outside of the tensors is read. Under autocast q, k and v are cast. The kernels give the same bits at every run, and
    a sequence the same in any batch.

    Args:
        q, k, v: [T, H, d] fp32, bf16, fp16 or fp64, views of any strides; d up to 128 by the kernels, fastest where
            it is 16, 32, 64 or 128.
        cu_seqlens: int32 [sequences + 1] on q's device: sequence b is the tokens cu_seqlens[b] .. cu_seqlens[b + 1].
        max_length: no sequence is longer.
        head_mask: [sequences, heads] or [heads], float or bool: 0 skips a head, another factor scales what it gives.
        bias: float, added to the scores by the positions in a sequence; broadcasts to [sequences, heads, max_length,
            max_length]. -inf hides a key. Copied where its rows are no whole groups of 16 bytes: a max_length that is
            a multiple of 8 spares that.
        causal: whether a query sees no keys after its own position.
        scale: of q k^T; 1 / sqrt(d) by default.
        heads: the original numbers of the H heads that are there, where head_mask and bias speak of all that there
            once were. Copied to the GPU at their first use, which a CUDA graph must not be.
        provider: who computes the forward pass: "auto", "triton", "cuda" (the compiled library's kernel: fp16 and bf16)
            or "torch", plain PyTorch. Each has bits of its own. "auto" is Triton where it is installed.

    Raises:
        RuntimeError: shapes, dtypes, devices, heads or a provider that do not fit; on a CPU also cu_seqlens and
            max_length.

    Example:
        >>> q, k, v = torch.randn(3, 7, 2, 16)
        >>> attention_cuda(q, k, v, torch.tensor([0, 3, 7], dtype=torch.int32), 4).shape
        torch.Size([7, 2, 16])
    """
    kind = q.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    if head_mask is not None:
        head_mask = head_mask.float() if head_mask.dtype == torch.bool else head_mask
        if head_mask.dim() == 1 and cu_seqlens.dim() == 1:
            head_mask = head_mask.expand(cu_seqlens.shape[0] - 1, -1)
    if bias is not None and bias.dim() == 4:
        sizes = [max_length if bias.shape[i] == 1 else bias.shape[i] for i in (2, 3)]
        bias = bias.expand(-1, -1, *sizes)
    if scale is None:
        # What has no last dimension is refused below.
        scale = max((1, *q.shape[-1:])) ** -0.5
    else:
        _expect(OP, "scale", "to be finite", scale, math.isfinite(scale))
    _expect(OP, "provider", f"one of {', '.join(PROVIDERS)}", provider, provider in PROVIDERS)
    number = PROVIDERS[provider]
    return _attention(q, k, v, cu_seqlens, head_mask, bias, heads, max_length, causal, scale, number)[0]
