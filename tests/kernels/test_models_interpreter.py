"""Whole small models by the GPU's path in Triton's interpreter: interpret_models.py, in a process of its own."""

import pytest

from .found import interpreted

CASES = [
    "BertModel-float", "BertModel-fp16", "RobertaModel-float", "BertModel-int8", "RobertaModel-int8-fp16",
    "DistilBertModel-int8", "BertModel-static", "BertModel-groupwise", "int8_codes", "sparse_blocks",
]  # fmt: skip


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What each case said."""
    return interpreted("interpret_models.py")


@pytest.mark.parametrize("case", CASES)
def test_case(said, case):
    assert said[case] == "ok", said[case]
