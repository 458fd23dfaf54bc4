"""What all tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Read when torch is imported: threads that wait do not spin, or tests that run side by side hold each other up.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Measured times go to a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BERTKERN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess]:
    """run_python(code or [arguments], path=[folders before the checkout], cwd=..., NAME=value ...): a fresh process.

    For what is decided once a process: the ISA cap, which library is loaded, what can be imported. A variable whose
    value is None is removed from the environment.
    """

    def run(code: str | list[str], path: list[Path] | None = None, cwd: Path = ROOT, **variables: str | None):
        folders = [ROOT] if path is None else path
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), **variables}
        arguments = ["-c", code] if isinstance(code, str) else code
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env={name: value for name, value in environment.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run
