"""The block-sparse kernels in Triton's interpreter, against float64: interpret.py, in a process of its own."""

import json
import os
import subprocess
import sys

import numpy
import pytest

from tests.conftest import ROOT

from .found import kernels

BLOCK_SPARSE = kernels("block_sparse")
TABLE = BLOCK_SPARSE.TABLE
CASES = [f"{entry.name}-{t}x{n}x{k}" for entry in TABLE for t, n, k in entry.shapes]
CHECKS = ["dead_blocks", "rows_alone", "int8_launcher", "empty"]


def version(module) -> tuple[int, ...]:
    return tuple(map(int, module.__version__.split(".")[:2]))


pytestmark = pytest.mark.skipif(
    version(BLOCK_SPARSE.triton) < (3, 7) and version(numpy) >= (2, 4),
    reason="the interpreter of Triton 3.6 cannot loop up to a run-time bound with numpy 2.4 and newer",
)


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What each case said."""
    done = subprocess.run(
        [sys.executable, "tests/kernels/interpret.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = map(json.loads, done.stdout.splitlines())
    return {line["case"]: line["said"] for line in lines}


@pytest.mark.parametrize("case", CASES + CHECKS)
def test_case(said, case):
    assert said[case] == "ok", said[case]


def test_layers(said):
    layers = {case: word for case, word in said.items() if case.startswith("layer-")}
    assert len(layers) == 4
    assert set(layers.values()) == {"ok"}, layers


def test_nothing_else_ran(said):
    assert len(said) == len(CASES) + len(CHECKS) + 4
