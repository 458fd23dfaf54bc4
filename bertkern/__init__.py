"""bertkern: pruned and quantized BERT models, really fast.

import bertkern as bk
bk.quantize_(model, bk.Int8Config())
print(bk.report(model))
"""

from importlib import import_module as _import_module
from typing import Any as _Any

from ._register import register as _register

__version__ = "0.1.0"

# Where each name of the surface lives; imported when first asked for.
_SURFACE = {
    "accelerate": "swap",
    "quantize_": "quantizing",
    "restore": "swap",
    "plan_of": "swap",
    "Plan": "tuning",
    "head_mask": "head_masks",
    "kept_heads": "head_masks",
    "encode_packed": "packed",
    "cuda_graphs": "graphs",
    "PackedStates": "packed",
    "head_importance": "compress.heads",
    "choose_heads": "compress.heads",
    "prune_heads_by_importance": "compress.heads",
    "HeadPruneConfig": "compress.heads",
    "HeadPruning": "compress.heads",
    "hessian_sensitivity": "compress.groupwise",
    "Sensitivity": "compress.groupwise",
    "loss_landscape": "compress.groupwise",
    "Landscape": "compress.groupwise",
    "assign_bits": "compress.groupwise",
    "choose_bits": "compress.groupwise",
    "BitAssignment": "compress.groupwise",
    "dequantize": "swap",
    "calibrate": "compress.static",
    "Calibration": "compress.static",
    "compensate": "compress.groupwise",
    "GroupwiseQatCallback": "compress.groupwise",
    "Int8Config": "config",
    "GroupwiseConfig": "config",
    "inspect": "inspect",
    "grids": "on_grid",
    "report": "reports",
    "Report": "reports",
    "cpu_isa": "ops",
    "attention_varlen": "ops",
    "load_checkpoint": "checkpoints",
    "prune_heads": "heads",
    "RaggedConfig": "ragged",
    "save_blocks": "hf.blocks",
    "keep_layers": "layers",
    "prune_": "compress.prune",
    "Pruner": "compress.prune",
    "Masks": "compress.prune",
    "PruneConfig": "compress.prune",
    "PruneSchedule": "compress.prune",
    "PruneCallback": "compress.prune",
    "UnstructuredPruneConfig": "compress.prune",
    "BlockPruneConfig": "compress.prune",
    "RowColumnPruneConfig": "compress.prune",
    "NmPruneConfig": "compress.prune",
}

__all__ = [*sorted(_SURFACE), "__version__"]
# Packages that are used by name without an import of their own: bk.nn.GroupwiseLinear.
_PACKAGES = ("checkpoints", "compress", "config", "formats", "nn", "ops")


def __getattr__(name: str) -> _Any:
    if name in _PACKAGES:
        return _import_module(f".{name}", __name__)
    if name in _SURFACE:
        value = globals()[name] = getattr(_import_module(f".{_SURFACE[name]}", __name__), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})


_register()
