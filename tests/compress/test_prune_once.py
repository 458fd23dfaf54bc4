"""prune_: exactly the smallest go, in every structure and shape; what is pruned of a model, and what is refused."""

import itertools
import math
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import bertkern as bk
from bertkern.compress.prune.select import ranks, smallest
from bertkern.compress.q8bert import Q8BertConfig, convert, prepare_qat
from tests.tiny_models import VOCABULARY, inputs, main_output, tiny

NORMS = {"l1": lambda x: x.abs().mean(), "l2": lambda x: x.square().mean().sqrt(), "max": lambda x: x.abs().max()}


def linear(n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(k, n, dtype=dtype)


def units_of(weight: torch.Tensor, block: tuple[int, int]) -> list[torch.Tensor]:
    """Views of the blocks, row by row."""
    n, k = weight.shape
    corners = itertools.product(range(0, n, block[0]), range(0, k, block[1]))
    return [weight[i : i + block[0], j : j + block[1]] for i, j in corners]


def reference(weights: list[torch.Tensor], blocks: list[tuple[int, int]], norm: str, sparsity: float) -> None:
    """Zeroes the smallest blocks of all `weights` together: sorted, the first ones."""
    units = [unit for weight, block in zip(weights, blocks, strict=True) for unit in units_of(weight, block)]
    order = sorted(range(len(units)), key=lambda i: float(NORMS[norm](units[i].double())))
    for i in order[: round(sparsity * len(units))]:
        units[i].zero_()


# --- structures and shapes --------------------------------------------------------------------------------------------

BLOCKS = [(1, 4), (4, 1), (16, 4), (16, 16), (32, 32), (7, 5), (13, 1)]


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.8, 1])
@pytest.mark.parametrize("shape", [(64, 96), (37, 53)], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_blocks(block, shape, sparsity):
    layer = linear(*shape)
    expected = layer.weight.detach().clone()
    reference([expected], [block], "l2", sparsity)
    masks = bk.prune_(layer, bk.BlockPruneConfig(sparsity=sparsity, block=block))
    assert torch.equal(layer.weight, expected)
    assert torch.equal(masks.pruned["weight"], expected == 0)
    zero_blocks = sum(int(not unit.any()) for unit in units_of(layer.weight.detach(), block))
    assert zero_blocks == round(sparsity * math.ceil(shape[0] / block[0]) * math.ceil(shape[1] / block[1]))


@pytest.mark.parametrize("norm", NORMS)
def test_norms(norm):
    layer = linear(45, 50)
    expected = layer.weight.detach().clone()
    reference([expected], [(8, 8)], norm, 0.6)
    bk.prune_(layer, bk.BlockPruneConfig(sparsity=0.6, block=(8, 8), norm=norm))
    assert torch.equal(layer.weight, expected)


def test_norms_differ():
    found = set()
    for norm in NORMS:
        layer = linear(64, 64)
        bk.prune_(layer, bk.BlockPruneConfig(sparsity=0.5, block=(4, 4), norm=norm))
        found.add(tuple((layer.weight == 0).flatten().tolist()))
    assert len(found) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("sparsity", [0, 0.29, 0.9, 1])
def test_single_weights(dtype, sparsity):
    layer = linear(41, 67, dtype)
    expected = layer.weight.detach().clone()
    reference([expected], [(1, 1)], "max", sparsity)
    bk.prune_(layer, bk.UnstructuredPruneConfig(sparsity=sparsity))
    assert torch.equal(layer.weight, expected)
    assert int((layer.weight == 0).sum()) == round(sparsity * 41 * 67)


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("norm", NORMS)
def test_rows_and_columns(axis, norm):
    layer = linear(37, 53)
    bias = layer.bias.detach().clone()
    expected = layer.weight.detach().clone()
    reference([expected], [(1, 53) if axis == "rows" else (37, 1)], norm, 0.5)
    bk.prune_(layer, bk.RowColumnPruneConfig(sparsity=0.5, axis=axis, norm=norm))
    assert torch.equal(layer.weight, expected)
    dead = (layer.weight == 0).all(1 if axis == "rows" else 0)
    assert int(dead.sum()) == round(0.5 * len(dead)) and int((layer.weight == 0).sum()) == int(dead.sum()) * (
        layer.weight.numel() // len(dead)
    )
    assert torch.equal(layer.bias, bias)


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (0, 4), (4, 4), (1, 2), (5, 16), (1, 1)])
@pytest.mark.parametrize("shape", [(24, 64), (13, 51)], ids=str)
def test_n_of_m(n, m, shape):
    layer = linear(*shape)
    before = layer.weight.detach().clone()
    bk.prune_(layer, bk.NmPruneConfig(n=n, m=m))
    for row_before, row in zip(before, layer.weight.detach(), strict=True):
        for start in range(0, shape[1], m):
            old, new = row_before[start : start + m], row[start : start + m]
            kept = new != 0
            assert int(kept.sum()) == min(n, len(new))
            assert torch.equal(new[kept], old[kept])
            assert old[~kept].abs().max() <= old[kept].abs().min() if 0 < kept.sum() < len(new) else True


def test_global_scope_compares_matrices():
    model = nn.Sequential(linear(32, 48), linear(48, 40, seed=1), linear(24, 16, seed=2))
    with torch.no_grad():
        model[0].weight.mul_(3)
    expected = [layer.weight.detach().clone() for layer in model]
    reference(expected, [(16, 4)] * 3, "l2", 0.7)
    bk.prune_(model, bk.BlockPruneConfig(sparsity=0.7, block=(16, 4), scope="global"))
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, expected, strict=True))
    shares = [float((layer.weight == 0).double().mean()) for layer in model]
    assert shares[0] < 0.3 < 0.8 < shares[1], "the larger weights stay"


def test_overrides():
    model = nn.Sequential(linear(32, 48), linear(48, 40), linear(24, 16))
    config = bk.UnstructuredPruneConfig(sparsity=0.5, scope="global", overrides={"1": 0.9, "[12]": 0})
    bk.prune_(model, config)
    zeros = [int((layer.weight == 0).sum()) for layer in model]
    assert zeros == [round(0.5 * 32 * 48), round(0.9 * 48 * 40), 0]


def test_the_first_override_counts():
    model = nn.Sequential(linear(20, 10), linear(20, 10))
    bk.prune_(model, bk.UnstructuredPruneConfig(sparsity=0.5, overrides=[("0", 0.1), ("*", 0.9)]))
    assert [int((layer.weight == 0).sum()) for layer in model] == [20, 180]


# --- ties, zeros and odd numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_ties_go_by_position(block):
    layer = linear(16, 20)
    nn.init.constant_(layer.weight, -0.5)
    bk.prune_(layer, bk.BlockPruneConfig(sparsity=0.35, block=block))
    count = round(0.35 * 320 / (block[0] * block[1]))
    zero = [not unit.any() for unit in units_of(layer.weight.detach(), block)]
    assert zero == [True] * count + [False] * (len(zero) - count)


def test_ties_go_by_matrix():
    model = nn.Sequential(*(linear(10, 10) for _ in range(3)))
    for layer in model:
        nn.init.ones_(layer.weight)
    bk.prune_(model, bk.UnstructuredPruneConfig(sparsity=0.5, scope="global"))
    assert [int((layer.weight == 0).sum()) for layer in model] == [100, 50, 0]


def test_n_of_m_ties_go_by_position():
    layer = linear(3, 8)
    nn.init.ones_(layer.weight)
    bk.prune_(layer, bk.NmPruneConfig())
    assert layer.weight.tolist() == [[0, 0, 1, 1, 0, 0, 1, 1]] * 3


def test_smallest_against_sorting():
    generator = torch.Generator().manual_seed(0)
    for trial in range(200):
        sizes = torch.randint(0, 40, (int(torch.randint(1, 4, (), generator=generator)),), generator=generator).tolist()
        # Few values, so that ties abound; at every magnitude, so that both histograms matter.
        scores = [
            torch.randint(0, 5, (size,), generator=generator).float() * 10.0 ** (trial % 40 - 20) for size in sizes
        ]
        flat = torch.cat(scores)
        count = int(torch.randint(0, len(flat) + 1, (), generator=generator))
        expected = torch.zeros(len(flat), dtype=torch.bool)
        expected[flat.sort(stable=True).indices[:count]] = True
        assert torch.equal(torch.cat(smallest([ranks(s, None) for s in scores], count)), expected)


def test_infinite_weights_are_the_largest_and_minus_zero_is_zero():
    layer = linear(4, 4)
    with torch.no_grad():
        layer.weight[0, :2] = torch.tensor([math.inf, -math.inf])
        layer.weight[3, 3] = -0.0
    masks = bk.prune_(layer, bk.UnstructuredPruneConfig(sparsity=1 / 16))
    assert masks.pruned["weight"].nonzero().tolist() == [[3, 3]]
    assert not torch.signbit(layer.weight[3, 3])
    bk.prune_(layer, bk.UnstructuredPruneConfig(sparsity=14 / 16))
    assert (layer.weight != 0).nonzero().tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize(
    "config",
    [
        bk.UnstructuredPruneConfig(sparsity=0.5),
        bk.BlockPruneConfig(sparsity=0.5, block=(4, 4)),
        bk.BlockPruneConfig(sparsity=0.5, block=(4, 4), norm="max", scope="global"),
        bk.NmPruneConfig(),
        bk.RowColumnPruneConfig(sparsity=0.5, criterion="random"),
    ],
    ids=lambda config: config.KIND,
)
def test_nan_is_refused_before_any_change(config):
    model = nn.Sequential(linear(16, 16), linear(16, 16))
    with torch.no_grad():
        model[1].weight[5, 6] = math.nan
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"expected 1.weight without NaN. Got some"):
        bk.prune_(model, config)
    assert torch.equal(model[0].weight, before)


def test_random_ones():
    config = bk.UnstructuredPruneConfig(sparsity=0.5, criterion="random")
    first, again, other = linear(64, 64), linear(64, 64), linear(64, 64)
    for layer, seed in ((first, 0), (again, 0), (other, 1)):
        bk.prune_(layer, bk.UnstructuredPruneConfig.from_dict({**config.to_dict(), "seed": seed}))
        assert int((layer.weight == 0).sum()) == 2048
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    untouched = linear(64, 64).weight.detach().abs()
    kept, gone = untouched[first.weight != 0].mean(), untouched[first.weight == 0].mean()
    assert float(kept / gone) == pytest.approx(1, abs=0.1), "magnitude plays no part"


def test_pruning_further_keeps_what_is_pruned():
    layer = linear(32, 32)
    first = bk.prune_(layer, bk.BlockPruneConfig(sparsity=0.4, block=(4, 4))).pruned["weight"]
    second = bk.prune_(layer, bk.BlockPruneConfig(sparsity=0.7, block=(4, 4))).pruned["weight"]
    assert (second | first).sum() == second.sum() > first.sum()


# --- which matrices ---------------------------------------------------------------------------------------------------


def pruned_names(model: nn.Module, **options) -> set[str]:
    return set(bk.prune_(model, bk.UnstructuredPruneConfig(sparsity=0.5, **options)).pruned)


BODY = {
    f"bert.encoder.layer.{i}.{name}.weight"
    for i in range(2)
    for name in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
}
TABLE, POOLER = "bert.embeddings.word_embeddings.weight", "bert.pooler.dense.weight"


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {*BODY, TABLE, POOLER}),
        ({"embeddings": False}, {*BODY, POOLER}),
        ({"pooler": False}, {*BODY, TABLE}),
        ({"head": True}, {*BODY, TABLE, POOLER, "classifier.weight"}),
        ({"skip": ["layer.1", "*.query", "pooler"]}, {TABLE, *(n for n in BODY if ".0." in n and "query" not in n)}),
    ],
)
def test_the_papers_matrices(options, expected):
    model = tiny("BertForSequenceClassification")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert pruned_names(model, **options) == expected
    for name, value in model.state_dict().items():
        if name in expected:
            assert int((value == 0).sum()) == round(0.5 * value.numel())
        else:
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("name", ["Roberta", "XLMRoberta", "Electra", "DistilBert", "MPNet"])
def test_every_family(name):
    model = tiny(f"{name}ForSequenceClassification")
    names = pruned_names(model)
    tables = [n for n in names if "embeddings." in n]
    assert len(tables) == 1 and tables[0].endswith("word_embeddings.weight")
    body = [n for n, m in model.base_model.named_modules() if isinstance(m, nn.Linear)]
    assert len(names) == len(body) + 1
    assert torch.isfinite(main_output(model(**inputs(model)))).all()


def test_a_tied_head_is_pruned_with_the_table_and_once():
    model = tiny("BertForMaskedLM")
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    names = pruned_names(model, head=True)
    assert TABLE in names and not any("decoder" in name for name in names)
    assert "cls.predictions.transform.dense.weight" in names
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert int((model.cls.predictions.decoder.weight == 0).sum()) == VOCABULARY * 48 // 2


@pytest.mark.parametrize("options", [{"embeddings": False}, {"skip": ("decoder",)}, {"skip": ("word_embeddings",)}])
def test_a_tied_head_stays_with_the_table(options):
    model = tiny("BertForMaskedLM")
    before = model.cls.predictions.decoder.weight.detach().clone()
    pruned_names(model, head=True, **options)
    assert torch.equal(model.cls.predictions.decoder.weight, before)


def test_what_stands_beside_a_transformers_model_stays():
    model = nn.Sequential(tiny("BertModel"), nn.Linear(48, 8))
    assert not any(name.startswith("1.") for name in pruned_names(model))


def test_the_report():
    model = tiny("BertForSequenceClassification")
    report = bk.prune_(model, bk.BlockPruneConfig(sparsity=0.75, block=(16, 4), scope="global")).report()
    record = report.to_dict()
    assert len(record["rows"]) == 13
    for row in record["rows"]:
        weight = model.get_parameter(row["name"])
        assert row["shape"] == list(weight.shape) and row["pruned"] == int((weight == 0).sum())
    assert record["pruned"] == sum(row["pruned"] for row in record["rows"]) == round(0.75 * record["weights"])
    text = str(bk.prune_(tiny("BertModel"), bk.BlockPruneConfig(sparsity=0.75, block=(16, 4))).report())
    assert "encoder.layer.*.intermediate.dense 2 80 x 48 2880 25.0%" in " ".join(text.split())
    assert text.endswith("weights are zero: 75.0%")


# --- what is understood and what is refused ---------------------------------------------------------------------------


def test_torch_prune_is_understood():
    model = nn.Sequential(linear(32, 32), linear(32, 32, seed=1))
    torch_prune.random_unstructured(model[0], "weight", amount=0.25)
    before = (model[0].weight_mask == 0).clone()
    masks = bk.prune_(model, bk.UnstructuredPruneConfig(sparsity=0.5))
    assert int((model[0].weight == 0).sum()) == int((model[1].weight == 0).sum()) == 512
    pruned = masks.pruned["0.weight_orig"]
    assert (pruned | before).equal(pruned), "what torch prunes counts as zero"
    x = torch.randn(3, 32)
    expected = nn.functional.linear(x, model[0].weight, model[0].bias)
    assert torch.equal(model[0](x), expected), "the next forward computes the weight anew"
    torch_prune.remove(model[0], "weight")
    assert int((model[0].weight == 0).sum()) == 512


def accelerated():
    return bk.accelerate(tiny("BertModel"))


def int8():
    return bk.quantize_(tiny("BertModel"), bk.Int8Config(keep_original=True))


def adapted():
    adapter = type("Linear", (nn.Module,), {"__module__": "peft.tuners.lora.layer"})()
    adapter.base_layer = linear(8, 8)
    return nn.Sequential(adapter)


CONFIG = bk.BlockPruneConfig(sparsity=0.5, block=(4, 4))


@pytest.mark.parametrize(
    "make, message",
    [
        (accelerated, "expected a plain model. Got one that runs by the kernels: call bertkern.restore on it first"),
        (lambda: nn.Sequential(accelerated()), "runs by the kernels, such as 0: call bertkern.restore"),
        (lambda: nn.Sequential(bk.nn.PackedLinear(8, 8)), "runs by the kernels, such as 0"),
        (int8, "expected a float model. Got int8 layers, such as embeddings.word_embeddings: prune first"),
        (adapted, "expected a model without adapters. Got one, such as 0: .* merge them first"),
        (lambda: parametrizations.weight_norm(linear(8, 8)), "expected the layer to hold its weight as a parameter"),
        (lambda: linear(8, 8).to("meta"), "expected weights on a device. Got weight on meta"),
        (lambda: nn.LazyLinear(8), "to be a plain parameter. Got UninitializedParameter"),
        (
            lambda: linear(3, 8),
            r"expected blocks that fit into weight of shape \[3, 8\]. Got \[4, 4\]: skip the matrix",
        ),
        (lambda: nn.LayerNorm(8), "expected at least one matrix to prune. Got none"),
        (lambda: torch.zeros(2, 2), "expected a torch.nn.Module. Got Tensor"),
    ],
)
def test_what_is_refused(make, message):
    model = make()
    with pytest.raises((TypeError, ValueError), match=message):
        bk.prune_(model, CONFIG)


@pytest.mark.parametrize("make", [accelerated, int8])
def test_restored_models_can_be_pruned(make):
    model = bk.restore(make())
    bk.prune_(model, CONFIG)
    assert int((model.encoder.layer[0].output.dense.weight == 0).sum()) == 48 * 80 // 2
    batch = inputs(model, padding=False)
    expected = main_output(model(**batch))
    torch.testing.assert_close(main_output(bk.accelerate(model)(**batch)), expected, rtol=1e-4, atol=1e-4)


def test_other_bad_arguments():
    with pytest.raises(TypeError, match=r"expected a config such as BlockPruneConfig. Got float"):
        bk.prune_(linear(8, 8), 0.5)
    with pytest.raises(ValueError, match=r"groups of at most 8, the columns of weight. Got 16: skip the matrix"):
        bk.prune_(linear(8, 8), bk.NmPruneConfig(n=1, m=16))
    with pytest.raises(ValueError, match=r'expected overrides to name matrices that are pruned. Got "qurey"'):
        bk.prune_(
            tiny("BertModel"), bk.UnstructuredPruneConfig(sparsity=0.5, overrides={"key": 0.1, "qurey": 0.1, "key*": 1})
        )


@pytest.mark.parametrize("pattern", ["qurey", "encoder.layer.2", "LayerNorm", "", "bert.encoder.layers.*"])
def test_skip_must_name_a_matrix(pattern):
    model = tiny("BertModel")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = bk.UnstructuredPruneConfig(sparsity=0.5, skip=("query", pattern))
    message = f'expected skip to name matrices of the model. Got "{re.escape(pattern)}"'
    for call in (bk.prune_, bk.Masks.of_zeros, lambda *both: bk.Pruner(*both, bk.PruneSchedule.one_shot(1))):
        with pytest.raises(ValueError, match=message):
            call(model, config)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("pattern", ["classifier", "pooler", "position_embeddings", "bert.encoder.layer.1", "*.0.*"])
def test_skip_may_name_what_stays_anyway(pattern):
    bk.prune_(tiny("BertForSequenceClassification"), bk.BlockPruneConfig(sparsity=0.5, pooler=False, skip=(pattern,)))


def test_a_block_that_does_not_fit_can_be_skipped():
    model = nn.Sequential(linear(8, 8), linear(3, 8))
    masks = bk.prune_(model, bk.BlockPruneConfig(sparsity=0.5, block=(4, 4), skip=("1",)))
    assert list(masks.pruned) == ["0.weight"]


def test_models_in_quantization_aware_training_can_be_pruned():
    model = prepare_qat(tiny("BertForSequenceClassification"), Q8BertConfig.uniform(mode="dynamic"))
    masks = bk.prune_(model, bk.UnstructuredPruneConfig(sparsity=0.8)).pruned
    assert len(masks) == 14
    int8 = convert(model)
    for name, mask in masks.items():
        codes = int8.get_submodule(name.removesuffix(".weight")).weight_codes
        assert not codes[mask].any() and codes.any()


def test_light_to_import(run_python):
    code = (
        "import sys, bertkern as bk, bertkern.compress.prune; bk.prune_; bk.Pruner; bk.BlockPruneConfig;"
        "print('transformers' in sys.modules)"
    )
    done = run_python(code)
    assert done.stdout == "False\n", done.stderr
