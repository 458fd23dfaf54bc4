"""Runs the row kernels in Triton's interpreter, as interpret.py does the block-sparse ones, against the plain forms of
their operators and the CPU's kernels; what is allocated is NaN, or the largest integer, before it is written.
"""

import itertools
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bertkern import _triton, ops
from bertkern.formats.groupwise import quantize_groupwise, table_rows
from bertkern.ops import rowwise_triton as rows
from tests.kernels.interpret import run

kernels = _triton.kernels("rowwise")

NAN = float("nan")
WIDTHS = (1, 48, 129, 1000)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of a result: sums in another order, and where it is stored bf16 is cut off instead of rounded.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
GRIDS = ((0.0, 0), (0.0, 128), (0.02, 128), (0.02, 0), (0.02, 40))


def fenced(t: int, width: int, dtype: torch.dtype) -> Tensor:
    """A matrix in the midst of NaN."""
    inside = torch.full((t + 2, width + 5), NAN, dtype=dtype)[1 : 1 + t, 3 : 3 + width]
    return inside.copy_(torch.randn(t, width))


def plain(operator: Callable, *arguments):
    """What an operator gives in plain PyTorch."""
    found, rows._triton_for = rows._triton_for, lambda x, width: None
    try:
        return operator(*arguments)
    finally:
        rows._triton_for = found


def same_codes(got: rows.Codes, expected: rows.Codes, borders: bool = True) -> None:
    """Equal codes, but for those at the border of two."""
    torch.testing.assert_close(got.scale, expected.scale, equal_nan=True, rtol=1e-6, atol=0)
    if expected.zero is None:
        assert got.zero is None
    else:
        assert (got.zero - expected.zero).abs().max() <= 1
    shift = 0 if expected.zero is None else (got.zero - expected.zero)[:, None]
    off = (got.codes.int() - expected.codes.int() - shift).abs()
    assert off.max() <= int(borders) and off.float().mean() <= 0.01 * borders, f"{int(off.sum())} codes differ"


def quantized(dtype: torch.dtype, grid: tuple[float, int], live: int | None) -> None:
    for width in WIDTHS:
        x = fenced(5, width, dtype)
        x[2] = 0
        if live is not None:
            x[live:] = NAN
        count = None if live is None else torch.tensor([live], dtype=torch.int32)
        same_codes(rows.quantize_rows_cuda(x, *grid, count), plain(rows.quantize_rows_cuda, x, *grid, count))


def as_the_cpu_rounds() -> None:
    for width, grid in itertools.product((48, 129), GRIDS):
        if grid == (0.0, 0):
            continue  # the CPU's operator has no zero points of rows
        x = fenced(5, width, torch.float32)
        unsigned = grid[1] not in (0, 128)
        codes, scale = ops.quantize_rows(x.cpu(), grid[0], grid[1] if unsigned else 0, unsigned)
        got = rows.quantize_rows_cuda(x, *grid)
        assert torch.equal(got.codes.int().cpu(), codes.int() - 128 * unsigned)
        assert torch.equal(got.scale.cpu(), scale)


def strange_rows() -> None:
    for grid in GRIDS:
        x = torch.randn(5, 40)
        x[0, 3], x[1, 7], x[2, 0], x[3] = NAN, float("inf"), -float("inf"), 1e-42
        got = rows.quantize_rows_cuda(x, *grid)
        assert got.scale[:3].isnan().all() and got.scale[3:].isfinite().all()
        assert not got.codes[:4].float().sub(0 if got.zero is None else got.zero[:4, None]).any()
        same_codes(got, plain(rows.quantize_rows_cuda, x, *grid))


def normalized(dtype: torch.dtype, residual: torch.dtype | None, live: int | None) -> None:
    for width, grid in zip(WIDTHS[1:], (GRIDS[0], GRIDS[4], GRIDS[1]), strict=True):
        x, other = fenced(5, width, dtype), None if residual is None else fenced(5, width, residual)
        weight, bias = (torch.randn(width).to(dtype) for _ in range(2))
        count = None if live is None else torch.tensor([live], dtype=torch.int32)
        if live is not None:
            x[live:] = NAN
        expected = plain(rows.add_layernorm_cuda, x, other, weight, bias, 1e-5, count)
        got = rows.add_layernorm_cuda(x, other, weight, bias, 1e-5, count)
        torch.testing.assert_close(got, expected, atol=3 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        y, codes = rows.add_layernorm_quantize_cuda(x, other, weight, bias, 1e-5, *grid, count)
        assert torch.equal(y, got)
        same_codes(codes, rows.quantize_rows_cuda(got, *grid, count), borders=False)
        if live is not None:
            assert not got[live:].any() and not codes.codes[live:].any() and bool((codes.scale[live:] == 1).all())


def variance_of_large_means() -> None:
    """Squares are of what the mean was taken from."""
    x = torch.randn(3, 768) + 300
    got = rows.add_layernorm_cuda(x, None, torch.ones(768), torch.zeros(768), 1e-12)
    expected = torch.nn.functional.layer_norm(x.double(), (768,), eps=1e-12)
    torch.testing.assert_close(got.double(), expected, atol=2e-4, rtol=0)


def tables_of(kind: str, width: int) -> tuple[list[Tensor], list[Tensor]]:
    """Word, token type and position tables, and their scales."""
    tables, scales = [], []
    for count in (13, 2, 9):
        dense = torch.randn(count, width)
        if kind == "int8":
            tables.append((dense * 40).clamp(-127, 127).to(torch.int8))
            scales.append(torch.rand(count) + 0.1 if count > 2 else torch.rand(1))
        elif kind.startswith("bits"):
            tables.append(table_rows(quantize_groupwise(dense, int(kind[4:]), 1, "n")))
            scales.append(torch.ones(1))
        else:
            tables.append(dense.to(getattr(torch, kind)))
            scales.append(torch.ones(1))
    return tables, scales


def embedded(kind: str, count: int) -> None:
    for width in (8, 129, 768):
        tables, scales = tables_of(kind, width)
        ids = [torch.randint(0, len(table), (3, 6)) for table in tables]
        ids[1] = torch.zeros(1, dtype=torch.int64).expand(3, 6)
        ids[2] = torch.arange(9)[None, 2:8].expand(3, -1)
        dtype = tables[0].dtype if tables[0].is_floating_point() else torch.float32
        given = ids[:count], tables[:count], scales[:count], torch.randn(width).to(dtype), torch.randn(width).to(dtype)
        got = rows.embed_cuda(*given, 1e-12, dtype)
        expected = plain(rows.embed_cuda, *given, 1e-12, dtype)
        torch.testing.assert_close(got, expected, atol=5 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def ids_that_are_not_there() -> None:
    tables, scales = tables_of("float32", 24)
    ids = [torch.randint(0, len(table), (2, 4)) for table in tables]
    ids[0][0, 1], ids[2][1, 3], ids[1][1, 0] = 13, -1, 2**40
    given = ids, tables, scales, torch.ones(24), torch.zeros(24), 1e-12, torch.float32
    got = rows.embed_cuda(*given)
    wrong = torch.zeros(2, 4, dtype=torch.bool)
    wrong[0, 1] = wrong[1, 3] = wrong[1, 0] = True
    assert got[wrong].isnan().all() and got[~wrong].isfinite().all()
    torch.testing.assert_close(got, plain(rows.embed_cuda, *given), equal_nan=True)


def gathered() -> None:
    for dtype, width in itertools.product((*DTYPES, torch.int8), (1, 7, 1030)):
        x = torch.randint(-9, 9, (4, width)).to(dtype)
        index = torch.tensor([3, -1, 0, 0, -7, 2], dtype=torch.int32)
        got = rows.gather_rows_cuda(x, index)
        assert torch.equal(got, plain(rows.gather_rows_cuda, x, index)) and not got[1].any()


def arranged(masked: int, empty: bool) -> None:
    for batch, length, share in itertools.product((1, 4), (1, 33), (0.2, 0.8)):
        mask = torch.rand(batch, length) < share
        mask[-1] = False
        mask[0] = True
        for given in (mask, mask[:, : max(1, length - 2)], torch.stack([mask, ~mask], -1)[..., 0]):
            got, expected = rows.arrange_cuda(given, masked, empty), plain(rows.arrange_cuda, given, masked, empty)
            for name, mine, theirs in zip(("source", "place", "ends", "keys"), got, expected, strict=True):
                assert torch.equal(mine, theirs), f"{name} of {given}: {mine}, not {theirs}"


def empty() -> None:
    for shape in ((0, 8), (2, 0, 8)):
        assert rows.quantize_rows_cuda(torch.zeros(shape)).codes.shape == shape
        got, codes = rows.add_layernorm_quantize_cuda(torch.zeros(shape), None, torch.ones(8), torch.ones(8), 0.1)
        assert got.shape == codes.codes.shape == shape
    assert rows.gather_rows_cuda(torch.zeros(3, 8), torch.empty(0, dtype=torch.int32)).shape == (0, 8)
    ids = [torch.empty(2, 0, dtype=torch.int64)]
    one = torch.ones(1)
    made = rows.embed_cuda(ids, [torch.ones(3, 8)], [one], torch.ones(8), torch.ones(8), 0.1, torch.float32)
    assert made.shape == (2, 0, 8)
    assert rows.arrange_cuda(torch.empty(2, 0, dtype=torch.bool), 1, False)[2].tolist() == [0, 0, 0]


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype, grid, live in itertools.product(DTYPES, GRIDS, (None, 3)):
        yield f"quantize-{dtype}-{grid}-{live}", lambda d=dtype, g=grid, n=live: quantized(d, g, n)
    for dtype, residual, live in itertools.product(DTYPES, (None, torch.float32, torch.float16), (None, 3)):
        yield f"normalize-{dtype}-{residual}-{live}", lambda d=dtype, r=residual, n=live: normalized(d, r, n)
    for kind, count in itertools.product(("float32", "float16", "int8", "bits2", "bits5", "bits8"), (1, 2, 3)):
        yield f"embed-{kind}-{count}", lambda k=kind, c=count: embedded(k, c)
    for masked, even in itertools.product((rows.NONE, rows.UP_TO_LAST, rows.ALL), (False, True)):
        yield f"arrange-{masked}-{even}", lambda m=masked, e=even: arranged(m, e)
    checks = (as_the_cpu_rounds, strange_rows, variance_of_large_means, ids_that_are_not_there, gathered, empty)
    for check in checks:
        yield check.__name__, check


def main() -> int:
    rows._triton_for = lambda x, width: kernels if kernels.supported(width) else None
    # Fills what is allocated with NaN, and with the largest integer.
    torch.use_deterministic_algorithms(True)
    return run(cases())


if __name__ == "__main__":
    sys.exit(main())
