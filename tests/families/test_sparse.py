"""Models full of zeros: accelerate and quantize_ skip them, change no answer, and give everything back."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import bertkern as bk
from bertkern import tuning
from bertkern.families import layers_of
from bertkern.nn import BlockSparseLinear, Form, Int8Linear, PackedLinear, SparseLinear

from .test_accelerate import assert_same
from .zoo import FAMILIES, OWN_WEIGHTS, answer, inputs, make, padded

FORMS = (Form("panels", 16, 1), Form("panels", 16, 4), Form("tokens", 1, 1), Form("tokens", 4, 4), Form("tokens", 2, 3))


def pruned(name, share=0.8, dead=True, **options):
    """A model with scattered zeros, a dead head and dead and constant units."""
    model = make(name, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for index, (_, layer, family) in enumerate(layers_of(model)):
            parts = family.parts(layer)
            query, key, value, out, ffn1, ffn2 = (getattr(*slot) for slot in parts.linears())
            for linear in (query, key, value, out, ffn1, ffn2):
                linear.weight[torch.rand(linear.weight.shape, generator=generator) < share] = 0
            if dead and index == 1:
                out.weight[:, :26] = 0
                ffn2.weight[:, 5:20] = 0
                ffn1.weight[40:50] = 0
    return model


@pytest.fixture
def every_form(monkeypatch):
    """Layers take the forms in turn, whatever is fastest here."""
    made = []

    def choose(weight, pack_dense, scale, times, rows):
        made.append(FORMS[len(made) % len(FORMS)])
        return tuning.Choice(made[-1], {str(made[-1]): 0.5}, measured=True)

    monkeypatch.setattr(tuning, "choose", choose)
    return made


def linears(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["none", "trailing", "left"])
def test_answers_in_every_form(family, padding, every_form):
    model = pruned(family + "ForTokenClassification")
    batch = padded(model, padding)
    with torch.no_grad():
        expected = model(**batch)
        got = bk.accelerate(model)(**batch)
    assert_same(expected, got, batch["attention_mask"])
    assert not bk.report(model).fallbacks
    assert len(linears(model, SparseLinear)) == len(every_form) >= 6 * len(list(layers_of(model)))


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_skips_zeros_with_the_bits_of_the_dense_kernels(family, every_form, monkeypatch):
    model = pruned(family + "ForSequenceClassification")
    dense = copy.deepcopy(model)
    bk.quantize_(model)
    assert {module.form for module in linears(model, Int8Linear)} == set(FORMS)
    monkeypatch.setattr(tuning, "choose", lambda *_: tuning.Choice(tuning.DENSE))
    bk.quantize_(dense)
    batch = padded(model, "trailing")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, dense(**batch).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dicts_are_those_of_the_whole_dense_model(family, every_form, tmp_path):
    model = pruned(family + "Model")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = inputs(model)
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        accelerated = bk.accelerate(model)(**batch).last_hidden_state
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

        model.save_pretrained(tmp_path)
        loaded = type(make(family + "Model")).from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(**batch).last_hidden_state, expected)

        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(**batch).last_hidden_state, accelerated)

        bk.restore(model)
        assert torch.equal(model(**batch).last_hidden_state, expected)
    assert not linears(model, (SparseLinear, PackedLinear))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert [name for name, _ in model.named_parameters()] == [n for n, _ in make(family + "Model").named_parameters()]


@pytest.mark.parametrize("family", FAMILIES)
def test_other_weights_are_loaded(family, every_form):
    model, other = pruned(family + "Model"), make(family + "Model")
    batch = inputs(model)
    with torch.no_grad():
        bk.accelerate(model)
        model.load_state_dict(other.state_dict())
        assert_same(other(**batch), model(**batch), batch["attention_mask"])


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_models_keep_their_widths_in_files(family, tmp_path):
    model = pruned(family + "ForSequenceClassification", **OWN_WEIGHTS.get(family, {}))
    batch = padded(model, "trailing")
    with torch.no_grad():
        expected = bk.quantize_(model)(**batch).logits
        model.save_pretrained(tmp_path)
        loaded = type(make(family + "ForSequenceClassification")).from_pretrained(tmp_path)
        assert torch.equal(loaded(**batch).logits, expected)
        base = type(make(family + "Model")).from_pretrained(tmp_path)
        got = [layer for layer in base.state_dict() if layer.endswith("weight_codes")]
        assert {base.state_dict()[name].shape for name in got} == {
            model.base_model.state_dict()[name].shape for name in got
        }
    assert 26 in {linear.out_features for linear in linears(loaded, Int8Linear)}


def test_dequantize_gives_whole_matrices_back():
    model = pruned("BertModel")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    bk.dequantize(bk.quantize_(model))
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes


def test_restore_after_quantizing_with_originals():
    model = pruned("BertModel")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bk.restore(bk.quantize_(model, bk.Int8Config(keep_original=True)))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("swap", [bk.accelerate, bk.quantize_])
def test_models_under_torchs_pruning(swap, every_form):
    model = make("BertForSequenceClassification")
    for module in list(model.bert.encoder.modules()):
        if isinstance(module, nn.Linear):
            prune.l1_unstructured(module, "weight", 0.7)
    names = list(model.state_dict())
    batch = padded(model, "trailing")
    with torch.no_grad():
        expected = model(**batch).logits
        got = swap(model)(**batch).logits
        torch.testing.assert_close(got, expected, atol=2e-5 if swap is bk.accelerate else 0.3, rtol=1e-4)
        assert not bk.report(model).fallbacks
        assert not any(name.endswith("_mask") for name in model.state_dict())
        if swap is bk.accelerate:
            bk.restore(model)
            assert list(model.state_dict()) == names
            assert torch.equal(model(**batch).logits, expected)


def masked():
    linear = nn.Linear(64, 64).eval()
    return prune.l1_unstructured(linear, "weight", 0.9)


def test_masked_layers_that_no_other_can_stand_in_for_are_left():
    x = torch.randn(3, 64)
    seen = []
    hooked = nn.Sequential(masked())
    hooked[0].register_forward_hook(lambda *_: seen.append(1))
    accelerated = nn.Sequential(bk.accelerate(nn.Sequential(nn.Linear(64, 64))).eval()[0])
    prune.l1_unstructured(accelerated[0], "weight", 0.9)
    with torch.no_grad():
        for model in (masked(), hooked, accelerated):
            expected = model(x)
            torch.testing.assert_close(bk.accelerate(model)(x), expected)
            assert "its weight is computed by a hook" in str(bk.report(model))
    assert len(seen) == 2


def test_matrices_too_wide_for_lists_stay_dense():
    model = nn.Sequential(nn.Linear(66_000, 32)).eval()
    x = torch.randn(2, 66_000)
    with torch.no_grad():
        model[0].weight[:, 100:] = 0
        expected = model(x)
        for plan in (None, tuning.Plan({"0": tuning.Choice(Form("panels", 16, 1))})):
            torch.testing.assert_close(bk.accelerate(model, plan=plan)(x), expected, atol=1e-4, rtol=1e-4)
            assert isinstance(model[0], PackedLinear)


def test_a_plan_with_blocks_beyond_all_measure_is_not_followed():
    plan = tuning.Plan({"0": tuning.Choice(Form("panels", 2**30, 2**30))})
    assert bk.accelerate(heavy(0.9), plan=plan)[0].form.rows < 100


def test_training_goes_on_from_the_kept_blocks(every_form):
    model = pruned("BertForSequenceClassification", dead=False)
    twin = copy.deepcopy(model)
    batch = {**padded(model, "trailing"), "labels": torch.tensor([0, 1, 1])}
    bk.accelerate(model)
    with pytest.warns(UserWarning, match=r"Make the optimizer after model.train\(\)"):
        model.train()
    twin.train()
    for each in (model, twin):
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        optimizer = torch.optim.SGD(each.parameters(), 0.1)
        each(**batch).loss.backward()
        optimizer.step()
        each.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, twin(**batch).logits, atol=1e-4, rtol=1e-4)
    assert linears(model, SparseLinear)


def test_gradients_reach_the_input_in_eval_mode(every_form):
    model = pruned("BertModel", dead=False)
    twin = copy.deepcopy(model)
    bk.accelerate(model)
    embeds = torch.randn(2, 7, 52)
    gradients = []
    for each in (model, twin):
        x = embeds.clone().requires_grad_()
        each(inputs_embeds=x).last_hidden_state.square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)


def test_sparse_false_keeps_every_parameter():
    model = pruned("BertModel")
    names = [name for name, _ in model.named_parameters()]
    bk.accelerate(model, sparse=False)
    assert [name for name, _ in model.named_parameters()] == names
    assert not linears(model, SparseLinear)


def test_the_dense_weight_is_freed(every_form):
    model = pruned("BertModel", share=0.95)
    dense = sum(parameter.nbytes for parameter in model.encoder.parameters())
    bk.accelerate(model)
    kept = {id(t): t.nbytes for t in (*model.encoder.parameters(), *model.encoder.buffers())}
    assert not any(name.endswith("dense.weight") for name, _ in model.encoder.named_parameters())
    assert sum(kept.values()) < dense


def test_dense_codes_are_freed_and_written(every_form):
    model = bk.quantize_(pruned("BertModel", share=0.95))
    for module in linears(model, Int8Linear)[:18]:
        assert module.form in FORMS and "weight_codes" not in dict(module.named_buffers())
        assert module.weight_codes.shape == (module.out_features, module.in_features)
        assert next(iter(module.state_dict())) == "weight_codes"
    twin = pruned("BertModel", share=0.95)
    with torch.no_grad():
        for linear in linears(twin, nn.Linear):
            linear.weight[linear.weight != 0] += 0.1
    bk.quantize_(twin)
    batch = inputs(model)
    with torch.no_grad():
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(**batch).last_hidden_state, model(**batch).last_hidden_state)
        expected = model(**batch).last_hidden_state
        for module in linears(model, Int8Linear):
            module.take_form(tuning.DENSE)
        assert torch.equal(model(**batch).last_hidden_state, expected)


def test_half_precision_and_moves(every_form):
    model = pruned("BertModel")
    batch = inputs(model)
    with torch.no_grad():
        expected = copy.deepcopy(model).bfloat16()(**batch).last_hidden_state
        got = bk.accelerate(model).bfloat16()(**batch).last_hidden_state
    torch.testing.assert_close(got, expected, atol=0.25, rtol=0.1)
    assert all(module.values.dtype == torch.bfloat16 for module in linears(model, SparseLinear))


def test_compiled(every_form):
    model = pruned("BertModel")
    batch = inputs(model)
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        got = torch.compile(bk.accelerate(model), backend="aot_eager")(**batch).last_hidden_state
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


# --- the plan ------------------------------------------------------------------------------------------------------


def heavy(zeros, block=(16, 4)):
    """A linear layer large enough for sparse forms to win by far."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 512)
    rows, columns = 512 // block[0], 256 // block[1]
    mask = (torch.rand(rows, columns) < zeros).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    with torch.no_grad():
        linear.weight[mask] = 0
    return nn.Sequential(linear).eval()


def test_the_plan_finds_what_pays():
    assert bk.plan_of(bk.accelerate(heavy(0.9))).layers["0"].form.layout in ("panels", "tokens")
    assert bk.plan_of(bk.accelerate(heavy(0.0))).layers["0"].form == tuning.DENSE
    assert bk.plan_of(bk.quantize_(heavy(0.5, (1, 1)))).layers["0"].form == tuning.DENSE


def test_measured_times_are_kept_and_used_again(monkeypatch, tmp_path):
    monkeypatch.setenv("BERTKERN_CACHE", str(tmp_path))
    first = bk.plan_of(bk.accelerate(heavy(0.9)))
    assert first.layers["0"].measured and list(tmp_path.glob("times-*.json"))
    monkeypatch.setattr(tuning, "_share", lambda *_: pytest.fail("measured twice"))
    assert bk.plan_of(bk.accelerate(heavy(0.9))) == first


@pytest.mark.parametrize("swap", [bk.accelerate, bk.quantize_])
def test_a_sample_says_at_how_many_rows_forms_are_timed(swap, monkeypatch, tmp_path):
    monkeypatch.setenv("BERTKERN_CACHE", str(tmp_path))
    seen, share = [], tuning._share
    monkeypatch.setattr(tuning, "_share", lambda *given: seen.append(given[-1]) or share(*given))
    swap(heavy(0.9), sample=torch.zeros(2, 3, 256))
    assert seen and set(seen) == {(6,)}
    swap(heavy(0.9), sample={"input": torch.zeros(6, 256)})
    swap(heavy(0.9), sample=(torch.zeros(6, 256),))
    assert set(seen) == {(6,)}
    swap(heavy(0.9))
    assert set(seen) == {(6,), tuning.ROWS}


def test_a_sample_leaves_no_trace(monkeypatch):
    model = pruned("BertModel").train()
    model.encoder.eval()
    modes = [module.training for module in model.modules()]
    from bertkern.sampling import rows_seen

    call = inputs(model, batch=2, length=7)
    rows = rows_seen(model, call)
    assert set(rows.values()) == {14, 2} and rows["pooler.dense"] == 2
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(TypeError, match="expected sample to be a tensor, a tuple"):
        bk.accelerate(model, 3)
    with pytest.raises(RuntimeError):
        bk.accelerate(model, torch.zeros(2, 3))
    assert [module.training for module in model.modules()] == modes
    assert not linears(model, PackedLinear)
    # Fused modules pass their parts by; the rows are seen all the same.
    assert rows_seen(bk.accelerate(model.eval(), call), call) == rows


# What may stand in a file that should hold JSON.
NO_JSON = [b"", b"{", b"[]", b"\xff\x00\xfe", b"[" * 200_000]


@pytest.mark.parametrize("damage", [*NO_JSON, b'{"version": 9}', b'{"version": 1, "machine": {}, "shares": {}}'])
def test_a_damaged_file_of_times_is_made_anew(damage, monkeypatch, tmp_path):
    monkeypatch.setenv("BERTKERN_CACHE", str(tmp_path))
    bk.accelerate(heavy(0.9))
    (path,) = tmp_path.glob("times-*.json")
    path.write_bytes(damage)
    with pytest.warns(UserWarning, match="is made anew"):
        assert bk.plan_of(bk.accelerate(heavy(0.9))).layers["0"].measured
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bk.accelerate(heavy(0.9))


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BERTKERN_CACHE", str(tmp_path / "file" / "below"))
    assert bk.plan_of(bk.accelerate(heavy(0.9))).layers["0"].measured


def test_without_measuring_a_cost_model_decides(monkeypatch):
    monkeypatch.setattr(tuning, "_share", lambda *_: pytest.fail("measured"))
    choice = bk.plan_of(bk.accelerate(heavy(0.9), measure=False)).layers["0"]
    assert choice.form == Form("panels", 16, 1) and not choice.measured
    assert bk.plan_of(bk.quantize_(heavy(0.9), measure=False)).layers["0"].form == Form("panels", 16, 4)


def test_a_plan_is_saved_and_followed(tmp_path):
    plan = tuning.Plan({"0": tuning.Choice(Form("tokens", 2, 8))})
    plan.save(tmp_path / "plan.json")
    for given in (plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        model = bk.accelerate(heavy(0.9), plan=given)
        assert model[0].form == Form("tokens", 2, 8)
    assert bk.plan_of(model).layers["0"].form == Form("tokens", 2, 8)


@pytest.mark.parametrize(
    "damage",
    [*NO_JSON, b'{"version": 2}', b'{"version": 1, "machine": {}, "layers": {"0": {"form": "diagonal"}}}'],
)
def test_a_damaged_plan_is_made_anew(damage, tmp_path):
    (tmp_path / "plan.json").write_bytes(damage)
    with pytest.warns(UserWarning, match="the plan is made anew"):
        model = bk.accelerate(heavy(0.9), plan=tmp_path / "plan.json")
    assert isinstance(model[0], SparseLinear)


def test_a_plan_of_another_machine_or_no_plan_at_all():
    other = tuning.Plan({"0": tuning.Choice(Form("tokens", 2, 8))}, {**tuning.machine(), "isa": "another"})
    with pytest.warns(UserWarning, match="made with another isa"):
        model = bk.accelerate(heavy(0.9), plan=other)
    assert model[0].form != Form("tokens", 2, 8)
    with pytest.warns(UserWarning, match="the plan is made anew") as caught:
        bk.accelerate(heavy(0.9), plan="nowhere.json")
        bk.quantize_(heavy(0.9), plan="nowhere.json")
    assert [warning.filename for warning in caught] == [__file__] * 2
    with pytest.raises(TypeError, match=r"expected plan to be a Plan or the path of one. Got int"):
        bk.accelerate(heavy(0.9), plan=3)
    with pytest.raises(ValueError, match="expected an accelerated model"):
        bk.plan_of(heavy(0.9))


def test_a_plan_of_another_model(tmp_path, monkeypatch):
    monkeypatch.setenv("BERTKERN_CACHE", str(tmp_path))
    inner, around = heavy(0.9), nn.Sequential(heavy(0.9))
    plan = bk.plan_of(bk.accelerate(around))
    with pytest.warns(UserWarning, match=r"made anew: it tells of 0\.0 and others, .* as 0 is") as caught:
        made = bk.plan_of(bk.accelerate(inner, plan=plan)).layers["0"]
    assert made.measured and isinstance(inner[0], SparseLinear)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    ("now", "form"),
    [
        (lambda: heavy(0.0), tuning.DENSE),  # the plan's form would be slower
        (lambda: heavy(0.9, (32, 64)), None),
        (lambda: heavy(0.7, (1, 1)), None),  # as many zeros, in another pattern
        (lambda: nn.Sequential(nn.Linear(260, 512)), tuning.DENSE),
        (lambda: heavy(0.9).bfloat16(), None),
    ],
    ids=["dense", "sparser", "pattern", "shape", "dtype"],
)
def test_a_plan_made_for_other_weights(now, form, tmp_path, monkeypatch):
    monkeypatch.setenv("BERTKERN_CACHE", str(tmp_path))
    bk.plan_of(bk.accelerate(heavy(0.7))).save(tmp_path / "plan.json")
    with pytest.warns(UserWarning, match=r"plan is made anew for 0: it was made for weights of another") as caught:
        made = bk.plan_of(bk.accelerate(now().eval(), plan=tmp_path / "plan.json")).layers["0"]
    assert made.measured if form is None else made.form == form
    assert [warning.filename for warning in caught] == [__file__]
    # Small changes, such as fine-tuning makes them, are none.
    model = heavy(0.7)
    with torch.no_grad():
        model[0].weight[0, :40] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bk.accelerate(model, plan=tmp_path / "plan.json")


def test_layers_that_a_plan_does_not_tell_of_are_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("BERTKERN_CACHE", str(tmp_path))
    model = nn.Sequential(heavy(0.9)[0], nn.Linear(512, 256), nn.ReLU())
    with torch.no_grad():
        model[1].weight[:, 64:] = 0
    plan = tuning.Plan({"0": tuning.Choice(Form("tokens", 2, 8))})
    layers = bk.plan_of(bk.accelerate(model.eval(), plan=plan)).layers
    assert layers["0"].form == Form("tokens", 2, 8) and layers["1"].measured
    assert bk.plan_of(bk.accelerate(heavy(0.9), plan=tuning.Plan({}), measure=False)).layers["0"].measured is False


def test_tied_and_nan_weights():
    model = make("BertForMaskedLM")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[20:] = 0
        model.bert.encoder.layer[0].intermediate.dense.weight[3:] = 0
        model.bert.encoder.layer[0].intermediate.dense.weight[50, 3] = torch.nan
    bk.accelerate(model)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    batch = inputs(model)
    with torch.no_grad():
        assert model(**batch).logits.isnan().all()


def test_the_report_says_which_form_and_why():
    model = bk.accelerate(heavy(0.9))
    text = str(bk.report(model))
    assert str(model[0].form) in text and "measured time, dense = 1:" in text


@pytest.mark.parametrize("swap", [bk.accelerate, bk.quantize_])
def test_blocks_that_were_trained_run_like_any_zeros(swap):
    model = pruned("BertModel", share=0.0)
    dense = copy.deepcopy(model)
    for layer, same in zip(model.encoder.layer, dense.encoder.layer, strict=True):
        for part, name in ((layer.intermediate, "dense"), (layer.attention.self, "value"), (layer.output, "dense")):
            linear = getattr(part, name)
            pattern = torch.rand(-(-linear.out_features // 4), -(-linear.in_features // 4)) < 0.3
            blocks = BlockSparseLinear(linear.in_features, linear.out_features, (4, 4), pattern=pattern)
            setattr(part, name, blocks.eval())
        same.intermediate.dense.weight.data.copy_(layer.intermediate.dense.weight)
        same.intermediate.dense.bias = layer.intermediate.dense.bias
        for slot in (("attention", "self", "value"), ("output", "dense")):
            blocks, plain = layer.get_submodule(".".join(slot)), same.get_submodule(".".join(slot))
            plain.weight.data.copy_(blocks.weight)
            plain.bias = blocks.bias
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer = model.encoder.layer[0]
    trained, batch = layer.intermediate.dense, padded(model, "trailing")
    rows = {row.name: row for row in bk.inspect(model).rows}
    assert rows["encoder.layer.0.intermediate.dense"].structure == "4x4 blocks"
    options = {} if swap is bk.accelerate else {"config": bk.Int8Config(keep_original=True)}
    swap(model, measure=False, **options)
    swap(dense, measure=False, **options)
    for key, value in answer(dense, **batch).items():
        assert torch.equal(answer(model, **batch)[key], value)
    assert not bk.report(model).fallbacks and "one operator" in {row.runs for row in bk.report(model).rows}
    bk.restore(model)
    if swap is bk.accelerate:
        assert layer.intermediate.dense is trained
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
