"""save_pretrained and from_pretrained of models that lost heads, and from_pretrained of what transformers 4 wrote."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import bertkern as bk
from bertkern.nn import Int8Linear, NoNorm
from tests.families.zoo import MODELS, answer, inputs, padded, tensors
from tests.pruned_exports import config_of, distinct, write
from tests.ragged_models import FAMILIES, HEADS, SIZE, kept, left, model_of, parts_of, some, zeroed

from .test_pretrained import auto

CLASSES = [name for name in MODELS if name.startswith(FAMILIES)]
QUERY = "bert.encoder.layer.1.attention.self.query"


def made(name):
    family = next(family for family in sorted(FAMILIES, key=len, reverse=True) if name.startswith(family))
    return family, model_of(family, name.removeprefix(family))


def same_tensors(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def assert_close(expected, got, atol=1e-5):
    expected, got = tensors(expected), tensors(got)
    assert expected.keys() == got.keys() and expected
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=atol, rtol=atol, msg=name)


def assert_float(model):
    assert not getattr(model, "is_quantized", False) and not hasattr(model, "hf_quantizer")
    assert not hasattr(model, "quantization_method") and not hasattr(model.config, "_is_quantized")


@pytest.mark.parametrize("name", CLASSES)
def test_the_same_bits(name, tmp_path):
    family, model = made(name)
    batch = padded(model, "trailing")
    answer(model, **batch)
    bk.prune_heads(model, some(family)).save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {key: record[key] for key in ("quant_method", "kind", "version")} == {
        "quant_method": "bertkern",
        "kind": "ragged",
        "version": 1,
    }
    numbers = left(some(family), len(parts_of(model)))
    assert [tuple(width["heads"]) for width in record["widths"].values()] == numbers
    loaded, info = auto(name).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(loaded) is type(model) and not loaded.training
    assert kept(loaded) == numbers and same_tensors(model, loaded)
    assert_float(loaded)
    assert loaded.config.quantization_config == model.config.quantization_config
    with torch.no_grad():
        assert_close(model(**batch), loaded(**batch))
        fast = bk.accelerate(copy.deepcopy(model))(**batch)
        again = bk.accelerate(loaded)(**batch)
        assert all(torch.equal(value, tensors(again)[key]) for key, value in tensors(fast).items())
    assert not bk.report(loaded).fallbacks
    loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("family", FAMILIES)
def test_other_heads_over_the_same_checkpoint(family, tmp_path):
    model = bk.prune_heads(model_of(family, "ForQuestionAnswering"), some(family))
    batch = inputs(model)
    model.save_pretrained(tmp_path / "head")
    base = transformers.AutoModel.from_pretrained(tmp_path / "head")
    with torch.no_grad():
        expected = model.base_model(**batch).last_hidden_state
        torch.testing.assert_close(base(**batch).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
        base.save_pretrained(tmp_path / "base")
        classifier, info = transformers.AutoModelForTokenClassification.from_pretrained(
            tmp_path / "base", output_loading_info=True
        )
        torch.testing.assert_close(classifier.base_model(**batch).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
        assert torch.isfinite(classifier(**batch).logits).all()
    assert "classifier.weight" in info["missing_keys"]
    assert kept(classifier) == kept(base) == kept(model)


def test_what_can_be_done_with_a_loaded_model(tmp_path):
    whole = model_of("Bert", "ForSequenceClassification")
    bk.prune_heads(copy.deepcopy(whole), some("Bert")).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    batch = inputs(loaded)
    bk.prune_heads(loaded, {0: [3]}).save_pretrained(tmp_path / "more")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "more")
    assert kept(again) == [(0, 2), (1,), ()] and same_tensors(again, loaded)
    reference = zeroed(whole, {**some("Bert"), 0: [1, 3]})
    with torch.no_grad():
        expected = reference(**batch).logits
        torch.testing.assert_close(again(**batch).logits, expected, atol=1e-5, rtol=1e-5)
        assert again.half().dtype == torch.float16 and again.float().dtype == torch.float32
        again.resize_token_embeddings(120)
        # int8, there and back.
        bk.quantize_(loaded, bk.Int8Config(keep_original=True)).save_pretrained(tmp_path / "int8")
        record = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
        assert record["kind"] == "int8" and [w["heads"] for w in record["widths"].values()] == [[0, 2], [1], []]
        int8 = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")
        assert torch.equal(int8(**batch).logits, loaded(**batch).logits)
        assert int8.bert.encoder.layer[2].attention.self.headless
        for back in (bk.restore(loaded), bk.dequantize(int8)):
            assert_float(back)
            assert kept(back) == [(0, 2), (1,), ()]
            back.save_pretrained(tmp_path / "back")
            last = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "back")
            assert same_tensors(last, back) and kept(last) == kept(back)
    bk.accelerate(last).save_pretrained(tmp_path / "fast")
    assert same_tensors(transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "fast"), back)


def test_training_by_trainer(tmp_path):
    model = bk.prune_heads(model_of("Bert", "ForSequenceClassification"), some("Bert"))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    batch = inputs(loaded, batch=8)
    rows = [{**{key: value[i] for key, value in batch.items()}, "labels": i % 2} for i in range(8)]
    arguments = transformers.TrainingArguments(
        tmp_path / "trainer", max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True, weight_decay=0.1
    )
    trainer = transformers.Trainer(loaded, arguments, train_dataset=rows)
    trainer.train()
    assert kept(loaded) == left(some("Bert"), 3) and not torch.equal(
        loaded.bert.encoder.layer[0].attention.self.query.weight,
        model.bert.encoder.layer[0].attention.self.query.weight,
    )
    trainer.save_model(tmp_path / "trained")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained")
    assert same_tensors(again, loaded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, tmp_path):
    model = bk.prune_heads(model_of("DistilBert").to(dtype), some("DistilBert"))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == dtype and same_tensors(loaded, model)
    other = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in other.parameters()} == {torch.float32} and kept(other) == kept(model)


def test_files_of_torch_and_in_parts(tmp_path):
    model = bk.prune_heads(model_of("Bert"), some("Bert"))
    model.save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    model.config.save_pretrained(tmp_path / "torch")
    torch.save(model.state_dict(), tmp_path / "torch" / "pytorch_model.bin")
    for folder in ("parts", "torch"):
        assert same_tensors(transformers.AutoModel.from_pretrained(tmp_path / folder), model)
        assert same_tensors(bk.load_checkpoint(tmp_path / folder), model)


def test_a_fresh_process(tmp_path, run_python):
    bk.prune_heads(model_of("MPNet"), some("MPNet")).save_pretrained(tmp_path)
    for order in ("import bertkern, transformers", "import transformers, bertkern"):
        code = (
            f"{order}; model = transformers.AutoModel.from_pretrained({str(tmp_path)!r}); "
            "print([layer.attention.attn.kept_heads for layer in model.encoder.layer])"
        )
        done = run_python(code)
        assert done.stdout.strip() == "[(0, 2, 3), (1,), (0,)]", done.stderr


def exported(folder, family, pruned, head="ForSequenceClassification", file="model.safetensors", **config):
    """A whole model, and the folder that transformers 4 would have written after it had pruned these heads."""
    model = model_of(family, head)
    state = distinct(model.state_dict())
    for index, parts in enumerate(parts_of(model)):
        columns = [h * SIZE + i for h in range(HEADS) if h not in pruned.get(index, ()) for i in range(SIZE)]
        names = {id(module): name for name, module in model.named_modules()}
        for slot in ("query", "key", "value"):
            name = names[id(getattr(*getattr(parts, slot)))]
            state[f"{name}.weight"], state[f"{name}.bias"] = (state[f"{name}.{t}"][columns] for t in ("weight", "bias"))
        name = f"{names[id(getattr(*parts.out))]}.weight"
        state[name] = state[name][:, columns]
    write(folder, state, config_of(model, pruned_heads={str(k): list(v) for k, v in pruned.items()}, **config), file)
    return model


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "sharded"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "MPNet"])
def test_checkpoints_of_transformers_4(family, file, tmp_path):
    pruned = some(family) if family != "Albert" else {0: range(HEADS)}
    whole = exported(tmp_path, family, pruned, file=file)
    assert any(0 in t.shape for t in bk.checkpoints.files.read_weights(tmp_path)[0].values())
    cls = transformers.AutoModelForSequenceClassification
    loaded, info = cls.from_pretrained(tmp_path, quantization_config=bk.RaggedConfig(), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = padded(whole, "trailing")
    assert kept(loaded) == left(pruned, len(parts_of(whole)))
    assert_float(loaded)
    assert not hasattr(loaded.config, "pruned_heads")
    with torch.no_grad():
        assert_close(zeroed(whole, pruned)(**batch), loaded(**batch))
    imported = bk.load_checkpoint(tmp_path)
    assert same_tensors(imported, loaded) and imported.config.quantization_config == loaded.config.quantization_config
    for index, each in enumerate((loaded, imported)):
        each.save_pretrained(tmp_path / str(index))
        assert same_tensors(cls.from_pretrained(tmp_path / str(index)), each)
        assert same_tensors(bk.load_checkpoint(tmp_path / str(index)), each)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = cls.from_pretrained(tmp_path / "0", quantization_config=bk.RaggedConfig())
    assert same_tensors(again, loaded) and kept(again) == kept(loaded)


def test_older_checkpoints(tmp_path):
    """Buffers that were saved, gamma and beta, a base model's names without a prefix."""
    whole = exported(tmp_path / "one", "Bert", {0: [1]}, "ForSequenceClassification")
    state = load_file(tmp_path / "one" / "model.safetensors")
    old = {}
    for name, tensor in state.items():
        old[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    old["bert.embeddings.position_ids"] = torch.arange(40)[None]
    save_file(old, tmp_path / "one" / "model.safetensors", {"format": "pt"})
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "one", quantization_config=bk.RaggedConfig()
    )
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in state.items())
    assert kept(loaded)[0] == (0, 2, 3)
    exported(tmp_path / "two", "Bert", {0: [1]}, "Model")
    headed = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "two", quantization_config=bk.RaggedConfig())
    assert kept(headed)[0] == (0, 2, 3)
    batch = inputs(whole)
    with torch.no_grad():
        assert torch.isfinite(headed(**batch).logits).all()


def test_int8_from_checkpoints_of_transformers_4(tmp_path):
    pruned = some("Bert")
    exported(tmp_path, "Bert", pruned)
    cls = transformers.AutoModelForSequenceClassification
    loaded = cls.from_pretrained(tmp_path, quantization_config=bk.Int8Config())
    direct = bk.quantize_(cls.from_pretrained(tmp_path, quantization_config=bk.RaggedConfig()))
    batch = inputs(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, direct(**batch).logits)
    assert isinstance(loaded.bert.encoder.layer[0].attention.self.query, Int8Linear)
    loaded.save_pretrained(tmp_path / "int8")
    with torch.no_grad():
        assert torch.equal(cls.from_pretrained(tmp_path / "int8")(**batch).logits, direct(**batch).logits)


def test_widths_by_hand_and_whole_models(tmp_path):
    """Checkpoints whose config says nothing; those that have lost nothing; a config for all of them."""
    model = bk.prune_heads(model_of("Roberta"), {1: [0]})
    model.config.__dict__.pop("quantization_config")
    model.save_pretrained(tmp_path / "mute")
    with pytest.raises(RuntimeError):
        transformers.AutoModel.from_pretrained(tmp_path / "mute")
    widths = {"encoder.layer.1": {"heads": [1, 2, 3]}}
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "mute", quantization_config=bk.RaggedConfig(widths))
    assert same_tensors(loaded, model) and kept(loaded)[1] == (1, 2, 3)
    assert loaded.config.quantization_config["widths"] == {"encoder.layer.1": {"heads": [1, 2, 3], "units": 117}}
    for name in ("BertModel", "MPNetModel", "AlbertModel"):
        _, whole = made(name)
        whole.save_pretrained(tmp_path / name)
        loaded = transformers.AutoModel.from_pretrained(tmp_path / name, quantization_config=bk.RaggedConfig())
        assert same_tensors(loaded, whole) and not hasattr(loaded.config, "quantization_config")
        assert_float(loaded)
    tiny = transformers.GPT2Model(transformers.GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=30))
    tiny.save_pretrained(tmp_path / "gpt2")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "gpt2", quantization_config=bk.RaggedConfig())
    assert same_tensors(loaded, tiny)


def test_units_too(tmp_path):
    """What accelerate removes is part of int8 checkpoints; a float one may be cut by hand."""
    model = model_of("Bert").double()
    with torch.no_grad():
        for parts in parts_of(model)[:2]:
            getattr(*parts.ffn2).weight[:, 40:] = 0
    whole, batch = zeroed(model, {0: [1]}), inputs(model)
    bk.prune_heads(model, {0: [1]})
    bk.shrink.shrink(model)
    bk.heads.record(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert [parts.ffn1[0].dense.out_features for parts in parts_of(loaded)] == [40, 40, 117]
    with torch.no_grad():
        assert_close(whole(**batch), loaded(**batch), atol=1e-12)


def test_models_without_norms(tmp_path):
    whole = exported(tmp_path, "Bert", {0: [1]}, layer_norm_type="no_norm", hidden_act="relu")
    whole.config.hidden_act = "relu"
    for module in whole.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, NoNorm.from_layer_norm(child))
            if name == "intermediate_act_fn":
                setattr(module, name, nn.ReLU())
    batch = inputs(whole)
    cls = transformers.AutoModelForSequenceClassification
    loaded = cls.from_pretrained(tmp_path, quantization_config=bk.RaggedConfig())
    imported = bk.load_checkpoint(tmp_path)
    with torch.no_grad():
        for index, each in enumerate((loaded, imported)):
            assert_close(zeroed(whole, {0: [1]})(**batch), each(**batch), atol=1e-4)
            each.save_pretrained(tmp_path / str(index))
            again = cls.from_pretrained(tmp_path / str(index))
            assert torch.equal(again(**batch).logits, each(**batch).logits)
            assert not any(isinstance(module, nn.LayerNorm) for module in again.modules())
    # Without heads to record, too.
    exported(tmp_path / "norms", "Bert", {}, layer_norm_type="no_norm")
    bk.load_checkpoint(tmp_path / "norms").save_pretrained(tmp_path / "again")
    again = cls.from_pretrained(tmp_path / "again")
    assert not any(isinstance(module, nn.LayerNorm) for module in again.modules())


def saved(folder, change_config=None, change_tensors=None):
    model = bk.prune_heads(model_of("Bert", "ForSequenceClassification"), {1: [0, 2], 2: range(HEADS)})
    model.save_pretrained(folder)
    if change_tensors:
        stored = load_file(folder / "model.safetensors")
        change_tensors(stored)
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
    if change_config:
        config = json.loads((folder / "config.json").read_text())
        change_config(config)
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def width(**values):
    return lambda config: config["quantization_config"]["widths"]["encoder.layer.1"].update(values)


def record(**values):
    return lambda config: config["quantization_config"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (width(heads=[1]), r"query.weight of shape \[13, 52\]. Got \[26, 52\]"),
        (width(heads=[0, 1, 3]), r"query.weight of shape \[39, 52\]. Got \[26, 52\]"),
        (width(heads=[]), r"query.weight of shape \[13, 52\]. Got \[26, 52\]"),
        (width(units=116), r"intermediate.dense.weight of shape \[116, 52\]. Got \[117, 52\]"),
        (lambda c: c["quantization_config"]["widths"].pop("encoder.layer.1"), r"of shape \[52, 52\]. Got \[26, 52\]"),
        (
            width(heads=[1, 4]),
            r"^from_pretrained: expected heads of bert.encoder.layer.1 to .*, from 0 to 3. Got \[1, 4\]",
        ),
        (width(heads=[3, 1]), r"heads of encoder.layer.1 to be ascending, from 0. Got \[3, 1\]"),
        (width(heads=[1, 1]), r"heads of encoder.layer.1 to be ascending, from 0. Got \[1, 1\]"),
        (width(heads=[-1, 1]), r"heads of encoder.layer.1 to be ascending, from 0. Got \[-1, 1\]"),
        (width(heads=[1.0, 3]), r"heads of encoder.layer.1 to be ascending, from 0. Got \[1.0, 3\]"),
        (width(heads="13"), r"heads of encoder.layer.1 to be ascending, from 0. Got '13'"),
        (width(units=0), "units of encoder.layer.1 to be at least 1. Got 0"),
        (width(units=118), r"^from_pretrained: expected units of bert.encoder.layer.1 to be from 1 to 117. Got 118"),
        (width(bias=1), "bias of encoder.layer.1 to be True or False. Got 1"),
        (width(rows=3), "heads, units and bias of encoder.layer.1. Got"),
        (record(widths=[1]), r"widths by name of the layer. Got \[1\]"),
        (record(widths={"encoder.layer.7": {"heads": [1]}}), "^from_pretrained: .* family. Got 'bert.encoder.layer.7'"),
        (record(version=2), "expected version 1. Got 2"),
        (record(kind="holes"), "Got 'holes'"),
        (record(groups=2), r"Got \['groups'\]"),
        (lambda c: c.update(num_attention_heads=2), "expected"),
        (lambda c: c.update(is_decoder=True), "^from_pretrained: .* Got a decoder"),
        (lambda c: c.update(pruned_heads={"1": [0]}), r"heads of encoder.layer.1. Got \[1, 2, 3\] and \[1, 3\]"),
        (lambda c: c.update(pruned_heads={"1": [0, 2]}), r"heads of encoder.layer.2. Got \[0, 1, 2, 3\] and \[\]"),
    ],
)
def test_records_that_the_tensors_contradict(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForSequenceClassification.from_pretrained(saved(tmp_path, change))
    with pytest.raises(ValueError, match="load_checkpoint: expected"):
        bk.load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({f"{QUERY}.weight": torch.zeros(52, 52)}), r"of shape \[26, 52\]. Got \[52, 52\]"),
        (lambda s: s.update({f"{QUERY}.bias": torch.zeros(52)}), r"query.bias of shape \[26\]. Got \[52\]"),
        (lambda s: s.pop(f"{QUERY}.weight"), r"query.weight of shape \[26, 52\]. Got none"),
        (lambda s: s[QUERY.replace("1", "2") + ".bias"].fill_(1), "layer.2.*query.bias to be zeros, as the config"),
        (
            lambda s: s["bert.encoder.layer.2.attention.output.dense.weight"].fill_(1),
            "layer.2.attention.output.dense.weight to be zeros, as the config records no heads",
        ),
        (
            lambda s: s.update({QUERY.replace("1", "2") + ".weight": torch.zeros(26, 52)}),
            r"query.weight of shape \[13, 52\]. Got \[26, 52\]",
        ),
    ],
)
def test_tensors_that_contradict_the_record(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForSequenceClassification.from_pretrained(saved(tmp_path, change_tensors=change))


def test_records_that_agree(tmp_path):
    both = saved(tmp_path, lambda c: c.update(pruned_heads={"1": [2, 0], "2": [0, 1, 2, 3]}))
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(both)
    assert kept(loaded) == [(0, 1, 2, 3), (1, 3), ()] and not hasattr(loaded.config, "pruned_heads")


@pytest.mark.parametrize(
    ("pruned", "message"),
    [
        ({"0": [4]}, "lists of heads below 4 by layer below 3"),
        ({"0": [1, 1]}, "lists of heads below 4"),
        ({"3": [1]}, "by layer below 3"),
        ([1], r"Got \[1\]"),
        ({"0": [1]}, r"query.weight of shape \[39, 52\]. Got \[52, 52\]"),
    ],
)
def test_wrong_pruned_heads(pruned, message, tmp_path):
    model = model_of("Bert")
    write(tmp_path, model.state_dict(), config_of(model, pruned_heads=pruned))
    with pytest.raises(ValueError, match=f"from_pretrained: (.|\n)*{message}"):
        transformers.AutoModel.from_pretrained(tmp_path, quantization_config=bk.RaggedConfig())


def test_other_configs_beside_a_record(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match="quantized with RaggedConfig but you are passing a Int8Config"):
        transformers.AutoModel.from_pretrained(tmp_path, quantization_config=bk.Int8Config())
    bk.quantize_(model_of("Bert")).save_pretrained(tmp_path / "int8")
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = transformers.AutoModel.from_pretrained(tmp_path / "int8", quantization_config=bk.Int8Config())
    assert isinstance(again.encoder.layer[0].attention.self.query, Int8Linear)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": 2}, "expected version 1. Got 2"),
        ({"version": True}, "expected version 1. Got True"),
        ({"widths": None}, "widths by name of the layer. Got None"),
        ({"widths": {1: {}}}, "widths by name of the layer. Got {1: {}}"),
        ({"widths": {"a": []}}, r"heads, units and bias of a. Got \[\]"),
        ({"widths": {"a": {"heads": [True]}}}, "heads of a to be ascending"),
    ],
)
def test_wrong_configs(values, message):
    with pytest.raises(ValueError, match=f"RaggedConfig: .*{message}"):
        bk.RaggedConfig(**values)
    with pytest.raises(ValueError, match=f"RaggedConfig: .*{message}"):
        bk.RaggedConfig.from_dict(values)


def test_the_config_as_json():
    config = bk.RaggedConfig({"encoder.layer.0": {"heads": (0, 2), "units": 7}})
    again = bk.RaggedConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.widths["encoder.layer.0"] == {"heads": [0, 2], "units": 7}
    assert bk.RaggedConfig().to_dict() == {"kind": "ragged", "widths": {}, "version": 1}
    for wrong in ([], None, {"kind": "int8"}, {"kind": "ragged", "more": 1}):
        with pytest.raises(ValueError, match="RaggedConfig: expected"):
            bk.RaggedConfig.from_dict(wrong)
