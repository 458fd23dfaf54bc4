"""save_pretrained and from_pretrained of int8 models: the same bits, and clear errors for what does not fit."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bertkern as bk
from bertkern.nn import Int8Linear
from tests.families.zoo import FAMILIES, MODELS, answer, inputs, make, padded, tensors

AUTO = {
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForNextSentencePrediction": "AutoModelForNextSentencePrediction",
    "ForPreTraining": "AutoModelForPreTraining",
    "Model": "AutoModel",
}


def auto(name):
    return getattr(transformers, next(cls for suffix, cls in AUTO.items() if name.endswith(suffix)))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weight", ["per_channel", "per_tensor"])
def test_the_same_bits(name, weight, tmp_path):
    model = make(name)
    batch = padded(model, "trailing")
    answer(model, **batch)
    bk.quantize_(model, bk.Int8Config(weight=weight))
    model.save_pretrained(tmp_path)
    loaded, info = auto(name).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(loaded) is type(model) and loaded.is_quantized
    with torch.no_grad():
        expected, got = tensors(model(**batch)), tensors(loaded(**batch))
    assert all(torch.equal(value, got[key]) for key, value in expected.items())
    assert not bk.report(loaded).fallbacks
    assert str(bk.report(loaded)) == str(bk.report(model))
    stored = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for k, t in stored.items() if k.endswith("weight_codes")} == {torch.int8}
    assert not any("packed" in key for key in stored)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert {k: v.tolist() for k, v in load_file(again / "model.safetensors").items()} == {
        k: v.tolist() for k, v in stored.items()
    }


@pytest.mark.parametrize(
    "options",
    [
        {"embeddings": False},
        {"head": False},
        {"pooler": False},
        {"skip": ("layer.1",)},
        {"skip": ("word_embeddings",)},
        {"keep_original": True},
    ],
)
@pytest.mark.parametrize("name", ["BertForMaskedLM", "DistilBertForSequenceClassification", "BertForPreTraining"])
def test_partly_quantized_models(options, name, tmp_path):
    model = bk.quantize_(make(name), bk.Int8Config(**options))
    batch = inputs(model)
    model.save_pretrained(tmp_path)
    loaded, info = auto(name).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        expected, got = tensors(model(**batch)), tensors(loaded(**batch))
    assert all(torch.equal(value, got[key]) for key, value in expected.items())
    model.tie_weights()
    loaded.tie_weights()
    with torch.no_grad():
        assert all(torch.equal(value, tensors(loaded(**batch))[key]) for key, value in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_other_heads_over_the_same_checkpoint(family, tmp_path):
    model = bk.quantize_(make(family + "ForQuestionAnswering"), bk.Int8Config(skip=("layer.0",)))
    model.save_pretrained(tmp_path / "head")
    base = transformers.AutoModel.from_pretrained(tmp_path / "head")
    batch = inputs(base)
    with torch.no_grad():
        expected = model.base_model(**batch).last_hidden_state
        assert torch.equal(base(**batch).last_hidden_state, expected)
        base.save_pretrained(tmp_path / "base")
        classifier, info = transformers.AutoModelForTokenClassification.from_pretrained(
            tmp_path / "base", output_loading_info=True
        )
        assert torch.equal(classifier.base_model(**batch).last_hidden_state, expected)
    assert "classifier.weight" in info["missing_keys"]


def test_quantizing_while_loading(tmp_path):
    model = make("BertForSequenceClassification")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=bk.Int8Config(weight="per_tensor")
    )
    batch = inputs(model)
    bk.quantize_(model, bk.Int8Config(weight="per_tensor"))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)
    loaded.save_pretrained(tmp_path / "int8")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)


def test_bf16(tmp_path):
    model = bk.quantize_(make("BertModel")).to(torch.bfloat16)
    batch = inputs(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.encoder.layer[0].output.dense.weight_scale.dtype == torch.float32
    with torch.no_grad():
        expected, got = model(**batch), loaded(**batch)
    assert got.last_hidden_state.dtype == torch.bfloat16
    assert torch.equal(expected.last_hidden_state, got.last_hidden_state)


def test_accelerated_models_save_the_plain_checkpoint(tmp_path):
    model = make("BertForMaskedLM")
    model.save_pretrained(tmp_path / "plain")
    bk.accelerate(model).save_pretrained(tmp_path / "fast")
    plain, fast = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "fast"))
    assert plain.keys() == fast.keys() and all(torch.equal(plain[key], fast[key]) for key in plain)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "fast")]
    assert configs[0] == configs[1]


def test_dequantize_by_transformers(tmp_path):
    model = bk.quantize_(make("BertForMaskedLM"))
    model.dequantize()
    model.save_pretrained(tmp_path)
    loaded, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = inputs(model)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)


def test_static_layers_from_elsewhere(tmp_path):
    model = make("BertForSequenceClassification")
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "classifier":
            form = Int8Linear.from_linear(module, bk.Int8Config(weight="per_tensor"))
            layer = Int8Linear.from_codes(
                form.weight_codes, form.weight_scale, form.bias, input_scale=0.05, output_scale=0.04
            )
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
    bk.accelerate(model.eval())
    batch = inputs(model)
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert record["weight"] == "per_tensor" and record["activation"] == "static" and not record["embeddings"]
    assert record["skip"] == ["classifier"] and record["quant_method"] == "bertkern" and record["version"] == 1
    loaded, info = auto("BertForSequenceClassification").from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)
    assert float(loaded.bert.pooler.dense.output_scale) == pytest.approx(0.04)
    assert not bk.report(loaded).fallbacks


def test_pickled_checkpoints_are_read_without_running_them(tmp_path):
    model = bk.quantize_(make("BertModel"))
    batch = inputs(model)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**batch).last_hidden_state, loaded(**batch).last_hidden_state)

    class Trap:
        def __reduce__(self):
            return exec, ("raise SystemExit('ran')",)

    torch.save({**model.state_dict(), "trap": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin' to be a file of tensors. .*nsupported .*exec"):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_a_fresh_process_that_imports_bertkern_first(tmp_path):
    model = bk.quantize_(make("BertModel"))
    model.save_pretrained(tmp_path)
    for order in ("import bertkern, transformers", "import transformers, bertkern"):
        code = (
            f"{order}; model = transformers.AutoModel.from_pretrained({str(tmp_path)!r}); "
            "print(type(model.encoder.layer[0].output.dense).__name__, type(model.encoder).__module__)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.split() == ["Int8Linear", "bertkern.families.bert"], done.stderr
    code = "import bertkern, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def saved(tmp_path, change_tensors=None, change_config=None, name="BertForSequenceClassification"):
    bk.quantize_(make(name)).save_pretrained(tmp_path)
    if change_tensors:
        stored = load_file(tmp_path / "model.safetensors")
        change_tensors(stored)
        save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if change_config:
        config = json.loads((tmp_path / "config.json").read_text())
        change_config(config["quantization_config"])
        (tmp_path / "config.json").write_text(json.dumps(config))
    return auto(name), tmp_path


QUERY = "bert.encoder.layer.1.attention.self.query"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop(f"{QUERY}.weight_codes"), "expected .*query.weight_codes. Got none"),
        (lambda s: s.pop(f"{QUERY}.input_scale"), "expected .*query.input_scale. Got none"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith(QUERY)], "expected .*query.weight_codes. Got none"),
        (lambda s: s.pop("bert.embeddings.word_embeddings.weight_scale"), "word_embeddings.weight_scale. Got none"),
        (
            lambda s: s.update({f"{QUERY}.weight_codes": s[f"{QUERY}.weight_codes"][:, :51].contiguous()}),
            r"query.weight_codes torch.int8 of shape \[N, K\] = \[52, 52\]. Got torch.int8 of shape \[52, 51\]",
        ),
        (
            lambda s: s.update({f"{QUERY}.weight_codes": s[f"{QUERY}.weight_codes"].float()}),
            r"query.weight_codes torch.int8 .* Got torch.float32 of shape \[52, 52\]",
        ),
        (lambda s: s.update({f"{QUERY}.weight_scale": torch.ones(3)}), r"Got torch.float32 of shape \[3\]"),
        (lambda s: s[f"{QUERY}.weight_scale"].fill_(float("nan")), "query.weight_scale finite"),
        (lambda s: s[f"{QUERY}.weight_codes"].fill_(-128), "Got -128"),
        (
            lambda s: s.update({"bert.embeddings.LayerNorm.weight_codes": torch.ones(3, dtype=torch.int8)}),
            "expected no embeddings.LayerNorm.weight_codes",
        ),
        (
            lambda s: s.update({QUERY.replace("1", "7") + ".weight_codes": torch.ones(52, 52, dtype=torch.int8)}),
            "expected no encoder.layer.7.attention.self.query.weight_codes. Got it",
        ),
        (lambda s: s.update({f"{QUERY}.weight": torch.ones(52, 52)}), "expected no .*query.weight. Got it"),
        (lambda s: s.pop("bert.embeddings.LayerNorm.bias"), r"LayerNorm.bias of shape \[52\]. Got none"),
        (
            lambda s: s.update({"bert.embeddings.LayerNorm.bias": torch.ones(51)}),
            r"LayerNorm.bias of shape \[52\]. Got \[51\]",
        ),
        (
            lambda s: s.update({f"{QUERY}.weight_codes": s[f"{QUERY}.weight_codes"].to(torch.uint8)}),
            "Got torch.uint8 of shape",
        ),
    ],
)
def test_checkpoints_that_do_not_fit(change, message, tmp_path):
    cls, path = saved(tmp_path, change_tensors=change)
    with pytest.raises(ValueError, match=message):
        cls.from_pretrained(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(version=2), "expected version 1. Got 2"),
        (lambda c: c.update(groups=128), "Got \\['groups'\\]"),
        (lambda c: c.update(kind="int3"), "Got 'int3'"),
        (lambda c: c.update(embeddings=False), "expected no embeddings"),
    ],
)
def test_configs_that_do_not_fit(change, message, tmp_path):
    cls, path = saved(tmp_path, change_config=change)
    with pytest.raises(ValueError, match=message):
        cls.from_pretrained(path)


def test_a_truncated_file(tmp_path):
    cls, path = saved(tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"expected '.*model.safetensors' to be a file of tensors. Got one truncated"):
        cls.from_pretrained(path)


def test_heads_and_poolers_may_differ(tmp_path):
    """A checkpoint's pooler and head stay unread where the model has none."""
    _, path = saved(tmp_path)
    masked = transformers.AutoModelForMaskedLM.from_pretrained(path)
    assert masked.bert.pooler is None and isinstance(masked.bert.encoder.layer[0].output.dense, Int8Linear)


def test_resizing_is_refused():
    for name in ("BertModel", "BertForMaskedLM"):
        model = bk.quantize_(make(name))
        with pytest.raises(ValueError, match="resize first, then quantize"):
            model.resize_token_embeddings(120)
        bk.dequantize(model).resize_token_embeddings(120)
        assert model.get_input_embeddings().weight.shape[0] == 120
