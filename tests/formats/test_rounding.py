"""Ranges of groups: in blocks as at once, and by each method what it promises."""

import numpy as np
import pytest
import torch

from bertkern.formats import rounding
from bertkern.formats.groupwise import grid, quantize_groupwise
from bertkern.formats.rounding import METHODS, Grid, round_weight

SHAPES = ((37, 50), (64, 48), (5, 3))
LAYOUTS = [(axis, size, shared) for axis, shared in (("n", False), ("k", False), ("k", True)) for size in (1, 3, 7, 64)]


def weight(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) ** 3


@pytest.mark.parametrize("axis,size,shared", LAYOUTS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_blocks_change_nothing(axis, size, shared, symmetric, monkeypatch):
    how = {"axis": axis, "shared": shared, "symmetric": symmetric}
    for shape in SHAPES:
        w = weight(*shape)
        for method in METHODS:
            whole = round_weight(w, 3, size, method=method, **how)
            with monkeypatch.context() as patch:
                patch.setattr(rounding, "BLOCK", 300)
                patch.setattr(rounding, "CACHED", 1000)
                cut = round_weight(w, 3, size, method=method, **how)
            for name, tensor in whole.tensors().items():
                assert torch.equal(tensor, getattr(cut, name)), (method, name)
            if method == "minmax":
                plain = quantize_groupwise(w, 3, size, **how)
                assert all(torch.equal(t, getattr(plain, name)) for name, t in whole.tensors().items())


@pytest.mark.parametrize("axis,size,shared", LAYOUTS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_is_never_worse(axis, size, shared, bits):
    for symmetric in (False, True):
        w = weight(37, 50, seed=bits)
        how = {"axis": axis, "shared": shared, "symmetric": symmetric}
        errors = [(round_weight(w, bits, size, method=m, **how).dequantize() - w).square() for m in ("minmax", "mse")]
        assert errors[1].sum() <= errors[0].sum() * (1 + 1e-5)


KINDS = (Grid(False, False), Grid(False, True), Grid(True, False))


def groups_of(tail: str, count: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count + size)
    x = torch.randn(count, size, generator=generator)
    if tail == "heavy":  # Student's t of 4 degrees of freedom
        x /= torch.randn(4, count, size, generator=generator).square().mean(0).sqrt()
    return x * torch.rand(count, 1, generator=generator) + 0.1 * torch.randn(count, 1, generator=generator)


def errors_of(groups: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int, on: Grid) -> torch.Tensor:
    """Squared errors [tries, G] of ranges [tries, G] of groups [G, elements], by the formula alone."""
    scale, zero = (part[..., None] for part in grid(low, high, bits, *on))
    codes = (groups / scale + zero).round().clamp(int(on.symmetric), 2**bits - 1)
    return ((codes - zero) * scale - groups).square().sum(-1)


def exhaustive(groups: torch.Tensor, bits: int, on: Grid) -> torch.Tensor:
    """The least error [G] of all ranges whose ends lie in quarters of a step, from one outside of the group's inwards.

    Of so few elements no more than some steps are cut off: each step costs more than all others' errors together.
    """
    low, high = groups.amin(1), groups.amax(1)
    if on.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    step = (high - low) / (2**bits - 1)
    inwards = torch.arange(-1, min(8, 0.8 * 2**bits), 0.25)[:, None] * step
    least = torch.full_like(low, float("inf"))
    for cut in inwards:
        lows, highs = low + inwards, (high - cut).expand_as(inwards)
        lows = lows[:1] + cut - inwards[0] if on.symmetric else lows
        tried = errors_of(groups, lows, highs[: len(lows)], bits, on)
        tried[lows >= highs[: len(lows)]] = float("inf")
        least = torch.minimum(least, tried.amin(0))
    return least


@pytest.mark.parametrize("on", KINDS, ids=("real", "whole", "symmetric"))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("tail", ["normal", "heavy"])
def test_mse_is_as_good_as_trying_all_ranges(tail, bits, on):
    groups = groups_of(tail, 24, 64)
    best = exhaustive(groups, bits, on)
    how = {"symmetric": on.symmetric, "whole_zero": on.whole_zero, "method": "mse"}
    for axis, size, matrix in (("n", 4, groups.reshape(96, 16)), ("k", 64, groups.reshape(4, 384))):
        made = round_weight(matrix, bits, size, axis, **how)
        errors = (made.dequantize() - matrix).reshape(24, 64).square().sum(1)
        assert errors.sum() <= 1.015 * best.sum()
        plain = round_weight(matrix, bits, size, axis, **{**how, "method": "minmax"})
        assert (errors <= (plain.dequantize() - matrix).reshape(24, 64).square().sum(1) * (1 + 1e-5)).all()
        again = round_weight(matrix, bits, size, axis, **how)
        assert all(torch.equal(tensor, getattr(again, name)) for name, tensor in made.tensors().items())


@pytest.mark.parametrize("on", KINDS, ids=("real", "whole", "symmetric"))
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_mse_of_strange_groups(bits, on):
    """Groups that have no range, or one that cannot be counted in steps, are rounded as by "minmax", or better."""
    tiny = torch.finfo(torch.float32).tiny
    rows = [
        [0.0] * 6,
        [3.0] * 6,
        [-3.0] * 6,
        [-1.0, 1.0] * 3,
        [0.0] * 5 + [1e30],
        [1e38, -1e38] * 3,
        [tiny, 0.0, -tiny] * 2,
        [1000.0, 1000.0001] * 3,
        [1e-30, 2e-30, 5e-30] * 2,
        [0.0] * 4 + [1.0, -40.0],
    ]
    w = torch.tensor(rows)
    made, plain = (
        round_weight(w, bits, 1, method=method, symmetric=on.symmetric, whole_zero=on.whole_zero).check()
        for method in ("mse", "minmax")
    )
    errors = [(each.dequantize().double() - w.double()).square().sum(1) for each in (made, plain)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    single = round_weight(w, bits, 1, "k", method="mse", symmetric=on.symmetric, whole_zero=on.whole_zero)
    assert single.check().dequantize().isfinite().all()


def test_mse_finds_the_known_optimum():
    """Of a normal distribution, 4 and 16 equal steps leave at least 0.1188 and 0.01154 of its variance (Max, 1960)."""
    w = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    for bits, least in ((2, 0.1188), (4, 0.01154)):
        error = (round_weight(w, bits, 64, method="mse").dequantize() - w).square().mean() / w.var()
        assert least * 0.99 < error < least * 1.01


def test_percentiles_are_those_of_numpy():
    w = weight(12, 700)
    low, high = METHODS["percentile"](w, torch.tensor(4), None)
    expected = np.percentile(w.double().numpy(), [0.1, 99.9], axis=1)
    np.testing.assert_allclose(np.stack([low.numpy(), high.numpy()]), expected, rtol=1e-5, atol=1e-6)
    made = round_weight(w, 4, 1, method="percentile")
    assert (made.dequantize() <= high[:, None] + 1e-4).all() and (made.dequantize() >= low[:, None] - 1e-4).all()


@pytest.mark.parametrize("method", METHODS)
def test_whole_zero_points_keep_zeros(method):
    w = weight(12, 700) + 0.3
    w[:, ::3] = 0
    for axis, size in (("n", 1), ("k", 50)):
        made = round_weight(w, 3, size, axis, method=method, whole_zero=True)
        assert torch.equal(made.zero, made.zero.round()) and not bool(made.dequantize()[:, ::3].any())
        if method == "mse":
            plain = round_weight(w, 3, size, axis, whole_zero=True)
            errors = [(each.dequantize() - w).square().sum() for each in (made, plain)]
            assert errors[0] < errors[1]


def test_bits_of_each_group():
    w = weight(12, 20)
    made = round_weight(w, [2, 8, 4, 3], 3, method="mse")
    assert made.bits.tolist() == [2, 8, 4, 3]
    for group, bits in enumerate((2, 8, 4, 3)):
        alone = round_weight(w[3 * group : 3 * group + 3], bits, 3, method="mse")
        assert torch.equal(made.dequantize()[3 * group : 3 * group + 3], alone.dequantize())


def test_bad_input():
    with pytest.raises(ValueError, match="method to be one of"):
        round_weight(torch.ones(3, 4), 4, 1, method="max")
    with pytest.raises(ValueError, match=r"bits of 3 groups\. Got 2"):
        round_weight(torch.ones(3, 4), [2, 3], 1)
    with pytest.raises(ValueError, match="finite"):
        round_weight(torch.full((3, 4), float("nan")), 4, 1)
