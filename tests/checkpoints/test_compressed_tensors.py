"""Import of compressed-tensors' sparse layouts: right bit by bit, and no mask of a file is believed."""

import json

import pytest
import torch

from bertkern.checkpoints import load_checkpoint
from bertkern.checkpoints.compressed_tensors import decompress
from tests.formats.matrices import random, same
from tests.pruned_exports import bitmask, config_of, distinct, write
from tests.tiny_models import inputs, tiny


@pytest.mark.parametrize("shape", [(17, 33), (8, 8), (1, 1), (5, 131), (3, 0), (0, 5), (13,), (8,)])
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("column", [True, False])
def test_one_layer(shape, density, column):
    matrix = shape if len(shape) == 2 else (1, *shape)
    weight = random(matrix, density).view(shape)
    assert torch.equal(decompress(bitmask(weight, column=column)), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_strange_numbers(dtype):
    weight = random((9, 21), 0.5).to(dtype)
    weight[2, 3], weight[4, 5] = float("nan"), -float("inf")
    assert same(decompress(bitmask(weight)), weight)


def test_two_of_four():
    weight = random((6, 24), 0.3)
    weight[:, 2::4] = 0
    weight[:, 3::4] = 0
    weight[1] = 0
    parts = bitmask(weight, two_of_four=True, column=True)
    assert parts["compressed"].shape == (6, 12) and "row_offsets" not in parts
    assert torch.equal(decompress({f"a.{name}": part for name, part in parts.items()}, "a."), weight)


def _set(name, change):
    return lambda parts: parts.update({name: change(parts[name])})


def _bit(t):
    t = t.clone()
    t[0, -1] |= 128
    return t


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda parts: parts.pop("shape"), "shape of dtype int64. Got none"),
        (lambda parts: parts.pop("bitmask"), "bitmask of dtype uint8. Got none"),
        (lambda parts: parts.pop("compressed"), "compressed of dtype float32 or .* Got none"),
        (_set("compressed", lambda t: t.char()), "compressed of dtype float32 or .* Got torch.int8"),
        (_set("compressed", lambda t: t[:-1]), r"compressed to hold the \d+ elements that bitmask has. Got"),
        (_set("bitmask", lambda t: t.int()), "bitmask of dtype uint8. Got torch.int32"),
        (_set("bitmask", lambda t: t[:-1]), "shape to hold one or two sizes and bitmask a bit for each"),
        (_set("bitmask", lambda t: t[:, :-1]), "shape to hold one or two sizes and bitmask a bit for each"),
        (_set("bitmask", _bit), "bitmask without bits beyond the 21 columns"),
        (_set("bitmask", lambda t: t & 127), r"compressed to hold the \d+ elements"),
        (_set("bitmask", lambda t: t.flip(0)), "row_offsets to say where the rows of bitmask begin"),
        (_set("row_offsets", lambda t: t + 1), "row_offsets to say"),
        (_set("row_offsets", lambda t: t[:-1]), "row_offsets to say"),
        (_set("row_offsets", lambda t: t.int()), "row_offsets of dtype int64"),
        (_set("shape", lambda t: t.int()), "shape of dtype int64"),
        (_set("shape", lambda t: t * -1), "shape to hold one or two sizes"),
        (_set("shape", lambda t: t[:0]), "shape to hold one or two sizes"),
        (_set("shape", lambda t: torch.tensor([1, 9, 21])), "shape to hold one or two sizes"),
        (_set("shape", lambda t: t + 8), "shape to hold one or two sizes and bitmask a bit for each"),
        (_set("shape", lambda t: t * 2**40), "shape to hold one or two sizes and bitmask a bit for each"),
    ],
)
def test_damaged_layers(damage, message):
    parts = bitmask(random((9, 21), 0.5))
    damage(parts)
    with pytest.raises(ValueError, match=f"decompress: expected {message}"):
        decompress(parts)


def exported(folder, layout="sparse-bitmask", age="new", dtype=torch.float32, file="model.safetensors"):
    """A pruned model, and `folder` with its linear layers compressed; in old files, with everything compressed."""
    model = tiny("BertForSequenceClassification").to(dtype)
    with torch.no_grad():
        for name, parameter in model.bert.encoder.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(random(tuple(parameter.shape), 0.5, seed=len(name)) != 0)
                if layout == "sparse-24-bitmask":
                    parameter[:, ::4] = 0
                    parameter[:, 3::4] = 0
    state = {}
    for name, tensor in distinct(model.state_dict()).items():
        if age == "old" or ("encoder" in name and tensor.dim() == 2):
            prefix = name if age == "old" else name.removesuffix(".weight")
            parts = bitmask(tensor, layout == "sparse-24-bitmask", age == "new")
            state |= {f"{prefix}.{part}": piece for part, piece in parts.items()}
        else:
            state[name] = tensor
    sparsity = {"format": layout, "global_sparsity": 50.0, "sparsity_structure": "unstructured"}
    config = config_of(model)
    if age == "new":
        config["quantization_config"] = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    elif age == "middle":
        config["compression_config"] = {"sparsity_config": sparsity}
    else:
        config["sparsity_config"] = sparsity
    write(folder, state, config, file)
    return model


@pytest.mark.parametrize(
    ("layout", "age"),
    [
        ("sparse-bitmask", "new"),
        ("sparse-bitmask", "middle"),
        ("sparse-bitmask", "old"),
        ("sparse-24-bitmask", "new"),
        ("sparse-24-bitmask", "middle"),
    ],
)
def test_model(layout, age, tmp_path):
    model = exported(tmp_path, layout, age)
    loaded = load_checkpoint(tmp_path)
    assert type(loaded) is type(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert torch.equal(loaded(**inputs(model)).logits, model(**inputs(model)).logits)
    # It is an ordinary float model from here on.
    loaded.save_pretrained(tmp_path / "plain")
    again = type(model).from_pretrained(tmp_path / "plain")
    assert all(torch.equal(again.get_parameter(name), p) for name, p in loaded.named_parameters())


def test_dtype_of_the_file_and_shards(tmp_path):
    model = exported(tmp_path, dtype=torch.bfloat16, file="sharded")
    loaded = load_checkpoint(tmp_path)
    for name, parameter in model.named_parameters():
        assert loaded.get_parameter(name).dtype == torch.bfloat16 and torch.equal(loaded.get_parameter(name), parameter)


QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop(f"{QUERY}.compressed"), "query.compressed of dtype float32 or .* Got none"),
        (lambda s: s.pop(f"{QUERY}.bitmask"), r"expected .*query.weight, float32 .* Got no such tensor"),
        (lambda s: s.pop("classifier.weight"), "classifier.weight.* Got no such tensor"),
        (lambda s: s.update({f"{QUERY}.weight": torch.zeros(48, 48)}), "query.weight once. Got it both"),
        (lambda s: s.update({f"{QUERY}.weight_scale": torch.ones(1)}), "not quantized. Got .*query.weight_scale"),
        (lambda s: s.update(_parts(torch.zeros(40, 48))), r"query.weight of shape \[48, 48\]. Got \[40, 48\]"),
        (lambda s: s.update({"a.bitmask": torch.zeros(1, 1, dtype=torch.uint8)}), "a.shape of dtype int64. Got none"),
        (lambda s: s.update({f"a.{k}": v for k, v in bitmask(torch.eye(2)).items()}), "expected no tensor a.weight"),
    ],
)
def test_damaged_models(damage, message, tmp_path):
    exported(tmp_path, file="pytorch_model.bin")
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    damage(state)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"load_checkpoint: (.|\n)*{message}"):
        load_checkpoint(tmp_path)


def _parts(weight):
    return {f"{QUERY}.{name}": part for name, part in bitmask(weight).items()}


def test_truncated(tmp_path):
    exported(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"to be a file of tensors. Got one that is truncated"):
        load_checkpoint(tmp_path)


def test_other_layouts_are_left_to_others(tmp_path):
    exported(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for config in ({"format": "dense"}, {"format": ["sparse-bitmask"]}, "sparse-bitmask", None):
        values["quantization_config"] = {"sparsity_config": config}
        path.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=r"expected .* to be a checkpoint that transformers loads"):
            load_checkpoint(tmp_path)
