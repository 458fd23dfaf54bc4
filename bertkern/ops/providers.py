"""Who computes an operator on a GPU: a Triton kernel, a CUDA kernel of the compiled library, or plain PyTorch.

Whether the library's kernels run on a card is said here for all operators. Which of two is taken is found in two ways:

    by measurement    Row operators and packed attention, here: Triton's is the default. Where there is a CUDA twin,
                      `bertkern.gpu_tuning` measures both on the user's card and tells the faster one, by operator,
                      device and width of a row (of attention: features of a head, and dtype): never by the number of
                      rows, on which no bits may depend.
    by the call       Linear layers with zeros or few bits, in linear_providers.py: what the caller asks for, and a
                      table of rules.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch

from .. import _cuda

TRITON, CUDA, TORCH = "triton", "cuda", "torch"
# The operator of the compiled library that computes the same, by ours.
TWINS = {
    "quantize_rows_cuda": "quantize_codes",
    "add_layernorm_cuda": "add_layernorm_live",
    "add_layernorm_quantize_cuda": "add_layernorm_codes",
    "embed_cuda": "embed",
    "attention_packed_cuda": "attention_cuda_forward",
}
_chosen: dict[tuple[str, torch.device, Hashable], str] = {}


@functools.cache
def lacking(device: torch.device) -> str | None:
    """Why the compiled library's CUDA kernels do not run on a device, or None where they do."""
    if device.type != "cuda":
        return f"{device} is no GPU"
    return _cuda.missing(torch.cuda.get_device_capability(device))


def available(op: str, device: torch.device) -> tuple[str, ...]:
    """The providers of an operator on a device."""
    twin = TWINS.get(op)
    there = twin is not None and lacking(device) is None and hasattr(torch.ops.bertkern, twin)
    there = there and torch._C._dispatch_has_kernel_for_dispatch_key(f"bertkern::{twin}", "CUDA")
    return (TRITON, CUDA, TORCH) if there else (TRITON, TORCH)


def provider(op: str, device: torch.device, width: Hashable) -> str:
    """Who computes `op` for rows of a width."""
    return _chosen.get((op, device, width), TRITON)


def prefer(op: str, device: torch.device, width: Hashable, name: str | None) -> None:
    """Has `name` compute it; None: the default again.

    Raises:
        ValueError: a provider that the operator lacks.
    """
    if name is None:
        _chosen.pop((op, device, width), None)
        return
    if name not in (there := available(op, device)):
        raise ValueError(f"prefer: expected a provider of {op}, {' or '.join(there)}. Got {name!r}.")
    _chosen[op, device, width] = name


@contextmanager
def preferred(op: str, device: torch.device, width: Hashable, name: str | None) -> Iterator[None]:
    """Within it, `name` computes an operator."""
    before = _chosen.get((op, device, width))
    prefer(op, device, width, name)
    try:
        yield
    finally:
        prefer(op, device, width, before)
