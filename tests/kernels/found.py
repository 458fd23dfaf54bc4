"""The kernels for the tests of this folder, or what to say where Triton is missing."""

import json
import os
import platform
import subprocess
import sys
from types import ModuleType

import numpy
import pytest

from bertkern import _triton
from tests.conftest import ROOT


def kernels(name: str) -> ModuleType:
    """kernels/<name>.py; an error where Triton could be installed but is not, a skip where it has no wheel."""
    try:
        return _triton.kernels(name)
    except ImportError as error:
        if sys.platform == "linux" and platform.machine() == "x86_64":
            raise
        pytest.skip(f"{error} (it has no wheel for this platform)", allow_module_level=True)


def _version(module: ModuleType) -> tuple[int, ...]:
    return tuple(map(int, module.__version__.split(".")[:2]))


def interpreted(script: str) -> dict[str, str]:
    """What each case of a script of this folder said in Triton's interpreter."""
    if _version(kernels("table").triton) < (3, 7) and _version(numpy) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 cannot loop up to a run-time bound with numpy 2.4 and newer")
    done = subprocess.run(
        [sys.executable, f"tests/kernels/{script}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = map(json.loads, done.stdout.splitlines())
    return {line["case"]: line["said"] for line in lines}
