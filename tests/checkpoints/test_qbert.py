"""Import of the checkpoints of Q-BERT's authors: their arithmetic to two roundings, and no file is believed."""

import json

import pytest
import torch
import transformers

import bertkern as bk
from bertkern.checkpoints import load_checkpoint
from bertkern.checkpoints.qbert import qbert_weight
from tests.low_bit_exports import qbert_ranges, qbert_rounded
from tests.pruned_exports import config_of, distinct, write
from tests.tiny_models import inputs, tiny

ROUNDINGS = 2 * torch.finfo(torch.float32).eps


def random(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("groups", "axis", "size"), [(1, "n", 20), (4, "k", 12), (16, "k", 3), (48, "k", 1), (5, "k", 1)]
)
def test_one_layer(bits, groups, axis, size):
    weight = random(20, 48)
    low, high = qbert_ranges(weight, groups)
    made = qbert_weight(weight, low, high, bits)
    wanted = qbert_rounded(weight, low, high, bits)
    assert (made.axis, made.group_size) == (axis, size) and made.bits.unique().tolist() == [bits]
    assert made.zero is None or torch.equal(made.zero, made.zero.round())
    assert bool(((made.dequantize(torch.float64) - wanted).abs() <= ROUNDINGS * wanted.abs()).all())
    # Ranges shrank, so some weights lay beyond the last code.
    assert bool((weight > high).any())


def test_scalars_and_odd_ranges():
    weight = random(6, 10)
    for low, high in ((-2.0, 3.0), (0.5, 1.5), (-3.0, -1.0), (0.0, 0.0)):
        ends = torch.tensor([low]), torch.tensor([high])
        made, wanted = qbert_weight(weight, *ends, 3), qbert_rounded(weight, *ends, 3)
        assert made.axis == "n" and made.groups == 1
        assert bool(((made.dequantize(torch.float64) - wanted).abs() <= ROUNDINGS * wanted.abs() + 1e-30).all())


def exported(folder, head="ForSequenceClassification", file="pytorch_model.bin", groups=4, later=False, **more):
    """A model, what its weights are rounded to by name, and `folder` as the authors' scripts save it."""
    model = tiny(f"Bert{head}")
    base = "" if head == "Model" else "bert."
    state, rounded = distinct(model.state_dict()), {}
    widths = [5, 3]
    layer_bits, emb_bits = {}, {"word_embeddings": 8, "position_embeddings": 8, "token_type_embeddings": 6}
    for name, module in model.named_modules():
        path = name.removeprefix(f"{base}encoder.")
        if isinstance(module, torch.nn.Linear) and path.startswith("layer."):
            bits = layer_bits[path] = 32 if path == "layer.1.output.dense" else widths[int(path.split(".")[1])]
        elif isinstance(module, torch.nn.Embedding):
            bits = emb_bits[name.rpartition(".")[2]]
        else:
            continue
        weight = state[f"{name}.weight"]
        low, high = qbert_ranges(weight, groups if isinstance(module, torch.nn.Linear) else 1)
        if path == "layer.0.intermediate.dense":
            # It never ran.
            low, high = torch.zeros(1), torch.zeros(1)
        state[f"{name}.x_min"], state[f"{name}.x_max"] = low, high
        if low.numel() == 1:
            low, high = qbert_ranges(weight, groups, shrink=1.0)
        if bits != 32:
            rounded[name] = qbert_rounded(weight, low, high, bits)
    config = {
        k: v for k, v in config_of(model).items() if k not in ("architectures", "model_type", "id2label", "label2id")
    }
    config |= {
        "layer_bits": layer_bits,
        ("embed_bits" if later else "emb_bits"): emb_bits,
        "quant_group_number": groups,
    }
    config |= {"activation_bits": 8} if later else {"quantize_activation": True}
    write(folder, state, {**config, **more}, file)
    return model, rounded


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_model(later, file, tmp_path):
    model, rounded = exported(tmp_path / "a", later=later, file=file)
    kind = transformers.BertForSequenceClassification
    loaded = load_checkpoint(tmp_path / "a", model_class=kind, activation="float")
    assert isinstance(loaded, kind) and loaded.config.num_labels == model.config.num_labels
    for name, wanted in rounded.items():
        got = loaded.get_submodule(name).dequantized_weight(torch.float64)
        assert torch.allclose(got, wanted, rtol=ROUNDINGS, atol=0), name
        model.get_submodule(name).weight.data.copy_(wanted)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert "layer.1.output.dense" not in "".join(rounded)
    given = inputs(model)
    assert torch.allclose(loaded(**given).logits, model(**given).logits, atol=1e-4)
    # By the file, activations have 8 bits.
    dynamic = load_checkpoint(tmp_path / "a", model_class=kind)
    query = dynamic.bert.encoder.layer[0].attention.self.query
    assert query.activation == "dynamic"
    assert torch.allclose(dynamic(**given).logits, model(**given).logits, atol=0.1)
    # It is one of bertkern's from here on.
    dynamic.save_pretrained(tmp_path / "b")
    again = kind.from_pretrained(tmp_path / "b")
    assert torch.equal(again(**given).logits, dynamic(**given).logits)


def test_float_by_the_file(tmp_path):
    exported(tmp_path, "Model", quantize_activation=False)
    loaded = load_checkpoint(tmp_path)
    assert isinstance(loaded, transformers.BertModel) and loaded.encoder.layer[0].output.dense.activation == "float"
    assert "int5" in str(bk.report(loaded))


QUERY = "bert.encoder.layer.0.attention.self.query"


def _at(name, change):
    return lambda state: state.update({f"{QUERY}.{name}": change(state[f"{QUERY}.{name}"])})


def _first(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop(f"{QUERY}.weight"), "query.weight, float32 of shape .48, 48.. Got no such tensor"),
        (lambda s: s.pop(f"{QUERY}.x_min"), "query.x_min, float32 of shape .48. or .1.. Got no such tensor"),
        (lambda s: s.pop(f"{QUERY}.bias"), "query.bias.* Got no such tensor"),
        (lambda s: s.update({"bert.encoder.x": torch.ones(1)}), "expected no tensor bert.encoder.x"),
        (_at("x_min", lambda t: t[:-1]), r"query.x_min, float32 of shape .* Got float32 of shape \[47\]"),
        (_at("x_max", lambda t: t[:1]), r"query.x_max of the shape of x_min, \[48\]. Got \[1\]"),
        (_at("x_max", lambda t: t.double()), "query.x_max, float32 .* Got float64"),
        (_at("x_max", _first(float("nan"))), "query.x_max to be finite"),
        (_at("x_max", _first(-9.0)), "query.x_min of at most x_max. Got .* and -9.0"),
        (_at("weight", _first(float("inf"))), "query.weight to be finite"),
        (_at("weight", lambda t: t[:, :-1]), r"query.weight, float32 of shape \[48, 48\]"),
        (_at("weight", lambda t: t.half()), "query.weight, float32 .* Got float16"),
    ],
)
def test_damaged(damage, message, tmp_path):
    exported(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    damage(state)
    torch.save(state, file)
    with pytest.raises(ValueError, match=f"load_checkpoint: (.|\n)*{message}"):
        load_checkpoint(tmp_path, model_class=transformers.BertForSequenceClassification)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_bits": {"layer.0.attention.self.query": 9}}, "2 to 8 bits, or 32. Got 9"),
        ({"layer_bits": {"layer.0.attention.self.query": True}}, "2 to 8 bits, or 32. Got True"),
        ({"layer_bits": {"layer.7.attention.self.query": 4}}, "expected bits to be of layers of the model. Got bert"),
        ({"layer_bits": {"layer.0.attention": 4}}, "layers of the model. Got bert.encoder.layer.0.attention"),
        ({"emb_bits": [8]}, r"emb_bits to be bits by name. Got \[8\]"),
        ({"quant_group_number": 49}, "quant_group_number to cut 48 columns"),
        ({"activation_bits": 4}, "activation_bits of 8 or 32"),
    ],
)
def test_wrong_config(change, message, tmp_path):
    exported(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=f"load_checkpoint: (.|\n)*{message}"):
        load_checkpoint(tmp_path, model_class=transformers.BertForSequenceClassification)


def apart(folder, name="bits.json"):
    """Moves what config.json of `folder` says about bits into a file of its own; returns it."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    keys = ("layer_bits", "emb_bits", "quantize_activation", "quant_group_number")
    said = {key: values.pop(key) for key in keys}
    path.write_text(json.dumps(values))
    (folder / name).write_text(json.dumps(said))
    return folder / name


def test_bits_in_a_file_of_their_own(tmp_path):
    model, _ = exported(tmp_path / "a", "Model")
    given = inputs(model)
    wanted = load_checkpoint(tmp_path / "a")(**given).last_hidden_state
    file = apart(tmp_path / "a", "new_config.json")
    (tmp_path / "a" / "other.json").write_text("[8]")
    for bits in (None, file, str(file), json.loads(file.read_text())):
        loaded = load_checkpoint(tmp_path / "a", bits=bits)
        assert torch.equal(loaded(**given).last_hidden_state, wanted)
    elsewhere = file.rename(tmp_path / "bits.json")
    assert torch.equal(load_checkpoint(tmp_path / "a", bits=elsewhere)(**given).last_hidden_state, wanted)
    with pytest.raises(ValueError, match=r"expected layer_bits in config.json, in one JSON file .* Got none"):
        load_checkpoint(tmp_path / "a")


def test_bits_given_replace_those_of_the_file(tmp_path):
    exported(tmp_path, "Model")
    loaded = load_checkpoint(tmp_path, bits={"layer_bits": {"layer.0.attention.self.query": 2}})
    low = [name for name, module in loaded.named_modules() if hasattr(module, "dequantized_weight")]
    assert low == ["encoder.layer.0.attention.self.query"]
    assert loaded.get_submodule(low[0]).activation == "float"  # nothing says that activations have 8 bits


def test_bits_that_are_none(tmp_path):
    exported(tmp_path, "Model")
    with pytest.raises(FileNotFoundError, match=r"expected bits to be a JSON file. Got 'nowhere.json'"):
        load_checkpoint(tmp_path, bits="nowhere.json")
    (tmp_path / "x.json").write_text('{"bits": 4}')
    with pytest.raises(ValueError, match=r"expected bits to hold layer_bits, emb_bits, embed_bits. Got bits"):
        load_checkpoint(tmp_path, bits=tmp_path / "x.json")
    (tmp_path / "x.json").write_text("4")
    with pytest.raises(ValueError, match=r"x.json' to be an object. Got int"):
        load_checkpoint(tmp_path, bits=tmp_path / "x.json")
    said = apart(tmp_path)
    (tmp_path / "x.json").write_text(said.read_text())
    with pytest.raises(ValueError, match=r"in one JSON file beside it.* Got bits.json and x.json"):
        load_checkpoint(tmp_path)


def test_other_objects_and_options(tmp_path):
    exported(tmp_path, "Model")
    with pytest.raises(ValueError, match='activation "dynamic" or "float"'):
        load_checkpoint(tmp_path, activation="static")
    torch.save({"a": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds other objects"):
        load_checkpoint(tmp_path)
