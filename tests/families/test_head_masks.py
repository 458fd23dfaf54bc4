"""Head masks against transformers 4's own formula in float64: probabilities times the mask, in every family."""

import copy
import pickle
import threading

import pytest
import torch
import transformers
from torch import nn

import bertkern as bk
from bertkern import shrink
from bertkern.head_masks import active_factors, is_mask, places
from tests.families import zoo
from tests.transformers4 import ALBERT_ROWS, BATCH, FAMILIES, HEADS, LAYERS, Transformers4, make, rows_of

KEYWORD_FAMILIES = tuple(family for family in zoo.FAMILIES if family not in ("MPNet", "Albert"))


def random_mask(model: nn.Module, kind: str, seed: int = 0) -> torch.Tensor:
    """Fractions, with a layer of zeros and a head of ones."""
    shape = {"heads": [HEADS], "layers": [rows_of(model), HEADS], "batch": [rows_of(model), BATCH, HEADS]}[kind]
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 1.5
    mask[..., 1] = 1
    if kind != "heads":
        mask[1] = 0
    return mask


def close(got, expected, call, tolerance=2e-5):
    """That every tensor of `got` is that of `expected` at real tokens."""
    expected = zoo.tensors(expected)
    assert expected
    for name, value in expected.items():
        a = zoo.real(name, got[name].double(), call["attention_mask"])
        b = zoo.real(name, value.double(), call["attention_mask"])
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["heads", "layers", "batch"])
@pytest.mark.parametrize("how", ["plain", "eager", "accelerated"])
@pytest.mark.parametrize("family", FAMILIES)
def test_as_transformers_4_has_it(family, how, kind):
    model = make(f"{family}ForSequenceClassification")
    call, mask = zoo.padded(model, "trailing"), random_mask(model, kind)
    expected = Transformers4(model, mask)(**call)
    unmasked = model(**call).logits
    assert (unmasked - expected.logits).abs().max() > 1e-3
    if how == "eager" and family != "MPNet":
        model.set_attn_implementation("eager")
    elif how == "accelerated":
        bk.accelerate(model)
    with bk.head_mask(model, mask) as same:
        assert same is model
        close(model(**call), expected, call)
    torch.testing.assert_close(model(**call).logits, unmasked)


@pytest.mark.parametrize("head", ["Model", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM"])
@pytest.mark.parametrize("family", ["Bert", "DistilBert", "MPNet"])
def test_every_head(family, head):
    model = make(family + head)
    call, mask = zoo.padded(model, "holes"), random_mask(model, "layers")
    with bk.head_mask(bk.accelerate(copy.deepcopy(model)), mask) as masked:
        close(masked(**call), Transformers4(model, mask)(**call), call, 5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_multiple_choice_counts_choices(family):
    model = make(f"{family}ForMultipleChoice")
    call = zoo.inputs(model)
    zoo.answer(model, **call)
    mask = random_mask(model, "batch").repeat_interleave(2, 1)
    expected = Transformers4(model, mask)(**call)
    with bk.head_mask(model, mask):
        close(model(**call), expected, call)
    with (
        bk.head_mask(model, mask[:, :BATCH]),
        pytest.raises(ValueError, match=r"for a batch of 6 sequences. Got one for 3"),
    ):
        model(**call)


@pytest.mark.parametrize("how", ["plain", "eager", bk.accelerate, bk.quantize_])
@pytest.mark.parametrize("family", FAMILIES)
def test_ones_are_for_their_batch_alone(family, how):
    model = make(f"{family}ForSequenceClassification")
    call, ones = zoo.inputs(model), torch.ones(rows_of(model), BATCH, HEADS)
    if how == "eager" and family != "MPNet":
        model.set_attn_implementation("eager")
    elif callable(how):
        how(model)
    wrong = pytest.raises(
        ValueError, match=r"head_mask: expected a mask .* for a batch of 3 sequences. Got one for 2\."
    )
    with torch.no_grad():
        expected = model(**call).logits
        for mask in (ones, ones[:, :1], ones.bool()):
            with bk.head_mask(model, mask):
                torch.testing.assert_close(model(**call).logits, expected)
        with bk.head_mask(model, ones[:, :2]), wrong:
            model(**call)
        if callable(how) and family in KEYWORD_FAMILIES:
            assert torch.equal(model(**call, head_mask=ones).logits, expected)
            with wrong:
                model(**call, head_mask=ones[:, :2])
        torch.testing.assert_close(model(**call).logits, expected)


@pytest.mark.parametrize("swap", [bk.accelerate, bk.quantize_])
@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForSequenceClassification", "ForMultipleChoice"])
def test_mpnet_refuses_the_keyword(head, swap):
    """Its code in transformers drops it."""
    config = {} if swap is bk.accelerate else {"config": bk.Int8Config(keep_original=True)}
    model = bk.accelerate(swap(make(f"MPNet{head}"), **config))  # twice is once
    call, mask = zoo.inputs(model), random_mask(model, "layers")
    expected = zoo.answer(model, **call)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.base_model):
        with pytest.raises(
            ValueError, match=r"whose code in transformers drops it.*`with bk.head_mask\(model, mask\):`"
        ):
            one(**call, head_mask=mask)
    got = zoo.answer(model, **call, head_mask=None)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    bk.restore(model)
    assert not any(module._forward_pre_hooks or module._forward_pre_hooks_with_kwargs for module in model.modules())
    model(**call, head_mask=mask)  # transformers' own way again


def test_compiled_mpnet_refuses_the_keyword():
    torch._dynamo.reset()
    model = bk.accelerate(make("MPNetModel"))
    call = zoo.inputs(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(**call).last_hidden_state, model(**call).last_hidden_state)
    with pytest.raises(Exception, match=r"whose code in transformers drops it"):
        torch.compile(model, backend="eager")(**call, head_mask=torch.zeros(HEADS))


@pytest.mark.parametrize("how", ["plain", "accelerated"])
@pytest.mark.parametrize("kind", ["heads", "layers", "batch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(family, kind, how):
    """Of the mask and of every weight."""
    model = make(f"{family}ForSequenceClassification")
    call, mask = zoo.padded(model, "trailing"), random_mask(model, kind).requires_grad_()
    reference = Transformers4(model, mask)
    weights = dict(reference.model.named_parameters())
    expected = torch.autograd.grad(
        reference(**call).logits.square().sum(), [mask, *weights.values()], allow_unused=True
    )
    if how == "accelerated":
        bk.accelerate(model)
    own = dict(model.named_parameters())
    assert list(own) == list(weights)
    with bk.head_mask(model, mask):
        for _ in range(2):  # a second backward pass finds the mask's graph whole
            loss = model(**call).logits.square().sum()
            got = torch.autograd.grad(loss, [mask, *own.values()], allow_unused=True)
    for name, a, b in zip(["mask", *own], got, expected, strict=True):
        if b is None or a is None:
            assert a is None or not a.any(), name
            assert b is None or not b.any(), name
            continue
        scale = float(b.abs().max())
        assert (a.double() - b).abs().max() <= 2e-4 * max(scale, 1e-2), (name, scale)
    assert got[0].abs().min() > 0  # zero factors have gradients, too: those a score is made of


@pytest.mark.parametrize("family", FAMILIES)
def test_in_training_with_dropout(family):
    """The mask comes after dropout: with the same random numbers, float64 agrees to its own rounding."""
    probabilities = {"attention_dropout": 0.3} if family == "DistilBert" else {"attention_probs_dropout_prob": 0.3}
    model = make(f"{family}Model", **probabilities).double().train()
    call, mask = zoo.padded(model, "trailing"), random_mask(model, "layers").double()
    if family != "MPNet":
        model.set_attn_implementation("eager")
    reference = Transformers4(model, mask)
    torch.manual_seed(5)
    expected = reference(**call)
    torch.manual_seed(5)
    with bk.head_mask(model, mask):
        close(model(**call), expected, call, 1e-11)
        torch.manual_seed(6)
        assert not torch.allclose(model(**call).last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("how", ["eager", "accelerated", "keyword"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_weights_are_masked_too(family, how):
    if how == "keyword" and family not in KEYWORD_FAMILIES:
        pytest.skip("its keywords do not reach the encoder")
    model = make(f"{family}Model")
    call, mask = zoo.padded(model, "trailing"), random_mask(model, "layers")
    expected = Transformers4(model, mask)(**call, output_attentions=True).attentions
    if how == "eager" and family != "MPNet":
        model.set_attn_implementation("eager")
    elif how != "eager":
        if family == "Albert":
            model.set_attn_implementation("eager")
        bk.accelerate(model)
    if how == "keyword":
        got = model(**call, output_attentions=True, head_mask=mask).attentions
    else:
        with bk.head_mask(model, mask):
            got = model(**call, output_attentions=True).attentions
    assert len(got) == len(expected) == rows_of(model)
    for a, b in zip(got, expected, strict=True):
        a, b = (zoo.real("", weights.transpose(1, 2), call["attention_mask"]) for weights in (a, b))
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_errs_no_more_with_a_mask(family):
    model = make(f"{family}Model")
    call, mask = zoo.padded(model, "trailing"), random_mask(model, "batch")
    real = call["attention_mask"].bool()
    expected = [Transformers4(model, m)(**call).last_hidden_state[real] for m in (torch.ones(HEADS), mask)]
    bk.quantize_(model)
    got = [model(**call).last_hidden_state[real]]
    with bk.head_mask(model, mask):
        got.append(model(**call).last_hidden_state[real])
    plain, masked = ((a.double() - b).abs().max() for a, b in zip(got, expected, strict=True))
    assert masked < 2 * plain < (expected[0] - expected[1]).abs().max()


def test_int8_gradient_of_the_mask():
    model = make("BertForSequenceClassification")
    call, mask = zoo.padded(model, "trailing"), random_mask(model, "layers").requires_grad_()
    (expected,) = torch.autograd.grad(Transformers4(model, mask)(**call).logits.square().sum(), mask)
    with bk.head_mask(bk.quantize_(model), mask):
        (got,) = torch.autograd.grad(model(**call).logits.square().sum(), mask)
    assert torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), 0) > 0.99


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64, torch.bfloat16])
def test_dtypes_of_masks(dtype):
    model = make("BertModel")
    call, mask = zoo.inputs(model), random_mask(model, "layers") > 0.7
    with bk.head_mask(model, mask.to(dtype)):
        close(model(**call), Transformers4(model, mask)(**call), call)


@pytest.mark.parametrize("how", [bk.accelerate, bk.quantize_])
@pytest.mark.parametrize("kind", ["heads", "layers", "batch"])
@pytest.mark.parametrize("family", KEYWORD_FAMILIES)
def test_keyword(family, kind, how):
    """Does what the context does, in a call."""
    model = how(make(f"{family}ForSequenceClassification"))
    call, mask = zoo.padded(model, "trailing"), random_mask(model, kind).requires_grad_()
    with bk.head_mask(model, mask):
        expected = model(**call, output_hidden_states=True)
        (gradient,) = torch.autograd.grad(expected.logits.sum(), mask)
    got = model(**call, output_hidden_states=True, head_mask=mask)
    close(got, expected, call, 1e-6)
    assert len(got.hidden_states) == len(expected.hidden_states) == LAYERS + 1
    torch.testing.assert_close(torch.autograd.grad(got.logits.sum(), mask)[0], gradient, rtol=1e-4, atol=1e-6)
    assert (got.logits - model(**call).logits).abs().max() > 1e-3


def test_ones_with_a_gradient_give_it():
    model = bk.accelerate(make("BertForSequenceClassification"))
    mask = torch.ones(LAYERS, HEADS, requires_grad=True)
    with bk.head_mask(model, mask):
        model(**zoo.inputs(model)).logits.sum().backward()
    assert mask.grad.abs().min() > 0


def test_keyword_by_attn_implementation_alone():
    """An encoder that is not fused, by bertkern's attention function."""
    model = make("BertForSequenceClassification")
    call, mask = zoo.padded(model, "trailing"), random_mask(model, "layers")
    expected = Transformers4(model, mask)(**call)
    for name in ("bertkern", "bertkern_eager"):
        model.set_attn_implementation(name)
        close(model(**call, head_mask=mask), expected, call)
        with pytest.raises(ValueError, match=r"\[layers, heads\] = \[3, 4\]"):
            model(**call, head_mask=mask[:2])
    for family in ("DistilBert", "Albert"):
        model = make(f"{family}Model")
        model.set_attn_implementation("bertkern")
        model(**call)
        with pytest.raises(ValueError, match=r"within bertkern.head_mask\(model, mask\)"):
            model(**call, head_mask=torch.zeros(HEADS))


def test_keyword_where_attention_is_not_ours():
    model = make("BertModel", output_attentions=True, attn_implementation="eager")
    call = zoo.inputs(model)
    bk.accelerate(model)
    with pytest.raises(ValueError, match=r"within bertkern.head_mask\(model, mask\)"):
        model(**call, head_mask=torch.zeros(HEADS))


def ragged(family: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A whole model, the same without some of its heads, and the mask [layers, heads] of those that it kept."""
    whole = make(f"{family}ForSequenceClassification")
    left = [(0, 2), (0, 1, 2, 3), (3,)]
    model, mask = copy.deepcopy(whole), torch.zeros(LAYERS, HEADS)
    for place, row, kept in zip(places(model).layers, mask, left, strict=True):
        row[list(kept)] = 1
        with torch.no_grad():
            place.out.weight.mul_(row.repeat_interleave(13))
    shrink.shrink(model)
    assert places(model).kept() == left
    return whole, model, mask


@pytest.mark.parametrize("how", ["plain", "accelerated", "keyword"])
@pytest.mark.parametrize("kind", ["heads", "layers", "batch"])
@pytest.mark.parametrize("family", [family for family in zoo.FAMILIES if family != "Albert"])
def test_ragged_models_count_heads_as_built(family, kind, how):
    if how == "keyword" and family not in KEYWORD_FAMILIES:
        pytest.skip("its keywords do not reach the encoder")
    whole, model, left = ragged(family)
    call, mask = zoo.padded(whole, "trailing"), random_mask(whole, kind).requires_grad_()
    rows = mask.expand(LAYERS, HEADS) if kind == "heads" else mask
    expected = Transformers4(whole, rows * (left if kind != "batch" else left[:, None]))(**call)
    (gradient,) = torch.autograd.grad(expected.logits.sum(), mask)
    if how != "plain":
        bk.accelerate(model)
    assert bk.kept_heads(model) == [[0, 2], [0, 1, 2, 3], [3]]
    if how == "keyword":
        got = model(**call, head_mask=mask)
    else:
        with bk.head_mask(model, mask):
            got = model(**call)
    close(got, expected, call)
    torch.testing.assert_close(torch.autograd.grad(got.logits.sum(), mask)[0], gradient, rtol=1e-3, atol=1e-5)


def test_a_layer_without_heads():
    """Whatever its own attention then does, there is nothing to mask."""
    model = make("BertModel")
    attention = model.encoder.layer[1].attention
    attention.self.kept_heads = ()
    found = places(model)
    assert found.kept() == [(0, 1, 2, 3), (), (0, 1, 2, 3)]
    before = attention.output.dense._forward_pre_hooks.copy()
    with bk.head_mask(model, torch.zeros(HEADS)):
        assert attention.output.dense._forward_pre_hooks == before
        assert len(model.encoder.layer[0].attention.output.dense._forward_pre_hooks) == 1


def test_nested_masks_multiply():
    model = make("BertModel")
    call, one, other = zoo.inputs(model), random_mask(model, "layers"), random_mask(model, "batch", 1)
    both, first = (Transformers4(model, mask)(**call) for mask in (one[:, None] * other, one))
    with bk.head_mask(model, one):
        with bk.head_mask(model, other):
            close(model(**call), both, call)
            outs = [place.out for place in places(model).layers]
            for factor, row in zip(active_factors(outs), one[:, None] * other, strict=True):
                torch.testing.assert_close(factor, row)
        close(model(**call), first, call)
    assert active_factors(outs) == [None] * LAYERS


def test_active_factors_of_layers_that_run_twice():
    model = make("AlbertModel")
    mask = random_mask(model, "layers")
    mask[2] = 1
    found = places(model)
    by_row = {row: place.out for place in found.layers for row in place.rows}
    with bk.head_mask(model, mask):
        factors = active_factors([by_row[row] for row in range(ALBERT_ROWS)])
        assert factors[2] is None
        assert all(torch.equal(factors[row], mask[row : row + 1]) for row in range(ALBERT_ROWS) if row != 2)
        hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
        assert hooks and all(map(is_mask, hooks))
    assert not is_mask(print)


def test_nothing_is_left_behind():
    model = bk.accelerate(make("BertModel"))
    call = zoo.inputs(model)
    expected = model(**call).last_hidden_state
    with pytest.raises(RuntimeError, match=r"on purpose"), bk.head_mask(model, torch.zeros(HEADS)):
        raise RuntimeError("on purpose")
    for module in model.modules():
        assert not any(map(is_mask, (*module._forward_pre_hooks.values(), *module._forward_hooks.values())))
    assert torch.equal(model(**call).last_hidden_state, expected)


def test_a_mask_is_read_on_entering():
    model = make("BertModel")
    call, mask = zoo.inputs(model), random_mask(model, "layers")
    expected = Transformers4(model, mask)(**call)
    with bk.head_mask(model, mask):
        mask.zero_()
        close(model(**call), expected, call)


def test_a_copy_is_masked_as_long_as_its_model():
    model = make("BertModel")
    call, mask = zoo.inputs(model), random_mask(model, "layers").requires_grad_()
    with bk.head_mask(model, mask):
        masked = model(**call).last_hidden_state
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**call).last_hidden_state, masked)
    assert torch.equal(twin(**call).last_hidden_state, model(**call).last_hidden_state)


def test_threads_have_their_own_keyword():
    model = bk.accelerate(make("BertModel"))
    call = zoo.inputs(model)
    masks = [random_mask(model, "layers", seed) for seed in range(4)]
    with torch.no_grad():
        expected = [model(**call, head_mask=mask).last_hidden_state for mask in masks]
        wrong, start = [], threading.Barrier(4)

        def serve(index: int) -> None:
            with torch.no_grad():
                start.wait()
                for _ in range(20):
                    if not torch.equal(model(**call, head_mask=masks[index]).last_hidden_state, expected[index]):
                        wrong.append(index)

        threads = [threading.Thread(target=serve, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong and not torch.equal(expected[0], expected[1])


def test_layers_that_run_twice_serve_threads():
    model = make("AlbertModel")
    call, mask = zoo.inputs(model), random_mask(model, "layers")
    with torch.no_grad(), bk.head_mask(model, mask):
        expected, wrong = model(**call).last_hidden_state, []

        def serve() -> None:
            with torch.no_grad():
                for _ in range(20):
                    if not torch.allclose(model(**call).last_hidden_state, expected, atol=1e-6):
                        wrong.append(1)

        threads = [threading.Thread(target=serve) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    with bk.head_mask(model, mask), pytest.raises(RuntimeError, match=r"run 2 times in its encoder. Got one run more"):
        model(**call)
        model.encoder.albert_layer_groups[0](torch.zeros(1, 2, 52))


@pytest.mark.parametrize("fused", [False, True])
def test_compiled_models_heed_masks(fused):
    """Compiled code does not look at hooks by itself."""
    model = make("DistilBertModel")
    call, mask = zoo.inputs(model), random_mask(model, "layers")
    expected = Transformers4(model, mask)(**call)
    if fused:
        bk.accelerate(model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(**call).last_hidden_state
        with bk.head_mask(model, mask):
            close(compiled(**call), expected, call)
        assert torch.equal(compiled(**call).last_hidden_state, before)
        with bk.head_mask(compiled, mask):
            close(compiled(**call), expected, call)
        if fused:
            close(compiled(**call, head_mask=mask), expected, call)
            close(compiled(**call, head_mask=mask * 0), Transformers4(model, mask * 0)(**call), call)
            assert torch.equal(compiled(**call).last_hidden_state, before)


def test_with_gradient_checkpointing():
    model = make("BertForSequenceClassification", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    call, mask = zoo.inputs(model), random_mask(model, "layers").requires_grad_()
    (expected,) = torch.autograd.grad(Transformers4(model, mask)(**call).logits.square().sum(), mask)
    model.gradient_checkpointing_enable()
    with bk.head_mask(model, mask):
        model(**call).logits.square().sum().backward()
    torch.testing.assert_close(mask.grad, expected, rtol=1e-3, atol=1e-6)
    bk.accelerate(model).train()
    mask.grad = None
    model(**call, head_mask=mask).logits.square().sum().backward()
    torch.testing.assert_close(mask.grad, expected, rtol=1e-3, atol=1e-6)


def test_a_model_inside_a_module():
    model = make("BertModel")
    call, mask = zoo.inputs(model), random_mask(model, "layers")
    expected = Transformers4(model, mask)(**call)
    with bk.head_mask(nn.ModuleDict({"encoder": model, "top": nn.Linear(2, 2)}), mask):
        close(model(**call), expected, call)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([1.0] * 4, TypeError, "expected a tensor. Got list"),
        (torch.ones(5), ValueError, r"\[heads\] = \[4\], \[layers, heads\] = \[3, 4\].*Got \[5\]"),
        (torch.ones(3), ValueError, r"Got \[3\]"),
        (torch.ones(2, 4), ValueError, r"Got \[2, 4\]"),
        (torch.ones(4, 3), ValueError, r"Got \[4, 3\]"),
        (torch.ones(3, 3, 5), ValueError, r"Got \[3, 3, 5\]"),
        (torch.ones(3, 1, 4, 1, 1), ValueError, r"Got \[3, 1, 4, 1, 1\]"),
        (torch.tensor(1.0), ValueError, r"Got \[\]"),
        (torch.ones(0), ValueError, r"Got \[0\]"),
        (torch.tensor([1, 1, 1, float("nan")]), ValueError, "expected finite factors. Got NaN or Inf"),
        (torch.tensor([1, 1, 1, float("inf")]), ValueError, "expected finite factors. Got NaN or Inf"),
        (torch.ones(4, dtype=torch.complex64), TypeError, "expected bool, int or float. Got complex64"),
    ],
)
def test_masks_that_are_none(mask, error, message):
    model = bk.accelerate(make("BertModel"))
    with pytest.raises(error, match=message), bk.head_mask(model, mask):
        pass
    with pytest.raises(error, match=message):
        model(**zoo.inputs(model), head_mask=mask)
    with pytest.raises(error, match=message), bk.head_mask(make("DistilBertModel"), mask):
        pass


@pytest.mark.parametrize("how", ["plain", "accelerated", "keyword"])
def test_a_mask_for_another_batch(how):
    model = make("BertModel")
    if how != "plain":
        bk.accelerate(model)
    mask = torch.zeros(LAYERS, BATCH + 1, HEADS)
    with pytest.raises(ValueError, match=r"for a batch of 3 sequences. Got one for 4"):
        if how == "keyword":
            model(**zoo.inputs(model), head_mask=mask)
        with bk.head_mask(model, mask):
            model(**zoo.inputs(model))


def test_models_without_heads_to_mask():
    mask = torch.ones(4)
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module. Got str"), bk.head_mask("bert", mask):
        pass
    with pytest.raises(ValueError, match=r"Got one with 0"), bk.head_mask(nn.Linear(2, 2), mask):
        pass
    two = nn.ModuleList([make("BertModel"), make("BertModel")])
    with pytest.raises(ValueError, match=r"Got one with 2"), bk.head_mask(two, mask):
        pass
    gpt = transformers.GPT2Model(transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"known family with layers. Got GPT2Model"), bk.head_mask(gpt, mask):
        pass
    decoder = make("BertModel", is_decoder=True)
    with pytest.raises(ValueError, match=r"expected layers of an encoder. Got a decoder"), bk.head_mask(decoder, mask):
        pass
    astray = make("BertModel")
    astray.encoder.layer[0].attention.self.kept_heads = (0, 1, 2, 4)
    with pytest.raises(ValueError, match=r"below num_attention_heads = 4. Got \[0, 1, 2, 4\]"):
        bk.kept_heads(astray)


@pytest.mark.parametrize("numbers", [(0, 1, 2, 3), (0, 1)])
def test_a_record_of_another_number_of_heads(numbers):
    model = bk.prune_heads(make("BertModel"), {0: [3]})
    model.encoder.layer[0].attention.self.kept_heads = numbers
    message = r"^kept_heads: expected the numbers of the 3 heads that the projections have. Got \["
    with pytest.raises(ValueError, match=message):
        bk.kept_heads(model)
    with pytest.raises(ValueError, match=message), bk.head_mask(model, torch.ones(HEADS)):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu(family):
    model = make(f"{family}ForSequenceClassification")
    call, mask = zoo.padded(model, "trailing"), random_mask(model, "layers").requires_grad_()
    expected = Transformers4(model, mask)(**call)
    call["labels"] = torch.zeros(BATCH, dtype=torch.int64)
    scores = bk.head_importance(model, call, progress=False)
    model.cuda()
    torch.testing.assert_close(bk.head_importance(model, call, progress=False), scores, rtol=1e-3, atol=1e-4)
    del call["labels"]
    with bk.head_mask(model, mask):  # a mask on the CPU follows
        got = model(**{key: value.cuda() for key, value in call.items()})
    close({key: value.cpu() for key, value in zoo.tensors(got).items()}, expected, call, 1e-3)
    got.logits.sum().backward()
    assert mask.grad.abs().min() > 0
