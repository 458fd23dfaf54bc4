"""Masks and Pruner in training loops: pruned weights are exactly zero at every step, whatever the optimizer does."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import bertkern as bk
from tests.tiny_models import VOCABULARY, tiny

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, accumulate: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(accumulate):
        x = torch.randn(16, 24, generator=generator)
        (model(x) - x.roll(1, 1)).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def assert_zeros(model: nn.Module, pruned: dict[str, torch.Tensor]) -> None:
    for name, mask in pruned.items():
        weight = model.get_parameter(name)
        assert torch.equal(weight == 0, mask), "what is pruned is zero, and nothing else"


CONFIG = bk.BlockPruneConfig(sparsity=0.5, block=(4, 4))


# --- masks after pruning once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_alone_hold_a_fresh_optimizer(name):
    model = network()
    masks = bk.prune_(model, CONFIG).hold()
    before = model[0].weight.detach().clone()
    optimizer = OPTIMIZERS[name](model.parameters())
    for seed in range(5):
        train_step(model, optimizer, seed, accumulate=2)
        assert_zeros(model, masks.pruned)
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_with_momentum_from_before_is_held(name):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    for seed in range(3):
        train_step(model, optimizer, seed)
    masks = bk.prune_(model, CONFIG).hold(optimizer)
    for seed in range(5):
        train_step(model, optimizer, seed)
        assert_zeros(model, masks.pruned)


def test_momentum_from_before_needs_the_optimizer():
    model = network()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train_step(model, optimizer, 0)
    masks = bk.prune_(model, CONFIG).hold()
    train_step(model, optimizer, 1)
    assert int((model[0].weight == 0).sum()) < int(masks.pruned["0.weight"].sum()), "else the test above shows nothing"
    masks.apply()
    assert_zeros(model, masks.pruned)


def test_remove_leaves_plain_weights():
    model = network()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    masks = bk.prune_(model, CONFIG).hold(optimizer)
    train_step(model, optimizer, 0)
    masks.remove()
    assert_zeros(model, masks.pruned)
    assert type(model[0].weight) is nn.Parameter and not model[0].weight._backward_hooks
    assert set(model.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    train_step(model, optimizer, 1)
    assert not (model[0].weight == 0).any()


def test_holding_twice_replaces():
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    masks = bk.prune_(model, CONFIG)
    masks.hold(optimizer).hold(optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1 and len(model[0].weight._backward_hooks) == 1


def test_frozen_weights_and_wrapped_optimizers():
    accelerate = pytest.importorskip("accelerate")
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = accelerate.Accelerator(cpu=True).prepare(OPTIMIZERS["adamw"](model.parameters()))
    masks = bk.prune_(model, CONFIG).hold(optimizer)
    train_step(model, optimizer, 0)
    assert_zeros(model, masks.pruned)


def test_the_copy_of_a_held_model_is_free():
    model = network()
    masks = bk.prune_(model, CONFIG).hold()
    other = copy.deepcopy(model)
    train_step(other, OPTIMIZERS["adamw"](other.parameters()), 0)
    train_step(other, OPTIMIZERS["adamw"](other.parameters()), 1)
    assert not torch.equal(other[0].weight == 0, masks.pruned["0.weight"])
    assert_zeros(model, masks.pruned)


def test_gradients_of_pruned_weights_are_zero_even_where_they_are_not_finite():
    model = network()
    masks = bk.prune_(model, CONFIG).hold()
    (model(torch.full((1, 24), math.inf)).sum()).backward()
    assert not model[0].weight.grad[masks.pruned["0.weight"]].any()
    assert model[0].weight.grad.isnan().any()


def test_sparse_gradients():
    model = nn.Sequential(tiny("BertModel"))
    table = model[0].embeddings.word_embeddings
    table.sparse = True
    config = bk.UnstructuredPruneConfig(sparsity=0.5, skip=("encoder", "pooler"))
    optimizer = torch.optim.SGD([table.weight], lr=0.1, momentum=0.9)
    masks = bk.prune_(model, config).hold(optimizer)
    for _ in range(2):
        table(torch.arange(5, 20)).sum().backward()
        assert table.weight.grad.is_sparse
        optimizer.step()
    assert_zeros(model, masks.pruned)


def test_torch_prune_beside_it():
    model = network()
    torch_prune.l1_unstructured(model[0], "weight", amount=0.25)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    bk.prune_(model, bk.UnstructuredPruneConfig(sparsity=0.5)).hold(optimizer)
    for seed in range(3):
        train_step(model, optimizer, seed)
    assert int((model[0].weight == 0).sum()) == int((model[2].weight == 0).sum()) == 480


def test_masks_of_the_zeros_found():
    model = network()
    pruned = bk.prune_(model, CONFIG).pruned
    masks = bk.Masks.of_zeros(model)
    assert all(torch.equal(masks.pruned[name], mask) for name, mask in pruned.items())
    masks.hold()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    for seed in range(3):
        train_step(model, optimizer, seed)
    assert_zeros(model, pruned)
    assert list(bk.Masks.of_zeros(model, bk.NmPruneConfig(skip=("0",))).pruned) == ["2.weight"]


def test_masks_are_saved_and_loaded():
    model, other = network(), network()
    state = bk.prune_(model, CONFIG).state_dict()
    masks = bk.Masks.of_zeros(other)
    masks.load_state_dict(state)
    assert_zeros(other, state)
    for spoiled, message in [
        ({"1.weight": state["0.weight"]}, "expected masks of the model's matrices. Got one of 1.weight"),
        ({"0.weight": state["2.weight"]}, r"expected 0.weight to be torch.bool \[40, 24\]. Got torch.bool \[24, 40\]"),
        ({"0.weight": state["0.weight"].float()}, r"Got torch.float32 \[40, 24\]"),
        ({"0.weight": None}, "Got NoneType"),
    ]:
        with pytest.raises(ValueError, match=message):
            masks.load_state_dict(spoiled)


def test_a_matrix_of_another_shape_is_told():
    model = tiny("BertModel")
    masks = bk.prune_(model, bk.UnstructuredPruneConfig(sparsity=0.5))
    model.resize_token_embeddings(VOCABULARY + 7)
    with pytest.raises(RuntimeError, match=r"word_embeddings.weight of shape \[120, 48\]. Got \[127, 48\]"):
        masks.apply()


def test_hold_takes_optimizers_only():
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer. Got generator"):
        bk.prune_(network(), CONFIG).hold(p for p in ())


# --- a schedule -------------------------------------------------------------------------------------------------------

SCHEDULE = bk.PruneSchedule(begin=2, end=12, frequency=3, initial=0.1)
KINDS = [
    bk.UnstructuredPruneConfig(sparsity=0.9),
    bk.UnstructuredPruneConfig(sparsity=0.9, scope="global"),
    bk.UnstructuredPruneConfig(sparsity=0.9, criterion="random", overrides={"2": 0.05}),
    bk.BlockPruneConfig(sparsity=0.8, block=(4, 4)),
    bk.BlockPruneConfig(sparsity=0.8, block=(7, 5), norm="max", scope="global"),
    bk.RowColumnPruneConfig(sparsity=0.5, axis="columns"),
    bk.NmPruneConfig(n=1, m=8),
]


def units(config, shape: tuple[int, int]) -> int:
    rows, columns = config.block_of(shape)
    return math.ceil(shape[0] / rows) * math.ceil(shape[1] / columns)


def zero_units(config, mask: torch.Tensor) -> int:
    rows, columns = config.block_of(tuple(mask.shape))
    grid = [
        mask[i : i + rows, j : j + columns]
        for i in range(0, mask.shape[0], rows)
        for j in range(0, mask.shape[1], columns)
    ]
    assert all(bool(unit.all()) == bool(unit.any()) for unit in grid)
    return sum(int(unit.all()) for unit in grid)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("config", KINDS, ids=lambda config: f"{config.KIND}-{getattr(config, 'scope', '')}")
def test_gradual_pruning(config, name):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    pruner = bk.Pruner(model, config, SCHEDULE)
    assert pruner.sparsity == 0 and not pruner.masks.pruned
    previous = {}
    for step in range(1, 16):
        train_step(model, optimizer, step)
        grew = pruner.step()
        assert grew == (step in (2, 5, 8, 11, 12)) and pruner.done == (step >= 12)
        if step < 2:
            assert not (model[0].weight == 0).any()
            continue
        masks = pruner.masks.pruned
        assert_zeros(model, masks)
        assert all((masks[key] & old).equal(old) for key, old in previous.items()), "masks never shrink"
        assert grew or all(masks[key].equal(old) for key, old in previous.items())
        previous = {key: mask.clone() for key, mask in masks.items()}
        last = max(t for t in (2, 5, 8, 11, 12) if t <= step)
        left = (1 - min(1, (last - 2) / 10)) ** 3
        finals = {
            "0.weight": config.sparsity,
            "2.weight": dict(getattr(config, "overrides", ())).get("2", config.sparsity),
        }
        asked = {key: final + (min(0.1, final) - final) * left for key, final in finals.items()}
        assert pruner.sparsity == pytest.approx(asked["0.weight"])
        if isinstance(config, bk.NmPruneConfig):
            for mask in masks.values():
                assert set(mask.unflatten(1, (-1, config.m)).sum(-1).flatten().tolist()) == {
                    round(asked["0.weight"] * 8)
                }
        elif config.scope == "global":
            total = sum(units(config, tuple(mask.shape)) for mask in masks.values())
            assert sum(zero_units(config, mask) for mask in masks.values()) == round(asked["0.weight"] * total)
        else:
            for key, mask in masks.items():
                assert zero_units(config, mask) == round(asked[key] * units(config, tuple(mask.shape)))
    pruner.remove()
    train_step(model, optimizer, 99)
    assert not torch.equal(model[0].weight == 0, previous["0.weight"])


def test_masks_grow_by_the_weights_as_they_then_are():
    model = network()
    pruner = bk.Pruner(model, bk.UnstructuredPruneConfig(sparsity=0.5, skip=("2",)), bk.PruneSchedule.one_shot(1))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(960.0).view(40, 24) + 1)
    pruner.step()
    assert torch.equal(pruner.masks.pruned["0.weight"].flatten(), torch.arange(960) < 480)


def test_step_zero_prunes_before_training():
    model = network()
    bk.Pruner(model, bk.UnstructuredPruneConfig(sparsity=0.5), bk.PruneSchedule.one_shot())
    assert int((model[0].weight == 0).sum()) == 480
    model = network()
    pruner = bk.Pruner(model, bk.UnstructuredPruneConfig(sparsity=0.5), bk.PruneSchedule(end=10, initial=0.25))
    assert int((model[0].weight == 0).sum()) == 240 and pruner.sparsity == 0.25


def run(steps: range, model, optimizer, pruner) -> None:
    for step in steps:
        train_step(model, optimizer, step)
        pruner.step()


@pytest.mark.parametrize("config", KINDS, ids=lambda config: f"{config.KIND}-{getattr(config, 'scope', '')}")
@pytest.mark.parametrize("stop", [1, 6, 12, 14])
@pytest.mark.parametrize("by", ["state", "step"])
def test_resuming_is_as_if_never_stopped(config, stop, by, tmp_path):
    whole = network()
    optimizer = OPTIMIZERS["adamw"](whole.parameters())
    pruner = bk.Pruner(whole, config, SCHEDULE)
    run(range(1, stop + 1), whole, optimizer, pruner)
    torch.save([whole.state_dict(), optimizer.state_dict(), pruner.state_dict()], tmp_path / "state.pt")
    run(range(stop + 1, 17), whole, optimizer, pruner)

    model = network()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    weights, moments, state = torch.load(tmp_path / "state.pt", weights_only=True)
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    if by == "state":
        again = bk.Pruner(model, config, SCHEDULE)
        again.load_state_dict(state)
    else:
        again = bk.Pruner(model, config, SCHEDULE, step=stop)
    assert again.steps == stop
    run(range(stop + 1, 17), model, optimizer, again)
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(mask, pruner.masks.pruned[key]) for key, mask in again.masks.pruned.items())


def test_states_of_others_are_refused():
    pruner = bk.Pruner(network(), CONFIG, SCHEDULE, step=4)
    state = pruner.state_dict()
    for spoiled, message in [
        (None, "expected a state of version 1. Got 'NoneType'"),
        ({**state, "version": 2}, "expected a state of version 1. Got 2"),
        ({**state, "config": KINDS[0].to_dict()}, "expected a state of the config .*'block'.* Got .*'unstructured'"),
        ({**state, "schedule": {}}, "expected a state of the schedule"),
        ({**state, "steps": -1}, "expected a state with steps and masks"),
        ({**state, "pruned": {"9.weight": torch.zeros(1)}}, "Got one of 9.weight"),
    ]:
        with pytest.raises(ValueError, match=message):
            pruner.load_state_dict(spoiled)
    assert pruner.steps == 4


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"expected schedule to be a PruneSchedule. Got int"):
        bk.Pruner(network(), CONFIG, 100)
    with pytest.raises(ValueError, match=r"expected step to be a whole number of at least 0. Got -1"):
        bk.Pruner(network(), CONFIG, SCHEDULE, step=-1)
    with pytest.raises(ValueError, match=r"expected schedule.initial to be at most the config's sparsity 0.5. Got 0.6"):
        bk.Pruner(network(), CONFIG, bk.PruneSchedule(initial=0.6))
    with pytest.raises(TypeError, match=r"expected a config such as BlockPruneConfig. Got PruneSchedule"):
        bk.Pruner(network(), SCHEDULE, SCHEDULE)


def test_nan_in_training_is_told():
    model = network()
    pruner = bk.Pruner(model, CONFIG, bk.PruneSchedule.one_shot(1))
    nn.init.constant_(model[2].weight, math.nan)
    with pytest.raises(ValueError, match=r"expected 2.weight without NaN"):
        pruner.step()


def test_a_tied_table_is_pruned_in_training():
    model = tiny("BertForMaskedLM").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruner = bk.Pruner(model, bk.UnstructuredPruneConfig(sparsity=0.5), bk.PruneSchedule.linear(end=4, frequency=1))
    ids = torch.randint(5, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    table = model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.weight is table
    assert int((table == 0).sum()) == VOCABULARY * 48 // 2
