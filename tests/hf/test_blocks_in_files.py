"""Files of int8 models full of zeros hold their blocks, and give the same bits back."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bertkern as bk
from bertkern import tuning
from bertkern.formats import BsrWeight
from bertkern.nn import Form, Int8Linear
from tests.families.test_sparse import every_form, pruned  # noqa: F401
from tests.families.zoo import FAMILIES, answer, inputs, make, padded

DENSE = "encoder.layer.0.intermediate.dense"


def auto(model):
    return getattr(transformers, "AutoModelFor" + type(model).__name__.partition("For")[2])


def saved(tmp_path, name="BertForSequenceClassification", **options):
    model = bk.quantize_(pruned(name, **options), measure=False)
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    return model, record, load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits(family, tmp_path):
    model, record, stored = saved(tmp_path / "a", family + "ForTokenClassification", share=0.9)
    batch = padded(model, "trailing")
    assert record["layers"] and not any(f"{name}.weight_codes" in stored for name in record["layers"])
    loaded, info = auto(model).from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for key, value in answer(model, **batch).items():
        assert torch.equal(answer(loaded, **batch)[key], value)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not bk.report(loaded).fallbacks
    loaded.save_pretrained(tmp_path / "b")
    again = load_file(tmp_path / "b" / "model.safetensors")
    assert again.keys() == stored.keys() and all(torch.equal(again[key], value) for key, value in stored.items())
    assert json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"] == record


def test_files_are_canonical_whatever_form_runs(tmp_path, every_form):  # noqa: F811
    """The form is this machine's, the block in the file is not."""
    model, record, stored = saved(tmp_path, share=0.95)
    forms = {module.form for module in model.modules() if isinstance(module, Int8Linear)}
    assert len(forms) > 1
    for name, told in record["layers"].items():
        module = model.get_submodule(f"bert.{name}" if not name.startswith("classifier") else name)
        parts = {key: stored[f"bert.{name}.{key}"] for key in BsrWeight.TENSORS}
        weight = BsrWeight.from_tensors(parts, (module.out_features, module.in_features))
        assert weight.block == tuple(told["block"]) and torch.equal(weight.to_dense(), module.weight_codes)
        assert weight.nbytes <= 0.9 * module.weight_codes.nbytes


def test_other_heads_and_the_base_model(tmp_path):
    model, _, _ = saved(tmp_path / "head", share=0.9)
    batch = inputs(model)
    base = transformers.AutoModel.from_pretrained(tmp_path / "head")
    with torch.no_grad():
        expected = model.bert(**batch).last_hidden_state
        assert torch.equal(base(**batch).last_hidden_state, expected)
        base.save_pretrained(tmp_path / "base")
        tagger = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "base")
        assert torch.equal(tagger.bert(**batch).last_hidden_state, expected)
    assert f"{DENSE}.values" in load_file(tmp_path / "base" / "model.safetensors")


def test_weights_that_changed_since_are_written_as_they_are(tmp_path):
    model, record, _ = saved(tmp_path, share=0.9)
    assert DENSE in record["layers"]
    whole = bk.quantize_(make("BertForSequenceClassification"), measure=False)
    layer, other = model.get_submodule(f"bert.{DENSE}"), whole.get_submodule(f"bert.{DENSE}")
    layer.load_state_dict({**layer.state_dict(), "weight_codes": other.weight_codes[: layer.out_features]})
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    stored = load_file(tmp_path / "model.safetensors")
    assert DENSE not in record["layers"] and torch.equal(stored[f"bert.{DENSE}.weight_codes"], layer.weight_codes)
    assert f"bert.{DENSE}.values" not in stored


def test_state_dicts_are_dense_and_read_both(tmp_path):
    model, _, stored = saved(tmp_path, share=0.9)
    other = bk.quantize_(pruned("BertForSequenceClassification", share=0.9), measure=False)
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, Int8Linear):
                module.load_state_dict({**module.state_dict(), "weight_codes": -module.weight_codes})
    found = other.load_state_dict(stored, strict=True)
    assert not found.missing_keys and not found.unexpected_keys
    batch = inputs(model)
    with torch.no_grad():
        assert torch.equal(other(**batch).logits, model(**batch).logits)
    stored[f"bert.{DENSE}.col"] = stored[f"bert.{DENSE}.col"] + 1000
    with pytest.raises(RuntimeError, match=rf"bert.{DENSE}: BsrWeight: expected col in"):
        other.load_state_dict(stored)
    # A pickled state dict beside the config of a file in blocks.
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = auto(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_a_layer_without_heads_or_blocks(tmp_path):
    model = make("BertForSequenceClassification")
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.weight.zero_()
        model.bert.encoder.layer[1].attention.output.dense.weight.zero_()
    bk.prune_heads(model, {2: range(model.config.num_attention_heads)})
    bk.quantize_(model, measure=False)
    model.save_pretrained(tmp_path)
    loaded = auto(model).from_pretrained(tmp_path)
    batch = padded(model, "left")
    for key, value in answer(model, **batch).items():
        assert torch.equal(answer(loaded, **batch)[key], value)


def test_a_loaded_model_takes_the_forms_of_this_machine(tmp_path, monkeypatch):
    saved(tmp_path, share=0.9)
    monkeypatch.setattr(tuning, "choose", lambda *_: tuning.Choice(Form("tokens", 2, 3)))
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert {m.form for m in loaded.bert.encoder.modules() if isinstance(m, Int8Linear)} == {Form("tokens", 2, 3)}


NAME = f"bert.{DENSE}"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s, r: s.pop(f"{NAME}.crow"), r"dense.crow. Got none"),
        (lambda s, r: s.pop(f"{NAME}.values"), r"dense.values. Got none"),
        (lambda s, r: s.update({f"{NAME}.col": s[f"{NAME}.col"].long()}), "dense.col torch.int32 .* Got I64"),
        (lambda s, r: s.update({f"{NAME}.col": s[f"{NAME}.col"][:-1]}), r"dense.col torch.int32 of shape \[blocks\]"),
        (lambda s, r: s.update({f"{NAME}.crow": s[f"{NAME}.crow"][:-1]}), r"dense.crow torch.int32 of shape \[ceil"),
        (
            lambda s, r: s.update({f"{NAME}.values": s[f"{NAME}.values"].float()}),
            "dense.values torch.int8 .* Got torch.f",
        ),
        (lambda s, r: s[f"{NAME}.col"].add_(1000), rf"{NAME}: BsrWeight: expected col in \[0, "),
        (lambda s, r: s[f"{NAME}.col"].sub_(1000), rf"{NAME}: BsrWeight: expected col in \[0, "),
        (lambda s, r: s[f"{NAME}.col"].copy_(s[f"{NAME}.col"].flip(0)), "strictly ascending within a row"),
        (lambda s, r: s[f"{NAME}.crow"][1:].add_(2**30), "expected crow to end"),
        (lambda s, r: s[f"{NAME}.crow"].copy_(s[f"{NAME}.crow"].flip(0)), "expected crow to start at 0"),
        (lambda s, r: s[f"{NAME}.values"].fill_(-128), "Got -128"),
        (lambda s, r: r["layers"][DENSE].update(block=[3, 3]), "dense.values torch.int8 .*, 3, 3"),
        (lambda s, r: r["layers"][DENSE].update(block=[0, 4]), "expected the block of .*dense"),
        (lambda s, r: r["layers"].update({DENSE: {"blocks": 4}}), "expected the block of .*dense"),
        (lambda s, r: r["layers"].pop(DENSE), "expected .*dense.weight_codes. Got none"),
    ],
)
def test_files_that_do_not_fit(change, message, tmp_path):
    _, record, stored = saved(tmp_path, share=0.9)
    change(stored, record)
    save_file({k: t.contiguous() for k, t in stored.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": record}))
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
