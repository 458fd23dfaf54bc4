"""BlockSparseLinear: the masked dense layer's function and gradients, and everything that a module has to survive."""

import copy
import gc
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bertkern.formats import BsrWeight
from bertkern.nn import BlockSparseLinear
from bertkern.ops import block_sparse as ops

BLOCKS = [(1, 4), (4, 1), (16, 4), (16, 16), (32, 32), (32, 64), (64, 64), (128, 128), (3, 5)]
DOUBLE = torch.float64


def pattern(n: int, k: int, block: tuple[int, int], density: float = 0.5) -> Tensor:
    grid = -(-n // block[0]), -(-k // block[1])
    kept = torch.rand(grid) < density
    kept[grid[0] // 2] = False  # a block row that is empty
    kept[-1, -1] = True  # and a block over both edges
    return kept


def mask_of(layer: BlockSparseLinear) -> Tensor:
    """[N, K], 1 where a block is kept."""
    weight = layer.to_weight()
    ones = torch.ones_like(weight.values)
    return BsrWeight(weight.crow, weight.col, ones, weight.shape).to_dense()


def blocks_of(layer: BlockSparseLinear, dense: Tensor) -> Tensor:
    """What of a matrix [N, K] lies in the layer's blocks, in the order of `values`; zero outside of the matrix."""
    (br, bc), (n, k) = layer.block, dense.shape
    whole = F.pad(dense, (0, -k % bc, 0, -n % br))
    grid = whole.view(whole.shape[0] // br, br, whole.shape[1] // bc, bc).permute(0, 2, 1, 3)
    row = torch.repeat_interleave(torch.arange(len(layer.crow) - 1), layer.crow.diff().long())
    return grid[row, layer.col.long()]


def made(block, n=None, k=None, dtype=DOUBLE, seed=0, **options) -> BlockSparseLinear:
    torch.manual_seed(seed)
    n, k = n or 2 * block[0] + 3, k or 3 * block[1] + 2
    return BlockSparseLinear(k, n, block, pattern=pattern(n, k, block), dtype=dtype, **options)


# --- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (), (0,), (2, 0)])
@pytest.mark.parametrize("block", BLOCKS)
def test_as_the_masked_dense_layer(block, shape, bias):
    layer = made(block, bias=bias)
    mask, dense = mask_of(layer), layer.weight.requires_grad_()
    other = layer.bias.detach().clone().requires_grad_() if bias else None
    x = torch.randn(*shape, layer.in_features, dtype=DOUBLE, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    got, expected = layer(x), F.linear(y, dense * mask, other)
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(expected)
    got.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(layer.values.grad, blocks_of(layer, dense.grad))
    if bias:
        torch.testing.assert_close(layer.bias.grad, other.grad)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("block", [(1, 4), (16, 4), (32, 32)])
def test_inputs_and_gradients_that_are_not_contiguous(block):
    layer = made(block)
    k, n = layer.in_features, layer.out_features
    wide = torch.randn(2 * k, 2, 7, dtype=DOUBLE)
    for x in (wide.permute(1, 2, 0)[..., ::2], wide[:k].permute(2, 1, 0), torch.randn(1, k, dtype=DOUBLE).expand(6, k)):
        grads = [
            torch.randn(n, *x.shape[:-1], dtype=DOUBLE).movedim(0, -1),
            torch.ones((), dtype=DOUBLE).expand(*x.shape[:-1], n),
            torch.randn(*x.shape[:-1], 2 * n, dtype=DOUBLE)[..., ::2],
        ]
        for grad in grads:
            assert not grad.is_contiguous()
            x = x.detach().requires_grad_()
            layer.zero_grad()
            layer(x).backward(grad)
            rows, dy = x.detach().reshape(-1, k), grad.reshape(-1, n)
            torch.testing.assert_close(x.grad, grad @ layer.weight)
            torch.testing.assert_close(layer.values.grad, blocks_of(layer, dy.T @ rows))
            torch.testing.assert_close(layer.bias.grad, dy.sum(0))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("block, n, k", [((2, 3), 7, 10), ((1, 4), 5, 9), ((4, 1), 9, 3), ((4, 4), 3, 3)])
def test_gradcheck(block, n, k):
    layer = made(block, n, k)
    x = torch.randn(2, 2, k, dtype=DOUBLE, requires_grad=True)

    def run(x, values, bias):
        return ops.block_sparse_linear(x, values, layer.index, n, bias)

    inputs = (x, layer.values, layer.bias)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("op", ["linear", "input_gradient", "values_gradient"])
def test_operators(op):
    layer = made((2, 3), 7, 10)
    x, dy = (torch.randn(4, width, dtype=DOUBLE, requires_grad=True) for width in (10, 7))
    values, bias, index = layer.values, layer.bias, layer.index
    calls = {
        "linear": [(x, values, bias, index, 7), (x, values, None, index, 7)],
        "input_gradient": [(dy, values, index, 10)],
        "values_gradient": [(dy, x, index, *values.shape)],
    }
    for arguments in calls[op]:
        found = torch.library.opcheck(getattr(torch.ops.bertkern, f"block_sparse_{op}").default, arguments)
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("block", [(1, 4), (16, 16), (64, 64)])
def test_narrower_dtypes(block, dtype, atol):
    layer = made(block, dtype=torch.float32)
    exact = BlockSparseLinear.from_weight(layer.to_weight().to(DOUBLE), layer.bias.detach().double())
    layer = layer.to(dtype)
    x = torch.randn(9, layer.in_features, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact(x.double()), atol=atol, rtol=atol)


@pytest.mark.usefixtures("device")
def test_no_block_left():
    layer = BlockSparseLinear(40, 70, (32, 32), pattern=torch.zeros(3, 2, dtype=torch.bool))
    x = torch.randn(3, 40, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, layer.bias.expand(3, 70)) and layer.density == 0
    y.sum().backward()
    assert not x.grad.any() and layer.values.grad.shape == (0, 32, 32)
    assert torch.equal(layer.bias.grad, torch.full((70,), 3.0))
    twin = BlockSparseLinear.from_linear(layer.to_linear(), (32, 32))
    assert torch.equal(twin(x), y)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("k, n", [(0, 5), (5, 0), (0, 0)])
def test_widths_of_zero(k, n):
    layer = BlockSparseLinear(k, n, (4, 4))
    x = torch.randn(2, 3, k, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, F.linear(x, torch.zeros(n, k), layer.bias))
    y.sum().backward()
    assert x.grad.shape == x.shape and torch.equal(layer.bias.grad, torch.full((n,), 6.0))


@pytest.mark.usefixtures("device")
def test_what_is_not_kept_is_not_read():
    layer = BlockSparseLinear(96, 64, (32, 32), pattern=torch.tensor([[0, 1, 0], [0, 1, 0]]) > 0)
    x = torch.randn(5, 96)
    clean = layer(x)
    x[:, :32], x[:, 64:] = float("nan"), float("inf")
    assert torch.equal(layer(x), clean)


@pytest.mark.usefixtures("device")
def test_nan_in_a_block_is_kept():
    linear = nn.Linear(64, 64)
    with torch.no_grad():
        linear.weight[:32] = 0
        linear.weight[3, 40] = float("nan")
    layer = BlockSparseLinear.from_linear(linear, (32, 32))
    assert layer.to_weight().density == 0.75
    y = layer(torch.randn(2, 64))
    assert y[:, 3].isnan().all() and y[:, 4:].isfinite().all()


def test_values_beyond_the_edge_stay_zero():
    layer = made((16, 16), 37, 53, torch.float32)
    outside = blocks_of(layer, torch.ones(37, 53)) == 0
    assert outside.any() and not layer.values[outside].any()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(3):
        x = torch.randn(7, 53)
        if step == 2:
            x[0, 0] = float("nan")
        layer(x).square().sum().backward()
        assert not layer.values.grad[outside].any()
        optimizer.step()
        optimizer.zero_grad()
        assert not layer.values[outside].any()


# --- forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
def test_from_linear_and_back(block):
    torch.manual_seed(0)
    linear = nn.Linear(3 * block[1] + 2, 2 * block[0] + 3)
    kept = pattern(*linear.weight.shape, block)
    with torch.no_grad():
        kept = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        linear.weight *= kept[: linear.out_features, : linear.in_features]
    layer = BlockSparseLinear.from_linear(linear.eval(), block)
    assert not layer.training and layer.block == block
    back = layer.to_linear()
    assert type(back) is nn.Linear and not back.training
    assert torch.equal(back.weight, linear.weight) and torch.equal(back.bias, linear.bias)
    assert torch.equal(layer.weight, linear.weight)
    x = torch.randn(5, linear.in_features)
    torch.testing.assert_close(layer(x), linear(x))
    again = BlockSparseLinear.from_weight(layer.to_weight(), layer.bias)
    assert torch.equal(again(x), layer(x))


def test_frozen_parameters_stay_frozen():
    linear = nn.Linear(8, 8).requires_grad_(False)
    layer = BlockSparseLinear.from_linear(linear, (4, 4))
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert not any(parameter.requires_grad for parameter in layer.to_linear().parameters())


def test_under_torch_prune():
    linear = nn.Linear(64, 64)
    mask = torch.zeros(64, 64)
    mask[:32, 32:] = 1
    torch.nn.utils.prune.custom_from_mask(linear, "weight", mask)
    layer = BlockSparseLinear.from_linear(linear, (32, 32))
    assert layer.density == 0.25
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), linear(x))


def test_repr():
    layer = BlockSparseLinear(64, 32, (16, 16), pattern=torch.eye(2, 4) > 0)
    assert repr(layer) == ("BlockSparseLinear(in_features=64, out_features=32, bias=True, block=(16, 16), kept=2/8)")
    assert layer.density == 0.25
    assert sorted(layer.state_dict()) == ["bias", "col", "crow", "values"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"block": (0, 4)}, r"expected block to be two sizes \(br, bc\) from 1\. Got \(0, 4\)\."),
        ({"block": 32}, r"Got 32\."),
        ({"block": (4, 4), "pattern": torch.ones(2, 3)}, r"expected pattern bool .* = \[2, 2\]\. Got torch.float32"),
        ({"block": (4, 4), "pattern": torch.ones(3, 2) > 0}, r"= \[2, 2\]\. Got torch.bool of shape \[3, 2\]"),
    ],
)
def test_constructor_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockSparseLinear(8, 7, **arguments)


def test_from_weight_refuses():
    weight = BsrWeight.from_dense(torch.ones(8, 8), (4, 4))
    with pytest.raises(ValueError, match=r"expected bias of shape \[N\] = \[8\]\. Got \[7\]\."):
        BlockSparseLinear.from_weight(weight, torch.ones(7))
    with pytest.raises(ValueError, match=r"expected values of a float dtype\. Got torch\.int8"):
        BlockSparseLinear.from_weight(weight.__class__(weight.crow, weight.col, weight.values.to(torch.int8), (8, 8)))
    with pytest.raises(ValueError, match="BsrWeight: "):
        BlockSparseLinear.from_weight(BsrWeight(weight.crow, weight.col + 1, weight.values, (8, 8)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 9)}, r"expected index int32 of shape"),
        ({"x": torch.tensor(1.0)}, r"expected x of shape \[\.\.\., K\]\. Got \[\]"),
        ({"x": torch.ones(2, 8).double()}, r"expected values of x's dtype torch.float64\. Got torch.float32"),
        ({"x": torch.ones(2, 8).int()}, r"expected x of dtype .*Got torch.int32"),
        ({"bias": torch.ones(7)}, r"expected bias of shape \[N\] = \[8\]\. Got \[7\]"),
        ({"bias": torch.ones(8).half()}, r"expected bias of x's dtype torch.float32\. Got torch.float16"),
        ({"values": torch.ones(4, 16)}, r"expected values of shape \[nnzb, br, bc\]\. Got \[4, 16\]"),
        ({"values": torch.ones(3, 4, 4)}, r"expected index int32 of shape \[\d+\]\. Got torch.int32 of shape \[\d+\]"),
        ({"index": torch.ones(22)}, r"Got torch.float32"),
        ({"x": torch.ones(2, 8, device="meta")}, r"expected values on meta\. Got cpu"),
    ],
)
def test_operator_refuses(change, message):
    weight = BsrWeight.from_dense(torch.ones(8, 8), (4, 4))
    arguments = {
        "x": torch.ones(2, 8),
        "values": weight.values,
        "index": ops.block_index(weight),
        "bias": torch.ones(8),
    }
    ops.block_sparse_linear(out_features=8, **arguments)
    with pytest.raises(RuntimeError, match=message):
        ops.block_sparse_linear(out_features=8, **{**arguments, **change})


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("shape", [(5, 69), (5, 71), (2, 3, 33), ()])
def test_another_width_is_refused(shape, mode):
    """One with as many blocks, too, of which the operator cannot tell."""
    layer = made((16, 16), 40, 70, torch.float32).train(mode)
    with torch.no_grad(), pytest.raises(ValueError, match=r"expected x of shape \[..., K\] = \[..., 70\]. Got"):
        layer(torch.zeros(shape))


# --- what a module has to survive ----------------------------------------------------------------------------------


def test_copies():
    layer = made((16, 16), dtype=torch.float32)
    x = torch.randn(3, layer.in_features)
    y = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
        copy.deepcopy(layer).double().float(),
    ):
        assert torch.equal(twin(x), y)
        assert twin.values is not layer.values
    half = copy.deepcopy(layer).half()
    assert half.crow.dtype == half.col.dtype == half.index.dtype == torch.int32 and half.values.dtype == torch.float16
    assert half(x.half()).dtype == torch.float16


def test_state_dict_of_another_pattern():
    first, second = made((16, 16), 40, 70, torch.float32, seed=1), made((16, 16), 40, 70, torch.float32, seed=2)
    assert first.col.numel() != second.col.numel()
    x, parameter = torch.randn(3, 70), second.values
    second(x).sum().backward()
    second.load_state_dict(first.state_dict())
    assert second.values is parameter and parameter.grad is None
    assert torch.equal(first(x), second(x))
    second(x).sum().backward()
    assert second.values.grad.shape == first.values.shape
    third = BlockSparseLinear(70, 40, (16, 16), device="meta")
    third.load_state_dict(first.state_dict(), assign=True)
    assert torch.equal(first(x), third(x))


def test_to_empty_then_load():
    first = made((16, 16), 40, 70, torch.float32)
    with torch.device("meta"):
        second = BlockSparseLinear(70, 40, (16, 16))
    assert second(torch.ones(3, 70, device="meta")).shape == (3, 40)
    second = second.to_empty(device="cpu")
    with torch.no_grad():
        second.col.fill_(77)
    second._reindex()
    with pytest.raises(ValueError, match="BsrWeight: "):
        second(torch.ones(3, 70))
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 70)
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(crow=s["crow"].long()),
        lambda s: s.update(crow=s["crow"][:-1]),
        lambda s: s["crow"].add_(1),
        lambda s: s["crow"][1:2].fill_(10**6),
        lambda s: s.update(col=s["col"].float()),
        lambda s: s.update(col=s["col"][:-1]),
        lambda s: s["col"].fill_(0),
        lambda s: s["col"][:1].fill_(-1),
        lambda s: s["col"][-1:].fill_(5),
        lambda s: s.update(col=s["col"].flip(0)),
        lambda s: s.update(values=s["values"][:-1]),
        lambda s: s.update(values=s["values"][:, :8]),
        lambda s: s.update(values=s["values"].int()),
        lambda s: s["values"].fill_(1),
        lambda s: s.pop("col") if s.update(crow=torch.zeros_like(s["crow"])) is None else None,
    ],
)
def test_damaged_state_dicts_are_refused(change):
    layer = made((16, 16), 40, 70, torch.float32)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    index, state = layer.index.clone(), {name: tensor.clone() for name, tensor in before.items()}
    change(state)
    with pytest.raises(RuntimeError, match=r"\t0: (BsrWeight|BlockSparseLinear): "):
        nn.Sequential(layer).load_state_dict({f"0.{name}": tensor for name, tensor in state.items()})
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    assert torch.equal(layer.index, index)


def test_training_follows_the_masked_dense_layer():
    layer = made((16, 4), 48, 40, torch.float32)
    dense = layer.to_linear()
    mask = mask_of(layer)
    optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-2) for module in (layer, dense)]
    for _ in range(10):
        x, target = torch.randn(8, 40), torch.randn(8, 48)
        for module, optimizer in zip((layer, dense), optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(module(x), target).backward()
            if module is dense:
                dense.weight.grad *= mask
            optimizer.step()
    torch.testing.assert_close(layer.weight, dense.weight.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.bias, dense.bias, atol=1e-5, rtol=1e-4)


def test_autocast():
    layer = made((16, 16), 40, 70, torch.float32)
    x = torch.randn(5, 70, requires_grad=True)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        inner = layer(y @ torch.randn(40, 70))  # of autocast's dtype already
    assert y.dtype == inner.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=2e-2, rtol=2e-2)
    y.sum().backward()
    assert layer.values.grad.dtype == x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(5, -1), atol=2e-2, rtol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.double()(x.double()).dtype == DOUBLE


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    layer = made((16, 16), 40, 70)
    x = torch.randn(5, 70, dtype=DOUBLE, requires_grad=True)
    layer(x).square().sum().backward()
    expected = [x.grad, layer.values.grad]
    x.grad, layer.values.grad = None, None
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected[0]) and torch.equal(layer.values.grad, expected[1])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend):
    layer = nn.Sequential(made((16, 16), 40, 70, torch.float32), nn.ReLU())
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for rows in (5, 3):
        x = torch.randn(rows, 70, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        layer.zero_grad()
        layer(x).sum().backward()
        expected = layer[0].values.grad
        layer.zero_grad()
        compiled(y).sum().backward()
        assert torch.equal(x.grad, y.grad) and torch.equal(layer[0].values.grad, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16


def test_export():
    layer = made((16, 16), 40, 70, torch.float32).eval()
    rows = torch.export.Dim("rows", min=1, max=64)
    x = torch.randn(5, 70)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))
    assert "bertkern.block_sparse_linear" in str(program.graph)
    assert torch.equal(program.module()(x[:2]), layer(x[:2]))


def test_inference_mode():
    layer = made((16, 16), 40, 70, torch.float32).eval()
    x = torch.randn(5, 70)
    with torch.inference_mode():
        y = layer(x)
    torch.testing.assert_close(y, layer(x))  # the processor's kernels, and plain PyTorch


def test_packed_forward_is_asked_in_eval_mode_without_gradients_alone(monkeypatch):
    layer = made((16, 16), 40, 70, torch.float32)
    x, asked = torch.randn(5, 70), []
    monkeypatch.setattr(layer, "_packed_forward", lambda x: asked.append(1) or torch.zeros(5, 40))
    layer(x)
    layer.eval()(x)
    with torch.no_grad():
        layer.train()(x)
        assert not asked
        assert not layer.eval()(x).any() and asked


def test_nothing_dense_is_made(monkeypatch):
    """Forward and backward pass allocate no tensor of the weight's full size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self.size = max(self.size, tensor.numel())
            return out

    layer = BlockSparseLinear(1024, 1024, (32, 32), pattern=torch.eye(32) > 0)
    x = torch.randn(4, 1024, requires_grad=True)
    index = ops._cut(layer.index, (1024, 1024), layer.values.shape)
    with Largest() as seen, torch.no_grad():
        y = ops._multiply(x, layer.values, layer.bias, index, False)
        ops._multiply(y, layer.values, None, index, True)
        ops._multiply_sampled(y, x, index)
    assert seen.size == layer.values.numel() == 1024 * 32


def test_without_triton_there_is_one_warning(monkeypatch):
    def missing(name):
        raise ImportError("bertkern's GPU kernels need Triton.")

    monkeypatch.setattr(ops._triton, "kernels", missing)
    ops._kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="runs in plain PyTorch, slowly: bertkern's GPU kernels need Triton"):
            assert ops._kernels() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert ops._kernels() is None
    finally:
        ops._kernels.cache_clear()


def test_import_without_triton(run_python):
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, bertkern, bertkern.nn\n"
        "layer = bertkern.nn.BlockSparseLinear(8, 8, (4, 4)); layer(torch.ones(2, 8)).sum().backward()\n"
        "from bertkern import _triton\n"
        "try: _triton.kernels('block_sparse')\n"
        "except ImportError as error: print(error)\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "bertkern's GPU kernels need Triton. Run: pip install 'triton>=3.6'"


# --- several processes ---------------------------------------------------------------------------------------------


def model() -> nn.Module:
    torch.manual_seed(0)
    first = BlockSparseLinear(24, 20, (8, 8), pattern=pattern(20, 24, (8, 8)), dtype=DOUBLE)
    return nn.Sequential(first, nn.Tanh(), BlockSparseLinear(20, 6, (2, 4), dtype=DOUBLE))


def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(8, 24, dtype=DOUBLE) for _ in range(3)]


def train(module: nn.Module, rows: slice) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for x in batches():
        optimizer.zero_grad()
        module(x[rows]).square().mean().backward()
        optimizer.step()


def worker(rank: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    module = nn.parallel.DistributedDataParallel(model())
    train(module, slice(4 * rank, 4 * rank + 4))
    torch.save(module.module.state_dict(), f"{folder}/{rank}.pt")
    # Else the module is the last that holds the group, and frees it with the interpreter's lock in hand, for which a
    # thread of the group may be waiting: seen to hang.
    del module
    gc.collect()
    dist.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    alone = model()
    train(alone, slice(None))
    for rank in range(2):
        together = torch.load(tmp_path / f"{rank}.pt")
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(together[name], tensor)
