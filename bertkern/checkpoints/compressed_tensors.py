"""Checkpoints of compressed-tensors in its sparse layouts, "sparse-bitmask" and "sparse-24-bitmask".

For each matrix [N, K] that is stored so there stand, under the name of its layer (in older files, of its weight)

    shape        int64 [2] or [2, 1]        N and K
    bitmask      uint8 [N, ceil(K / 8)]     a bit for each element, the lowest first: whether it is stored
    compressed   fp32, fp16 or bf16         the stored elements, row by row: [nnz]; of "sparse-24-bitmask", of which two
                                            of every four are stored, [N, K / 2]
    row_offsets  int64 [N]                  where each row begins in compressed; not with "sparse-24-bitmask"

transformers 5 reads these layouts no longer. Layers that are quantized as well are not read here.

Source: vllm-project/compressed-tensors, compressors/sparse_compressors/sparse_bitmask.py and sparse_24_bitmask.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .checked import FLOATS, CheckedTensors
from .files import find_weights, read_config, read_weights
from .format import CheckpointFormat
from .models import fill
from .pruned_heads import shaped

LAYOUTS = ("sparse-bitmask", "sparse-24-bitmask")
# Where config.json speaks of the layout, from the oldest files to the newest.
_KEYS = ("sparsity_config", "compression_config", "quantization_config")


def decompress(tensors: Mapping[str, Tensor], prefix: str = "") -> Tensor:
    """The dense matrix of one layer, zeros where the mask has none.

    Args:
        tensors: `<prefix>shape`, `bitmask`, `compressed` and, if they are there, `row_offsets`; others are passed over.
        prefix: of the names, its dot included.

    Returns:
        [N, K], or [N] of a vector, dtype of `compressed`.

    Raises:
        ValueError: a tensor is missing, of a wrong dtype or shape, or counts that do not agree.

    Source: vllm-project/compressed-tensors, compressors/sparse_compressors/sparse_bitmask.py.
    """
    this = f"decompress: expected {prefix}"
    parts = {name: tensors.get(prefix + name) for name in ("shape", "bitmask", "compressed", "row_offsets")}
    kinds = {"shape": (torch.int64,), "bitmask": (torch.uint8,), "compressed": FLOATS, "row_offsets": (torch.int64,)}
    for name, tensor in parts.items():
        if tensor is None and name == "row_offsets":
            continue
        if tensor is None or tensor.dtype not in kinds[name]:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in kinds[name])
            raise ValueError(f"{this}{name} of dtype {wanted}. Got {'none' if tensor is None else tensor.dtype}.")
    shape = parts["shape"].flatten().tolist()
    rows, columns = shape if len(shape) == 2 else (1, *shape) if len(shape) == 1 else (-1, -1)
    width = -(-columns // 8)
    if min(rows, columns) < 0 or parts["bitmask"].numel() != rows * width:
        raise ValueError(
            f"{this}shape to hold one or two sizes and bitmask a bit for each element. Got shape {shape} and a bitmask "
            f"of shape {list(parts['bitmask'].shape)}."
        )
    bits = torch.arange(8, dtype=torch.uint8)
    mask = ((parts["bitmask"].reshape(rows, width, 1) >> bits) & 1).bool().reshape(rows, width * 8)
    if bool(mask[:, columns:].any()):
        raise ValueError(f"{this}bitmask without bits beyond the {columns} columns. Got some.")
    mask = mask[:, :columns]
    counts = mask.sum(1)
    stored, values = int(counts.sum()), parts["compressed"]
    if values.numel() != stored:
        raise ValueError(f"{this}compressed to hold the {stored} elements that bitmask has. Got {values.numel()}.")
    if parts["row_offsets"] is not None and not torch.equal(parts["row_offsets"].flatten(), counts.cumsum(0) - counts):
        raise ValueError(f"{this}row_offsets to say where the rows of bitmask begin. Got others.")
    dense = values.new_zeros(rows, columns)
    dense[mask] = values.flatten()
    return dense.reshape(shape)


def load(path: Path, *, model_class: type[PreTrainedModel] | None = None) -> nn.Module:
    """The model with all of its matrices dense, in the dtype of the file.

    Args:
        path: the folder, or a file of weights in it.
        model_class: the transformers class, where config.json does not name it.
    """
    tensors, folder = read_weights(path)
    values = read_config(folder)
    if layers := sorted(name for name in tensors if name.endswith("_scale")):
        raise ValueError(f"load_checkpoint: expected sparse layers that are not quantized. Got {layers[0]}.")
    model, empty = shaped(values, tensors, model_class, foreign=_KEYS)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    problems = []
    for name in [name.removesuffix(".bitmask") for name in tensors if name.endswith(".bitmask")]:
        try:
            dense = decompress(tensors, f"{name}.")
        except ValueError as error:
            problems.append(str(error))
            continue
        for part in ("shape", "bitmask", "compressed", "row_offsets"):
            tensors.pop(f"{name}.{part}", None)
        weight = name if name in parameters else f"{name}.weight"
        if weight in tensors:
            problems.append(f"expected {weight} once. Got it both dense and compressed.")
        tensors[weight] = dense
    if problems:
        raise ValueError("load_checkpoint: " + "\n  ".join(problems))
    fill(model, CheckedTensors(tensors), empty)
    return model.eval()


def _layout(values: dict[str, Any]) -> str | None:
    """The sparse layout that config.json states, if any."""
    for key in _KEYS:
        config = values.get(key)
        if key != "sparsity_config" and isinstance(config, dict):
            config = config.get("sparsity_config")
        if isinstance(config, dict) and config.get("format") in LAYOUTS:
            return config["format"]
    return None


def _detect(path: Path) -> bool:
    try:
        return _layout(read_config(find_weights(path)[0].parent)) is not None
    except (OSError, ValueError):
        return False


COMPRESSED_TENSORS = CheckpointFormat("compressed-tensors-sparse", _detect, load)
