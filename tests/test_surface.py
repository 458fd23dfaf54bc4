"""What README.md names is there after `import bertkern as bk`, without another import."""

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

NAMES = sorted(set(re.findall(r"\bbk((?:\.\w+)+)", (ROOT / "README.md").read_text(encoding="utf-8"))))
PACKAGED = [name for name in NAMES if name.count(".") > 1]
CODE = """
import bertkern as bk
for name in {names}:
    try:
        eval("bk" + name)
    except AttributeError as error:
        print(error)
"""


def missing(*names: str) -> str:
    """What a fresh process says of names that it does not find."""
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(names=names)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_names_of_the_readme():
    assert len(NAMES) > 25 and not missing(*NAMES)


# Each alone: another name may have imported its package.
@pytest.mark.parametrize("name", PACKAGED)
def test_packages(name):
    assert not missing(name)


def test_others():
    assert "no attribute 'quantise'" in missing(".quantise") and "no attribute 'qbert'" in missing(".compress.qbert")
