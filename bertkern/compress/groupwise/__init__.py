"""Q-BERT (arXiv 1909.05840): weights of few bits in groups, by data or by training.

How many bits each encoder layer gets:

- `hessian_sensitivity(model, batches)` says how sharply the loss bends with each layer;
- `loss_landscape(model, batches, layer)` draws how;
- `assign_bits(sensitivity, model, average_bits=3)` makes bits of it, and `choose_bits(model)` does without data, too.

How the weights become codes:

- after training, `compensate(model, batches, config)` makes weights for `bertkern.quantize_`;
- in training, `prepare_qat(model, config)` or `GroupwiseQatCallback`, then `convert(model)`.
"""

from typing import Any

from .assign import BitAssignment, assign_bits, choose_bits, quantization_errors
from .compensation import compensate
from .conversion import convert
from .hessian import Sensitivity, hessian_sensitivity, unlabelled_loss
from .landscape import Landscape, loss_landscape
from .modules import FakeQuantGroupwiseEmbedding, FakeQuantGroupwiseLinear
from .prepare import prepare_qat

__all__ = [
    "BitAssignment",
    "FakeQuantGroupwiseEmbedding",
    "FakeQuantGroupwiseLinear",
    "GroupwiseQatCallback",
    "Landscape",
    "Sensitivity",
    "assign_bits",
    "choose_bits",
    "compensate",
    "convert",
    "hessian_sensitivity",
    "loss_landscape",
    "prepare_qat",
    "quantization_errors",
    "unlabelled_loss",
]


def __getattr__(name: str) -> Any:
    # The callback derives from a class of transformers, which nothing else here needs.
    if name == "GroupwiseQatCallback":
        from .callback import GroupwiseQatCallback

        return GroupwiseQatCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
