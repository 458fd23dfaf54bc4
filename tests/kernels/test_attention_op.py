"""attention_cuda where no kernel runs: against float64, its checks, under autograd, torch.compile and autocast."""

import itertools

import pytest
import torch
from torch import Tensor

from bertkern.ops import attention_triton
from bertkern.ops.attention_triton import attention_cuda

from .attention_reference import attention_reference

LENGTHS = (5, 1, 0, 9)
OPTIONS = {
    "plain": {},
    "causal": {"causal": True, "scale": 0.3},
    "mask": {"head_mask": (4, 3)},
    "mask-of-all": {"head_mask": (3,)},
    "bias": {"bias": (1, 3, 9, 9)},
    "bias-of-each": {"bias": (4, 1, 9, 9), "causal": True},
    "bias-of-keys": {"bias": (4, 1, 1, 9)},
    "kept": {"bias": (4, 6, 9, 9), "head_mask": (4, 6), "heads": (5, 0, 2)},
    "kept-bias-of-all": {"bias": (1, 1, 9, 9), "head_mask": (6,), "heads": (1, 3, 5)},
}


def ends(lengths=LENGTHS) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def leaves_of(options: dict, dtype: torch.dtype) -> tuple[list[Tensor], dict]:
    """q, k and v [17, 3, 6], two of whose tokens stand in no sequence; and the options with tensors for shapes."""
    torch.manual_seed(0)
    made = dict(options)
    qkv = [torch.randn(17, 3, 6).to(dtype).requires_grad_() for _ in range(3)]
    if "bias" in made:
        bias = torch.randn(made["bias"])
        bias[0, :, :, -1] = float("-inf")  # the only key of the query in the causal case's last row stays
        made["bias"] = bias.to(dtype).requires_grad_()
    if "head_mask" in made:
        mask = torch.rand(made["head_mask"]) + 0.5
        mask.view(-1, mask.shape[-1])[0, 0] = 0
        made["head_mask"] = mask.to(dtype).requires_grad_()
    return qkv + [made[name] for name in ("bias", "head_mask") if name in made], made


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_plain(name, dtype):
    leaves, options = leaves_of(OPTIONS[name], dtype)
    grad = torch.randn(17, 3, 6).to(dtype)
    out = attention_cuda(*leaves[:3], ends(), 9, **options)
    assert out.dtype == dtype and not out[15:].any()
    got = torch.autograd.grad(out, leaves, grad)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    rest = iter(wide[3:])
    options = {name: next(rest) if isinstance(value, Tensor) else value for name, value in options.items()}
    if "bias" in options:
        options["bias"] = options["bias"].expand(-1, -1, 9, 9)
    # The reference's leaves come in the order of its options, as ours do.
    expected = attention_reference(*wide[:3], LENGTHS, **options)
    theirs = torch.autograd.grad(expected, wide, grad.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}[dtype]
    for mine, right in zip((out, *got), (expected, *theirs), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), right, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_those_of_finite_differences(name):
    leaves, options = leaves_of(OPTIONS[name], torch.float64)
    names = [name for name in options if isinstance(options[name], Tensor)]
    fixed = {name: value for name, value in options.items() if name not in names}
    if "bias" in names:
        # Infinity has no differences.
        leaves[3] = leaves[3].detach().clamp(min=-3).requires_grad_()

    def run(q, k, v, *tensors):
        return attention_cuda(q, k, v, ends(), 9, **dict(zip(names, tensors, strict=True)), **fixed)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", ["plain", "bias", "kept"])
def test_opcheck(name):
    leaves, options = leaves_of(OPTIONS[name], torch.float32)
    arguments = (*leaves[:3], ends(), options.get("head_mask"), options.get("bias"), options.get("heads"), 9, True, 0.5)
    torch.library.opcheck(torch.ops.bertkern.attention_cuda, arguments)


def test_compiled_for_any_number_of_tokens():
    compiled = torch.compile(attention_cuda, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((3, 4), (9, 2), (6, 6)):
        x = torch.randn(sum(lengths), 3, 2, 8, requires_grad=True)
        mask = torch.rand(2, 2, requires_grad=True)
        expected = attention_cuda(*x.unbind(1), ends(lengths), max(lengths), head_mask=mask)
        got = compiled(*x.unbind(1), ends(lengths), max(lengths), head_mask=mask)
        torch.testing.assert_close(got, expected)
        grads = [torch.autograd.grad(out.square().sum(), (x, mask)) for out in (got, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.usefixtures("device")
def test_a_skipped_head_is_not_computed():
    q, k, v = (torch.full((4, 2, 8), float("nan"), requires_grad=True) for _ in range(3))
    out = attention_cuda(q, k, v, ends((4,)), 4, head_mask=torch.tensor([False, False]))
    assert not out.any()


@pytest.mark.usefixtures("device")
def test_queries_without_keys_give_zeros():
    x = torch.randn(4, 3, 1, 8, requires_grad=True)
    bias = torch.zeros(1, 1, 4, 4)
    bias[0, 0, 2] = float("-inf")
    out = attention_cuda(*x.unbind(1), ends((4,)), 4, bias=bias)
    assert not out[2].any() and out[3].all()
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


@pytest.mark.usefixtures("device")
def test_heads_of_none_and_tokens_of_none():
    for shape, lengths in (((0, 2, 8), (0, 0)), ((3, 0, 8), (3,)), ((3, 2, 8), ())):
        x = torch.randn(shape, requires_grad=True)
        out = attention_cuda(x, x, x, ends(lengths), 3)
        assert out.shape == shape and not out.any()
        assert not torch.autograd.grad(out.sum(), x)[0].any()


@pytest.mark.usefixtures("device")
def test_views_are_taken_as_they_are():
    x = torch.randn(2, 15, 3, 3, 8).transpose(2, 3)[1][..., 1:7]
    copies = [part.contiguous() for part in x.unbind(2)]
    torch.testing.assert_close(attention_cuda(*x.unbind(2), ends(), 9), attention_cuda(*copies, ends(), 9))


def test_autocast():
    x = torch.randn(15, 3, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention_cuda(*x.unbind(1), ends(), 9)
    assert torch.equal(out, attention_cuda(*x.bfloat16().unbind(1), ends(), 9))


def test_differentiable_once():
    x = torch.randn(15, 2, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(attention_cuda(x, x, x, ends(), 9).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["plain", "kept"])
def test_plain_pytorch_may_be_asked_for(name):
    leaves, options = leaves_of(OPTIONS[name], torch.float32)
    grad = torch.randn(17, 3, 6)
    out = attention_cuda(*leaves[:3], ends(), 9, **options)
    asked = attention_cuda(*leaves[:3], ends(), 9, provider="torch", **options)
    assert torch.equal(asked, out)
    for mine, theirs in zip(*(torch.autograd.grad(y, leaves, grad) for y in (asked, out)), strict=True):
        assert torch.equal(mine, theirs)
    assert attention_triton.provider(leaves[0]) == "torch"


class Pretending:
    """What `provider` asks of a q, as if it were on a card."""

    is_cuda, device = True, torch.device("cuda:0")

    def __init__(self, d: int, dtype: torch.dtype) -> None:
        self.shape, self.dtype = torch.Size([5, 2, d]), dtype


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize(
    "d, dtype, scale, taken",
    [
        (64, torch.float16, 0.1, True),
        (26, torch.bfloat16, 0.1, True),
        (64, torch.float32, 0.1, False),
        (129, torch.float16, 0.1, False),
        (64, torch.float16, -0.1, False),
        (64, torch.float16, float("inf"), False),
    ],
)
def test_who_computes(monkeypatch, triton, library, d, dtype, scale, taken):
    """Triton where it fits, else the CUDA kernel where it fits, else PyTorch; what is asked for, where it fits."""

    class Kernels:
        supported = staticmethod(lambda d, dtype: d <= 128)

    monkeypatch.setattr(attention_triton, "_tensor_cores", lambda device: True)
    monkeypatch.setattr(attention_triton, "_kernels", lambda: Kernels if triton else None)
    monkeypatch.setattr(attention_triton, "lacking", lambda device: None if library else "not built")
    q, by = Pretending(d, dtype), attention_triton.provider
    by_triton, by_cuda = triton and d <= 128, library and taken
    assert by(q, scale) == ("triton" if by_triton else "cuda" if by_cuda else "torch")
    for name, fits in (("triton", by_triton), ("cuda", by_cuda), ("torch", True)):
        if fits:
            assert by(q, scale, name) == by(q, scale, attention_triton.PROVIDERS[name]) == name
        else:
            with pytest.raises(RuntimeError, match=f"expected provider auto or torch .* Got {name}"):
                by(q, scale, name)


def test_on_meta():
    x = torch.randn(15, 2, 8, device="meta")
    assert attention_cuda(x, x, x, ends().to("meta"), 9).shape == (15, 2, 8)
    with pytest.raises(RuntimeError, match=r"attention_cuda: expected cu_seqlens on meta. Got cpu\."):
        attention_cuda(x, x, x, ends(), 9)


def test_without_triton_it_says_so_once(monkeypatch):
    def missing(name):
        raise ImportError("Run: pip install triton")

    attention_triton._kernels.cache_clear()
    monkeypatch.setattr(attention_triton._triton, "kernels", missing)
    with pytest.warns(UserWarning, match="attention_cuda: runs in plain PyTorch, slowly: Run: pip install triton"):
        assert attention_triton._kernels() is None
    attention_triton._kernels.cache_clear()


X = torch.zeros(15, 3, 8)
WRONG = {
    "q of two dimensions": ({"q": X[0]}, r"q of shape \[T, H, d\]. Got \[3, 8\]"),
    "q without a width": ({"q": X[..., :0]}, r"q of shape \[T, H, d\]. Got \[15, 3, 0\]"),
    "q without dimensions": ({"q": torch.tensor(1.0)}, r"q of shape \[T, H, d\]. Got \[\]"),
    "q of integers": ({"q": X.int()}, "q of dtype torch.float32, .*. Got torch.int32"),
    "k of fewer heads": ({"k": X[:, :2]}, r"k of q's shape \[T, H, d\] = \[15, 3, 8\]. Got \[15, 2, 8\]"),
    "v of another dtype": ({"v": X.double()}, "v of q's dtype torch.float32. Got torch.float64"),
    "v on another device": ({"v": X.to("meta")}, "on"),
    "cu_seqlens of int64": ({"cu_seqlens": ends().long()}, r"cu_seqlens int32 .*. Got torch.int64 of shape \[5\]"),
    "cu_seqlens of nothing": ({"cu_seqlens": ends()[:0]}, r"cu_seqlens int32 of shape \[sequences \+ 1\]"),
    "cu_seqlens of two dimensions": ({"cu_seqlens": ends()[None]}, r"Got torch.int32 of shape \[1, 5\]"),
    "cu_seqlens that fall": (
        {"cu_seqlens": torch.tensor([0, 7, 5, 15], dtype=torch.int32)},
        r"cu_seqlens to rise from 0 to at most T = 15. Got \[0, 7, 5, 15\]",
    ),
    "cu_seqlens from 1": ({"cu_seqlens": ends() + 1}, r"to rise from 0 to at most T = 15. Got \[1, "),
    "cu_seqlens past the end": ({"cu_seqlens": ends((9, 9))}, r"at most T = 15. Got \[0, 9, 18\]"),
    "a longer sequence": ({"max_length": 8}, "max_length of 9 or more, as the longest sequence has. Got 8"),
    "a scale of NaN": ({"scale": float("nan")}, "scale to be finite. Got nan"),
    "an endless scale": ({"scale": float("inf")}, "scale to be finite. Got inf"),
    "a negative length": ({"max_length": -1}, "max_length 0 or more. Got -1"),
    "a mask of fewer heads": (
        {"head_mask": torch.ones(4, 2)},
        r"head_mask of shape \[sequences, heads\] = \[4, 3\] or \[3\]. Got \[4, 2\]",
    ),
    "a mask of fewer sequences": ({"head_mask": torch.ones(3, 3)}, r"= \[4, 3\] or \[3\]. Got \[3, 3\]"),
    "a mask of no dimension": ({"head_mask": torch.tensor(1.0)}, r"= \[4, 3\] or \[3\]. Got \[\]"),
    "a mask of integers": ({"head_mask": torch.ones(4, 3).int()}, "head_mask of dtype .* or q's. Got torch.int32"),
    "a bias of bools": ({"bias": torch.ones(1, 3, 9, 9).bool()}, "bias of dtype .* or q's. Got torch.bool"),
    "a bias of more positions": (
        {"bias": torch.ones(1, 3, 10, 10)},
        r"bias that broadcasts to \[sequences, heads, max_length, max_length\] = \[4, 3, 9, 9\]. "
        r"Got shape \[1, 3, 10, 10\]",
    ),
    "a bias of other sequences": ({"bias": torch.ones(2, 3, 9, 9)}, r"Got shape \[2, 3, 9, 9\]"),
    "a bias of three dimensions": ({"bias": torch.ones(3, 9, 9)}, r"Got shape \[3, 9, 9\]"),
    "heads twice": ({"heads": [0, 1, 1]}, r"heads to be the different numbers of the 3 heads. Got \[0, 1, 1\]"),
    "too few heads": ({"heads": [0, 1]}, r"heads to be the different numbers of the 3 heads. Got \[0, 1\]"),
    "negative heads": ({"heads": [0, 1, -1]}, r"heads to be the different numbers of the 3 heads. Got \[0, 1, -1\]"),
    "heads that never were": (
        {"heads": [0, 1, 7], "head_mask": torch.ones(4, 6)},
        r"head_mask of shape \[sequences, heads\] = \[4, 8\] or \[8\]. Got \[4, 6\]",
    ),
    "an unknown provider": ({"provider": "cublas"}, "provider one of auto, triton, cuda, torch. Got cublas"),
    "the CUDA kernel on a CPU": (
        {"provider": "cuda"},
        "provider auto or torch for heads of 8 in torch.float32 on cpu here. Got cuda",
    ),
    "Triton on a CPU": ({"provider": "triton"}, "provider auto or torch for heads of 8 .* on cpu here. Got triton"),
    "a bias of other heads than the mask": (
        {"heads": [0, 1, 4], "head_mask": torch.ones(4, 6), "bias": torch.ones(1, 5, 9, 9)},
        r"= \[4, 6, 9, 9\]. Got shape \[1, 5, 9, 9\]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    wrong, said = WRONG[case]
    good = {"q": X, "k": X, "v": X, "cu_seqlens": ends(), "max_length": 9}
    with pytest.raises(RuntimeError, match=f"attention_cuda: expected .*{said}"):
        attention_cuda(**{**good, **wrong})
