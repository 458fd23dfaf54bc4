"""The row kernels in Triton's interpreter: interpret_rowwise.py, in a process of its own."""

import pytest

from .found import interpreted

CHECKS = [
    "as_the_cpu_rounds", "strange_rows", "variance_of_large_means", "ids_that_are_not_there", "gathered", "empty",
]  # fmt: skip


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What each case said."""
    return interpreted("interpret_rowwise.py")


@pytest.mark.parametrize("check", CHECKS)
def test_check(said, check):
    assert said[check] == "ok", said[check]


@pytest.mark.parametrize(("kernel", "count"), [("quantize", 30), ("normalize", 18), ("embed", 18), ("arrange", 6)])
def test_kernel(said, kernel, count):
    cases = {case: word for case, word in said.items() if case.startswith(f"{kernel}-")}
    assert len(cases) == count
    assert set(cases.values()) == {"ok"}, {case: word for case, word in cases.items() if word != "ok"}
