"""Converted models without the compiled library: for folders whose conftest imports the fixture."""

import pytest

from tests import reference


@pytest.fixture
def reference_kernels(monkeypatch):
    """Conversion makes modules of float64 references, so its arithmetic is tested without the compiled library."""

    def linear(parts):
        steps = float(parts.input_scale), float(parts.output_scale), parts.input_zero_point
        return reference.Int8LinearReference(parts.weight_codes, parts.weight_scale, parts.bias, *steps)

    for module in ("bertkern.compress.q8bert.conversion", "bertkern.checkpoints.nlp_architect"):
        monkeypatch.setattr(f"{module}.int8_linear", linear)
        monkeypatch.setattr(f"{module}.int8_embedding", reference.Int8EmbeddingReference)
