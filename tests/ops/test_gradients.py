"""Gradients of the operators against float64 references, eager and compiled."""

import pytest
import torch

from bertkern import ops
from bertkern.formats import BsrWeight, CsrWeight
from bertkern.formats.int8 import quantize_weight
from tests import reference

from .test_encoder import every_padding

op = torch.ops.bertkern
BACKENDS = ("eager", "aot_eager", "inductor")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(fused, plain, tensors, backend, tolerance=2e-4):
    """The gradients that `fused` gives each of `tensors` are those of `plain`, a reference in float64."""
    torch._dynamo.reset()
    run = fused if backend == "eager" else torch.compile(fused, fullgraph=True, dynamic=True, backend=backend)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    twins = [tensor.double().requires_grad_() for tensor in tensors]
    y, expected = run(*leaves), plain(*twins)
    assert torch.equal(y, fused(*tensors))
    weights = random(*y.shape, seed=9)
    found = torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True)
    wanted = torch.autograd.grad((expected * weights).sum(), twins, allow_unused=True)
    for ours, theirs in zip(found, wanted, strict=True):
        if theirs is None:
            assert ours is None
            continue
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance * scale + 1e-6, rtol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", range(6))
def test_linear(backend, activation):
    x, weight, bias, residual = random(3, 5, 13), random(7, 13, seed=1), random(7, seed=2), random(15, 7, seed=3)
    packed = ops.pack_linear(weight, bias)

    def plain(x, residual):
        y = reference.activate(torch.nn.functional.linear(x, weight.double(), bias.double()), activation)
        return y + residual.view(3, 5, 7)

    check(lambda x, residual: op.linear(x, packed, 7, activation, residual), plain, [x, residual], backend)
    codes = quantize_weight(weight)
    packed = ops.pack_qlinear(codes.codes, codes.scale, bias)
    weight = codes.codes * codes.scale[:, None]
    # The activation's slope is taken where the input is not rounded.
    leaf, twin = x.clone().requires_grad_(), x.double().requires_grad_()
    op.linear(leaf, packed, 7, activation, residual).sum().backward()
    plain(twin, residual.double()).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), twin.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ("panels", "tokens"))
@pytest.mark.parametrize("block", ((1, 1), (4, 4), (16, 4)))
def test_sparse_linear(block, form, backend):
    x, bias, residual = random(3, 5, 13), random(35, seed=2), random(15, 35, seed=3)
    kept = random(-(-35 // block[0]), -(-13 // block[1]), seed=4) > 0
    weight = random(35, 13, seed=1) * kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:35, :13]
    packed = ops.pack_sparse_linear(BsrWeight.from_dense(weight, block), None, bias, form=form)

    def plain(weight):
        def run(x, residual):
            y = torch.nn.functional.linear(x, weight.double(), bias.double())
            return reference.gelu(y) + residual.view(3, 5, 35)

        return run

    check(lambda x, residual: op.linear(x, packed, 35, 1, residual), plain(weight), [x, residual], backend)
    # The weight that it was made from gets a dense gradient: where it is zero, too.
    offset = bias.clone()
    check(lambda x, w, b: op.linear_from(x, packed, w, b), torch.nn.functional.linear, [x, weight, offset], backend)
    codes = quantize_weight(weight)
    packed = ops.pack_sparse_linear(BsrWeight.from_dense(codes.codes, block), codes.scale, bias, form=form)
    leaf, twin = x.clone().requires_grad_(), x.double().requires_grad_()
    op.linear(leaf, packed, 35, 1, residual).sum().backward()
    plain(codes.codes * codes.scale[:, None])(twin, residual.double()).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), twin.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_from_gives_gradients_to_its_weight(backend):
    x, weight, bias = random(3, 5, 13), random(7, 13, seed=1), random(7, seed=2)
    packed = ops.pack_linear(weight, bias)
    plain = torch.nn.functional.linear
    check(lambda x, w, b: op.linear_from(x, packed, w, b), plain, [x, weight, bias], backend)
    packed = ops.pack_linear(weight)
    check(lambda x, w: op.linear_from(x, packed, w, None), plain, [x, weight], backend)
    check(lambda x, w: op.linear_from(x, packed, w, None, 4), lambda x, w: plain(x, w).tanh(), [x, weight], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_add_layernorm_and_embed(backend):
    gamma, beta = random(12, seed=1), random(12, seed=2)
    x, residual = random(4, 12), random(4, 12, seed=3)
    check(
        lambda *tensors: op.add_layernorm(*tensors, 1e-5),
        lambda *tensors: reference.add_layernorm(*tensors, 1e-5),
        [x, residual, gamma, beta],
        backend,
    )
    ids = [torch.tensor([[1, 3, 0], [2, 2, 1]]), torch.tensor([[0, 1, 2], [0, 1, 2]])]
    codes = quantize_weight(random(3, 12, seed=4))
    scales = [torch.ones(1), codes.scale]
    table = random(5, 12, seed=5)

    def plain(table, gamma, beta):
        table = torch.where(torch.arange(5)[:, None] == 1, table.detach(), table)  # the padding row
        return reference.embed(ids, [table, codes.codes], scales, gamma, beta, 1e-5)

    check(
        lambda t, g, b: op.embed_from(ids, [t, codes.codes], scales, g, b, 1e-5, None, [1, -1]),
        plain,
        [table, gamma, beta],
        backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty_attends, keep_padding, states", [(False, False, False), (True, True, True)])
@pytest.mark.parametrize("rows, unpadded", [(0, False), (1, True), (8, False)])
def test_encoder(backend, empty_attends, keep_padding, states, rows, unpadded):
    if unpadded and backend != "eager":
        pytest.skip("its size depends on data")
    x, mask, bias = random(8, 9, 12), every_padding(9), random(1, 2, 9, 9, seed=1)
    options = ([2, 2], 1, 1e-5, keep_padding, states, empty_attends, False)
    head_mask = (random(max(rows, 1), 4, seed=2) + 1) * torch.tensor([1, 1, 0, 1])
    layers = [[], []]
    packed, codes = [], {}
    for i, (n, k) in enumerate(([(12, 12)] * 4 + [(10, 12), (12, 10)]) * 2):
        weight, offset = random(n, k, seed=i) / 3, random(n, seed=50 + i)
        if i in (2, 10):  # an int8 layer, which has no gradient
            codes[i] = quantize_weight(weight)
            packed.append(ops.pack_qlinear(codes[i].codes, codes[i].scale, offset))
        else:
            packed.append(ops.pack_linear(weight, offset))
        layers[i // 6] += [weight, offset]
    for i, layer in enumerate(layers):
        layer += list(random(4, 12, seed=80 + i))
    norms = torch.stack([torch.stack(layer[12:]) for layer in layers])

    def plain(x, bias, head_mask, *tensors):
        halves, linears = (tensors[:16], tensors[16:]), []
        for i in range(12):
            weight, offset = halves[i // 6][2 * (i % 6) : 2 * (i % 6) + 2]
            if i in codes:
                weight, offset = codes[i].codes * codes[i].scale[:, None], offset.detach()
            linears.append(reference.dense(weight, offset))
        norms = torch.stack([torch.stack(h[12:]) for h in halves])
        head_mask = head_mask if rows else None
        return reference.encoder(x, mask, bias, linears, norms, *options, head_mask, unpadded)

    def fused(x, bias, head_mask, *tensors):
        made_from = list(tensors)
        for i in codes:
            start = 16 * (i // 6) + 2 * (i % 6)
            made_from[start : start + 2] = [torch.empty(0)] * 2
        head_mask = head_mask if rows else None
        return op.encoder_from(x, mask, bias, packed, norms, made_from, *options, head_mask, unpadded)

    check(fused, plain, [x, bias, head_mask, *layers[0], *layers[1]], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_encoder_for_inputs_and_norms_alone(backend):
    x, norms = random(2, 9, 12), random(1, 4, 12, seed=3)
    weights = [random(n, k, seed=i) / 3 for i, (n, k) in enumerate([(12, 12)] * 4 + [(10, 12), (12, 10)])]
    weights[1::2] = [weight * (weight > 0.1) for weight in weights[1::2]]
    packed = [ops.pack_linear(weight) for weight in weights]
    for i, form in ((1, "tokens"), (3, "panels"), (5, "tokens")):
        packed[i] = ops.pack_sparse_linear(CsrWeight.from_dense(weights[i]), form=form)
    linears = [reference.dense(weight) for weight in weights]
    check(
        lambda x, norms: op.encoder(x, None, None, packed, norms, [3], 1, 1e-5),
        lambda x, norms: reference.encoder(x, None, None, linears, norms, [3], 1, 1e-5),
        [x, norms],
        backend,
    )


def test_half_precision():
    x, weight, bias = (random(*shape).bfloat16() for shape in ((3, 13), (7, 13), (7,)))
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    op.linear_from(leaves[0], ops.pack_linear(weight, bias), *leaves[1:]).float().square().sum().backward()
    twins = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    torch.nn.functional.linear(*twins).square().sum().backward()
    for ours, theirs in zip(leaves, twins, strict=True):
        assert ours.grad.dtype == torch.bfloat16
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=0.2, rtol=0.03)


def test_results_share_no_memory():
    x, residual = random(3, 5).requires_grad_(), random(3, 5).requires_grad_()
    y = op.add_layernorm(x, residual, torch.ones(5), torch.zeros(5), 1e-5)
    first, second = torch.autograd.grad(y[:, 0].sum(), [x, residual])
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


def test_what_has_no_gradient_says_so():
    x = random(3, 5).requires_grad_()
    packed = ops.pack_linear(random(4, 5))
    with pytest.raises(RuntimeError, match=r"linear: expected one backward pass. Got a second derivative"):
        torch.autograd.grad(op.linear(x, packed, 4).sum(), x, create_graph=True)
    codes, scale = ops.quantize_rows(x)
    assert not codes.requires_grad and not scale.requires_grad


def test_opcheck():
    x, weight, bias = random(3, 5), random(4, 5), random(4)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    torch.library.opcheck(op.linear_from.default, (leaves[0], ops.pack_linear(weight, bias), *leaves[1:]))
    torch.library.opcheck(op.linear.default, (leaves[0], ops.pack_linear(weight, bias), 4))
    gamma, beta = random(2, 5)
    torch.library.opcheck(op.add_layernorm.default, (leaves[0], None, gamma.requires_grad_(), beta, 1e-5))
    table = random(6, 5).requires_grad_()
    arguments = ([torch.tensor([1, 2])], [table], [torch.ones(1)], gamma, beta, 1e-5, None)
    torch.library.opcheck(op.embed_from.default, (*arguments, [1]))
    torch.library.opcheck(op.embed.default, arguments)
    weights = [random(4, 4).requires_grad_() for _ in range(6)]
    made_from = [part for weight in weights for part in (weight, torch.empty(0))] + list(random(4, 4))
    packed = [ops.pack_linear(weight) for weight in weights]
    x, norms = random(2, 3, 4).requires_grad_(), random(1, 4, 4)
    rest = ([2], 1, 1e-5, False, False, True)
    torch.library.opcheck(op.encoder_from.default, (x, torch.ones(2, 3), None, packed, norms, made_from, *rest))
    torch.library.opcheck(op.encoder.default, (x, torch.ones(2, 3), None, packed, norms, *rest))
    rest = (*rest, False, torch.tensor([[0.5, 0.0]], requires_grad=True))
    torch.library.opcheck(op.encoder_from.default, (x, torch.ones(2, 3), None, packed, norms, made_from, *rest))
    torch.library.opcheck(op.encoder.default, (x, torch.ones(2, 3), None, packed, norms, *rest))
