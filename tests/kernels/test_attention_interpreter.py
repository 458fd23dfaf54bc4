"""The attention kernels in Triton's interpreter, against float64: interpret_attention.py, in a process of its own."""

import pytest

from .found import interpreted, kernels

TABLE = kernels("attention").TABLE
CASES = [f"{entry.name}-{'x'.join(map(str, lengths))}" for entry in TABLE for lengths in entry.shapes]


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What each case said."""
    return interpreted("interpret_attention.py")


@pytest.mark.parametrize("case", CASES)
def test_entry(said, case):
    assert said[case] == "ok", said[case]


def test_problems(said):
    others = {case: word for case, word in said.items() if case not in CASES}
    assert len(others) == 22
    assert set(others.values()) == {"ok"}, {case: word for case, word in others.items() if word != "ok"}
