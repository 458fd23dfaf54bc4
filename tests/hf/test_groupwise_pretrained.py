"""save_pretrained and from_pretrained of low-bit models: the same bits, and clear errors for what does not fit."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bertkern as bk
from bertkern.formats.groupwise import quantize_groupwise
from bertkern.nn import GroupwiseEmbedding, GroupwiseLinear
from tests.families.zoo import FAMILIES, inputs, make, padded, tensors

from .test_pretrained import auto

CONFIGS = {
    "n": bk.GroupwiseConfig(groups=8),
    "k": bk.GroupwiseConfig(bits=3, group_size=16, axis="k", method="mse", pooler=True, head=True, embedding_bits=4),
    "float": bk.GroupwiseConfig(bits=5, groups=4, axis="k", shared=True, symmetric=True, activation="float"),
    "per group": bk.GroupwiseConfig(groups=4, layer_bits={"layer.1.*.dense": (2, 8, 3, 4)}),
    "bare": bk.GroupwiseConfig(embedding_bits=None, skip=("layer.1",), keep_original=True),
}
QUERY = "bert.encoder.layer.1.attention.self.query"
WORDS = "bert.embeddings.word_embeddings"


def same_outputs(model, other, batch):
    with torch.no_grad():
        expected, got = tensors(model(**batch)), tensors(other(**batch))
    return expected.keys() == got.keys() and all(torch.equal(value, got[key]) for key, value in expected.items())


def reloaded(model, path, **options):
    """The model as its class reads it from `path`; no tensor may be missing or left over."""
    model.save_pretrained(path)
    loaded, info = auto(type(model).__name__).from_pretrained(path, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return loaded


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "scheme,head", [("n", "ForMaskedLM"), ("k", "ForMaskedLM"), ("float", "ForSequenceClassification")]
)
def test_the_same_bits(family, scheme, head, tmp_path):
    model = bk.quantize_(make(family + head), CONFIGS[scheme])
    batch = padded(model, "trailing")
    loaded = reloaded(model, tmp_path)
    assert loaded.is_quantized and same_outputs(model, loaded, batch)
    assert str(bk.report(loaded)).partition("plain path")[0] == str(bk.report(model)).partition("plain path")[0]
    if head == "ForMaskedLM":
        assert loaded.get_output_embeddings().table[0] is loaded.get_input_embeddings()
    stored = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for k, t in stored.items() if k.endswith(("weight_codes", "weight_bits"))} == {torch.uint8}
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.keys() and all(torch.equal(again[key], stored[key]) for key in stored)
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path, tmp_path / "again")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    "scheme,name",
    [("per group", "BertForPreTraining"), ("bare", "BertForPreTraining"), ("bare", "DistilBertForMaskedLM")],
)
def test_partly_quantized_models(scheme, name, tmp_path):
    model = bk.quantize_(make(name), CONFIGS[scheme])
    batch = inputs(model)
    loaded = reloaded(model, tmp_path)
    assert same_outputs(model, loaded, batch)
    model.tie_weights()
    loaded.tie_weights()
    assert same_outputs(model, loaded, batch)


def test_the_record(tmp_path):
    config = bk.GroupwiseConfig(groups=8, layer_bits={"layer.1": 2, "layer.2.output": [3] * 8}, skip=("layer.0",))
    model = bk.quantize_(make("BertForSequenceClassification"), config)
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (record["quant_method"], record["kind"], record["version"]) == ("bertkern", "groupwise", 1)
    assert record["layer_bits"] == {"layer.1": 2, "layer.2.output": [3] * 8} and "layers" not in record
    stored = load_file(tmp_path / "model.safetensors")
    found = {name.removeprefix(f"{QUERY}."): tensor for name, tensor in stored.items() if name.startswith(QUERY)}
    assert {name: (str(tensor.dtype), list(tensor.shape)) for name, tensor in found.items()} == {
        "weight_codes": ("torch.uint8", [52 * 13]),
        "weight_scale": ("torch.float32", [8]),
        "weight_zero": ("torch.float32", [8]),
        "weight_bits": ("torch.uint8", [8]),
        "bias": ("torch.float32", [52]),
        "input_scale": ("torch.float32", []),
        "input_zero_point": ("torch.int32", []),
    }


def test_weights_from_elsewhere(tmp_path):
    """What the config does not tell stands beside it, module by module."""
    model = make("BertForMaskedLM")
    given = {
        QUERY: quantize_groupwise(model.get_submodule(QUERY).weight, [2, 8, 3, 4], 16, "k"),
        "cls.predictions.transform.dense": quantize_groupwise(model.cls.predictions.transform.dense.weight, 6, 1),
        WORDS: quantize_groupwise(model.get_input_embeddings().weight, 5, 10),
    }
    bk.quantize_(model, bk.GroupwiseConfig(groups=8, embedding_bits=None, skip=("layer.0", "layer.1")), weights=given)
    loaded = reloaded(model, tmp_path)
    assert same_outputs(model, loaded, inputs(model))
    record = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert record["layers"][QUERY.removeprefix("bert.")] == {"axis": "k", "group_size": 16, "activation": "dynamic"}
    assert record["layers"][WORDS.removeprefix("bert.")] == {"axis": "n", "group_size": 10}
    assert set(bk.plan.quantized_modules(loaded)) == set(bk.plan.quantized_modules(model))
    base = transformers.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.bert(**inputs(model)).last_hidden_state
        assert torch.equal(base(**inputs(model)).last_hidden_state, expected)


def test_grids_of_both_kinds(tmp_path):
    model = make("BertForMaskedLM")
    names = QUERY, WORDS
    given = {n: quantize_groupwise(model.get_submodule(n).weight, 4, 1, symmetric=True) for n in names}
    bk.quantize_(model, bk.GroupwiseConfig(groups=52), weights=given)
    loaded = reloaded(model, tmp_path)
    assert same_outputs(model, loaded, inputs(model))
    record = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {name: form["symmetric"] for name, form in record["layers"].items()} == {
        name.removeprefix("bert."): True for name in names
    }


def test_modules_placed_by_hand(tmp_path):
    model = make("BertForSequenceClassification")
    for number, layer in enumerate(model.bert.encoder.layer):
        config = bk.GroupwiseConfig(
            bits=4 + number, group_size=16, axis="k", activation="float" if number else "dynamic"
        )
        layer.output.dense = GroupwiseLinear.from_linear(layer.output.dense, config)
    bk.accelerate(model)
    loaded = reloaded(model, tmp_path)
    assert same_outputs(model, loaded, inputs(model))
    assert [layer.output.dense.activation for layer in loaded.bert.encoder.layer] == ["dynamic", "float", "float"]


@pytest.mark.parametrize("family", ["Bert", "DistilBert", "Albert"])
def test_other_heads_over_the_same_checkpoint(family, tmp_path):
    model = bk.quantize_(make(family + "ForQuestionAnswering"), bk.GroupwiseConfig(skip=("layer.0",)))
    model.save_pretrained(tmp_path / "head")
    base = transformers.AutoModel.from_pretrained(tmp_path / "head")
    batch = inputs(base)
    with torch.no_grad():
        expected = model.base_model(**batch).last_hidden_state
        assert torch.equal(base(**batch).last_hidden_state, expected)
        base.save_pretrained(tmp_path / "base")
        for cls in (transformers.AutoModelForTokenClassification, transformers.AutoModelForMaskedLM):
            other = cls.from_pretrained(tmp_path / "base")
            assert torch.equal(other.base_model(**batch).last_hidden_state, expected)
            assert other(**batch).logits.isfinite().all()


@pytest.mark.parametrize("config", [CONFIGS["n"], bk.GroupwiseConfig(groups=None, layer_bits={"layer.1": 2})])
def test_quantizing_while_loading(config, tmp_path):
    model = make("BertForSequenceClassification")
    model.save_pretrained(tmp_path)
    cls = transformers.AutoModelForSequenceClassification
    loaded = cls.from_pretrained(tmp_path, quantization_config=config)
    bk.quantize_(model, config)
    assert same_outputs(model, loaded, inputs(model))
    loaded.save_pretrained(tmp_path / "low")
    again = cls.from_pretrained(tmp_path / "low")
    assert same_outputs(model, again, inputs(model))


def test_bf16_and_static(tmp_path):
    model = bk.quantize_(make("BertModel"), CONFIGS["float"]).to(torch.bfloat16)
    loaded = reloaded(model, tmp_path / "a", dtype=torch.bfloat16)
    assert loaded.encoder.layer[0].output.dense.weight_scale.dtype == torch.float32
    assert loaded(**inputs(model)).last_hidden_state.dtype == torch.bfloat16 and same_outputs(
        model, loaded, inputs(model)
    )
    model = make("BertModel")
    config = bk.GroupwiseConfig(activation="static", activation_unsigned=True)
    bk.quantize_(model, config, calibration=[inputs(model)], progress=False)
    loaded = reloaded(model, tmp_path / "b")
    assert same_outputs(model, loaded, inputs(model))
    assert float(loaded.encoder.layer[0].output.dense.input_scale) > 0


def test_pruned_and_pickled(tmp_path):
    model = make("BertModel")
    with torch.no_grad():
        model.encoder.layer[1].attention.output.dense.weight[:, 26:] = 0
    bk.quantize_(model, CONFIGS["n"])
    assert same_outputs(model, reloaded(model, tmp_path), inputs(model))
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert same_outputs(model, transformers.AutoModel.from_pretrained(tmp_path), inputs(model))


def test_compile_and_export():
    torch._dynamo.reset()
    model, other = (bk.quantize_(make("BertForMaskedLM", hidden_act=act), CONFIGS["n"]) for act in ("gelu", "relu"))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for batch, length in ((3, 11), (2, 7)):
            call = inputs(model, batch, length)
            assert torch.equal(compiled(**call).logits, model(**call).logits)
        first = model(**call).logits
        state = {
            name: tensor * 2 if name.endswith("weight_scale") else tensor for name, tensor in other.state_dict().items()
        }
        model.load_state_dict(state)
        second = compiled(**call).logits
        assert not torch.equal(first, second) and torch.equal(second, model(**call).logits)
        base = bk.quantize_(make("BertModel"), CONFIGS["k"])
        sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=32)}
        call = padded(base, "trailing")
        program = torch.export.export(base, (), call, dynamic_shapes=dict.fromkeys(call, sizes))
        call = inputs(base, 2, 7)
        assert torch.equal(program.module()(**call).last_hidden_state, base(**call).last_hidden_state)


def test_loading_other_bits_and_wrong_state_dicts():
    model, other = (bk.quantize_(make("BertForMaskedLM"), bk.GroupwiseConfig(bits=bits)) for bits in (4, 3))
    model.load_state_dict(other.state_dict())
    assert same_outputs(model, other, inputs(model))
    for change, message in (
        ({f"{QUERY}.weight_codes": torch.zeros(5, dtype=torch.uint8)}, r"query: .*codes uint8 of shape \[1040\]"),
        ({f"{QUERY}.weight_scale": torch.zeros(52)}, "query: .*scales above 0"),
        ({f"{QUERY}.weight_bits": torch.full((52,), 9, dtype=torch.uint8)}, "query: .*bits from 2 to 8"),
    ):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict({**other.state_dict(), **change})
    assert same_outputs(model, other, inputs(model))


def test_a_sentence_transformer(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "film", "bad"]
    model = make("BertModel", vocab_size=len(words), pad_token_id=0)
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    encoder = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    bk.quantize_(encoder, CONFIGS["n"])
    expected = encoder.encode(["a good film", "bad"])
    encoder.save_pretrained(str(tmp_path / "low"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "low"), device="cpu")
    assert (again.encode(["a good film", "bad"]) == expected).all()
    assert any(isinstance(module, GroupwiseEmbedding) for module in again.modules())


def test_a_fresh_process(tmp_path):
    bk.quantize_(make("BertModel"), CONFIGS["n"]).save_pretrained(tmp_path)
    code = (
        f"import transformers, bertkern; model = transformers.AutoModel.from_pretrained({str(tmp_path)!r}); "
        "print(type(model.encoder.layer[0].output.dense).__name__, type(model.encoder).__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["GroupwiseLinear", "bertkern.families.bert"], done.stderr


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("low")
    bk.quantize_(make("BertForSequenceClassification"), bk.GroupwiseConfig(pooler=True)).save_pretrained(folder)
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def put(stored, path, change_tensors=None, change_config=None):
    held, config = {name: tensor.clone() for name, tensor in stored[0].items()}, json.loads(json.dumps(stored[1]))
    if change_tensors:
        change_tensors(held)
    if change_config:
        change_config(config["quantization_config"])
    save_file(held, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return transformers.AutoModelForSequenceClassification


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop(f"{QUERY}.weight_codes"), "expected .*query.weight_codes. Got none"),
        (lambda s: s.pop(f"{QUERY}.weight_bits"), "expected .*query.weight_bits. Got none"),
        (lambda s: s.pop(f"{QUERY}.input_scale"), "expected .*query.input_scale. Got none"),
        (lambda s: s.pop(f"{QUERY}.weight_zero"), "expected .*query.weight_zero. Got none"),
        (lambda s: s.pop(f"{WORDS}.weight_zero"), "expected .*word_embeddings.weight_zero. Got none"),
        (lambda s: s.pop("bert.pooler.dense.bias"), "expected .*pooler.dense.bias. Got none"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith(QUERY)], "expected .*query.weight_codes. Got none"),
        (lambda s: s.pop(f"{WORDS}.weight_scale"), "word_embeddings.weight_scale. Got none"),
        (
            lambda s: s.update({f"{QUERY}.weight_codes": s[f"{QUERY}.weight_codes"][:-1].clone()}),
            r"codes uint8 .* \[1352\]",
        ),
        (
            lambda s: s.update({f"{QUERY}.weight_codes": s[f"{QUERY}.weight_codes"].view(52, -1)}),
            r"weight_codes torch.uint8",
        ),
        (
            lambda s: s.update({f"{QUERY}.weight_codes": s[f"{QUERY}.weight_codes"].float()}),
            "Got torch.float32 of shape",
        ),
        (lambda s: s[f"{QUERY}.weight_bits"].fill_(3), r"query: .*codes uint8 of shape \[1040\]"),
        (lambda s: s[f"{QUERY}.weight_bits"].fill_(1), "query: .*bits from 2 to 8"),
        (lambda s: s.update({f"{QUERY}.weight_bits": torch.full((51,), 4, dtype=torch.uint8)}), r"\[G\] = \[52\]"),
        (lambda s: s[f"{QUERY}.weight_scale"].fill_(float("nan")), "query: .*finite scale"),
        (lambda s: s[f"{QUERY}.weight_scale"].fill_(float("inf")), "query: .*finite scale"),
        (lambda s: s[f"{QUERY}.weight_scale"].zero_(), "query: .*scales above 0"),
        (lambda s: s[f"{QUERY}.weight_zero"].fill_(float("nan")), "query: .*finite zero"),
        (
            lambda s: s.update({f"{QUERY}.weight_zero": torch.ones(3)}),
            r"query.weight_zero torch.float32 of shape \[G\]",
        ),
        (lambda s: s[f"{QUERY}.input_scale"].fill_(float("nan")), "query.input_scale finite"),
        (lambda s: s[f"{QUERY}.input_zero_point"].fill_(5), "query.input_zero_point 0, or 128, .* Got 5"),
        (lambda s: s[f"{WORDS}.weight_scale"].zero_(), "word_embeddings: .*scales above 0"),
        (lambda s: s.update({f"{QUERY}.weight": torch.ones(52, 52)}), "expected no .*query.weight. Got it"),
        (
            lambda s: s.update({QUERY.replace("1", "7") + ".weight_codes": torch.ones(9, dtype=torch.uint8)}),
            "expected no encoder.layer.7.attention.self.query.weight_codes. Got it",
        ),
        (lambda s: s.update({"classifier.weight_codes": torch.ones(9, dtype=torch.uint8)}), "expected no classifier"),
    ],
)
def test_checkpoints_that_do_not_fit(change, message, stored, tmp_path):
    cls = put(stored, tmp_path, change_tensors=change)
    with pytest.raises(ValueError, match=message):
        cls.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(version=2), "expected version 1. Got 2"),
        (lambda c: c.update(weight="per_tensor"), "Got \\['weight'\\]"),
        (lambda c: c.update(groups=4), r"query.weight_scale torch.float32 of shape \[G\] = \[4\]. Got .*\[52\]"),
        (lambda c: c.update(axis="k", groups=4), r"query.weight_scale torch.float32 of shape \[N, G\] .* = \[52, 4\]"),
        (lambda c: c.update(embedding_bits=None), "expected no embeddings"),
        (lambda c: c.update(symmetric=True), "expected no .*query.weight_zero, as its grids are symmetric. Got it"),
        (lambda c: c.update(activation="float"), "expected no .*input_scale, as its activations stay float"),
        (lambda c: c.update(layer_bits={"layer.1": 9}), "layer_bits of layer.1"),
        (
            lambda c: c.update(layers={"encoder.layer.1": {"axis": "q", "group_size": 1}}),
            "axis, group_size, activation and symmetric",
        ),
        (lambda c: c.update(layers={"encoder.layer.1": {"axis": "n"}}), "axis, group_size, activation and symmetric"),
        (lambda c: c.update(layers=["encoder"]), "layers by name"),
        (lambda c: c.update(layers={QUERY: {"activation": "float"}}), f"without bert. before their names. Got {QUERY}"),
    ],
)
def test_configs_that_do_not_fit(change, message, stored, tmp_path):
    cls = put(stored, tmp_path, change_config=change)
    with pytest.raises(ValueError, match=message):
        cls.from_pretrained(tmp_path)


def test_a_truncated_file(stored, tmp_path):
    cls = put(stored, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"expected '.*model.safetensors' to be a file of tensors. Got one truncated"):
        cls.from_pretrained(tmp_path)


def test_resizing_is_refused():
    model = bk.quantize_(make("BertForMaskedLM"), CONFIGS["n"])
    with pytest.raises(ValueError, match="resize first, then quantize"):
        model.resize_token_embeddings(120)
    bk.dequantize(model).resize_token_embeddings(120)
    assert model.get_input_embeddings().weight.shape[0] == 120
