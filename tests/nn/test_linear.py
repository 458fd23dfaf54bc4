"""PackedLinear: an nn.Linear with another kernel."""

import copy
import pickle

import pytest
import torch
from torch import nn

from bertkern.nn import PackedLinear


@pytest.mark.parametrize("k, n", [(1, 1), (13, 7), (52, 117), (64, 64)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 3e-3)])
def test_the_same_function(k, n, bias, dtype, atol):
    torch.manual_seed(k)
    linear = nn.Linear(k, n, bias=bias, dtype=dtype).eval()
    packed = PackedLinear.from_linear(linear)
    assert packed.weight is linear.weight and isinstance(packed, nn.Linear)
    with torch.no_grad():
        for shape in ((5, k), (2, 3, k), (k,), (0, k)):
            x = torch.randn(shape, dtype=dtype)
            torch.testing.assert_close(packed(x), linear(x), atol=atol, rtol=1e-2 if atol > 1e-4 else 1e-5)


def test_gradients():
    torch.manual_seed(0)
    linear = nn.Linear(13, 7).eval()
    packed = copy.deepcopy(PackedLinear.from_linear(linear))
    x, y = torch.randn(2, 5, 13, requires_grad=True), torch.randn(2, 5, 13)
    y = x.detach().clone().requires_grad_()
    linear(x).square().sum().backward()
    packed(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(linear.weight.grad, packed.weight.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(linear.bias.grad, packed.bias.grad, atol=1e-4, rtol=1e-4)
    first, second = torch.autograd.grad(packed(y).sum(), [packed.weight, y])
    assert first.shape == (7, 13) and second.shape == y.shape


def test_the_copy_follows_the_weight():
    torch.manual_seed(0)
    packed = PackedLinear.from_linear(nn.Linear(13, 7)).eval()
    x = torch.randn(3, 13)

    def check():
        with torch.no_grad():
            torch.testing.assert_close(
                packed(x), nn.functional.linear(x, packed.weight, packed.bias), atol=1e-5, rtol=1e-4
            )

    check()
    optimizer = torch.optim.SGD(packed.parameters(), lr=0.1)
    packed(x).sum().backward()
    optimizer.step()
    check()
    packed.load_state_dict(nn.Linear(13, 7).state_dict())
    check()
    packed.weight = nn.Parameter(torch.randn(7, 13))
    check()
    packed.weight.data = torch.randn(7, 13)
    check()
    packed.bias = None
    check()
    packed = pickle.loads(pickle.dumps(packed))
    check()
    packed = packed.double().float()
    check()


def test_other_paths():
    packed = PackedLinear.from_linear(nn.Linear(13, 7))
    x = torch.randn(3, 13)
    assert torch.equal(packed.train()(x), nn.functional.linear(x, packed.weight, packed.bias))
    packed.eval().double()
    assert packed(x.double()).dtype == torch.float64
