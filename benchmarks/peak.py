"""What the machine can do at this moment: the yardstick of every share, and the test that nothing disturbs a timing.

The yardsticks are bertkern's own probes: a loop of int8 dot products on registers, and a streaming read. Both take the
best of many short runs, so they see through disturbances. The test for quiet does the opposite: small matrix products,
on every thread at once, counted over all of a fixed time, so that whatever takes time away shows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


@cache
def _host() -> Any:
    try:
        from bertkern import _host
    except ImportError:
        return None
    return _host


def registers(threads: int, precision: str = "int8") -> float | None:
    """The register peak of `threads` threads together in int8, bf16 or fp32, GMAC/s; None without the host module."""
    host = _host()
    if host is None:
        return None
    return float(host.peak(precision, threads))


def read(threads: int, megabytes: int = 512) -> float:
    """Read bandwidth over a buffer beyond the caches, GB/s; without the host module by numpy, on one thread."""
    host = _host()
    if host is not None:
        return float(host.read_bandwidth(threads))
    data = np.ones(megabytes << 17, np.float64)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        data.max()
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best / 1e9


def quiet(threads: int, seconds: float = 0.02) -> float:
    """fp32 matrix products that `threads` threads get done together within `seconds`, GMAC/s.

    numpy's BLAS must run on one thread (`harness.Worker` sees to it).
    """

    end = time.perf_counter() + seconds

    def products() -> tuple[float, int, float]:
        a, b, out = _operands()
        done, start = 0, time.perf_counter()
        while time.perf_counter() < end:
            np.matmul(a, b, out=out)
            done += a.shape[0] ** 3
        return start, done, time.perf_counter()

    starts, done, ends = zip(*_together(threads, products), strict=True)
    return sum(done) / (max(ends) - min(starts)) / 1e9


def _operands() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    side = 192  # three such matrices stay in a second-level cache
    return np.ones((side, side), np.float32), np.ones((side, side), np.float32), np.empty((side, side), np.float32)


@cache
def _team(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _together(threads: int, work: Callable[[], T]) -> list[T]:
    """Runs `work` on that many threads at once."""
    if threads == 1:
        return [work()]
    return [future.result() for future in [_team(threads).submit(work) for _ in range(threads)]]


def cpu_model() -> str:
    """The processor's name, its family and model (a name may stand for several), and the cores of this process."""
    facts: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo") as info:
            for line in info:
                key, _, value = line.partition(":")
                facts.setdefault(key.strip(), value.strip())
    except OSError:
        import platform

        facts["model name"] = platform.processor() or platform.machine()
    name = facts.get("model name", "unknown processor")
    if "cpu family" in facts and "model" in facts:
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} core{'s' if cores != 1 else ''}"


def isa() -> str:
    """The instruction set in use: as the host module says, else the best that the kernel lists for the processor."""
    host = _host()
    if host is not None:
        return str(host.active_isa())
    try:
        with open("/proc/cpuinfo") as info:
            flags = next((line.split() for line in info if line.startswith("flags")), [])
    except OSError:
        return "unknown"
    known = {
        "amx_int8": "amx",
        "avx512_bf16": "avx512bf16",
        "avx512_vnni": "avx512vnni",
        "avx512f": "avx512",
        "avx2": "avx2",
    }
    return next((name for flag, name in known.items() if flag in flags), "portable")
