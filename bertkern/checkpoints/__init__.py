"""Checkpoints of compression papers, loaded as models that the kernels run.

`load_checkpoint(path)` finds the format among `FORMATS` by looking at the files; a new format is a new row there.
"""

from pathlib import Path
from typing import Any

from torch import nn

from . import nlp_architect
from .block_sparse import BLOCK_SPARSE, bsr_from_block_sparse
from .compressed_tensors import COMPRESSED_TENSORS
from .dense import DENSE
from .format import CheckpointFormat
from .gptq import GPTQ
from .ibert import IBERT
from .pack_quantized import PACK_QUANTIZED
from .pruned_heads import PRUNED_HEADS
from .qbert import QBERT

# The first that recognises a path has it: the general ones come last.
FORMATS: tuple[CheckpointFormat, ...] = (
    nlp_architect.INT8,
    nlp_architect.TRAINING,
    COMPRESSED_TENSORS,
    PACK_QUANTIZED,
    GPTQ,
    QBERT,
    IBERT,
    BLOCK_SPARSE,
    PRUNED_HEADS,
    DENSE,
)


def load_checkpoint(path: str | Path, *, format: str | None = None, **options: Any) -> nn.Module:
    """The model in a checkpoint of another project, in evaluation mode.

    int8 layers run on the kernels one by one; `bertkern.accelerate(model)` then fuses the encoder, and makes
    `save_pretrained` write an int8 model as one of bertkern's. A model with low-bit weights is what `quantize_` makes
    of one, and needs no more.

    Args:
        path: a checkpoint's folder, or the file of weights in it.
        format: a name in `FORMATS`, where the files leave it open. None: the first format that recognises them.
        options: what the format's own loader takes (`CheckpointFormat.load`).

    Raises:
        FileNotFoundError: `path`, or a file that must stand beside it, does not exist.
        ValueError: no format recognises the files, or they are damaged: tensors missing, extra, truncated,
            inconsistent, of a wrong dtype or out of range. The text names each and what was expected.

    Example::

        model = bertkern.accelerate(load_checkpoint("mrpc-8bit/"))
        model(**tokenizer("a sentence", "another", return_tensors="pt")).logits
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"load_checkpoint: expected a folder or file. Got {str(path)!r}, which does not exist.")
    known = ", ".join(row.name for row in FORMATS)
    if format is not None:
        row = next((row for row in FORMATS if row.name == format), None)
        if row is None:
            raise ValueError(f"load_checkpoint: expected format to be one of {known}. Got {format!r}.")
        return row.load(path, **options)
    for row in FORMATS:
        if row.detect(path):
            return row.load(path, **options)
    raise ValueError(f"load_checkpoint: expected a checkpoint of one of the formats {known}. Got {str(path)!r}.")


__all__ = ["FORMATS", "CheckpointFormat", "bsr_from_block_sparse", "load_checkpoint"]
