"""Compensated rounding: against a plain loop in float64, never worse than nearest rounding, and on whole models."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import bertkern as bk
from bertkern.compress.groupwise.gptq import compensated, output_error
from bertkern.compress.groupwise.grids import Grids
from bertkern.compress.groupwise.least_squares import refit
from bertkern.compress.groupwise.ranges import weighted_ends
from bertkern.config import GroupwiseConfig
from bertkern.formats.groupwise import GroupwiseWeight, grid, group_count, group_ranges
from bertkern.formats.rounding import round_weight
from tests import reference
from tests.tiny_models import inputs, main_output, tiny

LAYOUTS = [("n", 3), ("n", 7), ("k", 8), ("k", 11)]


def correlated(tokens: int, k: int, seed: int = 0) -> Tensor:
    """Inputs of few directions and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 5, generator=generator) @ torch.randn(5, k, generator=generator)
    return x + 0.3 * torch.randn(tokens, k, generator=generator)


def moments(x: Tensor) -> Tensor:
    return (x.double().T @ x.double()) / len(x)


def matrix(n: int = 20, k: int = 36, seed: int = 1) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def naive_gptq(weight: Tensor, second: Tensor, bits: list[int], axis: str, size: int, damp: float) -> Tensor:
    """The rounded weight [N, K] in float64: one column after the other, the inverse of what is left made anew."""
    w, (n, k) = weight.double().clone(), weight.shape
    damped = second.double() + damp * second.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    row_grids = grid(*group_ranges(weight, "n", size), torch.tensor(bits)) if axis == "n" else None
    for j in range(k):
        if axis == "n":
            scale, zero = (values.double().repeat_interleave(size)[:n] for values in row_grids)
            top = (2.0 ** torch.tensor(bits).double() - 1).repeat_interleave(size)[:n]
        else:
            if j % size == 0:
                part = w[:, j : j + size].float()
                ends = grid(part.amin(1), part.amax(1), bits[j // size])
            scale, zero, top = ends[0].double(), ends[1].double(), torch.tensor(2.0 ** bits[j // size] - 1).double()
        code = torch.minimum(torch.round(w[:, j] / scale + zero).clamp(min=0), top)
        error = w[:, j] - (code - zero) * scale
        inverse = torch.linalg.inv(damped[j:, j:])
        w[:, j + 1 :] -= torch.outer(error, inverse[0, 1:] / inverse[0, 0])
        w[:, j] = (code - zero) * scale
    return w


@pytest.mark.parametrize(("axis", "size"), LAYOUTS)
@pytest.mark.parametrize("bits", [2, 4, "mixed"])
def test_gptq_alone_is_the_plain_loop(axis, size, bits):
    weight, second = matrix(), moments(correlated(200, 36))
    groups = group_count((20, 36), axis, size)
    each = [2 + i % 3 for i in range(groups)] if bits == "mixed" else [bits] * groups
    got = compensated(weight, second, each, size, axis, method="minmax", ordered=False, rounds=0, damp=0.02)
    assert got.bits.tolist() == each
    # A value on the border of two codes may fall to either side, and all that follows with it.
    expected = naive_gptq(weight, second, each, axis, size, 0.02)
    same = (got.dequantize().double() - expected).abs().amax(1) < 1e-4
    assert same.double().mean() >= 0.9


@pytest.mark.parametrize(("axis", "size"), LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"method": "outputs"}, {"method": "percentile"}])
@pytest.mark.parametrize("rounds", [0, 3])
def test_outputs_err_less_than_of_nearest_codes(axis, size, options, rounds):
    weight, x = matrix(), correlated(400, 36)
    asked = {"method": "minmax", **options}
    got = compensated(weight, moments(x), 3, size, axis, rounds=rounds, **asked).check()
    plain_method = {**asked, "method": "mse" if asked["method"] == "outputs" else asked["method"]}
    nearest = round_weight(weight, 3, size, axis, **plain_method)
    error, plain = ((x @ (weight - w.dequantize()).T).square().mean() for w in (got, nearest))
    assert error < 0.7 * plain
    unseen = correlated(400, 36)[200:] + 0.1 * correlated(200, 36, seed=5)
    error, plain = ((unseen @ (weight - w.dequantize()).T).square().mean() for w in (got, nearest))
    assert error < plain


def test_each_round_lessens_the_error():
    weight, second = matrix(), moments(correlated(400, 36))
    errors = []
    for rounds in range(4):
        got = compensated(weight, second, 2, 12, "k", rounds=rounds)
        errors.append(output_error(weight, got.dequantize(), second.float()))
    assert errors[0] > errors[1] > errors[2] >= errors[3] * 0.999


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_shared_by_all_rows(shared, symmetric):
    got = compensated(matrix(), moments(correlated(99, 36)), 3, 10, "k", shared=shared, symmetric=symmetric).check()
    assert list(got.scale.shape) == [1 if shared else 20, 4] and (got.zero is None) == symmetric
    assert not symmetric or got.unpacked().min() >= 1


@pytest.mark.parametrize(("axis", "size", "shared"), [("n", 6, False), ("k", 10, False), ("k", 10, True)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_refit_is_the_least_squares_solution(axis, size, shared, symmetric):
    weight, second = matrix(), moments(correlated(99, 36)).float() + 0.01 * torch.eye(36)
    groups = group_count((20, 36), axis, size)
    bits = torch.full((groups,), 3, dtype=torch.uint8)
    scale, zero = grid(*group_ranges(weight, axis, size, shared), bits, symmetric)
    grids = Grids(scale, zero, bits, (20, 36), axis, size, symmetric)
    codes = grids.nearest(weight)
    # Newton's step of a quadratic function, made of its exact derivatives.
    offset = torch.zeros_like(scale) if symmetric else (3.5 - zero) * scale
    middle = zero.mean() if symmetric else 3.5

    def error(parameters: Tensor) -> Tensor:
        s, o = parameters[: scale.numel()].view(scale.shape), parameters[scale.numel() :].view(scale.shape)
        rounded = (codes.double() - middle) * grids.spread(s) + grids.spread(o if not symmetric else 0 * o)
        left = weight.double() - rounded
        return ((left @ second.double()) * left).sum()

    start = torch.cat([scale.flatten(), offset.flatten()]).double()
    got = refit(weight, codes, grids, second, shared)
    found = torch.cat([got.scale.flatten(), ((3.5 - got.zero) * got.scale * (not symmetric)).flatten()]).double()
    gradient = torch.func.grad(error)
    assert error(found) < error(start)
    assert gradient(found).norm() < 2e-3 * gradient(start).norm()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("axis", "size", "shared"), [("n", 7, False), ("k", 8, False), ("k", 11, True)])
def test_weighted_ranges_are_better_than_any_that_were_tried(axis, size, shared, symmetric):
    weight = matrix()
    importance = torch.rand(36, generator=torch.Generator().manual_seed(2)) ** 4
    bits = torch.full((group_count((20, 36), axis, size),), 3, dtype=torch.uint8)

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        grids = Grids(scale, zero, bits, (20, 36), axis, size, symmetric)
        lost = importance * (grids.values(grids.nearest(weight)) - weight).square()
        by_group = lost.sum(1) if axis == "n" else lost.sum(0) if shared else lost
        parts = by_group.split(size, -1)
        return torch.stack([part.sum(-1) for part in parts], -1)

    low, high = group_ranges(weight, axis, size, shared)
    found = error(*weighted_ends(weight, importance, bits, size, axis, symmetric, shared))
    for share in (1.0, 0.65, 0.475, 0.3):
        middle = torch.zeros_like(low) if symmetric else (low + high) / 2
        tried = grid(middle - share * (middle - low), middle + share * (high - middle), bits, symmetric)
        assert bool((found <= error(*tried).view(found.shape) * (1 + 1e-5)).all())


def test_dead_inputs_become_nearest_codes():
    x = correlated(300, 36)
    x[:, [3, 17]] = 0
    weight = matrix()
    got = compensated(weight, moments(x), 4, 5, "n", rounds=2)
    scale, zero = (got.spread(values).expand(20, 36) for values in (got.scale, got.zeros()))
    codes = torch.round(weight / scale + zero).clamp(0, 15)
    assert torch.equal(got.unpacked()[:, [3, 17]].float(), codes[:, [3, 17]])
    nothing = compensated(weight, torch.zeros(36, 36), 4, 5, "n", method="minmax", rounds=0)
    assert torch.equal(nothing.unpacked(), round_weight(weight, 4, 5, "n").unpacked())


def test_bad_input():
    with pytest.raises(ValueError, match=r"expected moments of shape \[K, K\]"):
        compensated(matrix(), torch.eye(35), 4, 5)
    with pytest.raises(ValueError, match="finite"):
        compensated(matrix(), torch.full((36, 36), torch.nan), 4, 5)
    with pytest.raises(ValueError, match="expected bits"):
        compensated(matrix(), torch.eye(36), 9, 5)


# --- whole models ---------------------------------------------------------------------------------------------------


def calls(model: nn.Module, count: int = 6) -> list[dict[str, Tensor]]:
    return [inputs(model, batch=8, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("family", ["Bert", "DistilBert", "MPNet", "Albert"])
@pytest.mark.parametrize("config", [GroupwiseConfig(bits=3, groups=8), GroupwiseConfig(bits=2, axis="k", group_size=8)])
def test_a_model_of_compensated_weights_is_nearer(family, config):
    model = tiny(f"{family}Model")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = bk.compensate(model, calls(model), config, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())
    asked = inputs(model, batch=8, seed=50, padding=False)
    with torch.no_grad():
        expected = main_output(model(**asked))
        plain = main_output(bk.quantize_(tiny(f"{family}Model"), config)(**asked))
        got = main_output(bk.quantize_(model, config, weights=weights)(**asked))
    assert reference.sqnr(expected, got) > reference.sqnr(expected, plain) + 1


def test_matrices_that_compensation_makes_worse_are_rounded_plainly(monkeypatch):
    model, config = tiny("BertModel"), GroupwiseConfig(bits=4, groups=8)
    shape = tuple(model.encoder.layer[0].output.dense.weight.shape)

    def spoiled(weight: Tensor, *given: object, **more: object) -> GroupwiseWeight:
        made = compensated(weight, *given, **more)
        return replace(made, scale=3 * made.scale) if made.shape == shape else made

    monkeypatch.setattr("bertkern.compress.groupwise.compensation.compensated", spoiled)
    found = bk.compensate(model, calls(model), config, progress=False)
    plain = {}
    for name, weight in found.items():
        dense = model.get_submodule(name).weight
        nearest = round_weight(dense, 4, weight.group_size, method="mse")
        plain[name] = torch.equal(weight.codes, nearest.codes) and torch.equal(weight.scale, nearest.scale)
    assert all(plain[f"encoder.layer.{i}.output.dense"] for i in range(2)) and not all(plain.values())


def test_bits_of_layers_and_groups():
    model = tiny("BertModel")
    config = GroupwiseConfig(
        bits=4, groups=6, layer_bits={"layer.1": 2, "layer.0.output.dense": [2, 3, 4, 5, 6, 7]}, skip=("query",)
    )
    weights = bk.compensate(model, calls(model, 2), config, progress=False)
    assert not any("query" in name or "pooler" in name for name in weights)
    assert set(weights["encoder.layer.1.intermediate.dense"].bits.tolist()) == {2}
    assert weights["encoder.layer.0.output.dense"].bits.tolist() == [2, 3, 4, 5, 6, 7]
    assert [name for name, _ in model.named_modules() if name in weights] == list(weights)


def test_padding_does_not_count():
    model, config = tiny("BertModel"), GroupwiseConfig(bits=3, groups=8)
    batch = inputs(model, batch=2)
    changed = {**batch, "input_ids": torch.where(batch["attention_mask"] > 0, batch["input_ids"], 7)}
    first, second = (bk.compensate(model, [b], config, progress=False) for b in (batch, changed))
    assert all(torch.equal(first[name].codes, second[name].codes) for name in first)


def test_of_an_accelerated_and_a_pruned_model():
    plain, config = tiny("BertModel"), GroupwiseConfig(bits=3, groups=8)
    expected = bk.compensate(plain, calls(plain, 2), config, progress=False)
    fused = bk.accelerate(tiny("BertModel"))
    got = bk.compensate(fused, calls(plain, 2), config, progress=False)
    same = [(got[name].unpacked() == expected[name].unpacked()).double().mean() for name in expected]
    assert torch.stack(same).min() > 0.95
    nn.utils.prune.random_unstructured(plain.encoder.layer[0].output.dense, "weight", 0.5)
    masked = bk.compensate(plain, calls(plain, 2), config, progress=False)
    assert masked["encoder.layer.0.output.dense"].check()


def test_a_model_that_gives_hidden_states_goes_on_to():
    model = tiny("BertModel", output_hidden_states=True)
    asked = inputs(model)
    with torch.no_grad():
        before = model(**asked).hidden_states
        bk.compensate(model, calls(model, 2), GroupwiseConfig(groups=8), progress=False)
        after = model(**asked).hidden_states
    assert len(before) == len(after) == 3
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_two_heads_of_one_input():
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(36, 20) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return sum(head(x) for head in self.heads)

    weights = bk.compensate(Heads(), [correlated(50, 36)], GroupwiseConfig(groups=5), progress=False)
    assert list(weights) == ["heads.0", "heads.1"]


def test_refusals_leave_the_model_alone():
    model, config = tiny("BertModel"), GroupwiseConfig(groups=8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"expected at least one batch. Got none"):
        bk.compensate(model, [], config)
    with pytest.raises(TypeError, match="compensate: expected a tokenizer with"):
        bk.compensate(model, ["a sentence"], config)
    with pytest.raises(TypeError, match="expected config to be a GroupwiseConfig"):
        bk.compensate(model, calls(model), bk.Int8Config())
    with pytest.raises(ValueError, match="expected damp above 0"):
        bk.compensate(model, calls(model), config, damp=0.0)
    model.embeddings.LayerNorm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"expected the input of encoder.layer.0.attention.self.query to be finite"):
        bk.compensate(model, calls(model), config, progress=False)
    model.embeddings.LayerNorm.weight.data[3] = before["embeddings.LayerNorm.weight"][3]
    model.unused = nn.Linear(48, 48)
    with pytest.raises(ValueError, match="expected the first batch to reach unused"):
        bk.compensate(model, calls(model), config, progress=False)
    del model.unused
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())
    model.encoder.layer[1].output.dense.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"expected encoder.layer.1.output.dense.weight to be finite"):
        bk.compensate(model, calls(model), config, progress=False)
