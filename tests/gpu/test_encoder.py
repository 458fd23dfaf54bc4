"""Whole models by the GPU's path, its operators in plain PyTorch on CPU tensors, against the CPU's path and eager."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import bertkern as bk
from bertkern.config import GroupwiseConfig, Int8Config
from bertkern.nn.gpu_encoder import GpuStack
from tests.gpu.conftest import everywhere
from tests.gpu.measures import sqnr
from tests.tiny_models import inputs, main_output, tiny

NAMES = ["BertModel", "RobertaModel", "ElectraModel", "DistilBertModel", "MPNetModel", "AlbertModel"]
CONFIGS = {
    "float": None,
    "int8": Int8Config(),
    "int8-symmetric": Int8Config(weight="per_tensor"),
    "static": Int8Config(activation="static"),
    "static-unsigned": Int8Config(activation="static", activation_unsigned=True),
    "groupwise": GroupwiseConfig(bits=4, groups=None, group_size=8, axis="n"),
    "groupwise-k": GroupwiseConfig(bits=3, groups=None, group_size=16, axis="k", activation="float"),
}


def run_by(model: nn.Module, config, **options) -> nn.Module:
    if config is None:
        return bk.accelerate(model, measure=False, **options)
    if config.activation == "static":
        options["calibration"] = [inputs(model, seed=seed) for seed in range(3)]
    return bk.quantize_(model, config, measure=False, **options)


def batch_of(model: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    batch = inputs(model, 4, 13, padding=False)
    mask = batch["attention_mask"]
    if kind == "none":
        del batch["attention_mask"]
    if kind in ("trailing", "all"):
        mask[1, 9:] = mask[2, 1:] = 0
    if kind in ("left", "all"):
        mask[3, :5] = 0
    if kind in ("holes", "all"):
        mask[0, 2:4] = mask[0, 12:] = 0
    if kind == "empty":
        mask[2] = 0
    return batch


def model_of(name: str, attention: str) -> nn.Module:
    # MPNet has one implementation, its own.
    return tiny(name) if name.startswith("MPNet") else tiny(name, _attn_implementation=attention)


def both(name: str, config, batch_kind: str, attention: str = "sdpa", **options) -> tuple:
    """Outputs by the GPU's path and by the CPU's, and the batch."""
    model = model_of(name, attention)
    batch = batch_of(model, batch_kind)
    on_cpu = run_by(copy.deepcopy(model), config, **options)
    with torch.no_grad():
        expected = on_cpu(**batch, output_hidden_states=True)
    with everywhere(), torch.no_grad():
        on_gpu = run_by(model, config, **options)
        stacks = [module._stack for module in on_gpu.modules() if getattr(module, "_stack", None) is not None]
        assert stacks and all(isinstance(stack, GpuStack) for stack in stacks)
        got = on_gpu(**batch)
        states = on_gpu(**batch, output_hidden_states=True)
        assert not bk.report(on_gpu).fallbacks
    # Asking for hidden states changes no bit.
    assert torch.equal(main_output(got), main_output(states))
    for mine, theirs in zip(states.hidden_states, expected.hidden_states, strict=True):
        assert mine.shape == theirs.shape and mine.isfinite().all()
    return got, expected, batch


# Every family in floats and int8, every format in one of them.
FORMS = [(name, config) for name in NAMES for config in CONFIGS if config in ("float", "int8") or name == "BertModel"]


@pytest.mark.parametrize(("name", "config"), FORMS)
def test_families_and_formats(name, config):
    got, expected, _ = both(name, CONFIGS[config], "all", exact_attention=True)
    mine, theirs = main_output(got), main_output(expected)
    exact = config in ("float", "groupwise-k")
    assert sqnr(mine, theirs) > (100 if exact else 40)
    dropped = torch.zeros(4, 13, dtype=torch.bool)
    dropped[1, 9:] = dropped[2, 1:] = dropped[0, 12:] = True
    assert not mine[dropped].any() and mine[~dropped].any(-1).all()
    if got.get("pooler_output") is not None:
        assert sqnr(got.pooler_output, expected.pooler_output) > (90 if exact else 35)


# By families that leave the padding out and that keep it; MPNet has one attention.
MASKS = [
    (name, kind, attention, keep)
    for name, attention in (("BertModel", "sdpa"), ("BertModel", "eager"), ("MPNetModel", "eager"))
    for kind in ("none", "trailing", "left", "holes", "empty")
    for keep in ((False, True) if kind in ("left", "empty") else (False,))
]


@pytest.mark.parametrize(("name", "kind", "attention", "keep"), MASKS)
def test_masks(name, kind, attention, keep):
    got, expected, _ = both(name, None, kind, attention, keep_padding=keep)
    torch.testing.assert_close(main_output(got), main_output(expected), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", ["float", "int8", "groupwise"])
@pytest.mark.parametrize("name", ["BertModel", "DistilBertModel"])
def test_half_precision(on_gpu, name, config, dtype):
    model = tiny(name)
    batch = batch_of(model, "all")
    with torch.no_grad():
        unquantized = bk.accelerate(copy.deepcopy(model), measure=False)(**batch).last_hidden_state
        run_by(model, CONFIGS[config], exact_attention=True)
        expected = model(**batch).last_hidden_state
        got = model.to(dtype)(**batch).last_hidden_state
    assert got.dtype == dtype and not bk.report(model).fallbacks
    # Codes at a border move with the last bits of half precision: that may cost what rounding to codes cost before.
    assert sqnr(got, expected) > min(sqnr(expected, unquantized), 45) - (0 if dtype == torch.float16 else 18)


def test_int8_attention_is_bf16_unless_it_is_to_be_exact(on_gpu):
    made = []
    for exact in (False, True):
        model = bk.quantize_(tiny("BertModel"), measure=False, exact_attention=exact)
        with torch.no_grad():
            made.append(model(**inputs(model)).last_hidden_state)
    assert 30 < sqnr(*made) < 70


def test_sparse_blocks(on_gpu):
    from bertkern.nn.sparse import Form, SparseLinear

    torch.manual_seed(0)
    for form in (Form("panels", 16, 16), Form("panels", 32, 16), Form("panels", 16, 4), Form("tokens", 1, 4)):
        linear = nn.Linear(64, 96)
        with torch.no_grad():
            linear.weight.view(6, 16, 4, 16)[torch.rand(6, 1, 4, 1).expand(6, 16, 4, 16) < 0.5] = 0
        x = torch.randn(3, 5, 64)
        expected = linear(x)
        sparse = bk.nn.sparse.sparsify(linear.eval(), form)
        assert isinstance(sparse, SparseLinear)
        with torch.no_grad():
            torch.testing.assert_close(sparse(x), expected, atol=1e-5, rtol=1e-5)
        x.requires_grad_()
        sparse(x).sum().backward()
        assert x.grad is not None


def test_a_sparse_model(on_gpu):
    model = tiny("BertModel", hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.intermediate.dense.weight[:64, :32] = 0
            layer.intermediate.dense.weight[64:, 32:] = 0
    batch = batch_of(model, "all")
    with torch.no_grad():
        expected = bk.accelerate(copy.deepcopy(model), measure=False, sparse=False)(**batch).last_hidden_state
        from bertkern.nn.sparse import Form, sparsify

        for layer in model.encoder.layer:
            sparsify(layer.intermediate.dense, Form("panels", 32, 32))
        got = bk.accelerate(model, measure=False)(**batch).last_hidden_state
    assert {linear.name for pack in model.encoder._stack.packs for linear in (pack.ffn1,)} == {"block-sparse"}
    torch.testing.assert_close(got, expected, atol=5e-6, rtol=1e-5)


def test_head_masks(on_gpu):
    for config in (None, Int8Config()):
        model = run_by(tiny("BertModel"), config)
        batch = batch_of(model, "all")
        mask = torch.tensor([[1.0, 0, 0.5, 1], [0, 1, 1, 2]])
        with torch.no_grad():
            plain = model(**batch).last_hidden_state
            by_keyword = model(**batch, head_mask=mask).last_hidden_state
            with bk.head_mask(model, mask):
                within = model(**batch).last_hidden_state
            each = model(**batch, head_mask=mask[:, None].expand(2, 4, 4)).last_hidden_state
            ones = model(**batch, head_mask=torch.ones(2, 4)).last_hidden_state
        assert torch.equal(by_keyword, within) and torch.equal(by_keyword, each) and torch.equal(plain, ones)
        assert sqnr(by_keyword, plain) < 20 and not bk.report(model).fallbacks


def test_head_masks_as_on_the_cpu():
    mask = torch.tensor([[1.0, 0, 0.5, 1], [0, 1, 1, 2]])
    model = tiny("RobertaModel")
    batch = batch_of(model, "all")
    with torch.no_grad():
        expected = bk.accelerate(copy.deepcopy(model), measure=False)(**batch, head_mask=mask).last_hidden_state
        with everywhere():
            got = bk.accelerate(model, measure=False)(**batch, head_mask=mask).last_hidden_state
    torch.testing.assert_close(got, expected, atol=5e-6, rtol=1e-5)


def test_pruned_heads_and_units():
    model = tiny("BertModel")
    bk.prune_heads(model, {0: [1, 3], 1: [0]})
    batch = batch_of(model, "all")
    with torch.no_grad():
        expected = bk.accelerate(copy.deepcopy(model), measure=False)(**batch).last_hidden_state
        with everywhere():
            got = bk.accelerate(model, measure=False)
            assert [pack.heads for pack in got.encoder._stack.packs] == [2, 3]
            got = got(**batch).last_hidden_state
    torch.testing.assert_close(got, expected, atol=5e-6, rtol=1e-5)


def test_packed_hidden_states(on_gpu):
    model = bk.accelerate(tiny("BertModel"), measure=False)
    batch = batch_of(model, "all")
    with torch.no_grad():
        states = bk.encode_packed(model, **batch)
        padded = model(**batch).last_hidden_state
    real = batch["attention_mask"] > 0
    torch.testing.assert_close(states.hidden, padded[real], atol=5e-6, rtol=1e-5)


def test_four_dimensional_masks(on_gpu):
    model = bk.accelerate(tiny("BertModel"), measure=False)
    x = torch.randn(2, 7, 48)
    keys = torch.ones(2, 7, dtype=torch.bool)
    keys[1, 4:] = False
    with torch.no_grad():
        expected = model.encoder(x, keys).last_hidden_state
        for mask in (
            keys[:, None, None],
            keys[:, None, None].expand(2, 1, 7, 7),
            torch.zeros(2, 1, 1, 7).masked_fill(~keys[:, None, None], torch.finfo(torch.float32).min),
            torch.zeros(2, 1, 1, 7).masked_fill(~keys[:, None, None], -math.inf),
        ):
            got = model.encoder(x, mask).last_hidden_state
            torch.testing.assert_close(got, expected, atol=5e-6, rtol=1e-5)
        # What the CPU's operator leaves to the plain path.
        causal = torch.ones(7, 7, dtype=torch.bool).tril()[None, None].expand(2, 1, 7, 7)
        got = model.encoder(x, causal).last_hidden_state
        bk.restore(model)
        torch.testing.assert_close(got, model.encoder(x, causal).last_hidden_state, atol=5e-6, rtol=1e-5)


def test_gradients_take_the_plain_path(on_gpu):
    for config in (None, Int8Config()):
        model = run_by(tiny("BertModel"), config)
        batch = batch_of(model, "trailing")
        y = model(**batch).last_hidden_state
        y.square().sum().backward()
        assert model.encoder.layer[0].attention.output.LayerNorm.weight.grad.abs().sum() > 0
        assert any("gradients are recorded" in reason for reason in bk.report(model).fallbacks)
        with torch.no_grad():
            again = model(**batch).last_hidden_state
        real = batch["attention_mask"] > 0
        assert sqnr(y.detach()[real], again[real]) > (100 if config is None else 20)


def test_training_mode_and_back(on_gpu):
    model = bk.accelerate(tiny("BertModel"), measure=False)
    batch = batch_of(model, "all")
    with torch.no_grad():
        before = model(**batch).last_hidden_state
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    model(**batch).last_hidden_state.square().mean().backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        after = model(**batch).last_hidden_state
        plain = bk.restore(copy.deepcopy(model))(**batch).last_hidden_state
    real = batch["attention_mask"] > 0
    assert not torch.equal(before, after)
    torch.testing.assert_close(after[real], plain[real], atol=5e-6, rtol=1e-5)


def test_autocast_takes_the_plain_path(on_gpu):
    model = bk.accelerate(tiny("BertModel"), measure=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**inputs(model))
    assert any("autocast" in reason for reason in bk.report(model).fallbacks)


def test_weights_that_change_are_followed(on_gpu):
    for config in (None, Int8Config()):
        model = run_by(tiny("BertModel"), config)
        batch = inputs(model)
        with torch.no_grad():
            before = model(**batch).last_hidden_state
            layer = model.encoder.layer[0].attention.self.query
            (layer.weight if config is None else layer.weight_scale).mul_(2)
            after = model(**batch).last_hidden_state
            again = copy.deepcopy(model)(**batch).last_hidden_state
        assert not torch.equal(before, after) and torch.equal(after, again)


def test_a_copy_that_other_models_changes_keep(on_gpu):
    """An exchange in another model makes nothing anew."""
    model, other = (bk.accelerate(tiny("BertModel"), measure=False) for _ in range(2))
    batch = inputs(model)
    with torch.no_grad():
        model(**batch)
        stack = model.encoder._stack
        other.encoder.layer[0].output.dense.weight = nn.Parameter(torch.randn(48, 80))
        other(**batch), model(**batch)
    assert model.encoder._stack is stack


def test_restore_gives_the_model_back(on_gpu):
    model = tiny("BertForSequenceClassification")
    batch = inputs(model)
    with torch.no_grad():
        expected = model(**batch).logits
        bk.accelerate(model, measure=False)
        torch.testing.assert_close(model(**batch).logits, expected, atol=5e-6, rtol=1e-5)
        assert torch.equal(bk.restore(model)(**batch).logits, expected)


def test_a_model_that_is_moved_later():
    """Accelerated on a CPU, then run where the GPU's path is: stacks are made anew by the move."""
    model = bk.quantize_(tiny("BertModel"), measure=False, exact_attention=True)
    batch = inputs(model)
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        with everywhere():
            model.to("cpu")  # as `.cuda()` does
            assert isinstance(model.encoder._stack, GpuStack)
            got = model(**batch).last_hidden_state
            assert not bk.report(model).fallbacks
        model.to("cpu")
        assert torch.equal(model(**batch).last_hidden_state, expected)
    assert sqnr(got, expected) > 40


def test_empty_batches(on_gpu):
    model = bk.quantize_(tiny("BertModel"), measure=False)
    with torch.no_grad():
        for shape in ((0, 5), (2, 1)):
            ids = torch.full(shape, 7)
            assert model(ids, torch.ones_like(ids)).last_hidden_state.shape == (*shape, 48)


def test_reports_say_what_runs(on_gpu):
    for config, kind, leaf in ((None, "torch", "torch"), (Int8Config(), "int8", "int8")):
        rows = {row.name: row for row in bk.report(run_by(tiny("BertModel"), config)).rows}
        assert rows["encoder"].runs == f"operators on cpu, linear layers {kind}"
        assert rows["encoder.layer.0.output.dense"].runs == leaf
