"""Launches every kernel through its launcher as a card would see it, but for the card: arguments are specialised and
code is compiled for compute capability 9.0, and nothing runs.

The interpreter knows no specialisation, by which an argument of 1 becomes a constant, and the tables hold the forms
that are expected, not those of every size. Prints a line for each case, as interpret.py does, and a last one with how
many launches there were.
"""

import itertools
import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from bertkern import _triton
from bertkern.formats import BsrWeight
from bertkern.formats.groupwise import quantize_groupwise
from bertkern.ops import block_sparse
from bertkern.ops import int8_triton as int8
from bertkern.ops.groupwise_planes import pack_for_triton

attention, sparse, groupwise, gemm, rowwise = map(
    _triton.kernels, ("attention", "block_sparse", "groupwise", "int8_gemm", "rowwise")
)
LAUNCHED: Counter = Counter()
# Of a block of an H200.
SHARED = 227 * 1024


class Launcher:
    """Stands for what starts a kernel on a card."""

    def __init__(self, source: Any, metadata: Any) -> None:
        assert metadata.shared <= SHARED, f"{metadata.name}: {metadata.shared} bytes of shared memory"

    def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
        assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16, f"a grid of {x} x {y} x {z}"
        LAUNCHED["launches"] += 1


class Driver:
    """A card of compute capability 9.0 that is not there."""

    launcher_cls = Launcher

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED, "multiprocessor_count": 132},
            load_binary=lambda name, kernel, shared, device: (1, 1, 64, 0, 1024),
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def assemble_tensormap_to_arg(self, *arguments: Any) -> Any:
        raise AssertionError("no kernel here takes tensor maps")


def half(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.float16)


def codes(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.int8)


def gemms(tokens: int, n: int, k: int, per_row: bool, options: dict[str, Any]) -> None:
    weight, sums = int8.pack_int8_weight(codes(n, k))
    scale, zero = torch.ones(tokens if per_row else 1), torch.ones(tokens if per_row else 1, dtype=torch.int32)
    count = torch.ones(3, dtype=torch.int32)[2:]
    call = int8._Call(codes(tokens, k), scale, zero, weight, torch.ones(n), sums, torch.ones(n), None, count, 1, 0.0)
    found = gemm.int8_linear(*int8._laid_out(call), options["out"], *options.get("grid", ()))
    assert found[0].shape == (tokens, n)


def blocks(tokens: int, n: int, k: int, side: int, dtype: torch.dtype) -> None:
    weight = BsrWeight.from_dense(torch.ones(n, k, dtype=dtype), (side, side))
    index = block_sparse._cut(block_sparse.block_index(weight), weight.shape, weight.values.shape)
    index = block_sparse._weight_index(sparse, index)
    if dtype == torch.int8:
        sparse.block_sparse_linear_int8(codes(tokens, k), torch.ones(tokens), index, weight.values, torch.ones(n))
        return
    sparse.block_sparse_linear(torch.ones(tokens, k, dtype=dtype), index, weight.values, torch.ones(n, dtype=dtype))


def low_bits(tokens: int, n: int, k: int, bits: int, axis: str, size: int, quantized: bool) -> None:
    planes = pack_for_triton(quantize_groupwise(torch.randn(n, k), bits, size, axis))
    weight = groupwise.Weight(
        planes.codes, planes.members or [None], planes.bits, planes.scale, planes.shift, planes.column_sum, (n, k),
        planes.group,
    )  # fmt: skip
    x: Any = half(tokens, k)
    if quantized:
        x = groupwise.quantize_activations(x, *((planes.scale.shape[0], planes.group or k) if planes.shift is not None
                                                else ()))  # fmt: skip
    groupwise.groupwise_linear(x, weight, torch.ones(n), 1, None, torch.float16)


def rows(batch: int, length: int, width: int) -> None:
    """What a model does to rows, beside its products."""
    mask, x = torch.ones(batch, length, dtype=torch.bool), half(batch * length, width)
    source, _, ends, _ = rowwise.arrangement(mask, 1, False)
    rowwise.gather_rows(x, source)
    live, one = ends[-1:], half(width)
    rowwise.add_layernorm(x, x, one, one, 1e-5, live)
    rowwise.add_layernorm(x, x, one, one, 1e-5, live, (0.0, 0))
    rowwise.quantize_rows(x, 0.02, 128, live)
    ids = [torch.zeros(batch, length, dtype=torch.int64), torch.zeros(1, dtype=torch.int64).expand(batch, length)]
    rowwise.embeddings(ids, [half(5, width), codes(2, width)], [torch.ones(1), torch.ones(2)], one, one, 1e-5, x.dtype)


def attend(batch: int, length: int, heads: int, d: int, dtype: torch.dtype, biased: bool) -> None:
    q, k, v = torch.ones(batch * length, 3 * heads * d, dtype=dtype).chunk(3, 1)
    q, k, v = (part.unflatten(1, (heads, d)) for part in (q, k, v))
    ends = torch.arange(batch + 1, dtype=torch.int32) * length
    bias = torch.ones(1, 1, length, length, dtype=dtype) if biased else None
    counts = None if biased else torch.ones(batch, dtype=torch.int32)
    asked = attention.Sequences(ends, length, d**-0.5, False, None, torch.ones(batch, heads), bias)
    attention.attention(q, k, v, asked._replace(counts=counts))


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    out = {"fp16": {"out": torch.float16}, "codes": {"out": torch.int8, "grid": (0.1, 3)}}
    for tokens, per_row in ((1, True), (1, False), (128, True), (4096, False)):
        for (name, options), (n, k) in itertools.product(out.items(), ((3072, 768), (1, 717))):
            yield f"int8-{name}-{tokens}x{n}x{k}-{per_row}", lambda a=(tokens, n, k, per_row, options): gemms(*a)
    for dtype, side, tokens in itertools.product((torch.float16, torch.int8), (16, 64), (1, 1024)):
        for n, k in ((3072, 768), (1, 717)):
            yield f"blocks-{dtype}-{side}-{tokens}x{n}x{k}", lambda a=(tokens, n, k, side, dtype): blocks(*a)
    for tokens, quantized, (axis, size) in itertools.product((1, 128), (False, True), (("n", 128), ("k", 64))):
        yield (
            f"low-{axis}{size}-{tokens}-{quantized}",
            lambda a=(tokens, 768, 768, 4, axis, size, quantized): low_bits(*a),
        )
    yield "low-k1", lambda: low_bits(1, 1, 24, 2, "k", 24, True)
    for batch, length, width in ((1, 1, 768), (1, 16, 768), (2, 77, 717), (64, 128, 1024)):
        yield f"rows-{batch}x{length}x{width}", lambda a=(batch, length, width): rows(*a)
    for batch, length in ((1, 1), (1, 128), (64, 384)):
        for d, dtype, biased in ((64, torch.float16, False), (26, torch.bfloat16, False), (64, torch.float32, True)):
            yield f"attention-{batch}x{length}x{d}-{dtype}", lambda a=(batch, length, 12, d, dtype, biased): attend(*a)


@contextmanager
def without_a_card() -> Iterator[None]:
    driver = triton.runtime.driver
    before, driver._active = driver._active, Driver()
    try:
        yield
    finally:
        driver._active = before


def main() -> int:
    with without_a_card():
        for name, launch in cases():
            try:
                launch()
                said = "ok"
            except Exception:
                said = traceback.format_exc(limit=-3)
            print(json.dumps({"case": name, "said": said}), flush=True)
    print(json.dumps({"case": "launches", "said": str(LAUNCHED["launches"])}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
