"""The kernels of 8-bit codes in Triton's interpreter, against exact sums, in a process of its own."""

import pytest

from .found import interpreted, kernels

TABLE = kernels("int8_gemm").TABLE
CASES = [f"{entry.name}-{'x'.join(map(str, shape))}" for entry in TABLE for shape in entry.shapes]
CHECKS = [
    "exact_bits", "one_scale_for_all", "float8_runs", "rows_that_are_not_there", "strange_rows", "rows_anywhere",
    "operators", "without_columns",
]  # fmt: skip


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What each case said."""
    return interpreted("interpret_int8_gemm.py")


@pytest.mark.parametrize("case", CASES + CHECKS)
def test_case(said, case):
    assert said[case] == "ok", said[case]


def test_epilogues(said):
    others = {case: word for case, word in said.items() if case not in CASES + CHECKS}
    assert len(others) == 21
    assert set(others.values()) == {"ok"}, {case: word for case, word in others.items() if word != "ok"}
