"""Every entry of the kernels' tables, and what they do not show, on a card: the interpreter's scripts without it."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SCRIPTS = sorted(path.name for path in (ROOT / "tests" / "kernels").glob("interpret*.py"))


@pytest.mark.gpu
@pytest.mark.parametrize("script", SCRIPTS)
def test_cases(script):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, f"tests/kernels/{script}"],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), "BERTKERN_TEST_DEVICE": "cuda"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    said = {line["case"]: line["said"] for line in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, (list(said)[-1:], done.stderr[-2000:])
    assert said and set(said.values()) == {"ok"}, {case: word for case, word in said.items() if word != "ok"}


def test_a_script_runs_what_is_asked_for():
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "tests/kernels/interpret.py", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )

    names = run("--list").stdout.splitlines()
    assert len(names) > 50 and "empty" in names and len(set(names)) == len(names)
    assert run("--list", "--only", "empty").stdout.split() == ["empty"]
    assert run("--list", "--first", "2").stdout.splitlines() == names[:2]
    done = run("--only", "int8_launcher")
    assert done.returncode == 0 and json.loads(done.stdout) == {"case": "int8_launcher", "said": "ok"}
    assert run("--only", "no such case").returncode == 1
