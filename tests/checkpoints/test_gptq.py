"""Import of GPTQ and pack-quantized layers: every code, scale and zero point, and no file is believed."""

import pytest
import torch

from bertkern.checkpoints import load_checkpoint
from bertkern.checkpoints.gptq import gptq_weight
from bertkern.checkpoints.pack_quantized import packed_weight
from tests import low_bit_exports as low
from tests.pruned_exports import config_of, distinct, write
from tests.tiny_models import inputs, tiny

N, K = 32, 96
ROUNDINGS = 2 * torch.finfo(torch.float32).eps


def parts_of(bits, size, n=N, k=K, symmetric=False):
    """codes, scale, zero and index of a layer."""
    groups = -(-k // size)
    zero = low.random_codes(n, groups, bits, 3).float()
    zero = torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero
    return low.random_codes(n, k, bits), low.random_scales(n, groups), zero, [j // size for j in range(k)]


def is_near(made, wanted):
    got = made.double() if isinstance(made, torch.Tensor) else made.dequantize(torch.float64)
    return bool(((got - wanted).abs() <= ROUNDINGS * wanted.abs()).all())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("size", [96, 32, 40])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("less", [0, 1])
def test_gptq_layer(bits, size, symmetric, less):
    codes, scale, zero, index = parts_of(bits, size, symmetric=symmetric)
    tensors = {f"a.{name}": part for name, part in low.gptq(codes, scale, zero, bits, index, less).items()}
    made = gptq_weight(tensors, (N, K), bits, -1 if size == K else size, "a.", less)
    assert torch.equal(made.unpacked(), codes.to(torch.uint8)) and is_near(made, low.exact(codes, scale, zero, index))
    assert (made.axis, made.group_size) == (("n", 1) if size == K else ("k", size))
    assert (made.zero is None) == symmetric
    del tensors["a.g_idx"]
    assert torch.equal(gptq_weight(tensors, (N, K), bits, size, "a.", less).dequantize(), made.dequantize())


def test_gptq_columns_out_of_order():
    codes, scale, zero, _ = parts_of(4, 32)
    # Blocks of 16 columns change places: shorter groups say the same.
    index = [(5 - j // 16) % 3 for j in range(K)]
    made = gptq_weight(low.gptq(codes, scale, zero, 4, index), (N, K), 4, 32)
    assert made.group_size == 16 and is_near(made, low.exact(codes, scale, zero, index))
    index = torch.randint(0, 3, (K,), generator=torch.Generator().manual_seed(0)).tolist()
    with pytest.warns(UserWarning, match="a has groups of columns out of order .*: it stays dense"):
        made = gptq_weight(
            {f"a.{n}": t for n, t in low.gptq(codes, scale, zero, 4, index).items()}, (N, K), 4, 32, "a."
        )
    assert isinstance(made, torch.Tensor) and is_near(made, low.exact(codes, scale, zero, index))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("n", "k", "size"), [(N, K, K), (N, K, 32), (13, 50, 25), (7, 11, 11)])
@pytest.mark.parametrize("zeros", ["none", "packed", "int8"])
def test_packed_layer(bits, n, k, size, zeros):
    codes, scale, zero, index = parts_of(bits, size, n, k, zeros == "none")
    tensors = low.packed(codes, scale, zero if zeros == "packed" else None, bits)
    if zeros == "int8":
        tensors["weight_zero_point"] = (zero - 2 ** (bits - 1)).to(torch.int8)
    made = packed_weight({f"a.{name}": part for name, part in tensors.items()}, bits, "a.")
    assert torch.equal(made.unpacked(), codes.to(torch.uint8)) and is_near(made, low.exact(codes, scale, zero, index))
    assert (made.axis, made.group_size) == (("n", 1) if size == k else ("k", size))


def test_other_packed_layers():
    codes, _, _, _ = parts_of(4, K)
    # One scale for the matrix.
    scale, zero = torch.tensor([0.25]), torch.full((N, 1), 8.0)
    made = packed_weight(low.packed(codes, scale, None, 4), 4)
    assert (made.axis, made.groups, made.zero) == ("n", 1, None)
    assert torch.equal(made.dequantize(torch.float64), low.exact(codes, scale.expand(N, 1), zero, [0] * K))
    # Words of whole codes.
    codes, scale, zero, index = parts_of(3, 32)
    made = packed_weight(low.packed(codes, scale, zero, 3, words=low.loose), 3)
    assert torch.equal(made.unpacked(), codes.to(torch.uint8)) and is_near(made, low.exact(codes, scale, zero, index))
    # Columns out of order, and an index that says nothing.
    order = torch.randint(0, 3, (K,), generator=torch.Generator().manual_seed(0)).tolist()
    with pytest.warns(UserWarning, match="it stays dense"):
        assert is_near(packed_weight(low.packed(codes, scale, zero, 3, order), 3), low.exact(codes, scale, zero, order))
    assert packed_weight(low.packed(codes, scale, zero, 3, [-1] * K), 3).group_size == 32


def exported(folder, kind, file="model.safetensors", **record):
    """A model whose encoder has low-bit layers, with the weights that they stand for, and its files."""
    model = tiny("BertForSequenceClassification", hidden_size=64, intermediate_size=96)
    state = distinct(model.state_dict())
    for name, module in model.bert.encoder.named_modules(prefix="bert.encoder"):
        if not isinstance(module, torch.nn.Linear):
            continue
        n, k = module.weight.shape
        codes, scale, zero, index = parts_of(4, 32, n, k)
        made = low.gptq(codes, scale, zero, 4, index) if kind == "gptq" else low.packed(codes, scale, zero, 4)
        del state[f"{name}.weight"]
        state |= {f"{name}.{part}": tensor for part, tensor in made.items()}
        module.weight.data.copy_(low.exact(codes, scale, zero, index))
    if kind == "gptq":
        config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False, **record}
    else:
        weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, **record}
        config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    write(folder, state, config_of(model, quantization_config=config), file)
    return model


@pytest.mark.parametrize("kind", ["gptq", "packed"])
@pytest.mark.parametrize("file", ["model.safetensors", "sharded", "pytorch_model.bin"])
def test_model(kind, file, tmp_path):
    model = exported(tmp_path / "a", kind, file)
    loaded, given = load_checkpoint(tmp_path / "a"), inputs(model)
    layer = loaded.bert.encoder.layer[1].output.dense
    assert layer.activation == "float" and layer.group_size == 32
    assert torch.allclose(loaded(**given).logits, model(**given).logits, atol=1e-4)
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(type(model).from_pretrained(tmp_path / "b")(**given).logits, loaded(**given).logits)


def test_activations_of_8_bits(tmp_path):
    model = exported(tmp_path, "packed", input_activations={"num_bits": 8, "type": "int", "dynamic": True})
    loaded, given = load_checkpoint(tmp_path), inputs(model)
    assert loaded.bert.encoder.layer[1].output.dense.activation == "dynamic"
    assert torch.allclose(loaded(**given).logits, model(**given).logits, atol=0.1)


QUERY = "bert.encoder.layer.0.attention.self.query"


def _at(name, change):
    return lambda state: state.update({f"{QUERY}.{name}": change(state[f"{QUERY}.{name}"].clone())})


def _first(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("gptq", lambda s: s.pop(f"{QUERY}.scales"), "query.scales, .* Got no such tensor"),
        ("gptq", lambda s: s.pop(f"{QUERY}.qzeros"), "query.qzeros, int32 .* Got no such tensor"),
        ("gptq", lambda s: s.pop(f"{QUERY}.bias"), "query.bias, .* Got no such tensor"),
        ("gptq", lambda s: s.pop(f"{QUERY}.qweight"), "query.weight, .* Got no such tensor"),
        ("gptq", lambda s: s.update({f"{QUERY}.weight": torch.ones(64, 64)}), "query.weight once. Got it both"),
        ("gptq", lambda s: s.update({"a.qweight": torch.ones(1, 1)}), "expected a to be a linear layer"),
        ("gptq", _at("qweight", lambda t: t[:-1]), r"query.qweight of shape \[8, 64\]. Got \[7, 64\]"),
        ("gptq", _at("qweight", lambda t: t.long()), "query.qweight of dtype int32. Got int64"),
        ("gptq", _at("scales", lambda t: t.T.contiguous()), r"query.scales of shape \[2, 64\]. Got \[64, 2\]"),
        ("gptq", _at("scales", _first(0.0)), "query.scales to be positive. Got 0.0"),
        ("gptq", _at("scales", _first(float("nan"))), "query.scales to be finite"),
        ("gptq", _at("scales", _first(float("inf"))), "query.scales to be finite"),
        ("gptq", _at("g_idx", _first(2)), r"query.g_idx in \[0, 2\). Got 0 to 2"),
        ("gptq", _at("g_idx", _first(-1)), r"query.g_idx in \[0, 2\). Got -1 to 1"),
        ("packed", lambda s: s.pop(f"{QUERY}.weight_shape"), "query.weight_shape, int64 .* Got no such tensor"),
        ("packed", lambda s: s.pop(f"{QUERY}.weight_scale"), "query.weight_scale, .* Got no such tensor"),
        ("packed", _at("weight_shape", _first(-1)), r"query.weight_shape to hold two sizes. Got \[-1, 64\]"),
        ("packed", _at("weight_shape", _first(8)), r"query.weight_packed of shape \[8, 8\]. Got \[64, 8\]"),
        ("packed", _at("weight_packed", lambda t: t[:, 1:]), r"query.weight_packed of shape \[64, 8\]. Got \[64, 7\]"),
        ("packed", _at("weight_scale", _first(-1.0)), "query.weight_scale to be positive. Got -1.0"),
        ("packed", _at("weight_scale", lambda t: t[1:]), r"query.weight_scale of shape \[64, 2\]. Got \[63, 2\]"),
        ("packed", lambda s: s.pop(f"{QUERY}.weight_zero_point"), "query.weight_zero_point, as config.json says"),
        ("packed", _at("weight_zero_point", lambda t: t[1:]), r"query.weight_zero_point of shape \[8, 2\]. Got"),
        ("packed", _at("weight_zero_point", lambda t: t.float()), "query.weight_zero_point of dtype int32"),
    ],
)
def test_damaged(kind, damage, message, tmp_path):
    exported(tmp_path, kind, "pytorch_model.bin")
    file = tmp_path / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    damage(state)
    torch.save(state, file)
    with pytest.raises(ValueError, match=f"load_checkpoint: (.|\n)*{message}"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("gptq", {"bits": 9}, "bits from 2 to 8. Got 9"),
        ("gptq", {"bits": 2}, r"query.qweight of shape \[4, 64\]. Got \[8, 64\]"),
        ("gptq", {"group_size": 0}, "group_size above 0, or -1. Got 0"),
        ("gptq", {"group_size": 16}, r"query.scales of shape \[4, 64\]. Got \[2, 64\]"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format to be one of gptq, gptq_v2. Got 'marlin'"),
        ("packed", {"targets": ["re:.*output"]}, "config_groups of config.json to name .*query"),
        ("packed", {"targets": ["re:("]}, "config_groups of config.json to name"),
        ("packed", {"weights": {"num_bits": 4, "type": "float"}}, "integers of 2 to 8 bits"),
        ("packed", {"weights": {"num_bits": 8}}, r"query.weight_packed of shape \[64, 16\]. Got \[64, 8\]"),
        ("packed", {"weights": {"num_bits": 4, "group_size": 16}}, "query.weight_scale of 4 groups, .* Got 2"),
        ("packed", {"weights": {"num_bits": 4, "strategy": "group", "group_size": 64}}, "weight_scale of 1 groups"),
        ("packed", {"input_activations": {"num_bits": 8, "dynamic": False}}, "to be float, or dynamic int8"),
    ],
)
def test_wrong_config(kind, record, message, tmp_path):
    exported(tmp_path, kind, **record)
    with pytest.raises(ValueError, match=f"load_checkpoint: (.|\n)*{message}"):
        load_checkpoint(tmp_path)
