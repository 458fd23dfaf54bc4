"""Loads the compiled operators, `torch.ops.bertkern.*`; where that cannot work, says in one line what to do.

Importing this module loads `_C.abi3.so`, which ties to torch's stable ABI (2.10 and newer) and to no Python version,
and the operators for GPUs beside it (`_cuda`), where they are there and can run.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

from . import _cuda

PACKAGE = Path(__file__).resolve().parent
LIBRARY = PACKAGE / "_C.abi3.so"
BUILD = "pip install --no-build-isolation -e ."
OLDEST_TORCH = (2, 10)


def _import_torch() -> ModuleType:
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError("bertkern needs torch 2.10 or newer. Run: pip install 'torch>=2.10'") from None
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        raise ImportError(f"bertkern needs torch 2.10 or newer. Got {torch.__version__}. Run: pip install -U torch")
    return torch


def _installed_elsewhere() -> Path | None:
    """Folder of an installed bertkern that this checkout hides, or None."""
    for distribution in metadata.distributions(name="bertkern"):
        folder = Path(str(distribution.locate_file("bertkern"))).resolve()
        if folder != PACKAGE and (folder / LIBRARY.name).exists():
            return folder
    return None


def _missing_library() -> str:
    installed = _installed_elsewhere()
    if installed:
        return (
            f"{PACKAGE} has no compiled operators and hides the installed {installed}. "
            f"Run Python from another folder, or build here: {BUILD}"
        )
    if (PACKAGE.parent / "setup.py").exists():
        return f"bertkern's operators are not built. Run in {PACKAGE.parent}: {BUILD}"
    return f"{PACKAGE} lacks {LIBRARY.name}. Reinstall: pip install --force-reinstall --no-deps bertkern"


def load(library: str | os.PathLike | None = None) -> None:
    """Registers the operators of `library` (default: $BERTKERN_LIBRARY, else the one beside this file).

    Raises:
        ImportError: with one line that says what to do, where torch is missing or too old, or the library is missing or
            was built for another platform.
    """
    torch = _import_torch()
    path = Path(library or os.environ.get("BERTKERN_LIBRARY") or LIBRARY)
    if not path.exists():
        raise ImportError(_missing_library() if path == LIBRARY else f"BERTKERN_LIBRARY: there is no file {path}.")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = str(error).replace("\n", " ")
        raise ImportError(
            f"{path} does not load here ({reason}): it was built for another platform or torch. "
            f"Build from the sources: {BUILD}"
        ) from None
    _cuda.load(torch)


if sys.platform == "win32":
    raise ImportError("bertkern runs on Linux and macOS. On Windows, use it inside WSL.")
load()
