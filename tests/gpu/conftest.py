"""The GPU's path on CPU tensors, its operators in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bertkern import gpu


@contextmanager
def everywhere() -> Iterator[None]:
    """Within it, models on any device run by `bertkern.gpu`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "runs_on", lambda device: True)
        yield


@pytest.fixture
def on_gpu() -> Iterator[None]:
    """As `everywhere`, for a test."""
    with everywhere():
        yield
