"""The group-wise kernels in Triton's interpreter, against float64: interpret_groupwise.py, in a process of its own."""

import pytest

from .found import interpreted, kernels

TABLE = kernels("groupwise").TABLE
CASES = [f"{entry.name}-{'x'.join(map(str, shape))}" for entry in TABLE for shape in entry.shapes]
CHECKS = [
    "apart_as_together", "large_tiles", "exact_integers", "rounded_activations", "strange_rows", "layers", "empty",
]  # fmt: skip


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What each case said."""
    return interpreted("interpret_groupwise.py")


@pytest.mark.parametrize("case", CASES + CHECKS)
def test_case(said, case):
    assert said[case] == "ok", said[case]


def test_problems(said):
    others = {case: word for case, word in said.items() if case not in CASES + CHECKS}
    assert len(others) == 87
    assert set(others.values()) == {"ok"}, {case: word for case, word in others.items() if word != "ok"}
