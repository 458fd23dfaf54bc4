"""The block-sparse kernels in Triton's interpreter, against float64: interpret.py, in a process of its own."""

import pytest

from .found import interpreted, kernels

BLOCK_SPARSE = kernels("block_sparse")
TABLE = BLOCK_SPARSE.TABLE
CASES = [f"{entry.name}-{t}x{n}x{k}" for entry in TABLE for t, n, k in entry.shapes]
CHECKS = ["dead_blocks", "rows_alone", "int8_launcher", "empty"]


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What each case said."""
    return interpreted("interpret.py")


@pytest.mark.parametrize("case", CASES + CHECKS)
def test_case(said, case):
    assert said[case] == "ok", said[case]


def test_layers(said):
    layers = {case: word for case, word in said.items() if case.startswith("layer-")}
    assert len(layers) == 4
    assert set(layers.values()) == {"ok"}, layers


def test_nothing_else_ran(said):
    assert len(said) == len(CASES) + len(CHECKS) + 4
