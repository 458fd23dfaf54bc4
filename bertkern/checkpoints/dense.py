"""Ordinary transformers checkpoints, whose matrices may be full of zeros.

Most pruned models are published so: unstructured, in 1x4 blocks along either side, 2:4, whole rows. Nothing in their
files says that they are pruned.

Source: Zafrir et al. 2021, Prune Once for All, arXiv 2111.05754; Gordon et al. 2020, arXiv 2002.08307.
"""

from pathlib import Path

from torch import nn
from transformers import AutoModel, PreTrainedModel

from .files import WEIGHTS, find_weights, read_config
from .format import CheckpointFormat
from .models import named_class, of_body


def load(path: Path, *, model_class: type[PreTrainedModel] | None = None) -> nn.Module:
    """What transformers' `from_pretrained` makes of a folder, in evaluation mode.

    transformers puts random numbers in the place of tensors that are missing, and says so in its log; in the base model
    that is an error here. Heads and poolers that the file lacks start anew, as ever.

    Args:
        path: the folder, or the file of weights in it.
        model_class: the transformers class; None: that which config.json names, else the base model.
    """
    file = find_weights(path)[0]
    folder = file.parent
    model_class = model_class or named_class(read_config(folder)) or AutoModel
    try:
        model, found = model_class.from_pretrained(
            folder,
            use_safetensors=file.suffix == ".safetensors",
            ignore_mismatched_sizes=True,  # told below, with the shapes
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    # Which one it is depends on where the damage lies, and on which of three libraries notices.
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"load_checkpoint: expected {str(folder)!r} to be a checkpoint that transformers loads. "
            f"Got: {reason[0] if reason else type(error).__name__}"
        ) from None
    problems = [f"expected {name}. Got no such tensor." for name in found["missing_keys"] if of_body(model, name)]
    problems += [f"expected {name} of shape {[*want]}. Got {[*got]}." for name, got, want in found["mismatched_keys"]]
    problems += [f"expected no tensor {name}. Got one." for name in found["unexpected_keys"] if of_body(model, name)]
    if problems:
        raise ValueError("load_checkpoint: " + "\n  ".join(sorted(problems)))
    return model.eval()


def _detect(path: Path) -> bool:
    try:
        file = find_weights(path)[0]
        values = read_config(file.parent)
    except (OSError, ValueError):
        return False
    known = path.is_dir() or path.name in (*WEIGHTS, *(f"{name}.index.json" for name in WEIGHTS))
    return known and isinstance(values.get("model_type"), str)


DENSE = CheckpointFormat("transformers", _detect, load)
