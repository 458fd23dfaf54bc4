"""The card as it is found: name, driver, versions, clocks."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from importlib import metadata
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "bertkern", "bitsandbytes", "torchao", "gemlite")
QUERY = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit",
    "temperature.gpu", "persistence_mode", "mig.mode.current",
)  # fmt: skip


def parse_smi(text: str) -> dict[str, str]:
    """The first card of `nvidia-smi --query-gpu=... --format=csv,noheader`, by the names of QUERY."""
    rows = list(csv.reader(io.StringIO(text), skipinitialspace=True))
    if not rows or len(rows[0]) != len(QUERY):
        return {}
    return {name: value.strip() for name, value in zip(QUERY, rows[0], strict=True)}


def smi() -> dict[str, str]:
    """What nvidia-smi says, nothing where it is missing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return parse_smi(done.stdout) if done.returncode == 0 else {}


def versions() -> dict[str, str]:
    """Of the packages that take part, as far as they are installed."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def facts() -> dict[str, Any] | None:
    """Of the current card, or None without one. Loads torch: for a child."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "arch": f"sm_{properties.major}{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "cuda": torch.version.cuda,
        "versions": versions(),
        "smi": smi(),
        "library": _library(),
    }


def _library() -> str:
    """Which architectures bertkern's CUDA library brings, as far as it says so."""
    try:
        import bertkern  # noqa: F401
        from bertkern import _cuda
    except ImportError as error:
        return str(error)
    import torch

    lacking = _cuda.missing(torch.cuda.get_device_capability())
    return "loaded" if lacking is None else lacking


def job(say: Any, device: str = "cuda") -> None:
    """Says the card's facts, or that there is none."""
    say(fact={"card": facts()})
