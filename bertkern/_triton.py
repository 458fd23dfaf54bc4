"""Finds the Triton kernels: the folder `kernels` of a checkout, `bertkern.kernels` where installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

PACKAGE = "bertkern.kernels"
ROOT = Path(__file__).resolve().parent.parent


def kernels(name: str) -> ModuleType:
    """The module kernels/<name>.py.

    Raises:
        ImportError: with one line that says what to do, where Triton is not installed.
    """
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ImportError("bertkern's GPU kernels need Triton. Run: pip install 'triton>=3.6'") from None
    folder = ROOT / "kernels"
    if PACKAGE not in sys.modules and (ROOT / "setup.py").is_file() and (folder / "__init__.py").is_file():
        # A checkout's own folder, whether or not it, or another one, is installed.
        spec = importlib.util.spec_from_file_location(
            PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACKAGE] = module
        spec.loader.exec_module(module)
    return importlib.import_module(f"{PACKAGE}.{name}")
