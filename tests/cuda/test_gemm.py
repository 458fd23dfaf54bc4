"""csrc/cuda/gemm on the host: every tile, tails, codes of all types, epilogues; see emulation.py."""

import itertools

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.cuda.emulation import TYPES, EmulatorError, emulated, skip_without_emulator

skip_without_emulator()

GLUE = """
using namespace bertkern::cuda;

extern "C" int gemm(void* a, int64_t code, int64_t m, int64_t n, int64_t k, int64_t a_pitch, void* weight,
                    int64_t weight_pitch, void* scale, int64_t scale_step, void* zero, int64_t zero_step,
                    void* weight_scale, int64_t weight_step, void* weight_sums, void* bias, void* live,
                    int64_t activation, float output_step, void* residual, int64_t residual_type,
                    int64_t residual_pitch, void* y, int64_t y_type, int64_t y_pitch, float out_step, int64_t out_zero,
                    void* steps, int64_t tile, int64_t processors) {
  GemmParams p;
  p.m = m, p.n = static_cast<int32_t>(n), p.k = static_cast<int32_t>(k);
  p.code = static_cast<Code>(code), p.a = a, p.a_pitch = a_pitch, p.weight = weight, p.weight_pitch = weight_pitch;
  p.scale = static_cast<float*>(scale), p.scale_step = static_cast<int32_t>(scale_step);
  p.zero = static_cast<int32_t*>(zero), p.zero_step = static_cast<int32_t>(zero_step);
  p.weight_scale = static_cast<float*>(weight_scale), p.weight_step = static_cast<int32_t>(weight_step);
  p.weight_sums = static_cast<int32_t*>(weight_sums), p.bias = static_cast<float*>(bias);
  p.live = static_cast<int32_t*>(live), p.activation = static_cast<Activation>(activation), p.output_step = output_step;
  p.residual.data = residual, p.residual.type = static_cast<Type>(residual_type), p.residual.pitch = residual_pitch;
  p.y.data = y, p.y.type = static_cast<Type>(y_type), p.y.pitch = y_pitch;
  p.out_step = out_step, p.out_zero = static_cast<int32_t>(out_zero), p.steps = static_cast<float*>(steps);
  p.tile = static_cast<GemmTile>(tile), p.processors = static_cast<int32_t>(processors);
  return launch_gemm(p, nullptr);
}
"""

TILES = {"automatic": 0, "large": 1, "middle": 2, "slices": 3, "few": 4, "rows": 5}
ROWS = {"large": 128, "middle": 64, "slices": 32, "few": 16, "rows": 16}
CODES = {torch.int8: 0, torch.uint8: 1, torch.float8_e4m3fn: 2}
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
INT8_TILES, FP8_TILES = ("large", "middle", "slices", "few"), ("large", "middle", "rows")


def codes(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Codes whose rows begin at multiples of 16 bytes, and what stands behind them: anything, of float8 zeros."""
    m, k = shape
    pitch = k + -k % 16
    if dtype == torch.float8_e4m3fn:
        wide = torch.randn(m, pitch).to(dtype)
        wide.view(torch.int8)[:, k:] = 0
    else:
        bounds = torch.iinfo(dtype)
        wide = torch.randint(bounds.min, bounds.max + 1, (m, pitch), dtype=dtype)
    return wide


class Problem:
    """Operands of [m, k] x [n, k]^T."""

    def __init__(self, m: int, n: int, k: int, dtype: torch.dtype = torch.int8, **options) -> None:
        torch.manual_seed(m + n + k)
        self.m, self.n, self.k, self.dtype = m, n, k, dtype
        self.a = codes((m, k), dtype)
        self.weight = codes((n, k), torch.int8 if dtype == torch.uint8 else dtype)
        self.weight.view(torch.int8)[:, k:] = 0
        self.scale, self.weight_scale = torch.rand(m) * 0.01 + 1e-3, torch.rand(n) * 0.02 + 1e-3
        self.zero = self.sums = self.bias = self.residual = self.live = None
        self.activation, self.output_step, self.out_step, self.out_zero = 0, 0.0, 0.0, 0
        for name, value in options.items():
            setattr(self, name, value)
        if self.zero is not None:
            self.sums = self.weight[:, :k].sum(1, dtype=torch.int32)

    def run(self, out: torch.dtype = torch.float32, tile: str = "automatic", processors: int = 108) -> Tensor:
        # A pitch beyond the width; NaN, or the highest code, before anything is written.
        wide = torch.full((self.m, self.n + 3), -1, dtype=torch.int8).repeat_interleave(out.itemsize, 1).view(out)
        y = wide[:, : self.n]
        self.steps = torch.zeros(self.m)
        r = self.residual
        emulated("gemm/gemm.cu", GLUE).gemm(
            self.a, CODES[self.dtype], self.m, self.n, self.k, self.a.stride(0), self.weight, self.weight.stride(0),
            self.scale, int(self.scale.numel() > 1), self.zero, int(self.zero is not None and self.zero.numel() > 1),
            self.weight_scale, int(self.weight_scale.numel() > 1), self.sums, self.bias, self.live, self.activation,
            self.output_step, r, 0 if r is None else TYPES[r.dtype], 0 if r is None else r.stride(0), y, TYPES[out],
            y.stride(0), self.out_step, self.out_zero, self.steps, TILES[tile], processors,
        )  # fmt: skip
        return y

    def exact(self) -> Tensor:
        a, weight = (x[:, : self.k].double() for x in (self.a, self.weight))
        return (a if self.zero is None else a - self.zero.double().reshape(-1, 1)) @ weight.T

    def bits(self) -> Tensor:
        """What a processor's operators give, without an activation: each operation rounded to fp32."""
        y = self.exact().float() * (self.scale[:, None] * self.weight_scale)
        return y if self.bias is None else y + self.bias

    def expected(self) -> Tensor:
        y = self.bits()
        if self.output_step:
            y = (y * (1 / torch.tensor(self.output_step))).round().clamp(-127, 127) * self.output_step
        y = reference.activate(y, self.activation)
        return y if self.residual is None else y + self.residual.double()


def near(got: Tensor, expected: Tensor, extra: float = 0.0) -> None:
    bound = ROUNDING[got.dtype] * expected.abs() + 1e-6 + extra
    error = (got.double() - expected.double()).abs()
    assert bool((error <= bound).all()), f"{int((~(error <= bound)).sum())} differ, up to {error.max()}"


# One block and one value; whole tiles; a tail in every direction, of K within 16 bytes; several steps and stages.
SHAPES = [(1, 1, 1), (16, 32, 128), (33, 37, 101), (19, 70, 1100), (130, 133, 208)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tile", INT8_TILES)
def test_exact_sums_in_every_tile(tile, shape):
    problem = Problem(*shape)
    assert torch.equal(problem.run(tile=tile), problem.bits())


@pytest.mark.parametrize("tile", INT8_TILES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("own", [True, False])
def test_zero_points(dtype, own, tile):
    m, n, k = 21, 37, 133
    low, high = (-128, 128) if dtype == torch.int8 else (0, 256)
    zero = torch.randint(low, high, (m if own else 1,), dtype=torch.int32)
    problem = Problem(m, n, k, dtype, zero=zero, bias=torch.randn(n))
    if not own:
        problem.scale, problem.weight_scale = torch.tensor([0.01]), torch.tensor([0.02])
    assert torch.equal(problem.run(tile=tile), problem.bits())


@pytest.mark.parametrize("shape", [(1, 1, 1), (16, 64, 128), (35, 69, 300), (130, 133, 200)], ids=str)
def test_float8(shape):
    problem = Problem(*shape, torch.float8_e4m3fn, bias=torch.randn(shape[1]))
    found = [problem.run(tile=tile) for tile in FP8_TILES]
    near(found[0], problem.bits(), 1e-6 * shape[2])
    # A row's result depends neither on the tile nor on the others.
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("out", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tile", ["middle", "few"])
def test_epilogues(tile, out):
    for activation, residual, n in zip(
        range(6), (None, torch.float32, torch.float16, torch.bfloat16) * 2, (36, 37, 40, 40, 36, 33), strict=False
    ):
        extra = None if residual is None else torch.randn(18, n).to(residual)
        problem = Problem(18, n, 150, bias=torch.randn(n), activation=activation, residual=extra)
        near(problem.run(out, tile), problem.expected(), 2e-6)


@pytest.mark.parametrize(("out", "zero"), [(torch.int8, 0), (torch.int8, -28), (torch.uint8, 0), (torch.uint8, 77)])
def test_codes(out, zero):
    for n, activation in ((40, 0), (37, 1)):
        problem = Problem(18, n, 150, activation=activation, bias=torch.randn(n), out_step=0.02, out_zero=zero)
        problem.scale[4], problem.scale[7] = float("nan"), float("inf")
        got, y = problem.run(out, "slices"), problem.expected()
        low, high = (-128 if zero else -127, 127) if out == torch.int8 else (0, 255)
        exact = y / torch.tensor(problem.out_step).double()
        fine = torch.ones(18, dtype=torch.bool).index_fill_(0, torch.tensor([4, 7]), False)
        expected = (exact.round() + zero).clamp(low, high)
        off = (got.double() - expected).abs()[fine]
        # What lies in the middle between two codes may go to either.
        assert bool((off <= 1).all()) and bool(((exact.frac().abs()[fine][off > 0] - 0.5).abs() < 1e-3).all())
        assert bool((got[4] == low).all())
        assert problem.steps[~fine].isnan().all() and bool((problem.steps[fine] == problem.out_step).all())


def test_sums_rounded_before_the_activation():
    problem = Problem(18, 40, 150, bias=torch.randn(40), output_step=0.04)
    assert torch.equal(problem.run(), problem.expected().float())
    problem.activation, problem.scale[3] = 3, float("nan")
    assert problem.run()[3].isnan().all()


@pytest.mark.parametrize("tile", INT8_TILES)
def test_rows_that_are_not_there_are_left_alone(tile):
    for live in (0, 1, 17, 40, 99):
        problem = Problem(40, 20, 64, live=torch.tensor([live], dtype=torch.int32))
        problem.scale[:] = 1e-3
        y, there = problem.run(tile=tile), min(live, 40)
        assert torch.equal(y[:there], problem.bits()[:there]) and y[there:].isnan().all()


def test_without_elements():
    assert Problem(0, 5, 16).run().shape == (0, 5)
    assert torch.equal(Problem(3, 5, 0, bias=torch.ones(5)).run(), torch.ones(3, 5))


@pytest.mark.parametrize("dtype", CODES)
def test_the_tile_that_is_chosen_computes(dtype):
    for m, n, processors in itertools.product((1, 16, 17, 40, 70, 130), (40, 140), (1, 3, 1000)):
        problem = Problem(m, n, 48, dtype)
        near(problem.run(processors=processors), problem.bits(), 1e-4 if dtype == torch.float8_e4m3fn else 0.0)


def test_what_does_not_fit_is_refused():
    problem = Problem(3, 5, 20)
    problem.weight = problem.weight[:, :20].contiguous()
    with pytest.raises(EmulatorError, match="cudaError_t 1"):
        problem.run()
    with pytest.raises(EmulatorError, match="cudaError_t 1"):
        Problem(3, 5, 20).run(tile="rows")
