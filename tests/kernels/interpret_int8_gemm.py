"""Runs the kernels of 8-bit codes in Triton's interpreter, as interpret.py does the block-sparse ones; results and
partial sums are NaN, or the largest integer, before they are written.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bertkern import _triton
from bertkern.ops import int8_triton as ops
from tests import reference
from tests.kernels.interpret import run
from tests.kernels.interpret_attention import Recorder

kernels = _triton.kernels("int8_gemm")

FP8 = kernels.FP8
DTYPES = {name: dtype for dtype, name in kernels.TYPES.items()}
# Rounding of a result: to nearest, of bf16 in this interpreter towards zero.
ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-22}
KINDS = (torch.int8, torch.uint8)


def fenced(t: int, k: int, dtype: torch.dtype) -> Tensor:
    """Codes amidst others, whose rows begin at multiples of 16 elements."""
    wide = torch.randint(-127, 128, (t + 4, k + 32 + -k % 16)).to(torch.int8)
    if dtype == FP8:
        wide = torch.full(wide.shape, float("nan")).to(FP8)
        wide[2 : 2 + t, 16 : 16 + k] = torch.randn(t, k).to(FP8)
    if dtype == torch.uint8:
        wide = wide.view(torch.uint8)
    return wide[2 : 2 + t, 16 : 16 + k]


class Problem:
    """Operands of [t, k] x [n, k]^T, for the launcher."""

    def __init__(self, t: int, n: int, k: int, dtype: torch.dtype = torch.int8, **options: Any) -> None:
        self.shape, self.dtype = (t, n, k), dtype
        self.codes = fenced(t, k, dtype)
        made = torch.randint(-127, 128, (n, k)).to(torch.int8) if dtype != FP8 else torch.randn(n, k).to(FP8)
        self.weight, sums = ops.pack_int8_weight(made)
        self.scale, self.weight_scale = torch.rand(t) * 0.01 + 1e-3, torch.rand(n) * 0.02 + 1e-3
        self.zero = self.bias = self.residual = self.count = None
        self.activation, self.output_scale, self.out_scale, self.out_zero = 0, 0.0, 0.0, 0
        self.out, self.steps = torch.float32, None
        for name, value in options.items():
            setattr(self, name, value)
        self.sums = sums if self.zero is not None or dtype == torch.uint8 else None

    def run(self, **options: Any) -> Tensor:
        call = ops._Call(
            self.codes, self.scale, self.zero, self.weight, self.weight_scale, self.sums, self.bias, self.residual,
            self.count, self.activation, self.output_scale,
        )  # fmt: skip
        y, self.steps = kernels.int8_linear(*ops._laid_out(call), self.out, self.out_scale, self.out_zero, **options)
        return y

    def bits(self) -> Tensor:
        """What a processor's operators give, without an activation: each operation rounded to fp32."""
        codes = self.codes.double() if self.zero is None else self.codes.double() - self.zero.reshape(-1, 1)
        exact = codes @ self.weight[:, : self.shape[2]].double().T
        y = exact.float() * (self.scale.reshape(-1, 1) * self.weight_scale)
        return y if self.bias is None else y + self.bias

    def expected(self) -> Tensor:
        y = self.bits()
        if self.output_scale:
            y = (y * (1 / torch.tensor(self.output_scale))).round().clamp(-127, 127) * self.output_scale
        y = reference.activate(y, self.activation)
        return y if self.residual is None else y + self.residual.double()

    def check(self, rows: int | None = None, **options: Any) -> None:
        """Runs it and compares the first `rows` rows."""
        got, y = self.run(**options)[:rows], self.expected()[:rows]
        if self.out not in KINDS:
            added = 2e-6 + (1e-6 * self.shape[2] if self.dtype == FP8 else 0)
            error = (got.double() - y).abs()
            wrong = ~(error <= ROUNDING[self.out] * y.abs() + added)
            assert got.dtype == self.out and not wrong.any(), f"{int(wrong.sum())} differ, up to {error.max()}"
            return
        low, high = (-128 if self.out_zero else -127, 127) if self.out == torch.int8 else (0, 255)
        exact = y.double() / torch.tensor(self.out_scale).double()
        off = (got.double() - (exact.round() + self.out_zero).clamp(low, high)).abs()
        # What lies in the middle between two codes may go to either.
        assert bool((off <= 1).all()) and bool(((exact.frac().abs()[off > 0] - 0.5).abs() < 1e-3).all())
        assert bool((self.steps[:rows] == self.out_scale).all())


# --- the forms of the table ------------------------------------------------------------------------------------------


def entry_of(entry: Any, shape: tuple[int, int, int]) -> None:
    """The form is right, and what was launched is what the table says of it."""
    (t, n, k), constants, kinds = shape, entry.constexprs, entry.signature
    given = {name for name, kind in kinds.items() if kind.startswith("*")}
    partial, out = constants["PARTIAL"], DTYPES[kinds["y"][1:]]
    out = torch.float32 if partial and "steps" not in given else torch.int8 if partial else out
    coded, dtype = out in KINDS, DTYPES[kinds["x"][1:]]
    problem = Problem(
        t, n, k, dtype,
        zero=torch.randint(-128, 128, (t,), dtype=torch.int32) if "x_zero" in given else None,
        bias=torch.randn(n) if "bias" in given else None,
        residual=torch.randn(t, n).half() if "residual" in given else None,
        count=torch.tensor([t], dtype=torch.int32) if "count" in given else None,
        activation=constants["ACTIVATION"], output_scale=0.03 if constants["ROUND"] else 0.0,
        out_scale=0.02 if coded else 0.0, out_zero=3 if coded else 0, out=out,
    )  # fmt: skip
    Recorder.launches.clear()
    problem.check(
        splits=2 if constants["ORDERED"] else None, apart=partial or (False if constants["ORDERED"] else None)
    )
    (arguments,) = (arguments for function, arguments in Recorder.launches if function is entry.function)
    assert {name: arguments[name] for name in constants} == dict(constants), entry.name
    assert {name: arguments[name] for name in entry.options} == dict(entry.options)
    assert {name: kernels.TYPES[arguments[name].dtype] for name in given} == {name: kinds[name][1:] for name in given}
    sizes = [name for name in entry.aligned if not kinds[name].startswith("*")]
    assert not [name for name in sizes if arguments[name] % 16]


# --- what the table does not show ------------------------------------------------------------------------------------


def exact_bits() -> None:
    """Sums are exact in every tile and cut: the very bits of fp32."""
    for (t, n, k), dtype in itertools.product(((1, 37, 1030), (21, 37, 530), (70, 75, 133), (33, 5, 1)), KINDS):
        zero = torch.randint(*((0, 256) if dtype == torch.uint8 else (-128, 128)), (t,), dtype=torch.int32)
        for options in ({}, {"zero": zero}, {"zero": zero[:1]}):
            problem = Problem(t, n, k, dtype, bias=torch.randn(n), **options)
            for splits, apart in ((None, None), (1, False), (3, True)):
                assert torch.equal(problem.run(splits=splits, apart=apart), problem.bits()), (t, n, k, dtype, splits)


def one_scale_for_all() -> None:
    problem = Problem(5, 37, 48, scale=torch.tensor([0.01]), weight_scale=torch.tensor([0.02]))
    assert torch.equal(problem.run(), problem.bits())


def float8_runs() -> None:
    """Runs side by side, or one after the other, give the same bits."""
    problem = Problem(20, 37, 1040, FP8)
    for splits in (1, 2, 4):
        assert torch.equal(problem.run(splits=splits, apart=True), problem.run(splits=splits, apart=False))


def rows_that_are_not_there() -> None:
    """They are not written, and what is beside them is whole."""
    for t, k, live in ((40, 64, 17), (70, 600, 0), (70, 600, 64), (9, 600, 3), (5, 64, 9)):
        problem = Problem(t, 40, k, count=torch.tensor([live], dtype=torch.int32), bias=torch.randn(40))
        y, there = problem.run(), min(live, t)
        assert torch.equal(y[:there], problem.bits()[:there]) and bool(y[there:].isnan().all())


def strange_rows() -> None:
    """A row whose scale is not finite is NaN, or the lowest codes beside a step that is NaN."""
    for out, step in ((torch.float32, 0.0), (torch.int8, 0.02)):
        for k in (64, 600):
            problem = Problem(6, 37, k, out=out, out_scale=step, activation=1, bias=torch.randn(37))
            clean = problem.run()
            problem.scale[1], problem.scale[4] = float("nan"), float("nan")
            y, fine = problem.run(), [0, 2, 3, 5]
            assert torch.equal(y[fine], clean[fine])
            assert bool((y[[1, 4]] == -127).all()) if step else bool(y[[1, 4]].isnan().all())
            assert not step or (
                bool(problem.steps[[1, 4]].isnan().all()) and bool(problem.steps[fine].isfinite().all())
            )


def rows_anywhere() -> None:
    """Operands whose rows begin anywhere, end with their memory, or are columns of something."""
    whole = Problem(5, 37, 101)
    expected, codes, weight = whole.bits(), whole.codes, whole.weight
    for made in (codes.clone(), codes.T.contiguous().T, torch.cat([codes[:, :1], codes], 1)[:, 1:]):
        whole.codes = made
        assert torch.equal(whole.run(), expected)
    for made in (weight[:, :101], weight[:, :101].clone(), weight.T.contiguous().T):
        whole.weight = made
        assert torch.equal(whole.run(), expected)
    eight = Problem(5, 37, 101, FP8)
    got, eight.codes = eight.run(), eight.codes.clone()
    assert torch.equal(eight.run(), got) and bool(got.isfinite().all())


def operators() -> None:
    """The operators by the launcher, against themselves in plain PyTorch."""
    weight, sums = ops.pack_int8_weight(torch.randint(-127, 128, (37, 90)).to(torch.int8))
    codes, scale = torch.randint(-128, 128, (2, 5, 90)).to(torch.int8), torch.rand(2, 5) * 0.01
    arguments = (codes, scale, weight, torch.rand(37), torch.randn(37))
    options = {"zero_point": torch.tensor([7]).int(), "weight_sums": sums, "residual": torch.randn(2, 5, 37)}

    def results() -> tuple[Tensor, ...]:
        y = ops.int8_linear_cuda(*arguments, **options, out_dtype=torch.float16)
        return y, *ops.int8_requantize_cuda(*arguments, **options, out_scale=0.3, out_zero_point=90, out_dtype=KINDS[1])

    found, ops._launcher = ops._launcher, lambda call: kernels.int8_linear
    mine = results()
    ops._launcher = found
    assert all(torch.equal(*pair) for pair in zip(mine, results(), strict=True))


def without_columns() -> None:
    problem = Problem(3, 5, 0, bias=torch.ones(5))
    assert torch.equal(problem.run(), torch.ones(3, 5))


CHECKS = (
    exact_bits, one_scale_for_all, float8_runs, rows_that_are_not_there, strange_rows, rows_anywhere, operators,
    without_columns,
)  # fmt: skip


def epilogues() -> Iterator[tuple[str, Problem]]:
    """All activations and residuals, in one program and apart; all grids of codes."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    for activation, k in itertools.product(range(6), (64, 600)):
        residual = torch.randn(9, 37).to(floats[activation % 3]) if activation else None
        options = {"activation": activation, "residual": residual, "out": floats[(activation + k // 100) % 3]}
        yield f"epilogue-{activation}-{k}", {"bias": torch.randn(37), **options, "k": k}
    for out, zero, k in itertools.product(KINDS, (0, 77), (64, 600)):
        asked = {"out": out, "out_zero": zero, "out_scale": 0.02, "activation": 1, "bias": torch.randn(37), "k": k}
        yield f"codes-{kernels.TYPES[out]}-{zero}-{k}", asked
    yield "rounded", {"output_scale": 0.04, "activation": 3, "k": 64}


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for entry in kernels.TABLE:
        for shape in entry.shapes:
            yield f"{entry.name}-{'x'.join(map(str, shape))}", functools.partial(entry_of, entry, shape)
    for name, asked in epilogues():
        k = asked.pop("k")
        yield name, lambda k=k, asked=asked: Problem(9, 37, k, **asked).check()
    for check in CHECKS:
        yield check.__name__, check


def main() -> int:
    # Fills what is allocated with NaN, or the largest integer.
    torch.use_deterministic_algorithms(True)
    kernels.multiply, kernels.add_in_order = Recorder(kernels.multiply), Recorder(kernels.add_in_order)
    return run(cases())


if __name__ == "__main__":
    sys.exit(main())
