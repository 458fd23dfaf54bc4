"""Magnitude pruning: zeros are written into the dense weights of a model, at once or by a schedule while it trains.

- `prune_(model, config)` prunes at once and returns `Masks`, which can hold the zeros through fine-tuning;
- `Pruner(model, config, schedule)` prunes little by little in any training loop;
- `PruneCallback(config, schedule)` does so under transformers' Trainer.

What the kernels then skip is found in the zeros themselves: `bertkern.accelerate`, `bertkern.quantize_`.
"""

from typing import Any

from .config import (
    BlockPruneConfig,
    NmPruneConfig,
    PruneConfig,
    RowColumnPruneConfig,
    UnstructuredPruneConfig,
)
from .masks import Masks
from .pruner import Pruner
from .pruning import prune_
from .report import PruneReport
from .schedule import PruneSchedule

__all__ = [
    "BlockPruneConfig",
    "Masks",
    "NmPruneConfig",
    "PruneCallback",
    "PruneConfig",
    "PruneReport",
    "PruneSchedule",
    "Pruner",
    "RowColumnPruneConfig",
    "UnstructuredPruneConfig",
    "prune_",
]


def __getattr__(name: str) -> Any:
    # The callback derives from a class of transformers, which nothing else here needs.
    if name == "PruneCallback":
        from .callback import PruneCallback

        return PruneCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
