"""LayerNorm, codes and embeddings for GPUs (csrc/cuda/rowwise), run in the emulator."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import bertkern.ops as ops
from bertkern.formats import groupwise
from tests import reference
from tests.cuda.emulation import TYPES, Library, emulated

GLUE = """
using namespace bertkern::cuda;

static Rows rows_of(void* data, int64_t type, int64_t pitch) { return {data, static_cast<Type>(type), false, pitch}; }

static Codes codes_of(int64_t grid, int64_t symmetric, float step, int64_t zero_point, void* codes, int64_t type,
                      int64_t pitch, void* scale, void* zero) {
  return {static_cast<Grid>(grid), symmetric != 0, rows_of(codes, type, pitch), static_cast<float*>(scale),
          static_cast<int32_t*>(zero), step, static_cast<int32_t>(zero_point)};
}

#define ROWS(name) void *name, int64_t name##_type, int64_t name##_pitch
#define CODES                                                                                               \\
  int64_t grid, int64_t symmetric, float step, int64_t zero_point, ROWS(codes), void *scale, void *zero
#define ROWS_OF(name) rows_of(name, name##_type, name##_pitch)
#define CODES_OF codes_of(grid, symmetric, step, zero_point, codes, codes_type, codes_pitch, scale, zero)

extern "C" int quantize(int64_t rows, int64_t width, void* live, ROWS(x), CODES) {
  RowParams p;
  p.rows = rows, p.width = static_cast<int32_t>(width), p.live = static_cast<const int32_t*>(live);
  p.x = ROWS_OF(x), p.out = CODES_OF;
  return launch_quantize(p, nullptr);
}
extern "C" int normalize(int64_t rows, int64_t width, void* live, ROWS(x), ROWS(residual), ROWS(gamma), ROWS(beta),
                         ROWS(y), float eps, CODES) {
  RowParams p;
  p.rows = rows, p.width = static_cast<int32_t>(width), p.live = static_cast<const int32_t*>(live), p.eps = eps;
  p.x = ROWS_OF(x), p.residual = ROWS_OF(residual), p.gamma = ROWS_OF(gamma), p.beta = ROWS_OF(beta);
  p.y = ROWS_OF(y), p.out = CODES_OF;
  return launch_normalize(p, nullptr);
}
#define TABLE(i) void *ids##i, ROWS(table##i), int64_t count##i, void *scale##i, int64_t each##i, int64_t bits##i
#define TABLE_OF(i)                                                                                           \\
  {static_cast<const int64_t*>(ids##i), ROWS_OF(table##i), count##i, static_cast<const float*>(scale##i),      \\
   each##i != 0, static_cast<int32_t>(bits##i)}
extern "C" int embed(int64_t rows, int64_t width, TABLE(0), TABLE(1), TABLE(2), ROWS(gamma), ROWS(beta), ROWS(y),
                     float eps) {
  EmbedParams p;
  p.rows = rows, p.width = static_cast<int32_t>(width), p.tables = ids2 ? 3 : ids1 ? 2 : 1, p.eps = eps;
  p.table[0] = TABLE_OF(0), p.table[1] = TABLE_OF(1), p.table[2] = TABLE_OF(2);
  p.gamma = ROWS_OF(gamma), p.beta = ROWS_OF(beta), p.y = ROWS_OF(y);
  return launch_embed(p, nullptr);
}
"""

NONE, OWN, SYMMETRIC, FIXED = range(4)
# Of one warp with tails, its limit, of 4 and of 16 warps; prime and odd ones; BERT's.
WIDTHS = (1, 7, 26, 384, 717, 768, 1024, 1027, 1600, 4096, 4099, 8192)


def kernels() -> Library:
    return emulated("rowwise/rowwise.cu", GLUE)


def rows(x: Tensor | None) -> tuple:
    return (None, 0, 0) if x is None else (x, TYPES[x.dtype], x.stride(0) if x.dim() > 1 else x.numel())


def shifted(x: Tensor, by: int = 1, pitch: int = 3) -> Tensor:
    """The same values at another alignment, in rows that lie further apart."""
    wide = x.new_empty(x.shape[0] * (x.shape[1] + pitch) + by)
    y = wide.as_strided(x.shape, (x.shape[1] + pitch, 1), by)
    return y.copy_(x)


class Made:
    """Outputs, poisoned: y of x's dtype, codes with steps and zero points."""

    def __init__(self, x: Tensor, grid: int = NONE, step: float = 0.0, zero_point: int | None = None, pitch: int = 0):
        self.grid, self.step, self.zero_point = grid, step, zero_point
        self.y = torch.full_like(x, torch.nan)
        count, width = x.shape
        self.codes = torch.full((count, width + pitch), 55, dtype=torch.int8)[:, :width]
        self.scale, self.zero = torch.full((count,), torch.nan), torch.full((count,), 99, dtype=torch.int32)

    def arguments(self) -> tuple:
        given = (self.grid, self.zero_point is None, self.step, self.zero_point or 0)
        return (*given, *rows(self.codes), self.scale, self.zero)


def normalize(x: Tensor, residual: Tensor | None, gamma: Tensor, beta: Tensor, made: Made, live: Tensor | None = None):
    """The kernel, which fills `made`."""
    places = (*rows(x), *rows(residual), *rows(gamma), *rows(beta), *rows(made.y))
    kernels().normalize(*made.y.shape, live, *places, 1e-5, *made.arguments())
    return made


def quantize(x: Tensor, made: Made, live: Tensor | None = None) -> Made:
    kernels().quantize(*made.codes.shape, live, *rows(x), *made.arguments())
    return made


def expected_codes(x: Tensor, grid: int, step: float = 0.0, zero_point: int | None = None) -> tuple[Tensor, ...]:
    """Signed codes, steps and zero points by the CPU kernels' formulas, in fp32 step by step: the same integers."""
    x = x.float()
    low, high = x.amin(1, True).clamp(max=0), x.amax(1, True).clamp(min=0)
    size = {
        OWN: high * torch.tensor(1 / 255) - low * torch.tensor(1 / 255),
        SYMMETRIC: torch.maximum(high, -low) * torch.tensor(1 / 127),
        FIXED: torch.full_like(low, step),
    }[grid]
    size = torch.where(size < torch.finfo(torch.float32).tiny, 1.0, size)
    inverse = 1 / size
    zero = torch.full_like(low, float(zero_point or 0))
    if grid == OWN:
        zero = (-low * inverse).round().clamp(max=255) - 128
    symmetric = grid == SYMMETRIC or (grid == FIXED and zero_point is None)
    least = -127.0 if symmetric else -128 - zero
    codes = (
        torch.minimum(torch.maximum((x * inverse).round(), torch.as_tensor(least, device=x.device)), 127 - zero) + zero
    )
    return codes.to(torch.int8), size[:, 0], zero[:, 0].int()


def case(count: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(width)
    x, residual = (torch.randn(count, width) * 3 + 1).to(dtype), torch.randn(count, width).to(dtype)
    return x, residual, (torch.rand(width) + 0.5).to(dtype), torch.randn(width).to(dtype)


ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(width):
    for dtype, with_residual in itertools.product(ROUNDING, (False, True)):
        x, residual, gamma, beta = case(3, width, dtype)
        residual = residual if with_residual else None
        made = normalize(x, residual, gamma, beta, Made(x))
        wanted = reference.add_layernorm(x, residual, gamma, beta, 1e-5)
        torch.testing.assert_close(made.y.double(), wanted, rtol=ROUNDING[dtype], atol=8 * ROUNDING[torch.float32])
        assert (made.codes == 55).all()


@pytest.mark.parametrize("width", (26, 768, 1027))
def test_layer_norm_knows_no_neighbours_and_no_alignment(width):
    """The same bits for a row alone, among many, and wherever it stands, and with weights of another dtype."""
    x, residual, gamma, beta = case(1030, width, torch.bfloat16)
    few = slice(0, 5)
    one = normalize(x[few], residual[few], gamma, beta, Made(x[few], OWN))
    apart = normalize(shifted(x[few]), shifted(residual[few], 2), gamma, beta.clone(), Made(x[few], OWN, pitch=5))
    for name in ("y", "codes", "scale", "zero"):
        assert torch.equal(getattr(one, name), getattr(apart, name)), name
    if width == 26:  # two grids of rows of one warp
        many = normalize(x, residual, gamma, beta, Made(x, OWN))
        assert torch.equal(many.y[few], one.y) and torch.equal(many.codes[few], one.codes)
    wide = normalize(x[few], residual[few].float(), gamma.float(), beta.float(), Made(x[few]))
    assert torch.equal(wide.y, one.y)


GRIDS = [(OWN, 0.0, None), (SYMMETRIC, 0.0, None), (FIXED, 0.05, None), (FIXED, 0.031, -93), (FIXED, 0.031, 127)]


@pytest.mark.parametrize(("grid", "step", "zero_point"), GRIDS)
@pytest.mark.parametrize("width", (1, 26, 384, 717, 1600, 4099))
def test_codes(width, grid, step, zero_point):
    for dtype in ROUNDING:
        x, *_ = case(4, width, dtype)
        x[1] = -x[1].abs()
        x[2] = 0
        x[3] *= 1e-3
        made = quantize(x, Made(x, grid, step, zero_point, pitch=-width % 16))
        codes, scale, zero = expected_codes(x, grid, step, zero_point)
        assert torch.equal(made.scale, scale) and torch.equal(made.zero, zero)
        assert torch.equal(made.codes, codes)


def test_codes_are_those_of_the_cpu():
    x = torch.randn(5, 771) * torch.tensor([[1e-3], [1.0], [3e4], [0.0], [1e-39]])
    signed = quantize(x, Made(x, SYMMETRIC))
    codes, scale = ops.quantize_rows(x)
    assert torch.equal(signed.codes, codes) and torch.equal(signed.scale, scale)
    made = Made(x, FIXED, 0.02, 77 - 128)
    made.codes = made.codes.view(torch.uint8)
    assert torch.equal(quantize(x, made).codes, ops.quantize_rows(x, 0.02, 77, True)[0])


@pytest.mark.parametrize(("grid", "step", "zero_point"), GRIDS)
def test_codes_are_made_of_what_is_stored(grid, step, zero_point):
    x, residual, gamma, beta = case(3, 768, torch.bfloat16)
    both = normalize(x, residual, gamma, beta, Made(x, grid, step, zero_point))
    again = quantize(both.y, Made(x, grid, step, zero_point))
    assert torch.equal(both.codes, again.codes) and torch.equal(both.scale, again.scale)
    assert torch.equal(both.zero, again.zero)


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize(("grid", "step", "zero_point"), GRIDS)
@pytest.mark.parametrize("width", (26, 1600))
def test_a_row_that_is_not_finite(width, grid, step, zero_point, value):
    x, *_ = case(3, width, torch.float32)
    clean = quantize(x, Made(x, grid, step, zero_point))
    x[1, width - 2] = value
    made = quantize(x, Made(x, grid, step, zero_point))
    assert made.scale[1].isnan() and (made.codes[1] == made.zero[1]).all()
    for row in (0, 2):
        assert torch.equal(made.codes[row], clean.codes[row]) and made.scale[row] == clean.scale[row]


@pytest.mark.parametrize("width", (26, 1600))
def test_rows_past_the_live_ones(width):
    """They come out as zeros, and are not read: x and the residual end with the last live row."""
    x, residual, gamma, beta = case(5, width, torch.float16)
    for live in (0, 3):
        made = Made(x, OWN)
        places = (*rows(x[:live]), *rows(residual[:live]), *rows(gamma), *rows(beta), *rows(made.y))
        kernels().normalize(5, width, torch.tensor([live], dtype=torch.int32), *places, 1e-5, *made.arguments())
        wanted = normalize(x, residual, gamma, beta, Made(x, OWN))
        assert torch.equal(made.y[:live], wanted.y[:live]) and (made.y[live:] == 0).all()
        assert torch.equal(made.codes[:live], wanted.codes[:live]) and (made.codes[live:] == 0).all()
        assert (made.scale[live:] == 1).all() and (made.zero[live:] == 0).all()


def table(ids: Tensor | None, data: Tensor | None = None, scale: Tensor | None = None, bits: int = 0) -> tuple:
    if ids is None:
        return (None, *rows(None), 0, None, 0, 0)
    return (ids, *rows(data), len(data), scale, scale.numel() > 1, bits)


@pytest.mark.parametrize("width", (8, 26, 768, 1600, 4099))
def test_embeddings(width):
    torch.manual_seed(width)
    tokens, vocabulary = 5, 11
    gamma, beta = torch.rand(width) + 0.5, torch.randn(width)
    ids = torch.randint(vocabulary, (3, tokens))
    one, each = torch.ones(1), torch.rand(vocabulary) / 50
    floats = torch.randn(vocabulary, width)
    for out_dtype, bits in zip(ROUNDING, (2, 4, 7), strict=True):
        low = groupwise.quantize_groupwise(floats, bits, 1, "n")
        parts = [
            (floats.to(out_dtype), one, 0),
            (torch.randint(-127, 128, (vocabulary, width), dtype=torch.int8), each, 0),
            (groupwise.table_rows(low), one, bits),
        ]
        for count in (1, 2, 3):
            chosen = parts[-count:]
            y = torch.full((tokens, width), torch.nan, dtype=out_dtype)
            places = [table(ids[i], *part) for i, part in enumerate(chosen)] + [table(None)] * (3 - count)
            kernels().embed(tokens, width, *sum(places, ()), *rows(gamma), *rows(beta), *rows(y), 1e-5)
            values = [low.dequantize() if b else t for t, _, b in chosen]
            wanted = reference.embed(list(ids[:count]), values, [s for _, s, _ in chosen], gamma, beta, 1e-5)
            torch.testing.assert_close(y.double(), wanted, rtol=ROUNDING[out_dtype], atol=4e-5)


def test_an_id_that_a_table_has_not():
    """Its row alone is NaN; nothing outside the table is read."""
    floats, ids = torch.randn(4, 40), torch.tensor([1, 4, -1, 3])
    y = torch.zeros(4, 40)
    places = (*table(ids, floats, torch.ones(1)), *table(None), *table(None))
    kernels().embed(4, 40, *places, *rows(torch.ones(40)), *rows(torch.zeros(40)), *rows(y), 1e-5)
    assert y.isnan().all(1).tolist() == [False, True, True, False] and not y[[0, 3]].isnan().any()


def test_no_rows():
    x = torch.empty(0, 40)
    normalize(x, None, torch.ones(40), torch.zeros(40), Made(x, OWN))
    quantize(x, Made(x, OWN))
