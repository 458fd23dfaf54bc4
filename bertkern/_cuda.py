"""Loads the operators of NVIDIA GPUs, where they were built and can run; says once, in one line, why not.

`_C_cuda.abi3.so` lies beside this file, or where $BERTKERN_CUDA_LIBRARY says. It needs a torch with CUDA at run time,
not when it is built: the same file serves every torch from 2.10 on and every Python.
"""

from __future__ import annotations

import ctypes
import functools
import json
import mmap
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

LIBRARY = Path(__file__).resolve().parent / "_C_cuda.abi3.so"
_MARK = b"bertkern-cuda-facts{"

# None once the operators are registered; else why they are not.
reason: str | None = "not asked for yet"


def library() -> Path:
    """The library's file, which need not exist."""
    return Path(os.environ.get("BERTKERN_CUDA_LIBRARY") or LIBRARY)


def build_facts() -> dict[str, Any] | None:
    """What the library was built for, read from its file without loading it; None: there is no library.

    Keys: `cuda` (the toolkit's version, a pair), `targets` (architectures, such as "80" and "90a"), `ptx`
    (architectures whose PTX the driver compiles for newer cards).

    Raises:
        ImportError: the file is no such library.
    """
    path = library()
    if not path.exists():
        return None
    with open(path, "rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                start = data.find(_MARK)
                found = data[start + len(_MARK) - 1 : data.find(b"\0", start)] if start >= 0 else b""
        except ValueError:  # an empty file
            found = b""
    if not found:
        raise ImportError(f"{path} is not bertkern's CUDA library. Build it from the sources.")
    return json.loads(found)


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the installed driver serves; None: there is no driver. Starts nothing on the GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value // 1000, version.value % 1000 // 10


def _why_not(torch: ModuleType) -> str | None:
    facts = build_facts()
    if facts is None:
        return "not built: there was no nvcc, or torch was without CUDA, and BERTKERN_USE_CUDA=1 was not set"
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    driver = driver_version()
    if driver is None:
        return "there is no NVIDIA driver"
    # Within one major version, older drivers run what newer toolkits have compiled.
    if driver[0] < facts["cuda"][0]:
        return (
            f"the NVIDIA driver serves CUDA {driver[0]}.{driver[1]}, this build needs {facts['cuda'][0]}.0. "
            "Update the driver, or build with an older toolkit (CUDA_HOME)"
        )
    return None


def load(torch: ModuleType) -> None:
    """Registers the CUDA operators where they can run; else `reason` says why not, and the CPU's work as ever."""
    global reason
    try:
        reason = _why_not(torch)
        if reason is None:
            torch.ops.load_library(library())
    except (ImportError, OSError) as error:
        reason = str(error).replace("\n", " ").rstrip(".")
    if reason is not None and torch.version.cuda is not None and library().exists() and driver_version() is not None:
        warnings.warn(f"bertkern: its CUDA operators are not used: {reason}.", stacklevel=2)


@functools.cache
def missing(capability: tuple[int, int]) -> str | None:
    """Why the CUDA operators do not run on cards of this compute capability, or None where they do.

    Says it once in a warning where the build lacks the architecture: Triton or torch do the work there.

    Example:
        >>> missing(torch.cuda.get_device_capability(device))
    """
    if reason is not None:
        return reason
    facts = build_facts()
    assert facts is not None
    if runs_on(facts, capability):
        return None
    said = (
        f"the build has no code for compute capability {capability[0]}.{capability[1]} "
        f"({', '.join(facts['targets'])}{' and PTX of ' + ', '.join(facts['ptx']) if facts['ptx'] else ''}). "
        f'Build with TORCH_CUDA_ARCH_LIST="{capability[0]}.{capability[1]}"'
    )
    warnings.warn(f"bertkern: its CUDA operators are not used: {said}.", stacklevel=2)
    return said


def runs_on(facts: dict[str, Any], capability: tuple[int, int]) -> bool:
    """Whether a build of these facts has code for cards of this compute capability."""
    return any(_binary_fits(target, capability) for target in facts["targets"]) or any(
        _version(ptx) == capability or (ptx[-1].isdigit() and _version(ptx) <= capability) for ptx in facts["ptx"]
    )


def _version(target: str) -> tuple[int, int]:
    digits = target.rstrip("af")
    return int(digits[:-1]), int(digits[-1])


def _binary_fits(target: str, capability: tuple[int, int]) -> bool:
    """Machine code runs on its own and later minor versions; with "a" on its own alone, with "f" on its family."""
    major, minor = _version(target)
    if target.endswith("a"):
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor
