"""The GPU's path over tensors without data, on a device that is not the CPU: what is made on the way lies there, too,
nothing is asked for, and every shape and dtype is as the operators have them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bertkern.formats import BsrWeight
from bertkern.formats.groupwise import quantize_groupwise
from bertkern.gpu.encoder import Layer, encode
from bertkern.gpu.linears import BlockSparse, BlockSparseInt8, Dense, Groupwise, Int8
from bertkern.gpu.packing import in_place, packing_of
from bertkern.gpu.rows import Norm
from bertkern.nn.gpu_encoder import asked_mask
from bertkern.ops.block_sparse import block_index
from bertkern.ops.groupwise_planes import pack_for_triton
from bertkern.ops.rowwise_triton import embed_cuda

CARD = torch.device("meta")
WIDTH, INNER, HEADS, BATCH, LENGTH = 64, 128, 2, 3, 16


def linear(kind: str, n: int, k: int, dtype: torch.dtype):
    weight, bias = torch.randn(n, k), torch.randn(n)
    if kind == "dense":
        return Dense(weight.to(dtype), bias.to(dtype))
    if kind == "blocks":
        blocks = BsrWeight.from_dense(weight.to(dtype), (32, 32))
        return BlockSparse(blocks.values, block_index(blocks), bias.to(dtype), n)
    if kind == "groupwise":
        planes = pack_for_triton(quantize_groupwise(weight, 4, 32, "k"))
        return Groupwise(planes, bias, {"quantized": True})
    codes = (weight * 40).clamp(-127, 127).to(torch.int8)
    grid = (0.02, 40) if kind == "static" else (0.0, 0)
    if kind == "int8 blocks":
        return BlockSparseInt8.of(BsrWeight.from_dense(codes, (32, 32)), torch.rand(n), bias, grid)
    return Int8.of(codes, torch.rand(n), bias, grid, 0.05 if kind == "rounded" else 0.0)


def layer_of(kind: str, dtype: torch.dtype) -> Layer:
    sizes = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH), (WIDTH, INNER)]
    norms = [Norm(torch.ones(WIDTH, dtype=dtype), torch.zeros(WIDTH, dtype=dtype), 1e-12) for _ in range(2)]
    return Layer.of([linear(kind, n, k, dtype) for n, k in sizes], norms, HEADS)


class OneDevice(TorchDispatchMode):
    """Refuses what a card would: operands in two places, but for numbers."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        places = {x.device for x in operands if x.dim() or x.device == CARD}
        if len(places) > 1 and function not in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            raise RuntimeError(f"{function}: expected all tensors on one device. Got {places}.")
        return function(*args, **(kwargs or {}))


def on_card(value):
    """A layer, or what it is made of, with all tensors on that device."""
    if isinstance(value, Tensor):
        return value.to(CARD)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(on_card, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(on_card, value))
    if hasattr(value, "__dataclass_fields__"):
        made = object.__new__(type(value))
        made.__dict__.update({name: on_card(part) for name, part in value.__dict__.items()})
        return made
    return value


KINDS = ("dense", "blocks", "groupwise", "int8", "static", "rounded", "int8 blocks")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_stays_on_its_card(kind, dtype):
    layers = on_card([layer_of(kind, dtype) for _ in range(2)])
    with OneDevice():
        x = torch.empty(BATCH, LENGTH, WIDTH, dtype=dtype, device=CARD)
        mask = torch.empty(BATCH, LENGTH, dtype=torch.bool, device=CARD)
        head_mask = torch.empty(1, 2 * HEADS, device=CARD)
        wide = torch.empty(BATCH, 1, LENGTH, LENGTH, dtype=dtype, device=CARD)
        keys, bias, _ = asked_mask(wide, torch.empty(1, HEADS, LENGTH, LENGTH, device=CARD), x, False)
        for packing, options in (
            (packing_of(None, x), {}),
            (packing_of(mask, x), {"head_mask": head_mask}),
            (packing_of(mask, x, keep_padding=True, empty_attends=True), {"exact_attention": True, "every": True}),
            (in_place(x, keys), {"bias": bias}),
        ):
            for rows in encode(layers, 1, x, packing, **options):
                got = packing.pad(rows)
                assert got.device == CARD and got.dtype == dtype and got.shape == x.shape


def test_embeddings_stay_on_their_card():
    with OneDevice():
        weight, bias = torch.empty(2, WIDTH, device=CARD)
        ids = [torch.empty(BATCH, LENGTH, dtype=torch.int64, device=CARD) for _ in range(2)]
        tables = [torch.empty(7, WIDTH, device=CARD), torch.empty(7, WIDTH, dtype=torch.int8, device=CARD)]
        scales = [torch.empty(1, device=CARD), torch.empty(7, device=CARD)]
        got = embed_cuda(ids, tables, scales, weight, bias, 1e-12, torch.float16)
    assert got.device == CARD and got.shape == (BATCH, LENGTH, WIDTH) and got.dtype == torch.float16


def test_what_lies_elsewhere_is_refused():
    """So the tests above say something."""
    layer = on_card(layer_of("int8", torch.float16))
    with OneDevice(), pytest.raises(RuntimeError, match=r"on meta|on one device"):
        x = torch.empty(BATCH, LENGTH, WIDTH, dtype=torch.float16, device=CARD)
        encode([layer], 1, x, packing_of(None, x), head_mask=torch.empty(1, HEADS))
