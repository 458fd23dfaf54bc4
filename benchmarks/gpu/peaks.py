"""What the card gives at most, measured: bf16, int8 and fp8 products of large matrices, a copy, an empty launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .timing import clock_of, ready, take_turns

SIZE, COPY = 8192, 1 << 30


def calls(device: str, size: int, copy: int) -> dict[str, tuple[float, Callable[[], Any]]]:
    """By name: how much work a call is (TFLOP, or GB moved), and the call."""
    x = torch.randn(size, size, device=device)
    half, codes = x.bfloat16(), (x * 20).clamp(-127, 127).to(torch.int8)
    flop, one = 2 * size**3 / 1e12, torch.zeros(1, device=device)
    made: dict[str, tuple[float, Callable[[], Any]]] = {
        "bf16": (flop, lambda: half @ half.t()),
        "int8": (flop, lambda: torch._int_mm(codes, codes.t())),
        "launch": (0.0, lambda: one.add_(0)),
    }
    eight = x.to(torch.float8_e4m3fn)
    step = torch.ones(size, 1, device=device)

    def fp8() -> Any:
        return torch._scaled_mm(eight, eight.t(), scale_a=step, scale_b=step.t(), out_dtype=torch.bfloat16)

    made["fp8"] = (flop, fp8)
    source = torch.empty(copy, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    made["copy"] = (2 * copy / 1e9, lambda: target.copy_(source))
    return made


def job(say: Any, device: str = "cuda", size: int = SIZE, copy: int = COPY, rounds: int = 7) -> None:
    """Rows of kernel "peak": tflop_s, gb_s, latency_ms; the fact `peaks`: medians by name."""
    clock, timed, work = clock_of(device), [], {}
    for name, (amount, call) in calls(device, size, copy).items():
        say(at=f"peaks|{name}")
        try:
            timed.append(ready(clock, name, lambda _, call=call: call(), (), cold=False))
            work[name] = amount
        except RuntimeError as error:
            say(absent={f"peak {name}": str(error).splitlines()[0][:200]})
    found = {}
    for name, s in take_turns(clock, timed, rounds).items():
        axis, ms = ("what", f"{size} {name}"), (s.median, s.p20, s.p80)
        say.row("peak", name, "latency_ms", axis, ms)
        found[name] = s.median
        if work[name]:
            rates = [1e3 * work[name] / value for value in (s.median, s.p80, s.p20)]
            say.row("peak", name, "gb_s" if name == "copy" else "tflop_s", axis, rates)
            found[name] = rates[0]
    say(fact={"peaks": found})
