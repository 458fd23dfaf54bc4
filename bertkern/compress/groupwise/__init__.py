"""Q-BERT (arXiv 1909.05840): weights of few bits in groups, by data or by training.

- after training: `compensate(model, batches, config)` makes weights for `bertkern.quantize_`;
- in training: `prepare_qat(model, config)` or `GroupwiseQatCallback`, then `convert(model)`.
"""

from typing import Any

from .compensation import compensate
from .conversion import convert
from .modules import FakeQuantGroupwiseEmbedding, FakeQuantGroupwiseLinear
from .prepare import prepare_qat

__all__ = [
    "FakeQuantGroupwiseEmbedding",
    "FakeQuantGroupwiseLinear",
    "GroupwiseQatCallback",
    "compensate",
    "convert",
    "prepare_qat",
]


def __getattr__(name: str) -> Any:
    # The callback derives from a class of transformers, which nothing else here needs.
    if name == "GroupwiseQatCallback":
        from .callback import GroupwiseQatCallback

        return GroupwiseQatCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
