"""Import of pytorch_block_sparse's layers: right block by block, and no index of a file is believed."""

import json

import pytest
import torch

from bertkern.checkpoints import bsr_from_block_sparse, load_checkpoint
from tests.formats.matrices import random, same
from tests.pruned_exports import block_sparse, config_of, distinct, write
from tests.tiny_models import inputs, tiny


@pytest.mark.parametrize("shape", [(96, 160), (32, 32), (64, 32), (768, 96)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", [None, 1])
def test_one_layer(shape, density, seed):
    weight = random(shape, density, (32, 32))
    tensors = block_sparse(weight, seed=seed)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    made = bsr_from_block_sparse(tensors, shape).check()
    assert made.block == (32, 32) and made.shape == shape and made.dtype == torch.float32
    assert torch.equal(made.to_dense(), weight)
    made.values.fill_(5)
    made.crow.fill_(5)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in before.items())


@pytest.mark.parametrize("block", [(64, 32), (32, 96), (8, 4), (1, 4)])
def test_blocks_that_are_not_square(block):
    weight = random((192, 288), 0.4, block)
    made = bsr_from_block_sparse(block_sparse(weight, block, seed=0), (192, 288))
    assert made.block == block and torch.equal(made.to_dense(), weight)


def test_strange_numbers():
    weight = random((64, 64), 0.5, (32, 32))
    weight[3, 5], weight[40, 40] = float("nan"), float("inf")
    assert same(bsr_from_block_sparse(block_sparse(weight), (64, 64)).to_dense(), weight)


def test_the_twins_may_be_missing():
    weight = random((64, 96), 0.5, (32, 32))
    tensors = {f"a.{name}": tensor for name, tensor in block_sparse(weight, seed=3).items()}
    for name in ("rows_b", "col_start_ends_b", "blocks"):
        del tensors[f"a.{name}"]
    assert torch.equal(bsr_from_block_sparse(tensors, (64, 96), "a.").to_dense(), weight)
    for name in ("data", "cols_a", "row_start_ends_a"):
        with pytest.raises(ValueError, match=f"bsr_from_block_sparse: expected a tensor a.{name}. Got none"):
            bsr_from_block_sparse({k: v for k, v in tensors.items() if k != f"a.{name}"}, (64, 96), "a.")


def _change(name, place, value):
    def change(tensors):
        tensors[name] = tensors[name].clone()
        tensors[name][place] = value

    return change


def _set(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_set("data", lambda t: t.double()), r"data to be torch.float32 of 2 dimensions. Got torch.float64"),
        (_set("data", lambda t: t.view(-1, 32, 32)), r"data to be torch.float32 of 2 dimensions"),
        (_set("data", lambda t: t[:-1]), r"data of shape \[nb \* br, bc\] = \[4 \* 32, 32\]"),
        (_set("data", lambda t: t[:, :-1]), r"blocks that divide the matrix \[N, K\] = \[64, 96\]"),
        (_set("data", lambda t: t[:, :0]), r"blocks that divide the matrix"),
        (_set("data", lambda t: "text"), r"data to be torch.float32 of 2 dimensions. Got str"),
        (_set("cols_a", lambda t: t.long()), r"cols_a to be torch.int32 of 2 dimensions. Got torch.int64"),
        (_set("cols_a", lambda t: t[:, 0]), r"cols_a to be torch.int32 of 2 dimensions"),
        (_set("cols_a", lambda t: t[:, :1]), r"cols_a of shape \[nb, 2\]. Got"),
        (_set("cols_a", lambda t: t[:3]), r"data of shape"),
        (_change("cols_a", (0, 0), 3), r"cols_a and row_start_ends_a to be right. Got: .*col in \[0, 3\). Got 3"),
        (_change("cols_a", (0, 0), -1), r"col in \[0, 3\). Got -1"),
        (_change("cols_a", (1, 0), 0), r"col to be strictly ascending within a row"),
        (_change("cols_a", (0, 1), 9), r"cols_a to name each of the 4 blocks once"),
        (_change("cols_a", (0, 1), -1), r"cols_a to name each of the 4 blocks once"),
        (_change("cols_a", (0, 1), 1), r"cols_a to name each of the 4 blocks once"),
        (_set("row_start_ends_a", lambda t: t[:-1]), r"data of shape|blocks that divide"),
        (_set("row_start_ends_a", lambda t: t[:0]), r"blocks that divide"),
        (_change("row_start_ends_a", 2, 5), r"crow to end at the number of blocks, 4. Got 5"),
        (_change("row_start_ends_a", 0, 1), r"crow to start at 0. Got 1"),
        (_change("row_start_ends_a", 1, -7), r"crow never to fall"),
        (_change("rows_b", (0, 0), 1), r"rows_b to describe the blocks that cols_a does"),
        (_change("rows_b", (0, 1), 3), r"rows_b to describe"),
        (_change("col_start_ends_b", 1, 0), r"col_start_ends_b to describe"),
        (_set("col_start_ends_b", lambda t: t[:-1]), r"col_start_ends_b to describe"),
        (_change("blocks", 0, 2), r"blocks to describe"),
        (_set("blocks", lambda t: t.long()), r"blocks to be torch.int32 of 1 dimensions"),
    ],
)
def test_damaged_layers(damage, message):
    weight = torch.zeros(64, 96)
    weight[0, 0] = weight[1, 40] = weight[33, 1] = weight[60, 90] = 1.0
    tensors = block_sparse(weight)
    assert tensors["cols_a"].tolist() == [[0, 0], [1, 1], [0, 2], [2, 3]]
    damage(tensors)
    with pytest.raises(ValueError, match=f"bsr_from_block_sparse: expected .*({message})"):
        bsr_from_block_sparse(tensors, (64, 96))


LAYERS = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.intermediate.dense"]


def exported(folder, file="pytorch_model.bin", block=(32, 32), emulated=False):
    """A model with block-sparse layers, and `folder` with them in pytorch_block_sparse's form."""
    model = tiny("BertForSequenceClassification", hidden_size=64, num_attention_heads=2, intermediate_size=96)
    with torch.no_grad():
        for seed, name in enumerate(LAYERS):
            weight = model.get_parameter(f"{name}.weight")
            weight.mul_(random(tuple(weight.shape), 0.5, block, seed=seed) != 0)
    state = distinct(model.state_dict())
    for name in LAYERS:
        weight = state.pop(f"{name}.weight")
        parts = block_sparse(weight, block, seed=7)
        if emulated:
            # Trained in the dense form: what the blocks were before is stale, what is outside of them counts not.
            parts["_dense"] = torch.where(weight != 0, weight, 0.0)
            parts["data"] = torch.full_like(parts["data"], 3.0)
            inside = bsr_from_block_sparse(parts, tuple(weight.shape)).to_dense() != 0
            parts["_dense"][~inside] = 9.0
        state |= {f"{name}.weight.{part}": tensor for part, tensor in parts.items()}
    write(folder, state, config_of(model), file)
    return model


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors", "sharded"])
def test_model(file, tmp_path):
    model = exported(tmp_path, file)
    loaded = load_checkpoint(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert {name: p.shape for name, p in loaded.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    batch = inputs(model)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_files_of_the_time(tmp_path):
    """The container from before torch 1.6."""
    model = exported(tmp_path)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    loaded = load_checkpoint(tmp_path)
    assert torch.equal(loaded.get_parameter(f"{LAYERS[1]}.weight"), model.get_parameter(f"{LAYERS[1]}.weight"))


def test_emulated_layers(tmp_path):
    model = exported(tmp_path, block=(8, 16), emulated=True)
    loaded = load_checkpoint(tmp_path)
    for name in LAYERS:
        assert torch.equal(loaded.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.weight"))
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    state[f"{LAYERS[0]}.weight._dense"] = torch.zeros(64, 63)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"query.weight._dense, torch.float32 of shape \[64, 64\]. Got .*\[64, 63\]"):
        load_checkpoint(tmp_path)


def test_with_removed_heads(tmp_path):
    """Both at once: the shapes are those of what is left."""
    model = exported(tmp_path)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    attention = "bert.encoder.layer.0.attention"
    query = model.get_parameter(f"{attention}.self.query.weight")[32:].detach()
    for part in list(state):
        if part.startswith(f"{attention}.self.query.weight."):
            del state[part]
    state |= {f"{attention}.self.query.weight.{part}": t for part, t in block_sparse(query).items()}
    state[f"{attention}.self.query.bias"] = state[f"{attention}.self.query.bias"][32:]
    for name in ("key", "value"):
        for leaf in ("weight", "bias"):
            state[f"{attention}.self.{name}.{leaf}"] = state[f"{attention}.self.{name}.{leaf}"][32:]
    state[f"{attention}.output.dense.weight"] = state[f"{attention}.output.dense.weight"][:, 32:]
    write(tmp_path, state, config_of(model, pruned_heads={"0": [0]}), "pytorch_model.bin")
    loaded = load_checkpoint(tmp_path)
    assert torch.equal(loaded.bert.encoder.layer[0].attention.self.query.weight, query)
    with torch.no_grad():
        model.get_parameter(f"{attention}.output.dense.weight")[:, :32] = 0
    torch.testing.assert_close(loaded(**inputs(model)).logits, model(**inputs(model)).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop(f"{LAYERS[0]}.weight.data"), "expected a tensor .*query.weight.data. Got none"),
        (lambda s: s.pop(f"{LAYERS[0]}.bias"), "query.bias.* Got no such tensor"),
        (lambda s: s.update({"bert.stranger": torch.zeros(1)}), "expected no tensor bert.stranger. Got one"),
        (lambda s: s.update({"a.weight.cols_a": torch.zeros(1)}), "expected a to be a linear layer of the model"),
        (
            lambda s: s.update({"bert.embeddings.word_embeddings.weight.cols_a": torch.zeros(1)}),
            "word_embeddings to be a linear layer",
        ),
        (lambda s: s.update({f"{LAYERS[0]}.weight.more": torch.zeros(1)}), "expected no tensor .*query.weight.more"),
        (lambda s: s.update({f"{LAYERS[0]}.weight": torch.zeros(64, 64)}), "query.weight once. Got it both"),
    ],
)
def test_damaged_models(damage, message, tmp_path):
    exported(tmp_path)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    damage(state)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"load_checkpoint: (.|\n)*{message}"):
        load_checkpoint(tmp_path)


def test_shapes_of_another_config(tmp_path):
    exported(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 128}))
    with pytest.raises(ValueError, match=r"layer.1.intermediate.dense.weight.data of shape .*|blocks that divide"):
        load_checkpoint(tmp_path)
