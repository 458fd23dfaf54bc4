"""NoNorm: what is left of a LayerNorm whose statistics became constants."""

import pytest
import torch
from torch import nn

from bertkern.nn import NoNorm


def test_the_function_and_its_gradients():
    torch.manual_seed(0)
    norm = nn.LayerNorm(5, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    made = NoNorm.from_layer_norm(norm)
    assert made.weight is norm.weight and made.bias is norm.bias and list(made.state_dict()) == ["weight", "bias"]
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.equal(made(x), norm.weight * x + norm.bias)
    assert torch.autograd.gradcheck(made, x)
    assert torch.equal(NoNorm(4)(torch.arange(4.0)), torch.arange(4.0)) and "4" in repr(NoNorm(4))


@pytest.mark.parametrize("norm", [nn.LayerNorm((2, 3)), nn.LayerNorm(3, elementwise_affine=False)])
def test_other_norms(norm):
    with pytest.raises(ValueError, match=r"NoNorm: expected a LayerNorm with weight and bias of shape \[H\]. Got"):
        NoNorm.from_layer_norm(norm)
