"""Eval mode with gradients: the fused path runs, and its gradients are those of the untouched model."""

import copy

import pytest
import torch
from transformers.models.mpnet import modeling_mpnet

import bertkern as bk

from .test_padding import batch
from .zoo import FAMILIES, inputs, make, padded

TRACED = ["Bert", *(["MPNet"] if hasattr(modeling_mpnet, "create_bidirectional_mask") else [])]
BACKENDS = ("eager", "aot_eager", "inductor")
SWAPS = [bk.accelerate, bk.quantize_]


def runner(model, backend):
    """The model itself or compiled."""
    torch._dynamo.reset()
    if backend == "eager":
        return model
    return torch.compile(model, fullgraph=True, dynamic=True, backend=backend)


def loss(output, mask):
    """Linear in the outputs, so that its gradient is the same where outputs are rounded."""
    hidden = output.last_hidden_state
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)) * mask[..., None]
    total = (hidden * weights).sum()
    pooled = getattr(output, "pooler_output", None)
    return total if pooled is None else total + pooled.sum()


def assert_gradients(model, twin, tolerance=1e-4):
    """Every parameter of `model` has the gradient that the one of its name has in `twin`."""
    expected = dict(twin.named_parameters())
    for name, ours in model.named_parameters():
        theirs = expected[name].grad
        if theirs is None:
            assert ours.grad is None or not ours.grad.any(), name
            continue
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs, atol=tolerance * scale + 1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("family", TRACED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters(family, backend):
    model = make(family + "Model")
    twin, call = copy.deepcopy(model), batch("everything")
    run = runner(bk.accelerate(model), backend)
    with torch.no_grad():
        expected = model(**call).last_hidden_state
    output = run(**call)
    assert torch.equal(output.last_hidden_state, expected)
    loss(output, call["attention_mask"]).backward()
    loss(twin(**call), call["attention_mask"]).backward()
    assert_gradients(model, twin)
    assert not bk.report(model).fallbacks


@pytest.mark.parametrize("family", TRACED)
@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("frozen", [False, True])
def test_inputs_embeds(family, backend, swap, frozen):
    model = make(family + "Model")
    mask = batch("trailing")["attention_mask"]
    embeds = torch.randn(6, 11, 52, generator=torch.Generator().manual_seed(2))
    twin = copy.deepcopy(model)
    if swap is bk.quantize_:
        twin = bk.dequantize(swap(twin))
        # Outputs of int8 models are rounded, and those of the pooler bend before the loss.
        model.pooler = twin.pooler = None
    run = runner(swap(model).requires_grad_(not frozen), backend)
    grads = []
    for called in (run, twin):
        leaf = embeds.clone().requires_grad_()
        loss(called(inputs_embeds=leaf, attention_mask=mask), mask).backward()
        grads.append(leaf.grad)
    if swap is bk.quantize_:
        # Behind one layer of int8 the activations differ a little, and with them every slope.
        cosine = torch.nn.functional.cosine_similarity(grads[0].flatten(), grads[1].flatten(), dim=0)
        assert cosine > 0.99
    else:
        torch.testing.assert_close(*grads, atol=1e-4 * grads[1].abs().max().item(), rtol=1e-3)
    assert not grads[0][mask == 0].any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("swap", SWAPS)
def test_a_second_derivative_is_refused(family, swap):
    model = swap(make(family + "Model"))
    embeds = torch.randn(2, 5, model.get_input_embeddings().embedding_dim, requires_grad=True)
    hidden = model(inputs_embeds=embeds).last_hidden_state
    with pytest.raises(RuntimeError, match=r"encoder.*: expected one backward pass. Got a second derivative"):
        torch.autograd.grad(hidden.sum(), embeds, create_graph=True)


def optimizers(model):
    yield torch.optim.SGD(model.parameters(), lr=0.01)
    # It does not count its changes.
    yield torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_training_in_eval_mode(backend):
    model = make("BertForSequenceClassification")
    twin = copy.deepcopy(model)
    run = runner(bk.accelerate(model), backend)
    call = {**padded(model, "trailing"), "labels": torch.tensor([0, 1, 1])}
    for ours, theirs in zip(optimizers(model), optimizers(twin), strict=True):
        for _ in range(2):
            for module, called, optimizer in ((model, run, ours), (twin, twin, theirs)):
                module.zero_grad()
                called(**call).loss.backward()
                optimizer.step()
            with torch.no_grad():
                expected = twin(**call).logits
                torch.testing.assert_close(run(**call).logits, expected, atol=1e-3, rtol=1e-3)
                torch.testing.assert_close(model(**call).logits, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("swap", SWAPS)
def test_calls_without_no_grad_run_fused(backend, swap):
    model = swap(make("BertForSequenceClassification"))
    run, call = runner(model, backend), inputs(model)
    with torch.no_grad():
        expected = model(**call).logits
    got = run(**call).logits
    assert got.requires_grad and torch.equal(got, expected)
    assert not bk.report(model).fallbacks


@pytest.mark.parametrize("swap", SWAPS)
def test_export_with_gradients_enabled(swap):
    model = swap(make("BertModel"))
    call = padded(model, "trailing")
    program = torch.export.export(model, (), call)
    assert str(program.graph).count("bertkern.encoder") == 1
    with torch.no_grad():
        got = program.module()(**call).last_hidden_state
        assert torch.equal(got, model(**call).last_hidden_state)
