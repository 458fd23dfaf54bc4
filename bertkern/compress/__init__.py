"""Methods that make a model smaller: each prepares, trains or calibrates in torch, then converts for the kernels."""

from .observers import AbsMax, MovingAverage, Observer, Percentile
from .static import Calibration, calibrate

__all__ = ["AbsMax", "Calibration", "MovingAverage", "Observer", "Percentile", "calibrate"]
