"""Checkpoints of pytorch_block_sparse: linear layers as lists of blocks.

For each such layer, [N, K] in blocks [br, bc] (32x32 wherever its kernels ran), there stand under `<layer>.weight.`

    data              fp32  [nb * br, bc]   the blocks one below the other; the memory of each is that of its transpose
    cols_a            int32 [nb, 2]         (block column, index of the block in data), block row by block row
    row_start_ends_a  int32 [N / br + 1]    where each block row begins in cols_a
    rows_b            int32 [nb, 2]         (block row, index of the block in data), block column by block column
    col_start_ends_b  int32 [K / bc + 1]    where each block column begins in rows_b
    blocks            int32 [nb * 2]        block column and block row of each block, in the order of data

and `<layer>.bias`. The last three say what the first three do, and are checked against them. Layers with other blocks
ran as dense ones, over a parameter `_dense` [N, K] that then holds the weight.

Source: huggingface/pytorch_block_sparse, pytorch_block_sparse/block_sparse.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bertkern.formats import BsrWeight

from .checked import CheckedTensors
from .files import names_of, read_config, read_weights
from .format import CheckpointFormat
from .models import fill
from .pruned_heads import shaped

PARTS = ("data", "cols_a", "row_start_ends_a", "rows_b", "col_start_ends_b", "blocks")
# Of layers whose blocks are not 32x32: the matrix that was trained in the place of `data`, right within the blocks.
EMULATED = "_dense"


def bsr_from_block_sparse(tensors: Mapping[str, Tensor], shape: Sequence[int], prefix: str = "") -> BsrWeight:
    """The weight of one layer.

    Args:
        tensors: `<prefix>data`, `cols_a` and `row_start_ends_a`; `rows_b`, `col_start_ends_b` and `blocks` are checked
            where they are there; others are passed over.
        shape: (N, K).
        prefix: of the names, its dot included.

    Returns:
        BsrWeight with blocks [br, bc], fp32, a copy.

    Raises:
        ValueError: a tensor is missing, of a wrong dtype or shape, or indices that do not describe a matrix of blocks.

    Example::

        state = torch.load("pytorch_model.bin", weights_only=True)
        bsr_from_block_sparse(state, (768, 768), "bert.encoder.layer.0.attention.self.query.weight.")

    Source: huggingface/pytorch_block_sparse, pytorch_block_sparse/block_sparse.py.
    """
    this = "bsr_from_block_sparse: expected "
    given = {name: tensors[prefix + name] for name in PARTS if prefix + name in tensors}
    for name in PARTS[:3]:
        if name not in given:
            raise ValueError(f"{this}a tensor {prefix}{name}. Got none.")
    for name, tensor in given.items():
        dtype, dims = (torch.float32, 2) if name == "data" else (torch.int32, 2 if name in ("cols_a", "rows_b") else 1)
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.dim() != dims:
            got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{this}{prefix}{name} to be {dtype} of {dims} dimensions. Got {got}.")
    (n, k), data, cols = shape, given["data"], given["cols_a"]
    rows = len(given["row_start_ends_a"]) - 1
    bc = data.shape[1]
    br = n // rows if rows > 0 else 0
    if br < 1 or bc < 1 or rows * br != n or k % bc:
        raise ValueError(
            f"{this}blocks that divide the matrix [N, K] = {[n, k]}. Got {rows} rows of blocks, {bc} columns wide."
        )
    if cols.shape[1] != 2 or data.shape[0] != len(cols) * br:
        raise ValueError(
            f"{this}{prefix}data of shape [nb * br, bc] = [{len(cols)} * {br}, {bc}] and cols_a of shape [nb, 2]. "
            f"Got {list(data.shape)} and {list(cols.shape)}."
        )
    order = cols[:, 1].long()
    if not torch.equal(order.sort().values, torch.arange(len(cols))):
        raise ValueError(f"{this}{prefix}cols_a to name each of the {len(cols)} blocks once. Got others.")
    # BsrWeight has blocks in the order of cols_a, and each of them row by row.
    values = data.reshape(len(cols), bc, br)[order].transpose(1, 2).contiguous()
    made = BsrWeight(given["row_start_ends_a"].clone(), cols[:, 0].contiguous(), values, (n, k))
    try:
        made.check()
    except ValueError as error:
        raise ValueError(f"{this}{prefix}cols_a and row_start_ends_a to be right. Got: {error}") from None
    _check_twins(given, made, order, this + prefix)
    return made


def load(path: Path, *, model_class: type[PreTrainedModel] | None = None) -> nn.Module:
    """The model with nn.Linear in the place of block-sparse layers, zeros where they had no block.

    Args:
        path: the folder, or a file of weights in it.
        model_class: the transformers class, where config.json does not name it.
    """
    tensors, folder = read_weights(path)
    layers = [name.removesuffix(".weight.cols_a") for name in tensors if name.endswith(".weight.cols_a")]
    model, empty = shaped(read_config(folder), tensors, model_class)
    problems = []
    for name in layers:
        prefix = f"{name}.weight."
        linear = dict(model.named_modules()).get(name)
        if not isinstance(linear, nn.Linear):
            problems.append(f"expected {name} to be a linear layer of the model. Got none of that name.")
            continue
        try:
            dense = _dense(tensors, linear, prefix)
        except ValueError as error:
            problems.append(str(error))
            continue
        for part in (*PARTS, EMULATED):
            tensors.pop(prefix + part, None)
        if f"{name}.weight" in tensors:
            problems.append(f"expected {name}.weight once. Got it both dense and in blocks.")
        tensors[f"{name}.weight"] = dense
    if problems:
        raise ValueError("load_checkpoint: " + "\n  ".join(problems))
    fill(model, CheckedTensors(tensors), empty)
    return model.eval()


def _detect(path: Path) -> bool:
    return any(name.endswith(".weight.cols_a") for name in names_of(path))


BLOCK_SPARSE = CheckpointFormat("pytorch-block-sparse", _detect, load)


def _dense(tensors: Mapping[str, Tensor], linear: nn.Linear, prefix: str) -> Tensor:
    """The weight of a layer, [N, K] as that of `linear`."""
    weight = bsr_from_block_sparse(tensors, tuple(linear.weight.shape), prefix)
    if prefix + EMULATED not in tensors:
        return weight.to_dense()
    dense = tensors[prefix + EMULATED]
    if dense.dtype != torch.float32 or tuple(dense.shape) != weight.shape:
        raise ValueError(
            f"expected {prefix}{EMULATED}, torch.float32 of shape {[*weight.shape]}. "
            f"Got {dense.dtype} of shape {[*dense.shape]}."
        )
    inside = replace(weight, values=torch.ones_like(weight.values)).to_dense().bool()
    return dense.where(inside, 0.0)


def _check_twins(given: Mapping[str, Tensor], made: BsrWeight, order: Tensor, this: str) -> None:
    """Raises ValueError where a tensor that repeats the structure says otherwise."""
    rows = torch.repeat_interleave(torch.arange(len(made.crow) - 1), made.crow.diff())
    down = torch.argsort(made.col, stable=True)
    blocks = torch.empty(len(order), 2, dtype=torch.int32)
    blocks[order] = torch.stack([made.col, rows.int()], 1)
    wanted = {
        "rows_b": torch.stack([rows, order], 1)[down].int(),
        "col_start_ends_b": made.transpose().crow,
        "blocks": blocks.flatten(),
    }
    for name, tensor in wanted.items():
        if name in given and not torch.equal(given[name], tensor):
            raise ValueError(f"{this}{name} to describe the blocks that cols_a does. Got others.")
