"""The launchers with the arguments of a model's sizes, compiled as for a card: launch.py, in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

from .found import kernels

kernels("table")


@pytest.mark.slow
def test_what_is_launched_is_compiled(tmp_path):
    done = subprocess.run(
        [sys.executable, "tests/kernels/launch.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = {line["case"]: line["said"] for line in map(json.loads, done.stdout.splitlines())}
    launches = int(said.pop("launches"))
    assert set(said.values()) == {"ok"}, {case: word for case, word in said.items() if word != "ok"}
    assert launches > len(said) > 40
