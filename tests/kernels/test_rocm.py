"""Triton's kernels compile for AMD's gfx942, on a machine without ROCm; they have not run on such a card."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

from .found import kernels

TABLES = ("block_sparse", "attention", "groupwise", "int8_gemm", "rowwise")


def test_compiled_for_gfx942(tmp_path):
    kernels("table")
    pytest.importorskip("triton.backends.amd", reason="this Triton brings no compiler for AMD")
    done = subprocess.run(
        [sys.executable, "tests/kernels/compile_rocm.py", *TABLES],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = {line["case"]: line["said"] for line in map(json.loads, done.stdout.splitlines())}
    assert len(said) > 20 and {case.split()[0] for case in said} == set(TABLES)
    assert set(said.values()) == {"ok"}, {case: word for case, word in said.items() if word != "ok"}
