"""Runs the kernels in Triton's interpreter, in a process of its own: TRITON_INTERPRET is read when they are defined.

Prints a line for each case: its name, and "ok" or what is wrong, as JSON. With BERTKERN_TEST_DEVICE=cuda the same cases
run on a card, whatever is made being made there.

    --list          names alone    --only NAME   what begins with it; may be repeated    --first N   the first ones
    --skip NAME     without it; may be repeated                 --say   {"at": name} before each, and where a case has
                                                                        lost the card, status 3 and no other after it

With --only or --first the exit status is 1 where a case is wrong, or none is left.
"""

import argparse
import json
import os
import sys
import traceback

import torch
from torch import Tensor

from bertkern import _triton
from bertkern.formats import BsrWeight
from bertkern.nn import BlockSparseLinear
from bertkern.ops import block_sparse as ops
from bertkern.ops.int8_triton import pack_int8_weight
from tests import reference

kernels = _triton.kernels("block_sparse")
ON_CARD = os.environ.get("BERTKERN_TEST_DEVICE") == "cuda"
assert _triton.kernels("launch").INTERPRETED != ON_CARD
if ON_CARD and "--list" not in sys.argv:
    torch.set_default_device("cuda")

DTYPES = {name: dtype for dtype, name in kernels.TYPES.items()}
# Rounding of a result: to nearest, of bf16 in this interpreter towards zero.
ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-22}


def fenced(shape: tuple[int, ...], dtype: torch.dtype, make=torch.randn) -> Tensor:
    """A matrix in the midst of NaN (int8: of -128), so that a read beside it shows."""
    fence = -128 if dtype == torch.int8 else float("nan")
    around = torch.full([size + 5 for size in shape], fence, dtype=dtype)
    inside = around[tuple(slice(2, 2 + size) for size in shape)]
    inside.copy_(make(*shape))
    return inside


def codes(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape)


def pattern(n: int, k: int, block: tuple[int, int]) -> Tensor:
    """About half of the blocks; the second block row is empty, the last block is kept."""
    kept = torch.rand(-(-n // block[0]), -(-k // block[1])) < 0.5
    kept[0] = True
    kept[1:2] = False
    kept[-1, -1] = True
    return kept


def weight(n: int, k: int, block: tuple[int, int], dtype: torch.dtype) -> BsrWeight:
    kept = pattern(n, k, block).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:n, :k]
    dense = codes(n, k) if dtype == torch.int8 else torch.randn(n, k)
    return BsrWeight.from_dense((dense * kept).to(dtype), block)


def index_of(w: BsrWeight):
    return ops._weight_index(kernels, ops._cut(ops.block_index(w), w.shape, w.values.shape))


def compare(got: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """Equal up to the rounding of the result and that of fp32 sums, of which `magnitude` is the sum of absolutes."""
    bound = ROUNDING[got.dtype] * expected.abs() + 2e-6 * magnitude + torch.finfo(got.dtype).smallest_normal * 2**-10
    wrong = ~((got.double() - expected).abs() <= bound)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} differ, by up to {(got.double() - expected).abs().max()}"
    )


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def launch(entry, programs: int, **arguments) -> None:
    constexprs = {name: value for name, value in entry.constexprs.items() if name not in arguments}
    entry.function[(programs,)](**arguments, **constexprs, **entry.options)


def run_multiply(entry, t: int, n: int, k: int) -> None:
    transposed, dtype = entry.constexprs["TRANSPOSED"], DTYPES[entry.signature["x"][1:]]
    out, inner = entry.constexprs["OUT"], entry.constexprs["IN"]
    w = weight(n, k, (inner, out) if transposed else (out, inner), dtype)
    lists = index_of(w).transposed if transposed else index_of(w).forward
    dense = w.to_dense().double()
    dense = dense if transposed else dense.T
    x, y = fenced((t, dense.shape[0]), dtype), poisoned(t, dense.shape[1], dtype=dtype)
    bias = None if transposed else fenced((n,), dtype)
    tiles = -(-t // entry.constexprs["BT"]) * -(-y.shape[1] // entry.constexprs["BN"])
    launch(
        entry, tiles, x=x, starts=lists.starts, inner=lists.inner, number=lists.number, values=w.values, bias=bias, y=y,
        T=t, x_width=x.shape[1], y_width=y.shape[1], x_stride=x.stride(0), y_stride=y.stride(0),
    )  # fmt: skip
    expected, magnitude = x.double() @ dense, x.double().abs() @ dense.abs()
    compare(y, expected if bias is None else expected + bias.double(), magnitude)


def run_int8(entry, t: int, n: int, k: int) -> None:
    dtype, given = DTYPES[entry.signature["y"][1:]], entry.signature
    w = weight(n, k, (entry.constexprs["OUT"], entry.constexprs["IN"]), torch.int8)
    lists, x, y = index_of(w).forward, fenced((t, k), torch.int8, codes), poisoned(t, n, dtype=dtype)
    # Of a size that fp16 can hold the results.
    x_scale, w_scale = (fenced((size,), torch.float32, torch.rand).mul_(0.01) for size in (t, n))
    bias, dense = fenced((n,), torch.float32), w.to_dense()
    zero = sums = residual = count = None
    if "x_zero" in given:
        zero, sums = torch.randint(-128, 128, (t,), dtype=torch.int32), dense.int().sum(1, dtype=torch.int32)
        residual, count = fenced((t, n), dtype), torch.tensor([t], dtype=torch.int32)
    tiles = -(-t // entry.constexprs["BT"]) * -(-n // entry.constexprs["BN"])
    launch(
        entry, tiles, x=x, x_scale=x_scale, x_zero=zero, starts=lists.starts, inner=lists.inner, number=lists.number,
        values=w.values, weight_scale=w_scale, weight_sums=sums, bias=bias, residual=residual, count=count, y=y,
        T=t, x_width=k, y_width=n, x_stride=x.stride(0), y_stride=y.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
    )  # fmt: skip
    exact = (x.double() - (0 if zero is None else zero[:, None])) @ dense.double().T
    expected = exact.float() * (x_scale[:, None] * w_scale) + bias
    # Integers are exact, and the scales come in this order: the very bits of fp32.
    if dtype == torch.float32:
        assert torch.equal(y, expected)
    expected = reference.activate(expected.double(), entry.constexprs["ACTIVATION"])
    compare(y, expected if residual is None else expected + residual.double(), torch.ones(()))


def run_sampled(entry, t: int, n: int, k: int) -> None:
    dtype, block = DTYPES[entry.signature["x"][1:]], (entry.constexprs["BR"], entry.constexprs["BC"])
    w = weight(n, k, block, dtype)
    index, dy, x = index_of(w), fenced((t, n), dtype), fenced((t, k), dtype)
    dvalues = poisoned(*w.values.shape, dtype=dtype)
    launch(
        entry, dvalues.numel() // (entry.constexprs["BM"] * entry.constexprs["BN"]), dy=dy, x=x, row=index.row,
        col=index.col, dvalues=dvalues, T=t, N=n, K=k, dy_stride=dy.stride(0), x_stride=x.stride(0),
    )  # fmt: skip

    def blocks(dense: Tensor) -> Tensor:
        # Whole blocks of a matrix, in the order of values.
        whole = torch.zeros(-(-n // block[0]) * block[0], -(-k // block[1]) * block[1], dtype=torch.double)
        whole[:n, :k] = dense
        split = whole.view(-1, block[0], whole.shape[1] // block[1], block[1]).permute(0, 2, 1, 3)
        return split[index.row.long(), index.col.long()]

    compare(dvalues, blocks(dy.double().T @ x.double()), blocks(dy.double().abs().T @ x.double().abs()))
    assert not dvalues[blocks(torch.ones(n, k)) == 0].any()


RUN = {kernels.multiply: run_multiply, kernels.multiply_int8: run_int8, kernels.multiply_sampled: run_sampled}


class Launchers:
    """Stands for the module of the kernels and counts the calls that come through."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str):
        found = getattr(kernels, name)
        if name.startswith("block_sparse_"):
            self.calls.append(name)
        return found


def layer_of(block: tuple[int, int], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """BlockSparseLinear by the launchers, against the same layer in plain PyTorch."""
    n, k = 2 * block[0] + 3, 3 * block[1] + 9
    layer = BlockSparseLinear(k, n, block, pattern=pattern(n, k, block)).to(dtype)
    plain = BlockSparseLinear.from_weight(layer.to_weight().to(torch.float64), layer.bias.detach().double())
    x = torch.randn(k, *shape, dtype=dtype).movedim(0, -1).requires_grad_()
    double = x.detach().double().requires_grad_()
    expected = plain(double)
    grad = torch.randn(n, *shape, dtype=dtype).movedim(0, -1)
    expected.backward(grad.double())
    launchers, before = Launchers(), ops._triton_for
    ops._triton_for = lambda values, block: launchers if kernels.supported(block, values.dtype) else None
    try:
        got = layer(x)
        got.backward(grad)
    finally:
        ops._triton_for = before
    assert launchers.calls == [
        "block_sparse_linear",
        "block_sparse_input_gradient",
        "block_sparse_values_gradient",
    ], launchers.calls
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for mine, theirs in (
        (got, expected),
        (x.grad, double.grad),
        (layer.values.grad, plain.values.grad),
        (layer.bias.grad, plain.bias.grad),
    ):
        torch.testing.assert_close(mine.double(), theirs.double(), atol=tolerance, rtol=tolerance)


def dead_blocks() -> None:
    """What no kept block reads may be anything, also where 16-wide blocks go in pairs and one is left over."""
    kept = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]]) > 0
    for side in (16, 32):
        layer = BlockSparseLinear(5 * side, 4 * side, (side, side), pattern=kept)
        index, values = index_of(layer.to_weight()), layer.values.detach()
        x, dy = torch.randn(5, 5 * side), torch.randn(5, 4 * side)
        clean = kernels.block_sparse_linear(x, index, values), kernels.block_sparse_input_gradient(dy, index, values)
        x[:, :side], x[:, 4 * side :], dy[:, 2 * side : 3 * side] = float("nan"), float("inf"), float("nan")
        assert torch.equal(kernels.block_sparse_linear(x, index, values), clean[0])
        assert torch.equal(kernels.block_sparse_input_gradient(dy, index, values), clean[1])


def rows_alone() -> None:
    """A row's result does not depend on the rows beside it."""
    layer = BlockSparseLinear(70, 50, (16, 32), pattern=pattern(50, 70, (16, 32)))
    index, x = index_of(layer.to_weight()), torch.randn(90, 70)
    together = kernels.block_sparse_linear(x, index, layer.values.detach(), None)
    for row in (0, 63, 64, 89):
        assert torch.equal(
            kernels.block_sparse_linear(x[row : row + 1], index, layer.values.detach(), None)[0], together[row]
        )


def int8_launcher() -> None:
    """In every form the bits that the kernel of a dense weight gives; rows past the count are left alone."""
    dense_kernels = _triton.kernels("int8_gemm")
    for tokens, out in ((3, torch.float32), (70, torch.float16)):
        w = weight(37, 80, (16, 16), torch.int8)
        x, scale, w_scale, bias = codes(tokens, 80).to(torch.int8), torch.rand(tokens), torch.rand(37), torch.randn(37)
        packed, sums = pack_int8_weight(w.to_dense())
        zero, count = torch.randint(-99, 99, (tokens,), dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
        residual = torch.randn(tokens, 37).to(torch.bfloat16)
        for options in (
            {},
            {"zero": zero, "weight_sums": sums},
            {"zero": zero, "weight_sums": sums, "activation": 1, "residual": residual, "count": count},
        ):
            got = kernels.block_sparse_linear_int8(x, scale, index_of(w), w.values, w_scale, bias, out, **options)
            expected, _ = dense_kernels.int8_linear(
                x, scale, options.get("zero"), packed, w_scale, sums, bias, options.get("residual"),
                options.get("count"), options.get("activation", 0), 0.0, out,
            )  # fmt: skip
            there = 2 if "count" in options else tokens
            assert got.dtype == out and torch.equal(got[:there], expected[:there]), options
    assert kernels.block_sparse_linear_int8(x[:0], scale[:0], index_of(w), w.values, w_scale).shape == (0, 37)


def empty() -> None:
    for shape in ((0,), (2, 0), ()):
        for kept in (torch.zeros(3, 2, dtype=torch.bool), torch.ones(3, 2, dtype=torch.bool)):
            layer = BlockSparseLinear(40, 70, (32, 32), pattern=kept)
            index, x = index_of(layer.to_weight()), torch.randn(*shape, 40)
            y = kernels.block_sparse_linear(x, index, layer.values.detach(), layer.bias.detach())
            torch.testing.assert_close(y, x @ layer.weight.T + layer.bias.detach())
            dx = kernels.block_sparse_input_gradient(y, index, layer.values.detach())
            torch.testing.assert_close(dx, y @ layer.weight)
            dvalues = kernels.block_sparse_values_gradient(y, x, index)
            assert dvalues.shape == layer.values.shape and dvalues.isfinite().all()


def cases():
    for entry in kernels.TABLE:
        for t, n, k in entry.shapes:
            yield f"{entry.name}-{t}x{n}x{k}", lambda e=entry, s=(t, n, k): RUN[e.function](e, *s)
    for block, dtype, shape in (
        ((16, 16), torch.float32, (2, 33)),
        ((64, 32), torch.float32, (5,)),
        ((16, 128), torch.float16, (67,)),
        ((32, 32), torch.bfloat16, (2, 9)),
    ):
        yield f"layer-{block}-{dtype}", lambda b=block, d=dtype, s=shape: layer_of(b, d, s)
    for check in (dead_blocks, rows_alone, int8_launcher, empty):
        yield check.__name__, check


def run(cases) -> int:
    """Runs what the command line leaves of (name, check) pairs; the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--skip", action="append", default=[])
    parser.add_argument("--say", action="store_true")
    parser.add_argument("--first", type=int)
    asked = parser.parse_args()
    chosen = [case for case in cases if not asked.only or case[0].startswith(tuple(asked.only))][: asked.first]
    chosen = [case for case in chosen if case[0] not in asked.skip]
    if asked.list:
        print("\n".join(name for name, _ in chosen))
        return 0
    wrong = 0
    for name, check in chosen:
        torch.manual_seed(0)
        if asked.say:
            print(json.dumps({"at": name}), flush=True)
        try:
            check()
            if ON_CARD:
                torch.cuda.synchronize()
            said = "ok"
        except Exception:
            said = traceback.format_exc(limit=-3)
            wrong += 1
        print(json.dumps({"case": name, "said": said}), flush=True)
        if said != "ok":
            print(f"{name}: {said.strip().splitlines()[-1]}", file=sys.stderr)
            if asked.say and ON_CARD and lost():
                return 3
    return int((asked.only or asked.first is not None) and (wrong > 0 or not chosen))


def lost() -> bool:
    """Whether the card answers this process no more, as after a read outside of what is allocated."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(run(cases()))
