"""Files of pruned float models may hold their blocks, and give the same bits back."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

import bertkern as bk
from bertkern.formats import BsrWeight
from bertkern.nn import BlockSparseLinear, SparseLinear
from tests.families.test_sparse import pruned
from tests.families.zoo import FAMILIES, answer, make, padded
from tests.hf.test_blocks_in_files import auto

DENSE = "encoder.layer.0.intermediate.dense"


def record_in(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def expect_state(model, state):
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits(family, accelerated, tmp_path):
    model = pruned(family + "ForTokenClassification", share=0.9)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = padded(model, "trailing")
    if accelerated:
        bk.accelerate(model, measure=False)
    expected = answer(model, **batch)
    bk.save_blocks(model, tmp_path / "blocks")
    assert not hasattr(model.config, "quantization_config")
    assert all(torch.equal(answer(model, **batch)[key], value) for key, value in expected.items())
    model.save_pretrained(tmp_path / "dense")
    sizes = [(tmp_path / kind / "model.safetensors").stat().st_size for kind in ("blocks", "dense")]
    assert sizes[0] < sizes[1]
    stored, blocks = load_file(tmp_path / "blocks" / "model.safetensors"), record_in(tmp_path / "blocks")["blocks"]
    assert blocks and not any(f"{model.base_model_prefix}.{name}.weight" in stored for name in blocks)
    loaded, info = auto(model).from_pretrained(tmp_path / "blocks", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expect_state(loaded, state)
    assert not hasattr(loaded.config, "quantization_config") and not getattr(loaded, "is_quantized", False)
    assert not any(isinstance(module, (BlockSparseLinear, SparseLinear)) for module in loaded.modules())
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in loaded.parameters())
    bk.accelerate(loaded.eval(), measure=False)
    if accelerated:
        assert all(torch.equal(answer(loaded, **batch)[key], value) for key, value in expected.items())


def test_a_ragged_model_keeps_its_widths(tmp_path):
    model = bk.prune_heads(pruned("BertForSequenceClassification", share=0.9), {0: [1], 1: [0, 1]})
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = dict(model.config.quantization_config)
    bk.save_blocks(bk.accelerate(model, measure=False), tmp_path, max_shard_size="20KB")
    assert model.config.quantization_config == own and "blocks" not in own
    assert record_in(tmp_path)["widths"] == own["widths"] and record_in(tmp_path)["blocks"]
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = auto(model).from_pretrained(tmp_path)
    expect_state(loaded, state)
    assert loaded.config.quantization_config == own


def test_other_heads_and_dtypes(tmp_path):
    model = pruned("BertForSequenceClassification", share=0.9)
    bk.save_blocks(model, tmp_path / "head")
    base = transformers.AutoModel.from_pretrained(tmp_path / "head")
    expect_state(base, model.bert.state_dict())
    bk.save_blocks(base, tmp_path / "base")
    assert f"{DENSE}.values" in load_file(tmp_path / "base" / "model.safetensors")
    tagger = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "base")
    expect_state(tagger.bert, {name: tensor for name, tensor in base.state_dict().items() if "pooler" not in name})
    half = transformers.AutoModel.from_pretrained(tmp_path / "head", dtype=torch.bfloat16)
    expect_state(half, base.to(torch.bfloat16).state_dict())
    quantized = transformers.AutoModel.from_pretrained(tmp_path / "head")
    assert bk.quantize_(quantized, measure=False).is_quantized


def test_a_tied_head_and_dense_weights_stay_as_they_are(tmp_path):
    model = make("BertForMaskedLM")
    bk.prune_(model, bk.UnstructuredPruneConfig(sparsity=0.95))
    bk.save_blocks(model, tmp_path / "tied")
    assert not any("decoder" in name for name in record_in(tmp_path / "tied")["blocks"])
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "tied")
    expect_state(loaded, model.state_dict())
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    bk.save_blocks(make("BertModel"), tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_block_sparse_layers_come_back_dense(tmp_path):
    model = pruned("BertModel", share=0.9)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = model.encoder.layer[0].intermediate.dense
    model.encoder.layer[0].intermediate.dense = BlockSparseLinear.from_linear(dense, (4, 4))
    bk.save_blocks(model, tmp_path)
    assert record_in(tmp_path)["blocks"][DENSE] == [4, 4]
    expect_state(transformers.AutoModel.from_pretrained(tmp_path), state)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(TypeError, match=r"save_blocks: expected a model of transformers. Got Linear"):
        bk.save_blocks(nn.Linear(2, 2), tmp_path)
    model = pruned("BertModel", share=0.9)
    prune.identity(model.encoder.layer[0].output.dense, "weight")
    with pytest.raises(ValueError, match=r"expected plain weights. Got encoder.layer.0.output.dense under torch"):
        bk.save_blocks(model, tmp_path)
    bk.accelerate(model, measure=False)
    bk.save_blocks(model, tmp_path)
    transformers.AutoModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"save_blocks: expected a float model. Got one that is int8"):
        bk.save_blocks(bk.quantize_(pruned("BertModel"), measure=False), tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_a_file_stays_as_it_is(share, tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    for place in (file, str(file)):
        with pytest.raises(FileExistsError, match=r"save_blocks: expected a folder. Got the file .*file\."):
            bk.save_blocks(pruned("BertModel", share=share), place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and file.read_text() == "old"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s, r: s.pop(f"{DENSE}.col"), r"dense.col torch.int32 of shape .*. Got none"),
        (lambda s, r: s.update({f"{DENSE}.col": s[f"{DENSE}.col"].long()}), "dense.col torch.int32 .* Got I64"),
        (lambda s, r: s.update({f"{DENSE}.crow": s[f"{DENSE}.crow"][:-1]}), r"dense.crow torch.int32 of shape"),
        (lambda s, r: s.update({f"{DENSE}.values": s[f"{DENSE}.values"][:-1]}), "dense.col torch.int32 of shape"),
        (lambda s, r: s.pop(f"{DENSE}.values"), "dense.values of shape .* Got none"),
        (lambda s, r: r["blocks"][DENSE].reverse(), "dense.(crow|values)"),
        (lambda s, r: r["blocks"].update({DENSE: [0, 4]}), r"the block of .*dense, such as \[16, 4\]. Got \[0, 4\]"),
        (lambda s, r: r["blocks"].update({DENSE: "16x4"}), "the block of .*dense"),
        (lambda s, r: r.update(blocks=[DENSE]), "expected blocks by name"),
        (lambda s, r: r["blocks"].pop(DENSE), "dense.weight of shape .* Got none"),
        (lambda s, r: s[f"{DENSE}.col"].fill_(9999), r"dense: BsrWeight: expected col in"),
        (lambda s, r: s[f"{DENSE}.crow"].fill_(-1), r"dense: BsrWeight: expected crow to start at 0"),
    ],
)
def test_damaged_files(damage, message, tmp_path):
    model = pruned("BertModel", share=0.9)
    with torch.no_grad():  # blocks that cannot be mistaken for others
        kept = (torch.rand(117, 13, generator=torch.Generator().manual_seed(0)) < 0.3).repeat_interleave(4, 1)
        model.get_submodule(DENSE).weight.fill_(1.0).mul_(kept)
    bk.save_blocks(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["blocks"][DENSE] == [1, 4]
    damage(state, config["quantization_config"])
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_a_dense_state_beside_the_record(tmp_path):
    model = pruned("BertModel", share=0.9)
    bk.save_blocks(model, tmp_path)
    save_file(
        {name: t.clone() for name, t in model.state_dict().items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    expect_state(transformers.AutoModel.from_pretrained(tmp_path), model.state_dict())


def test_blocks_are_canonical(tmp_path):
    model = pruned("BertModel", share=0.9)
    bk.save_blocks(bk.accelerate(model, measure=False), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name, block in record_in(tmp_path)["blocks"].items():
        full = bk.restore(model).get_submodule(name).weight
        parts = {key: stored[f"{name}.{key}"] for key in BsrWeight.TENSORS}
        weight = BsrWeight.from_tensors(parts, tuple(full.shape))
        assert list(weight.block) == block and torch.equal(weight.to_dense(), full)
