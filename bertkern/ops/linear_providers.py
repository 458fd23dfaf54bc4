"""Which kernels run a sparse or low-bit linear layer on a GPU: Triton's (kernels/) or the CUDA library's (csrc/cuda).

Chosen at each call, by rules; what is chosen by measurement stands in providers.py. A call asks its own `provider`,
then $BERTKERN_GPU_PROVIDER, then the operator's table below, by the call's shape. Where the CUDA library is not loaded,
lacks the card's architecture, or the operands do not fit its kernels, Triton's run, and a warning says once why, if
CUDA was asked for.

    auto       as the table says
    triton     Triton's
    cuda       the CUDA library's, for any number of rows
    cuda-few   the CUDA library's for few rows (16 of group-wise weights, 32 of block-sparse ones), Triton's for more

The two add in different orders. So among float operands the tables never ask for the number of rows, or a row's last
bits would depend on how many stand beside it; "cuda-few" gives that up, for whoever asks for it. Sums of int8 are
exact.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .providers import lacking

VARIABLE = "BERTKERN_GPU_PROVIDER"
NAMES = ("auto", "triton", "cuda", "cuda-few")
AUTO, TRITON, CUDA, CUDA_FEW = range(len(NAMES))
HALF, CODES = (torch.float16, torch.bfloat16), (torch.int8,)


@dataclass(frozen=True)
class Rule:
    """A row of a table: calls with operands of these dtypes and of up to `rows` rows are `provider`'s (TRITON or CUDA).

    sides: rows of the weight's blocks that it is about; empty: all.
    """

    provider: int
    dtypes: tuple[torch.dtype, ...]
    rows: int | None = None
    sides: tuple[int, ...] = ()

    def fits(self, dtype: torch.dtype, rows: int, side: int) -> bool:
        return (
            dtype in self.dtypes and (self.rows is None or rows <= self.rows) and (not self.sides or side in self.sides)
        )


@dataclass(frozen=True)
class Table:
    """An operator's rules, of which the first that fits counts (none: Triton), and what few rows are."""

    rules: tuple[Rule, ...]
    few: int


# Expected, not measured: on tiles of 64 rows and more Triton has sm_90's and sm_100's own instructions. For fewer int8
# rows both have sm_80's, and the CUDA kernel a ring of stages that does not wait for the list of blocks.
BLOCK_SPARSE = Table((Rule(CUDA, CODES, rows=32), Rule(TRITON, (*HALF, *CODES))), few=32)
GROUPWISE = Table((Rule(TRITON, HALF),), few=16)


def provider_code(name: str) -> int:
    """The number by which operators know a provider.

    Raises:
        ValueError: no such provider.

    Example:
        >>> provider_code("triton") == TRITON
        True
    """
    if name not in NAMES:
        raise ValueError(f"provider: expected one of {', '.join(NAMES)}. Got {name!r}.")
    return NAMES.index(name)


def _asked() -> int:
    # Inside an operator, at each call: a compiled or exported graph holds nothing of it.
    name = os.environ.get(VARIABLE) or "auto"
    if name not in NAMES:
        raise ValueError(f"{VARIABLE}: expected one of {', '.join(NAMES)}. Got {name!r}.")
    return NAMES.index(name)


@functools.cache
def _say(op: str, reason: str) -> None:
    warnings.warn(f"{op}: its CUDA kernels were asked for and do not run: {reason}. Triton's do.", stacklevel=4)


def by_cuda(op: str, table: Table, provider: int, x: Tensor, misfit: str | None, side: int = 0) -> bool:
    """Whether the CUDA library's kernels run a call.

    Args:
        op: its name, for the warning.
        provider: of `provider_code`.
        x: the operand [..., K].
        misfit: why the kernels do not take the operands, or None.
        side: rows of the weight's blocks, where it has any.
    """
    if not x.is_cuda:
        return False
    provider = provider or _asked()
    if provider == TRITON:
        return False
    rows = x.shape[:-1].numel()
    if provider == AUTO:
        rule = next((rule for rule in table.rules if rule.fits(x.dtype, rows, side)), None)
        if rule is None or rule.provider != CUDA:
            return False
    elif provider == CUDA_FEW and rows > table.few:
        return False
    reason = misfit or lacking(x.device)
    if reason is not None and provider != AUTO:
        _say(op, reason)
    return reason is None


def rows_misfit(x: Tensor) -> str | None:
    """Why x's rows cannot be read 16 bytes at a time, or None where they can."""
    width = x.shape[-1]
    apart = x.dim() == 2 and x.stride(1) == 1 and x.stride(0) >= width
    stride = x.stride(0) if apart else width
    # What is neither contiguous nor a matrix of rows is copied first.
    begins = (not apart and not x.is_contiguous()) or x.data_ptr() % 16 == 0
    if begins and (x.shape[:-1].numel() <= 1 or stride * x.element_size() % 16 == 0):
        return None
    return "rows do not begin at multiples of 16 bytes"


def dtype_misfit(x: Tensor, dtypes: Sequence[torch.dtype]) -> str | None:
    return None if x.dtype in dtypes else f"there is no kernel for {x.dtype}"


def fake(name: str) -> Callable[[Callable[..., Tensor]], None]:
    """Registers the shape of a result of the CUDA library's operator, where it is loaded."""

    def register(shape: Callable[..., Tensor]) -> None:
        if hasattr(torch.ops.bertkern, name):
            torch.library.register_fake(f"bertkern::{name}", shape)

    return register
