"""The kernels for the tests of this folder, or what to say where Triton is missing."""

import platform
import sys
from types import ModuleType

import pytest

from bertkern import _triton


def kernels(name: str) -> ModuleType:
    """kernels/<name>.py; an error where Triton could be installed but is not, a skip where it has no wheel."""
    try:
        return _triton.kernels(name)
    except ImportError as error:
        if sys.platform == "linux" and platform.machine() == "x86_64":
            raise
        pytest.skip(f"{error} (it has no wheel for this platform)", allow_module_level=True)
