"""What the machine can do at this moment: the yardstick of every share, and the test that nothing disturbs a timing.

With bertkern's host module: its register-only int8 loop (GMAC/s) and its streaming read (GB/s). Without it (in a rival's
interpreter, or before the build) an fp32 matmul of torch or numpy stands in, good only for telling quiet from disturbed.
"""

from __future__ import annotations

import os
import time
from functools import cache
from typing import Any


@cache
def _host() -> Any:
    try:
        from bertkern import _host
    except ImportError:
        return None
    return _host


def kind() -> str:
    """What `compute` measures: "int8" (GMAC/s of the int8 dot products) or "fp32 matmul" (GMAC/s, a stand-in)."""
    return "int8" if _host() is not None else "fp32 matmul"


@cache
def _operands() -> Any:
    import numpy as np

    return np.ones((256, 256), np.float32), np.ones((256, 256), np.float32)


def compute(threads: int, seconds: float = 0.02) -> float:
    """Peak of `threads` threads together, GMAC/s (see `kind`)."""
    host = _host()
    if host is not None:
        return float(host.peak("int8", threads, seconds))
    a, b = _operands()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return a.shape[0] ** 3 / best / 1e9


def read(threads: int, megabytes: int = 512) -> float:
    """Read bandwidth over a buffer beyond the caches, GB/s."""
    host = _host()
    if host is not None and hasattr(host, "read_bandwidth"):
        return float(host.read_bandwidth(threads, megabytes))
    import numpy as np

    data = np.ones(megabytes << 17, np.float64)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        data.max()
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best / 1e9


def cpu_model() -> str:
    """The processor's name and the number of cores that this process may use."""
    name = "unknown processor"
    try:
        with open("/proc/cpuinfo") as info:
            for line in info:
                if line.startswith("model name"):
                    name = line.split(":", 1)[1].strip()
                    break
    except OSError:
        import platform

        name = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} core{'s' if cores != 1 else ''}"


def isa() -> str:
    """The highest of the instruction sets that int8 kernels care about, as bertkern sees it or as the kernel lists it."""
    try:
        from bertkern import cpu_isa

        return str(cpu_isa())
    except (ImportError, AttributeError, RuntimeError, OSError):
        pass
    try:
        with open("/proc/cpuinfo") as info:
            flags = next((line.split() for line in info if line.startswith("flags")), [])
    except OSError:
        return "unknown"
    known = {"avx512_bf16": "avx512bf16", "avx512_vnni": "avx512vnni", "avx512f": "avx512", "avx2": "avx2"}
    return next((name for flag, name in known.items() if flag in flags), "portable")
