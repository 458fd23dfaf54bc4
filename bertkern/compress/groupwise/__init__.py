"""Group-wise low-bit weights: how many bits each encoder layer gets.

- `hessian_sensitivity(model, batches)` says how sharply the loss bends with each layer;
- `loss_landscape(model, batches, layer)` draws how;
- `assign_bits(sensitivity, model, average_bits=3)` makes bits of it, and `choose_bits(model)` does without data, too.
"""

from .assign import BitAssignment, assign_bits, choose_bits, quantization_errors
from .hessian import Sensitivity, hessian_sensitivity, unlabelled_loss
from .landscape import Landscape, loss_landscape

__all__ = [
    "BitAssignment",
    "Landscape",
    "Sensitivity",
    "assign_bits",
    "choose_bits",
    "hessian_sensitivity",
    "loss_landscape",
    "quantization_errors",
    "unlabelled_loss",
]
