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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`gpu` tests are skipped where no card is."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _card():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA card here"))


def _card() -> bool:
    import torch

    return torch.version.hip is None and torch.cuda.is_available()


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


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest):
    """Tests that make their tensors themselves run on a CPU and, where there is one, on a card.

    Within it new tensors are on the device; on a card what is allocated is NaN, or the largest integer, until it is
    written.
    """
    import torch

    if request.param == "cpu":
        yield request.param
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_default_device(request.param)
    try:
        yield request.param
    finally:
        torch.set_default_device(None)
        torch.use_deterministic_algorithms(False)
