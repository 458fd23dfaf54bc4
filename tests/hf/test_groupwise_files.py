"""Files of low-bit models, read and written with numpy alone, from what bertkern/schemes/groupwise.py says of them."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import bertkern as bk
from bertkern.formats.groupwise import quantize_groupwise

SIZES = {
    "vocab_size": 53, "hidden_size": 22, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37,
    "max_position_embeddings": 19, "num_labels": 3,
}  # fmt: skip
QUERY, WORDS = "encoder.layer.1.attention.self.query", "embeddings.word_embeddings"
TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")


def small() -> transformers.BertForSequenceClassification:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).eval()


def cut(name: str, shape: tuple[int, int], record: dict) -> tuple[str, int]:
    """Axis and group size of a module."""
    form = record.get("layers", {}).get(name.removeprefix("bert."), {})
    if "axis" in form:
        return form["axis"], form["group_size"]
    if name.endswith(TABLES):
        return "n", 1
    side = shape[0] if record["axis"] == "n" else shape[1]
    return record["axis"], record["group_size"] or -(-side // record["groups"])


def decoded(tensors: dict[str, np.ndarray], shape: tuple[int, int], axis: str, size: int) -> np.ndarray:
    """float64 [N, K]."""
    (n, k), bits, scale = shape, tensors["weight_bits"], tensors["weight_scale"].astype(np.float64)
    zero = tensors.get("weight_zero")
    zero = np.broadcast_to(2.0 ** (bits.astype(np.float64) - 1), scale.shape) if zero is None else zero
    stream, made = tensors["weight_codes"].tobytes(), np.zeros(shape)
    for row in range(n):
        group = [row // size] * k if axis == "n" else [column // size for column in range(k)]
        width = -(-sum(int(bits[g]) for g in group) // 8)
        whole, stream = int.from_bytes(stream[:width], "little"), stream[width:]
        for column, g in enumerate(group):
            code, whole = whole & ((1 << int(bits[g])) - 1), whole >> int(bits[g])
            at = g if axis == "n" else (row % len(scale), g)
            made[row, column] = (code - float(zero[at])) * scale[at]
    assert not stream
    return made


CONFIGS = {
    "n": bk.GroupwiseConfig(bits=3, groups=5, head=True, pooler=True),
    "k": bk.GroupwiseConfig(bits=5, group_size=7, axis="k", symmetric=True, embedding_bits=4),
    "shared": bk.GroupwiseConfig(bits=6, groups=3, axis="k", shared=True, embedding_bits=None, activation="float"),
    "mixed n": bk.GroupwiseConfig(groups=5, layer_bits={"layer.0.output.dense": [2, 8, 3, 4, 5], "layer.1": 7}),
    "mixed k": bk.GroupwiseConfig(groups=5, axis="k", layer_bits={"output.dense": [2, 8, 3, 4, 5], WORDS: 2}),
    "layers": bk.GroupwiseConfig(bits=2, groups=2, skip=("layer.0",)),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_files_are_read(kind, tmp_path):
    model = small()
    modules = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
    }
    weights = {}
    if kind == "layers":
        for name, how in ((QUERY, (3, 4, "k")), (WORDS, (6, 5, "k"))):
            weight = model.get_submodule(f"bert.{name}").weight
            weights[f"bert.{name}"] = quantize_groupwise(weight, *how, symmetric=name == QUERY)
    bk.quantize_(model, CONFIGS[kind], weights=weights).save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    stored = load_file(tmp_path / "model.safetensors")
    low = 0
    for name, shape in modules.items():
        tensors = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
        low += "weight_codes" in tensors
        if "weight_codes" in tensors:
            wanted = decoded(tensors, shape, *cut(name, shape, record))
            got = model.get_submodule(name).dequantized_weight(torch.float64).numpy()
        else:
            wanted, got = tensors["weight"], model.get_submodule(name).weight.detach().numpy()
        assert np.array_equal(got, wanted), name
    assert low == {"n": 17, "shared": 12, "layers": 9}.get(kind, 15)


def test_files_are_written(tmp_path):
    model, rng = small().bert, np.random.default_rng(0)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    layers = {
        QUERY: {"axis": "n", "group_size": 3, "activation": "float"},
        "pooler.dense": {"axis": "k", "group_size": 22, "symmetric": True},
        WORDS: {"axis": "k", "group_size": 4},
    }
    record = {"quant_method": "bertkern", "kind": "groupwise", "axis": "k", "group_size": 5, "layers": layers}
    expected = {}
    for name, module in model.named_modules():
        if not isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            continue
        n, k = module.weight.shape
        axis, size = cut(name, (n, k), record)
        groups = -(-(n if axis == "n" else k) // size)
        bits = rng.integers(2, 9, groups).astype(np.uint8)
        shape = groups if axis == "n" else (n, groups) if name.endswith(("query", "dense")) else (1, groups)
        made = {
            "weight_bits": bits,
            "weight_scale": rng.uniform(0.01, 0.1, shape).astype(np.float32),
            "weight_zero": (rng.uniform(0, 1, shape) * 2.0**bits).astype(np.float32),
        }
        if layers.get(name, {}).get("symmetric"):
            del made["weight_zero"]
        stream = b""
        for row in range(n):
            whole = at = 0
            for column in range(k):
                width = int(bits[row // size if axis == "n" else column // size])
                whole |= int(rng.integers(0, 2**width)) << at
                at += width
            stream += whole.to_bytes(-(-at // 8), "little")
        made["weight_codes"] = np.frombuffer(stream, np.uint8)
        expected[name] = decoded(made, (n, k), axis, size)
        if not name.endswith(TABLES) and layers.get(name, {}).get("activation") != "float":
            made |= {"input_scale": np.zeros((), np.float32), "input_zero_point": np.zeros((), np.int32)}
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": tensor for part, tensor in made.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_dict(), "architectures": ["BertModel"], "quantization_config": record}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = transformers.AutoModel.from_pretrained(tmp_path).eval()
    for name, wanted in expected.items():
        assert np.array_equal(loaded.get_submodule(name).dequantized_weight(torch.float64).numpy(), wanted), name
        model.get_submodule(name).weight.data.copy_(torch.from_numpy(wanted))
    ids = torch.randint(0, 53, (2, 9))
    with torch.no_grad():
        wanted, got = model(ids)[0], loaded(ids)[0]
    assert float((got - wanted).norm()) < 0.03 * float(wanted.norm())
