"""Padding of every kind: what the untouched model answers, eager, compiled and exported with the same bits."""

import copy

import pytest
import torch
from transformers.models.mpnet import modeling_mpnet

import bertkern as bk

from .zoo import FAMILIES, VOCAB, make, tensors

# Older releases of transformers give MPNet a mask of four dimensions, which cannot be judged while tracing.
TRACED = ["Bert", *(["MPNet"] if hasattr(modeling_mpnet, "create_bidirectional_mask") else [])]
KINDS = ("none", "trailing", "left", "holes", "everything")
MASK_DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)
TRACED_DTYPES = (torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32)


def batch(kind):
    """Six rows of eleven ids; "everything" has a row of each kind, one with a single token and one without any."""
    mask = torch.ones(6, 11, dtype=torch.long)
    if kind in ("trailing", "everything"):
        mask[0, 4:] = 0
        mask[1, 9:] = 0
    if kind in ("left", "everything"):
        mask[2, :5] = 0
    if kind in ("holes", "everything"):
        mask[3, 2:9:3] = 0
        mask[3, 0] = 0
    if kind == "everything":
        mask[4, :] = 0
        mask[5, :-1] = 0
    ids = torch.randint(5, VOCAB, (6, 11), generator=torch.Generator().manual_seed(0))
    return {"input_ids": torch.where(mask == 0, 1, ids), "attention_mask": mask}


def attending(name, implementation):
    """A model with this attention implementation."""
    model = make(name)
    if name.startswith("MPNet"):
        if implementation != "eager":
            pytest.skip("MPNet has one attention")
    else:
        model.set_attn_implementation(implementation)
    return model


def computed(mask):
    """Where hidden states are what the padded model computes: up to the last token, all of a row without one."""
    up_to_last = mask.flip(1).cumsum(1).flip(1) > 0
    return up_to_last | ~mask.bool().any(1, keepdim=True)


def assert_same(expected, got, mask):
    for name, value in tensors(expected).items():
        ours = tensors(got)[name]
        if value.shape[:2] == mask.shape:
            assert not ours[~computed(mask)].any()
            value, ours = value[computed(mask)], ours[computed(mask)]
        torch.testing.assert_close(ours, value, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_untouched_model_answers_the_same(family, implementation, kind):
    model = attending(family + "Model", implementation)
    call = batch(kind)
    with torch.no_grad():
        expected = model(**call)
        bk.accelerate(model)
        assert_same(expected, model(**call), call["attention_mask"])
        assert_same(expected, copy.deepcopy(model)(**call), call["attention_mask"])
        states = model(**call, output_hidden_states=True)
        assert torch.equal(states.last_hidden_state, model(**call).last_hidden_state)
        assert not bk.report(model).fallbacks
        for module in model.train().modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        # The plain path leaves no position out.
        torch.testing.assert_close(model(**call).last_hidden_state, expected.last_hidden_state, atol=2e-5, rtol=1e-4)
        bk.restore(model.eval())
        assert torch.equal(model(**call).last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_does_not_depend_on_the_others(family):
    model = bk.accelerate(make(family + "Model"))
    call = batch("everything")
    with torch.no_grad():
        together = tensors(model(**call))
        for row in range(6):
            alone = tensors(model(**{name: value[row : row + 1] for name, value in call.items()}))
            for name, value in alone.items():
                assert torch.equal(together[name][row], value[0]), (name, row)


@pytest.mark.parametrize("family", TRACED)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("swap", [bk.accelerate, bk.quantize_])
def test_compiled_and_exported_models_give_the_same_bits(family, implementation, swap):
    torch._dynamo.reset()
    model = swap(attending(family + "Model", implementation))
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=32)}
    call = batch("trailing")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        exported = torch.export.export(model, (), call, dynamic_shapes=dict.fromkeys(call, sizes)).module()
        for kind in KINDS:
            call = batch(kind)
            expected = tensors(model(**call))
            for traced in (compiled, exported):
                got = tensors(traced(**call))
                assert all(torch.equal(value, got[name]) for name, value in expected.items()), kind
    assert not bk.report(model).fallbacks


@pytest.mark.parametrize("family", TRACED)
def test_mask_dtypes(family):
    torch._dynamo.reset()
    model = bk.accelerate(make(family + "Model"))
    call = batch("everything")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        expected = tensors(model(**call))
        for dtype in MASK_DTYPES:
            call["attention_mask"] = call["attention_mask"].to(dtype)
            # torch compiles a function eight times at most.
            for run in (model, compiled) if dtype in TRACED_DTYPES else (model,):
                got = tensors(run(**call))
                assert all(torch.equal(value, got[name]) for name, value in expected.items()), dtype


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -torch.inf])
def test_a_mask_of_four_dimensions(implementation, lowest):
    model = attending("BertModel", implementation)
    call = batch("everything")
    mask = call["attention_mask"]
    call["attention_mask"] = (
        torch.zeros(6, 1, 1, 11).masked_fill(mask[:, None, None] == 0, lowest).expand(-1, -1, 11, -1)
    )
    with torch.no_grad():
        expected = model(**call).last_hidden_state
        got = bk.accelerate(model)(**call).last_hidden_state
    torch.testing.assert_close(got[computed(mask)], expected[computed(mask)], atol=2e-5, rtol=1e-4, equal_nan=True)


def test_keep_padding_computes_every_position():
    model = make("BertModel")
    call = batch("everything")
    with torch.no_grad():
        expected = model(**call).last_hidden_state
        got = bk.accelerate(model, keep_padding=True)(**call).last_hidden_state
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
