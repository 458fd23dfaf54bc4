"""Q8BERT (Zafrir et al. 2019, arXiv 1910.06188): train or calibrate a BERT for int8, then run it on int8.

Three ways lead to the int8 model, and all end in `convert`:

- quantization-aware training: `prepare_qat(model, config)`, train as usual, `convert(model)`;
- calibration of a trained model: `calibrate(model, batches, config)`, `convert(model)`;
- a checkpoint of NLP Architect: `bertkern.checkpoints.load_checkpoint(path)`.
"""

from ..observers import AbsMax, MovingAverage, Percentile
from .calibration import Range, calibrate
from .config import OpSettings, Q8BertConfig
from .conversion import convert
from .modules import FakeQuantEmbedding, FakeQuantLinear
from .prepare import prepare_qat

__all__ = [
    "AbsMax",
    "FakeQuantEmbedding",
    "FakeQuantLinear",
    "MovingAverage",
    "OpSettings",
    "Percentile",
    "Q8BertConfig",
    "Range",
    "calibrate",
    "convert",
    "prepare_qat",
]
