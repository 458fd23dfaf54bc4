"""What importers of low-bit weights share: words of packed codes, groups out of indices, and the finished model."""

import warnings
from collections import Counter
from collections.abc import Mapping
from math import gcd

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bertkern.config import GroupwiseConfig
from bertkern.formats.groupwise import GroupwiseWeight, pack_codes
from bertkern.quantizing import quantize_

from .checked import CheckedTensors
from .models import by_identity, fill

# Columns in a group that are worth a scale of their own where an order of columns has broken larger groups up.
SMALLEST_RUN = 16


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The codes in rows of little-endian words: uint8 [R, count] of int32 [R, W], W >= count * bits / 32.

    A row is a bit stream: each code as many bits as there are, the first in the lowest bits of the first word.
    """
    stream = np.ascontiguousarray(words.numpy().astype("<i4")).view(np.uint8)
    flat = np.unpackbits(stream, axis=1, bitorder="little")[:, : count * bits]
    codes = np.packbits(flat.reshape(len(flat), count, bits), axis=2, bitorder="little")
    return torch.from_numpy(codes.reshape(len(flat), count))


def words_of(count: int, bits: int) -> int:
    """W of so many codes."""
    return -(-count * bits // 32)


def run_of(labels: Tensor) -> int:
    """The largest size at which runs of neighbours, the last of which may be shorter, have equal labels [K, ...]."""
    changes = (labels[1:] != labels[:-1]).flatten(1).any(1).nonzero().flatten() + 1
    return gcd(*changes.tolist()) or len(labels)


def grouped(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, size: int) -> GroupwiseWeight:
    """The weight of groups of `size` columns; codes [N, K], scale and zero fp32 [N, G] or [1, G].

    One group becomes groups of rows, the cheaper ones; the middle of the codes needs no zero points.
    """
    middle = None if bool((zero == 2 ** (bits - 1)).all()) else zero
    if scale.shape[1] > 1:
        return pack_codes(codes, scale, middle, bits, "k", size)
    rows = len(codes) // len(scale) if len(scale) else 1
    return pack_codes(codes, scale[:, 0], None if middle is None else middle[:, 0], bits, "n", max(1, rows))


def grouped_by_index(
    name: str, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, size: int, index: Tensor | None
) -> GroupwiseWeight | Tensor:
    """As `grouped`, with the group of each column in `index` int64 [K]; None: they follow each other.

    Columns out of order are kept in shorter groups that repeat scales, of 16 columns or more. Where there are none, the
    dense weight fp32 [N, K] comes back, which is exact, with a warning: a format without an order of columns would need
    a scale for every weight.
    """
    if index is None or torch.equal(index, torch.arange(len(index)) // size):
        return grouped(codes, scale, zero, bits, size)
    run = run_of(index[:, None])
    if run < SMALLEST_RUN:
        warnings.warn(
            f"load_checkpoint: {name} has groups of columns out of order (desc_act, actorder): it stays dense.",
            stacklevel=2,
        )
        return (codes.float() - zero[:, index]) * scale[:, index]
    order = index[::run]
    return grouped(codes, scale[:, order].contiguous(), zero[:, order].contiguous(), bits, run)


def finish(
    model: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    weights: Mapping[str, GroupwiseWeight],
    problems: list[str],
    activation: str,
) -> PreTrainedModel:
    """The model of float tensors by name and of low-bit weights by module name, in evaluation mode.

    Raises:
        ValueError: with all `problems`, or those of the tensors; see `fill`.
    """
    state = dict(tensors)
    # A low-bit weight is held to the shape that it must have as the float one that it stands for.
    for name, weight in weights.items():
        state[f"{name}.weight"] = weight.dequantize()
    for tied in by_identity(model):
        known = next((name for name in tied if name.removesuffix(".weight") in weights), None)
        for name in tied if known else ():
            if name in state:
                state[name] = state[known]
    checked = CheckedTensors(state)
    for problem in problems:
        checked.wrong(problem)
    fill(model, checked)
    model.eval()
    if not weights:
        return model
    # Only what the file has in few bits is to be so.
    bits = Counter(int(b) for weight in weights.values() for b in weight.bits.unique())
    layouts = Counter((weight.axis, weight.group_size) for weight in weights.values())
    (axis, size), symmetric = layouts.most_common(1)[0][0], all(weight.zero is None for weight in weights.values())
    config = GroupwiseConfig(
        bits=bits.most_common(1)[0][0],
        group_size=size,
        axis=axis,
        symmetric=symmetric,
        shared=axis == "k" and all(len(weight.scale) == 1 for weight in weights.values() if weight.axis == "k"),
        activation=activation,
        embedding_bits=None,
        skip=("*",),
    )
    return quantize_(model, config, weights=weights, measure=False)
