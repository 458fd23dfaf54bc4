"""inspect finds the structure that was put there, in every matrix and family, and takes nothing else for one."""

import importlib
import io
import json

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize, prune

import bertkern as bk
from bertkern import ops
from bertkern.formats.groupwise import quantize_groupwise
from bertkern.inspect import BLOCKS, Inspection, estimate

from .families.zoo import FAMILIES, make
from .test_shrink import HEADS, UNITS, model_of, names_of, parts_of, prune_some


def linear(weight: torch.Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0])
    made.weight = nn.Parameter(weight)
    return made


def row_of(weight: torch.Tensor):
    return bk.inspect(linear(weight)).rows[0]


def blocks(rows: int, columns: int, block: tuple[int, int], density: float, seed: int = 0) -> torch.Tensor:
    """A weight [rows, columns] without zeros but for whole blocks of them."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.rand(-(-rows // block[0]), -(-columns // block[1]), generator=generator) < density
    mask = grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :columns]
    return mask * (torch.rand(rows, columns, generator=generator) + 0.5)


def density_by_loop(weight: torch.Tensor, block: tuple[int, int]) -> float:
    kept = [
        bool((weight[i : i + block[0], j : j + block[1]] != 0).any())
        for i in range(0, weight.shape[0], block[0])
        for j in range(0, weight.shape[1], block[1])
    ]
    return sum(kept) / len(kept)


@pytest.mark.parametrize("block", [*BLOCKS, (32, 1), (1, 32), (64, 16), (2, 2), (128, 4)])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_the_block_that_the_zeros_came_in(block, density):
    rows, columns = (1600, 1584) if max(block) > 32 else (333, 410)  # tails at both edges
    weight = blocks(rows, columns, block, density)
    # Some zeros of other origin, a few inside of kept blocks.
    weight.view(-1)[::997] = 0
    row = row_of(weight)
    assert row.block == block and row.structure == f"{block[0]}x{block[1]} blocks"
    assert row.densities[f"{block[0]}x{block[1]}"] == pytest.approx(density_by_loop(weight, block))
    assert row.zeros == pytest.approx(float((weight == 0).float().mean()), abs=1e-6)


def test_densities_are_those_of_a_plain_loop():
    weight = blocks(45, 71, (3, 5), 0.3)
    row = row_of(weight)
    assert row.densities.keys() == {"1x1", *(f"{r}x{c}" for r, c in BLOCKS)}
    for block in BLOCKS:
        assert row.densities[f"{block[0]}x{block[1]}"] == pytest.approx(density_by_loop(weight, block)), block


@pytest.mark.parametrize("density", [0.02, 0.1, 0.3, 0.5, 0.8, 0.97])
def test_scattered_zeros_are_no_blocks(density):
    row = row_of(blocks(512, 768, (1, 1), density))
    assert row.block is None and row.structure == "unstructured"


def test_both_orientations_are_told_apart():
    assert row_of(blocks(64, 96, (1, 4), 0.2)).structure == "1x4 blocks"
    assert row_of(blocks(64, 96, (4, 1), 0.2)).structure == "4x1 blocks"
    assert row_of(blocks(64, 96, (4, 1), 0.2).t().contiguous()).structure == "1x4 blocks"
    # A view, as a weight that was transposed in place is.
    assert row_of(blocks(64, 96, (4, 1), 0.2).t()).structure == "1x4 blocks"


def test_whole_rows_and_columns_are_no_blocks():
    weight = torch.ones(96, 64)
    weight[::3] = 0
    weight[:, 5:9] = 0
    row = row_of(weight)
    assert (row.dead_rows, row.dead_columns, row.block, row.structure) == (32, 4, None, "whole rows, columns")
    # Blocks beside them are still found.
    weight = blocks(256, 256, (16, 16), 0.4)
    weight[::3] = 0
    weight[:, 7] = 0
    assert row_of(weight).structure == "16x16 blocks"


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (1, 4)])
@pytest.mark.parametrize("side", ["K", "N"])
@pytest.mark.parametrize("tail", [0, 3])
def test_n_of_m(n, m, side, tail):
    rows, columns = 64, 96 + tail
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(n * m))
    weight = scores + 0.5
    for start in range(0, columns, m):
        group = scores[:, start : start + m]
        lost = group.argsort(1)[:, : max(0, group.shape[1] - n)]
        weight[:, start : start + m].scatter_(1, lost, 0.0)
    row = row_of(weight if side == "K" else weight.t())
    assert row.structure == f"{n}:{m} along {side}" and row.block is None
    implied = {(2, 4): [(2, 4)], (1, 2): [(1, 2), (2, 4)], (1, 4): [(1, 4), (2, 4)]}[n, m]
    assert set(row.patterns) >= {f"{a}:{b} along {side}" for a, b in implied}
    weight[17, 48 : 48 + m] = 1  # one group breaks it
    assert f"{n}:{m} along {side}" not in row_of(weight if side == "K" else weight.t()).patterns


def test_a_pattern_that_holds_by_chance_is_no_structure():
    weight = torch.zeros(64, 64)
    weight[torch.arange(64), torch.arange(64).roll(5)] = 1
    row = row_of(weight)
    assert row.patterns[0] == "1:4 along K" and row.structure == "unstructured"


def test_nan_counts_and_minus_zero_does_not():
    weight = torch.zeros(8, 8)
    weight[1] = float("nan")
    weight[2] = -0.0
    weight[3, 3] = float("inf")
    found = bk.inspect(nn.Sequential(linear(weight)))
    row = found.rows[0]
    assert row.zeros == 1 - 9 / 64 and (row.dead_rows, row.dead_columns) == (6, 0)
    assert "NaN or Inf, neither of which is zero, in: 0" in str(found)


def test_nothing_and_everything():
    row = row_of(torch.zeros(6, 5))
    assert (row.zeros, row.dead_rows, row.dead_columns, row.block, row.structure) == (1, 6, 5, None, "all zero")
    assert row.densities["16x4"] == 0
    row = row_of(torch.ones(6, 5))
    assert (row.zeros, row.dead_rows, row.dead_columns, row.structure) == (0, 0, 0, "dense")
    assert row.times == {"fp32": 1.0, "int8": 1.0}
    assert row_of(torch.empty(0, 5)).zeros is None
    found = bk.inspect(nn.Linear(3, 4, device="meta"))
    assert found.rows[0].zeros is None and "nn.Linear" not in str(found)
    assert bk.inspect(nn.ReLU()).rows == () and str(bk.inspect(nn.LazyLinear(3)))
    with pytest.raises(TypeError, match=r"inspect: expected a torch\.nn\.Module\. Got dict\."):
        bk.inspect({})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    row = row_of(blocks(64, 64, (16, 4), 0.3).to(dtype))
    assert row.structure == "16x4 blocks"


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_units_of_every_family(family):
    model = prune_some(model_of(family, "ForSequenceClassification"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = bk.inspect(model)
    assert [layer.name for layer in found.layers] == names_of(model)
    assert [layer.dead_heads for layer in found.layers] == [(1, 2), (0,), ()]
    assert [layer.dead_units for layer in found.layers] == [0, 10, 0]
    assert [layer.foldable_units for layer in found.layers] == [0, 10, 0]
    totals = found.totals
    assert (totals.heads, totals.dead_heads, totals.units) == (3 * HEADS, 3, 3 * UNITS)
    assert (totals.dead_units, totals.foldable_units) == (10, 10)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    every = sum(m.weight.numel() for m in linears)
    gone = 3 * 13 * (52 * 3 + model.config.hidden_size) + 20 * 52 * 2
    assert totals.kept == pytest.approx(1 - gone / every)
    assert 1 < totals.speedup["fp32"] <= 1 / totals.kept + 0.1
    value = getattr(*parts_of(model)[0].value)  # its zeros go with head 2; what is left is dense
    name = next(name for name, module in model.named_modules() if module is value)
    assert next(row for row in found.rows if row.name == name).times == {"fp32": 0.5, "int8": 0.5}
    text = str(found)
    assert f"{names_of(model)[0]}  4      2: 1 2" in text
    assert "3 of 12 heads, 10 dead and 10 constant of 351 feed-forward units" in text
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_after_accelerate_the_dead_are_gone_and_restore_brings_them_back(family):
    model = prune_some(model_of(family, "ForSequenceClassification"))
    before = bk.inspect(model)
    after = bk.inspect(bk.accelerate(model))
    assert [layer.heads for layer in after.layers] == [2, 3, 4]
    assert not any(layer.dead_heads or layer.dead_units for layer in after.layers)
    assert bk.inspect(bk.restore(model)).to_dict() == before.to_dict()


def test_after_shrink_there_is_nothing_left_to_remove():
    from bertkern import shrink

    model = prune_some(model_of("MPNet"))
    shrink.shrink(model)
    totals = bk.inspect(model).totals
    assert (totals.heads, totals.dead_heads, totals.units, totals.dead_units, totals.foldable_units) == (
        9,
        0,
        331,
        0,
        0,
    )


def test_under_torch_prune_the_masked_weight_counts():
    model = make("BertModel")
    dense = model.encoder.layer[0].output.dense
    prune.identity(dense, "weight")
    dense.weight_mask[:, ::2] = 0  # no forward pass since
    found = bk.inspect(model)
    row = next(row for row in found.rows if row.name == "encoder.layer.0.output.dense")
    assert row.pruned and row.dead_columns == 59 and found.layers[0].dead_units == 59
    assert "torch.nn.utils.prune" in str(found)
    parametrize.register_parametrization(model.pooler.dense, "weight", Halved())
    row = next(row for row in bk.inspect(model).rows if row.name == "pooler.dense")
    assert row.dead_rows == 26 and row.why == "it is a ParametrizedLinear"


class Halved(nn.Module):
    def forward(self, weight):
        return weight * (torch.arange(len(weight)) % 2)[:, None]


def test_shared_weights_count_once():
    config = transformers.AlbertConfig(
        vocab_size=50,
        embedding_size=16,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=64,
        num_hidden_layers=6,
        max_position_embeddings=20,
    )
    albert = transformers.AlbertModel(config)
    found = bk.inspect(albert)
    matrices = sum(p.numel() for p in albert.parameters() if p.dim() == 2)
    assert found.totals.weights == matrices and sum("query" in row.name for row in found.rows) == 1

    model = make("BertForMaskedLM")
    found = bk.inspect(model)
    assert found.totals.weights == sum(p.numel() for p in model.parameters() if p.dim() == 2)
    rows = {row.name: row for row in found.rows}
    table, decoder = rows["bert.embeddings.word_embeddings"], rows["cls.predictions.decoder"]
    assert decoder.same_as == table.name and decoder.zeros == table.zeros and decoder.times and not table.times
    assert "same weights as bert.embeddings.word_embeddings" in str(found)


def test_decoders_say_why_they_were_not_looked_into():
    config = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
    model = transformers.BertLMHeadModel(transformers.BertConfig(**config, vocab_size=30, is_decoder=True))
    found = bk.inspect(model)
    assert [layer.why for layer in found.layers] == ["a decoder"] * 2
    assert "2 layers not looked into for heads and units: a decoder" in str(found)


def test_int8_codes_are_looked_at():
    model = prune_some(model_of("Bert"))
    zeros = {row.name: row.zeros for row in bk.inspect(model).rows}
    rows = {row.name: row for row in bk.inspect(bk.quantize_(model)).rows}
    name = "encoder.layer.0.attention.output.dense"
    assert rows[name].runs == "int8 already" and rows[name].shape == (52, 26)  # without the columns of dead heads
    kept = "encoder.layer.2.output.dense"
    assert rows[kept].shape == (52, 117) and rows[kept].zeros >= zeros[kept]


def test_as_data_and_as_tables():
    from rich.console import Console

    model = prune_some(model_of("Bert"))
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.intermediate.dense.weight.copy_(blocks(117, 52, (16, 4), 0.2))
    found = bk.inspect(model)
    assert isinstance(found, Inspection) and isinstance(found, importlib.import_module("bertkern").Report)
    data = found.to_dict()
    assert json.loads(json.dumps(data)) == data
    row = next(row for row in data["rows"] if row["name"] == "encoder.layer.2.intermediate.dense")
    assert row["block"] == [16, 4] and row["structure"] == "16x4 blocks" and row["shape"] == [117, 52]
    assert set(row["times"]) == {"fp32", "int8"} and row["densities"]["16x4"] < 0.3
    assert data["layers"][0]["dead_heads"] == [1, 2] and data["totals"]["dead_heads"] == 3
    stream = io.StringIO()
    Console(file=stream, width=240).print(found)
    for text in (str(found), stream.getvalue()):
        line = next(line.split() for line in text.splitlines() if "intermediate.dense" in line)
        assert line[:5] == ["encoder.layer.*.intermediate.dense", "3", "117", "x", "52"]
        assert line[line.index("16x4") :][:2] == ["16x4", "blocks"] and line[-1] == "int8"
        assert "estimated, not measured" in text
    narrow = io.StringIO()
    Console(file=narrow, width=60).print(found)
    assert max(map(len, narrow.getvalue().splitlines())) <= 60


def test_layers_with_other_patterns_have_lines_of_their_own():
    model = make("BertModel", num_hidden_layers=6)
    with torch.no_grad():
        for number, layer in enumerate(model.encoder.layer):
            weight = layer.output.dense.weight
            if number in (0, 1, 4):
                weight.mul_(blocks(*weight.shape, (4, 1), 0.3) != 0)
            elif number == 2:
                weight.zero_()
    lines = [line.split() for line in str(bk.inspect(model)).splitlines()]
    found = {
        line[0]: line for line in lines if line and line[0].endswith("output.dense") and "attention" not in line[0]
    }
    assert list(found) == [f"encoder.layer.{numbers}.output.dense" for numbers in ("0-1,4", "2", "3,5")]
    assert [found[name][1] for name in found] == ["3", "1", "2"]
    assert {"4x1", "blocks"} <= set(found["encoder.layer.0-1,4.output.dense"])
    # No speed is told of what has nothing left to compute.
    assert found["encoder.layer.2.output.dense"][-3:] == [">99x", ">99x", "int8"]
    assert ["encoder.layer.*.attention.self.query", "6"] in [line[:2] for line in lines]


def test_a_zero_that_came_by_chance_is_no_pattern():
    weight = torch.ones(300, 400)
    weight[5, 6] = 0
    assert (row_of(weight).block, row_of(weight).structure) == (None, "dense")
    weight[:, 7] = weight[:, 100:200] = 0
    assert (row_of(weight).block, row_of(weight).structure) == (None, "whole rows, columns")


def test_a_layer_without_heads_has_none():
    model = bk.prune_heads(make("BertModel"), {1: range(2)})
    found = bk.inspect(model)
    assert [layer.heads for layer in found.layers] == [2, 0, 2]
    assert (found.totals.heads, found.totals.dead_heads) == (4, 0)
    assert bk.inspect(bk.accelerate(model)).totals.heads == 4


def test_the_module_does_not_hide_the_function(run_python):
    code = (
        "import bertkern.inspect, bertkern as bk, torch\n"
        "print(bk.inspect(torch.nn.Linear(2, 3)).rows[0].shape, bertkern.inspect.estimate.__name__)"
    )
    done = run_python(code)
    assert done.stdout == "(3, 2) estimate\n", done.stderr


def gain(density, dtype, form):
    weight = blocks(768, 768, {"1x1": (1, 1), "1x4": (1, 4), "16x4": (16, 4)}[form], density)
    return 1 / estimate(row_of(weight).densities, dtype)


def test_the_estimate_knows_the_matrix_unit(monkeypatch):
    """Its dense products are faster, so fewer zeros gain nothing; fp32 is not its business."""
    monkeypatch.setattr(ops, "cpu_isa", lambda: "avx512vnni")
    without = gain(0.2, "int8", "16x4"), gain(0.1, "fp32", "1x1")
    monkeypatch.setattr(ops, "cpu_isa", lambda: "amx")
    assert 1.3 < gain(0.2, "int8", "16x4") < without[0] and gain(0.1, "fp32", "1x1") == without[1]
    assert gain(0.5, "int8", "16x4") == 1 and gain(0.2, "int8", "1x4") == 1 and gain(0.2, "int8", "1x1") == 1


def test_the_estimate_knows_where_nothing_is_gained(monkeypatch):
    monkeypatch.setattr(ops, "cpu_isa", lambda: "avx512vnni")
    # What DESIGN and the issue expect of the kernels, within what a model can know.
    assert gain(0.2, "int8", "16x4") == pytest.approx(4.4, rel=0.1)
    assert gain(0.5, "int8", "16x4") == pytest.approx(1.9, rel=0.1)
    assert 2.5 <= gain(0.2, "int8", "1x4") <= 3.1 and 3.8 <= gain(0.1, "int8", "1x4") <= 5.2
    assert gain(0.1, "fp32", "1x1") == pytest.approx(5, rel=0.1)
    assert gain(0.2, "int8", "1x1") == 1 and gain(0.1, "int8", "1x1") > 1.3
    assert gain(0.98, "int8", "16x4") == 1
    with pytest.raises(ValueError, match="estimate: expected dtype fp32 or int8"):
        estimate({"1x1": 1.0, "1x4": 1.0, "16x4": 1.0}, "fp64")


def test_grids_that_weights_lie_on():
    model = nn.Sequential(nn.Linear(48, 96), nn.Linear(96, 48), nn.Linear(48, 64), nn.Embedding(40, 48))
    with torch.no_grad():
        model[0].weight.copy_(quantize_groupwise(model[0].weight, 4, 6).dequantize())
        made = quantize_groupwise(model[1].weight, 3, 12, "k", shared=True)
        # Divided instead of multiplied: no longer bit for bit.
        scale, zero = made.spread(made.scale), made.spread(made.zeros())
        model[1].weight.copy_((made.unpacked() - zero) / (1 / scale))
        model[3].weight.copy_(quantize_groupwise(model[3].weight, 8, 40).dequantize())
    found = bk.inspect(model)
    words = [str(row.grid) if row.grid else None for row in found.rows]
    assert words == [
        "4 bits, 16 groups along n",
        "3 bits, 8 groups along k, shared by rows, to rounding",
        None,
        "8 bits, 1 group along n",
    ]
    made = json.loads(json.dumps(found.to_dict()))["rows"]
    assert "grid" not in made[2]
    assert made[0]["grid"] == {
        "bits": [4],
        "axis": "n",
        "groups": 16,
        "group_size": 6,
        "shared": False,
        "exact": True,
    }
    assert "on a grid" in str(found) and "4 bits, 16 groups along n" in str(found)
    # Nothing is said where there is nothing to say: zeros alone, int8 codes, other matrices.
    model[0].weight.data.zero_()
    assert "on a grid" not in str(bk.inspect(nn.Sequential(model[0], nn.Linear(8, 8))))
    assert all(row.grid is None for row in bk.inspect(bk.quantize_(nn.Sequential(nn.Linear(8, 8)))).rows)
