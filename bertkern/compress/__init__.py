"""Methods that make a model smaller: each prepares, trains or calibrates in torch, then converts for the kernels."""

from importlib import import_module as _import_module
from typing import Any as _Any

from .observers import AbsMax, MovingAverage, Observer, Percentile
from .static import Calibration, calibrate

__all__ = ["AbsMax", "Calibration", "MovingAverage", "Observer", "Percentile", "calibrate"]

_PACKAGES = ("groupwise", "heads", "prune", "q8bert")


def __getattr__(name: str) -> _Any:
    # bk.compress.q8bert.prepare_qat, without an import of its own.
    if name in _PACKAGES:
        return _import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
