"""What this machine and this installation can do: the facts that `python -m bertkern doctor` prints.

Nothing here fails where a part of the installation does: what is missing or broken is a fact too, and `hints` says what
to do about it.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "triton", "sentence-transformers")
ISA_NAMES = ("portable", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx")  # as csrc/cpu/isa.h numbers them
OLDEST_TRANSFORMERS = (5, 6)


def collect() -> dict[str, Any]:
    """Facts in sections of plain values, ready for JSON.

    Sections: `versions` (None: not installed), `processor` (ISA levels, cache sizes in bytes), `threads`, `build`
    (compiler, flags of each ISA, torch built against and running), `gpu`, and the list `hints`, one sentence each.

    Example:
        >>> bertkern.doctor.collect()["processor"]["isa_active"]
        'avx512bf16'
    """
    facts: dict[str, Any] = {
        "versions": _versions(),
        "processor": _processor(),
        "threads": _threads(),
        "build": _build(),
        "gpu": _gpu(),
    }
    facts["hints"] = hints(facts)
    return facts


def hints(facts: dict[str, Any]) -> list[str]:
    """What to do about what `facts` (of `collect`) show, one sentence each."""
    found = []
    versions, processor, threads, build = (facts[name] for name in ("versions", "processor", "threads", "build"))

    if build["error"]:
        found.append(build["error"])
    elif not build["host_module"]:
        found.append(
            f"There is no host module for Python {versions['python']} here: all else works, but the processor's name, "
            "cache sizes, build flags and peaks are unknown. Build with this Python to have them."
        )
    if processor["isa_error"]:
        found.append(processor["isa_error"])
    elif processor["isa_cap"] and processor["isa_active"] != processor["isa_detected"]:
        found.append(
            f"BERTKERN_CPU_ISA={processor['isa_cap']} caps this processor, which has {processor['isa_detected']}. "
            "Unset it for full speed."
        )
    if processor["isa_detected"] in ("portable", "avx2", "avx512"):
        found.append(
            f"This processor ({processor['isa_detected']}) has no 8-bit dot product (AVX-512 VNNI): int8 runs through "
            "16-bit products, at half the speed or less."
        )

    usable, running = threads["usable_cores"], threads["torch"]
    if running and running > usable:
        found.append(
            f"torch runs {running} threads on {usable} usable cores, which costs more than it brings. "
            f"Set OMP_NUM_THREADS={usable} or call torch.set_num_threads({usable})."
        )
    elif running and running < usable and threads["OMP_NUM_THREADS"]:
        found.append(f"OMP_NUM_THREADS={threads['OMP_NUM_THREADS']} leaves {usable - running} of {usable} cores idle.")

    transformers = versions["transformers"]
    if transformers is None:
        found.append("transformers is not installed: whole models need it. Run: pip install 'bertkern[hf]'")
    elif _release(transformers) < OLDEST_TRANSFORMERS:
        found.append(f"Expected transformers 5.6 or newer. Got {transformers}. Run: pip install -U transformers")
    return found


def peaks(threads: int = 1) -> dict[str, float]:
    """Measured limits of this machine, empty without the host module; takes about half a second.

    Keys: `int8`, `bf16`, `fp32`: 10^9 multiply-accumulates a second of these threads together, on registers alone, at
    the active ISA level; `read`: 10^9 bytes a second from memory.
    """
    host = _host()
    if host is None:
        return {}
    rates = {dtype: host.peak(dtype, threads) for dtype in ("int8", "bf16", "fp32")}
    return {**rates, "read": host.read_bandwidth(threads)}


def text(facts: dict[str, Any]) -> str:
    """`facts` as lines for a person, hints last."""
    lines = []
    for section, values in facts.items():
        if section == "hints":
            continue
        lines.append(section)
        width = max(map(len, values), default=0)
        lines += [f"  {name:<{width}}  {_plain(name, value)}" for name, value in values.items()]
    lines.append("hints")
    lines += [f"  {hint}" for hint in facts["hints"]] or ["  none: all is well"]
    return "\n".join(lines)


def _load_error() -> str | None:
    """None where the operators are loaded, else the line that says what to do."""
    try:
        importlib.import_module("bertkern._lib")
    except ImportError as error:
        return str(error)
    return None


def _host() -> ModuleType | None:
    """The host module, or None where it was built for another Python version or not at all."""
    try:
        return importlib.import_module("bertkern._host")
    except ImportError:
        return None


def _plain(name: str, value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name in ("l1d", "l2", "l3"):
        return f"{value / 2**10:.0f} KiB" if value < 2**20 else f"{value / 2**20:.0f} MiB"
    return str(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def _versions() -> dict[str, str | None]:
    from bertkern import __version__

    return {
        "bertkern": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        **{package: _version(package) for package in PACKAGES},
    }


def _processor() -> dict[str, Any]:
    host = _host()
    cap = os.environ.get("BERTKERN_CPU_ISA") or None
    facts = {"brand": None, "isa_detected": None, "isa_cap": cap, "isa_active": None, "isa_error": None}
    caches = {"l1d": None, "l2": None, "l3": None}
    if host is not None:
        cpu = host.cpu()
        facts.update(brand=cpu["brand"] or platform.machine(), isa_detected=cpu["isa"])
        caches = {name: cpu[name] for name in caches}
    if _load_error() is None:
        import torch

        try:
            facts["isa_active"] = ISA_NAMES[torch.ops.bertkern.cpu_isa()]
        except RuntimeError as error:  # BERTKERN_CPU_ISA holds no level's name
            facts["isa_error"] = str(error).splitlines()[0]
    return {**facts, **caches}


def _threads() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_cores()
    if quota:
        usable = max(1, min(usable, math.ceil(quota)))
    facts = {
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "container_limit": quota,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "torch": None,
    }
    try:
        import torch

        facts["torch"] = torch.get_num_threads()
    except ImportError:
        pass
    return facts


def _cgroup_cores(root: str = "/sys/fs/cgroup") -> float | None:
    """Cores that a container may use at a time (its CPU quota), or None where there is no limit."""
    try:  # version 2, then version 1
        quota, period = Path(root, "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = Path(root, "cpu/cpu.cfs_quota_us").read_text().strip()
            period = Path(root, "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not quota.isdigit() or not period.isdigit():  # "max", -1: no limit
        return None
    return int(quota) / int(period)


def _build() -> dict[str, Any]:
    facts: dict[str, Any] = {"error": _load_error(), "host_module": False}
    host = _host()
    if host is not None:
        built = json.loads(host.build_facts())
        facts["host_module"] = True
        facts["compiler"] = built["compiler"]
        facts["flags"] = built["flags"]
        facts.update({f"flags {isa}": flags or "baseline" for isa, flags in built["isa_flags"].items()})
        facts["torch built against"] = f"{built['torch']} (stable ABI {built['stable_abi']})"
        facts["python built against"] = built["python"]
    facts["torch running"] = _version("torch")
    return facts


def _gpu() -> dict[str, Any]:
    from . import _cuda

    facts: dict[str, Any] = {"device": None}
    try:
        import torch

        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            facts = {
                "device": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "cuda": torch.version.cuda,
            }
    except (ImportError, RuntimeError):
        pass
    driver = _cuda.driver_version()
    facts["driver serves CUDA"] = driver and f"{driver[0]}.{driver[1]}"
    try:
        built = _cuda.build_facts()
    except ImportError as error:
        return {**facts, "kernels built": False, "kernels loaded": False, "why not": str(error)}
    facts["kernels built"] = built is not None
    if built:
        facts["kernels' CUDA"] = ".".join(map(str, built["cuda"]))
        facts["kernels' targets"] = ", ".join([f"sm_{target}" for target in built["targets"]])
        facts["kernels' PTX"] = ", ".join(f"compute_{target}" for target in built["ptx"]) or None
    why_not = _load_error() or _cuda.reason
    if why_not is None and facts["device"]:
        why_not = _cuda.missing(tuple(map(int, facts["capability"].split("."))))
    facts["kernels loaded"] = why_not is None
    facts["why not"] = why_not
    return facts
