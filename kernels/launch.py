"""What launchers share: how operands come to a kernel, on which device it runs, and what the compiler is told."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)


def compile_options(warps: int, stages: int, *, fuse: bool) -> dict[str, Any]:
    """What Triton's compiler takes. `fuse`: whether a multiply and an add may become one that rounds once; stated,
    because the default differs between Triton's versions."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fuse}


def upcast(dtype: torch.dtype) -> bool:
    """Whether operands become fp32 before they are multiplied: of bf16 the interpreter multiplies the bit patterns,
    silently, and it knows no float8."""
    return INTERPRETED and dtype in (torch.bfloat16, torch.float8_e4m3fn)


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def rows_of(x: Tensor) -> Tensor:
    """x as a matrix whose rows are contiguous; a copy only where they are not."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def row_block(width: int) -> int:
    """The lanes that a row of this width takes."""
    return max(32, triton.next_power_of_2(width))
