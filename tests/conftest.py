"""What all tests share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Read when torch is imported: threads that wait do not spin, or tests that run side by side hold each other up.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_addoption(parser: pytest.Parser) -> None:
    card = parser.getgroup("a card")
    card.addoption("--shard", metavar="I/N", help="every N-th test from the I-th on, a JSON line before and after each")
    card.addoption("--done", action="append", default=[], metavar="TEST", help="leave out one of the shard's")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--shard"):
        config.pluginmanager.register(_Shard(*map(int, config.getoption("--shard").split("/")), config))


class _Shard:
    """Runs a share of the tests and tells what each says, for benchmarks/gpu/checks.py; needs -s to be heard."""

    def __init__(self, number: int, shards: int, config: pytest.Config) -> None:
        self.number, self.shards, self.done = number, shards, set(config.getoption("--done"))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items[self.number :: self.shards] if item.nodeid not in self.done]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        print("\n" + json.dumps({"at": nodeid}), flush=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        said = "ok" if report.passed else report.longreprtext[-2000:]
        if report.skipped:
            said = f"skipped: {report.longrepr[2] if isinstance(report.longrepr, tuple) else said}"
        print("\n" + json.dumps({"case": report.nodeid, "said": said}), flush=True)
        if report.failed and _card() and _lost():
            os._exit(3)


def _lost() -> bool:
    """Whether the card answers this process no more, as after a read outside of what is allocated."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


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
