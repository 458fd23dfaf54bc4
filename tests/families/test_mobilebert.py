"""MobileBERT in all of its forms: bottlenecks, norms, stacked feed-forwards, trigrams, a head that reads weights."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn
from transformers.models.mobilebert import modeling_mobilebert

import bertkern as bk
from bertkern.nn import Int8Linear, NoNorm

from .test_accelerate import assert_same
from .test_gradients import assert_gradients, loss, optimizers, runner
from .test_int8 import simulate, sqnr
from .zoo import VOCAB, inputs, make, padded, tensors

FORMS = {
    "as published": {},
    "one bottleneck for attention": {"use_bottleneck_attention": True, "key_query_shared_bottleneck": False},
    "both set": {"use_bottleneck_attention": True},
    "attention of the whole width": {"key_query_shared_bottleneck": False, "hidden_size": 52},
    "no bottleneck": {"use_bottleneck": False, "hidden_size": 52},
    "layer norms": {"normalization_type": "layer_norm"},
    "layer norms, no bottleneck": {"normalization_type": "layer_norm", "use_bottleneck": False, "hidden_size": 52},
    "one feed-forward": {"num_feedforward_networks": 1},
    "no trigrams": {"trigram_input": False},
    "no transformation": {"trigram_input": False, "embedding_size": 68},
    "gelu": {"hidden_act": "gelu"},
}


def of_form(form, head="Model"):
    return make(f"MobileBert{head}", **FORMS[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch,length", [(1, 1), (1, 7), (3, 1), (3, 7), (1, 33), (3, 33)])
def test_every_form_and_size(form, batch, length):
    model = of_form(form)
    call = inputs(model, batch, length)
    call["attention_mask"][-1, (length + 1) // 2 :] = 0
    call["token_type_ids"] = torch.arange(batch * length).view(batch, length) % 2
    call["input_ids"] = torch.where(call["attention_mask"] == 0, 1, call["input_ids"])
    mask = call["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**call, output_hidden_states=True)
        bk.accelerate(model)
        got = model(**call, output_hidden_states=True)
        assert_same(expected, got, call["attention_mask"])
        assert torch.equal(model(**call).last_hidden_state, got.last_hidden_state)
        for ours, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(ours[mask], theirs[mask], atol=2e-5, rtol=1e-4)
        assert not got.last_hidden_state[~mask].any()
        # bf16 and int8, against what they stand for.
        half = bk.accelerate(bk.restore(model).bfloat16())
        assert sqnr(expected.last_hidden_state[mask], half(**call).last_hidden_state[mask]) > 30
        int8 = bk.quantize_(of_form(form), exact_attention=True)
        plain = simulate(int8)(**call).last_hidden_state
        assert sqnr(plain[mask], int8(**call).last_hidden_state[mask]) > 35
    for each in (half, int8):
        assert not bk.report(each).fallbacks
        runs = {row.name: row.runs for row in bk.report(each).rows}
        assert runs["encoder"] == runs["embeddings"] == runs["encoder.layer.1"] == "one operator"


def test_published_widths():
    config = transformers.MobileBertConfig(num_hidden_layers=2, vocab_size=VOCAB, max_position_embeddings=64)
    torch.manual_seed(0)
    model = transformers.MobileBertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        call = padded(model, "trailing")
        expected = model(**call)
        assert_same(expected, bk.accelerate(model)(**call), call["attention_mask"])
        stack = model.encoder._stack
        assert len(stack.linears) == 2 * (7 + 8) and stack.norms.shape == (2, 2 * (128 * 7 + 512))
        assert stack.eps is None and stack.heads == [4, 4]
        got = bk.quantize_(bk.restore(model))(**call).last_hidden_state
    mask = call["attention_mask"].bool()
    assert sqnr(expected.last_hidden_state[mask], got[mask]) > 25


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_every_form(form):
    model = of_form(form)
    twin, call = copy.deepcopy(model), padded(model, "trailing")
    bk.accelerate(model)
    output = model(**call)
    assert output.last_hidden_state.requires_grad
    loss(output, call["attention_mask"]).backward()
    loss(twin(**call), call["attention_mask"]).backward()
    assert_gradients(model, twin)
    assert not bk.report(model).fallbacks


@pytest.mark.parametrize("backend", ("eager", "aot_eager", "inductor"))
@pytest.mark.parametrize("head", ("ForMaskedLM", "ForSequenceClassification"))
def test_compiled_and_trained(backend, head):
    model = make(f"MobileBert{head}")
    twin, call = copy.deepcopy(model), padded(model, "trailing")
    run = runner(bk.accelerate(model), backend)
    real = call["attention_mask"].bool() if head == "ForMaskedLM" else slice(None)
    labels = call["input_ids"].masked_fill(~real, -100) if head == "ForMaskedLM" else torch.tensor([0, 1, 1])
    with torch.no_grad():
        # Inductor has a tanh and a LayerNorm of its own for the heads.
        torch.testing.assert_close(run(**call).logits, model(**call).logits, atol=1e-6, rtol=1e-5)
    ours, theirs = (list(optimizers(module))[1] for module in (model, twin))
    for _ in range(2):
        for module, called, optimizer in ((model, run, ours), (twin, twin, theirs)):
            module.zero_grad()
            called(**call, labels=labels).loss.backward()
            optimizer.step()
        with torch.no_grad():
            expected = twin(**call).logits[real]
            for called in (run, model):
                torch.testing.assert_close(called(**call).logits[real], expected, atol=2e-3, rtol=2e-3)
    assert not bk.report(model).fallbacks


def test_embeddings_see_their_neighbours_and_nothing_else():
    model = make("MobileBertModel")
    ids = inputs(model, 2, 9)["input_ids"]
    with torch.no_grad():
        expected = model.embeddings(ids)
        bk.accelerate(model)
        first = model.embeddings(ids)
        torch.testing.assert_close(first, expected, atol=1e-6, rtol=1e-5)
        other = ids.clone()
        other[0, 4] = (other[0, 4] + 1) % VOCAB
        changed = (model.embeddings(other) != first).any(-1)
        assert changed.nonzero().tolist() == [[0, 3], [0, 4], [0, 5]]
        # Only transformers' code takes embeddings as input, and its answer is the same.
        embeds = model.get_input_embeddings()(ids)
        torch.testing.assert_close(
            model(inputs_embeds=embeds).last_hidden_state, model(ids).last_hidden_state, atol=2e-5, rtol=1e-4
        )
        with pytest.raises(RuntimeError, match=r"expected ids in \[0, 97\) of table 0"):
            model(ids + VOCAB)
        with pytest.raises((RuntimeError, IndexError)):
            model(ids.expand(2, 9).repeat(1, 5))


def test_the_head_that_reads_weights():
    for head in ("ForMaskedLM", "ForPreTraining"):
        model = make(f"MobileBert{head}")
        call = padded(model, "trailing")
        with torch.no_grad():
            expected = model(**call)
            bk.accelerate(model)
            got = model(**call)
            assert_same(expected, got, call["attention_mask"])
            predictions = model.cls.predictions
            assert predictions._packed is not None and predictions.dense._packed is None
            alone = model(**{name: value[:1, :4] for name, value in call.items()})
            for name in ("logits", "prediction_logits"):
                if name in got:
                    assert torch.equal(got[name][0, :4], alone[name][0])
            # Its copy follows, and so do copies of the model.
            predictions.dense.weight.mul_(1.5)
            changed = model(**call)
            for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert each.cls.predictions._packed is not None
                assert all(torch.equal(v, tensors(each(**call))[n]) for n, v in tensors(changed).items())
            assert_same(bk.restore(copy.deepcopy(model))(**call), changed, call["attention_mask"])
            assert not bk.report(model).fallbacks
            handle = predictions.dense.register_forward_hook(lambda *_: None)
            assert_same(model(**call), changed, call["attention_mask"])
            handle.remove()
            assert bk.report(model).fallbacks == {"cls.predictions: hooks on inner modules": 1}


def test_the_head_that_reads_weights_in_int8():
    model = make("MobileBertForMaskedLM")
    call = padded(model, "trailing")
    mask = call["attention_mask"].bool()
    for config in (bk.Int8Config(), bk.Int8Config(weight="per_tensor"), bk.Int8Config(head=False)):
        each = bk.quantize_(copy.deepcopy(model), config, exact_attention=True)
        predictions = each.cls.predictions
        assert isinstance(predictions.dense, Int8Linear) == config.head
        with torch.no_grad():
            expected, got = simulate(each)(**call).logits[mask], each(**call).logits[mask]
        # The simulation leaves the head's input as it is.
        assert sqnr(expected, got) > 30
        assert not bk.report(each).fallbacks


def test_parts_that_do_not_fit_fall_back():
    call = padded(make("MobileBertModel"), "trailing")

    def norms_of_two_kinds(model):
        model.encoder.layer[1].output.LayerNorm = nn.LayerNorm(52)
        return "norms of two kinds"

    def another_norm(model):
        model.encoder.layer[1].ffn[0].output.LayerNorm = nn.Identity()
        return "a norm is Identity"

    def activations(model):
        model.encoder.layer[1].ffn[2].intermediate.intermediate_act_fn = nn.GELU()
        return "layers differ in activation"

    def no_kernel(model):
        model.encoder.layer[0].intermediate.intermediate_act_fn = nn.Mish()
        return "no kernel for the activation Mish"

    for change in (norms_of_two_kinds, another_norm, activations, no_kernel):
        model = make("MobileBertModel")
        reason = change(model)
        with torch.no_grad():
            expected = model(**call)
            assert_same(expected, bk.accelerate(model)(**call), call["attention_mask"])
        rows = {row.name: row.why for row in bk.report(model).rows}
        assert any(reason in why for why in rows.values()), rows
        # What still fits runs fused by itself.
        assert sum(name.startswith("encoder.layer.") and not why for name, why in rows.items()) > 30

    model = make("MobileBertModel")
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, modeling_mobilebert.NoNorm):
                norm = NoNorm(child.weight.shape[0])
                norm.weight, norm.bias = child.weight, child.bias
                setattr(module, name, norm)
    with torch.no_grad():
        expected = model(**call)
        assert_same(expected, bk.accelerate(model)(**call), call["attention_mask"])
    assert not bk.report(model).fallbacks and next(r for r in bk.report(model).rows if r.name == "encoder").why == ""


def test_changes_and_hooks_are_noticed():
    model = make("MobileBertModel")
    call = inputs(model)
    bk.accelerate(model)

    def answer_now():
        with torch.no_grad():
            got = model(**call).last_hidden_state
            plain = bk.restore(copy.deepcopy(model))(**call).last_hidden_state
        torch.testing.assert_close(got, plain, atol=2e-5, rtol=1e-4)
        return got

    before = answer_now()
    layer = model.encoder.layer[1]
    for parameter in (
        layer.bottleneck.attention.dense.weight,
        layer.bottleneck.input.LayerNorm.weight,
        layer.ffn[1].output.dense.bias,
        layer.ffn[2].intermediate.dense.weight,
        layer.output.bottleneck.LayerNorm.bias,
        model.embeddings.embedding_transformation.weight,
        model.embeddings.LayerNorm.bias,
    ):
        with torch.no_grad():
            parameter.mul_(1.5)
        after = answer_now()
        assert not torch.equal(before, after)
        before = after
    model.load_state_dict(make("MobileBertModel", initializer_range=0.01).state_dict())
    assert not torch.equal(before, answer_now())
    model.encoder.layer = model.encoder.layer[:2]
    answer_now()
    assert not bk.report(model).fallbacks
    seen = []
    for module in (layer.ffn[1], layer.bottleneck.input.LayerNorm, layer.output.bottleneck.dense):
        handle = module.register_forward_hook(lambda *call: seen.append(call[0]))
        answer_now()
        handle.remove()
        assert any(one is module for one in seen)
    assert bk.report(model).fallbacks == {
        "encoder: hooks on inner modules": 3,
        "encoder.layer.1: hooks on inner modules": 3,
    }
    model.eval().double()
    answer_now()


@pytest.mark.parametrize("swap", [bk.accelerate, bk.quantize_])
def test_heads_and_layers(swap, tmp_path):
    model = make("MobileBertForSequenceClassification", num_attention_heads=4)
    call = padded(model, "trailing")
    gone = {0: [1], 1: [3, 0, 2], 2: range(4)}
    mask = torch.ones(3, 4)
    for layer, heads in gone.items():
        mask[layer, list(heads)] = 0
    with torch.no_grad():
        with bk.head_mask(model, mask):
            expected = model(**call).logits
        bk.prune_heads(model, gone)
        torch.testing.assert_close(model(**call).logits, expected, atol=1e-5, rtol=1e-4)
        assert bk.kept_heads(model) == [[0, 2, 3], [1], []] or bk.kept_heads(model)[:2] == [[0, 2, 3], [1]]
        swap(model)
        assert model.mobilebert.encoder._stack.heads == [3, 1, 1]
        got = model(**call).logits
        assert sqnr(expected, got) > (90 if swap is bk.accelerate else 20)
        model.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
        bk.accelerate(loaded)
        assert torch.equal(loaded(**call).logits, got)
        if swap is bk.quantize_:
            with pytest.raises(ValueError, match=r"keep_layers: expected a float model. Got one that is int8"):
                bk.keep_layers(model, [0, 2])
            return
        bk.keep_layers(model, [0, 2])
        assert model.config.num_hidden_layers == 2 and model.config.kept_layers == [0, 2]
        shorter = model(**call).logits
        model.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(**call).logits, shorter, atol=1e-5, rtol=1e-4)
        assert not bk.report(model).fallbacks
    for function, arguments, match in (
        (bk.prune_heads, {2: [0]}, "expected layers from 0 to 1"),
        (bk.prune_heads, {0: [4]}, "prune_heads: expected"),
        (bk.keep_layers, [0, 2], "expected layers from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=match):
            function(model, arguments)
    with pytest.raises(ValueError, match=r"\[layers, heads\] = \[2, 4\]"), bk.head_mask(model, torch.ones(3, 4)):
        pass
