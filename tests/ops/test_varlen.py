"""attention_varlen on a CPU: against float64, its gradients, and what it refuses; on a GPU the same (`gpu`)."""

import itertools
import re

import pytest
import torch
from torch import Tensor

import bertkern as bk
from bertkern.ops import attention_varlen
from tests import reference

LENGTHS = (5, 1, 0, 9, 33)
TOKENS, LONGEST = sum(LENGTHS), max(LENGTHS)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OPTIONS = {
    "plain": {},
    "causal": {"causal": True, "softmax_scale": 0.3},
    "mask": {"head_mask": (5, 3)},
    "mask-of-all": {"head_mask": (3,)},
    "bias": {"bias": (1, 3, LONGEST, LONGEST)},
    "bias-of-keys": {"bias": (5, 1, 1, LONGEST), "causal": True},
    "used": {"seqused_k": (3, 1, 0, 0, 20)},
    "used-bias": {"seqused_k": (5, 0, 0, 9, 33), "bias": (1, 1, LONGEST, LONGEST), "head_mask": (5, 3)},
}


def ends(lengths=LENGTHS) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def made(name: str, dtype: torch.dtype, device: str = "cpu", d: int = 26) -> tuple[list[Tensor], dict]:
    torch.manual_seed(0)
    options = dict(OPTIONS[name])
    qkv = list(torch.randn(TOKENS, 3, 3, d).to(device, dtype).unbind(1))
    if "bias" in options:
        options["bias"] = torch.randn(options["bias"]).to(device, dtype)
        options["bias"][..., 2] = -torch.inf  # all that the query of a sequence of 3 or fewer causal keys sees
    if "head_mask" in options:
        options["head_mask"] = torch.rand(options["head_mask"]).to(device, dtype) + 0.5
        options["head_mask"].view(-1, 3)[0, 1] = 0
    if "seqused_k" in options:
        options["seqused_k"] = torch.tensor(options["seqused_k"], dtype=torch.int32, device=device)
    return qkv, options


def expected(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
    bias, mask, counts = (options.get(name) for name in ("bias", "head_mask", "seqused_k"))
    return reference.packed_attention(
        q.cpu(), k.cpu(), v.cpu(), ends().tolist(),
        None if counts is None else counts.tolist(),
        None if bias is None else bias.cpu().double().expand(-1, -1, LONGEST, LONGEST),
        None if mask is None else mask.cpu().double().expand(len(LENGTHS), -1),
        options.get("softmax_scale"), options.get("causal", False),
    )  # fmt: skip


def run(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
    cu = ends().to(q.device)
    return attention_varlen(q, k, v, cu, cu.clone(), LONGEST, LONGEST, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", OPTIONS)
def test_against_float64(name, dtype, device):
    qkv, options = made(name, dtype, device)
    y = run(*qkv, options)
    assert y.dtype == dtype and y.device.type == device
    torch.testing.assert_close(y.cpu().double(), expected(*qkv, options), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(name, dtype, device):
    """Those of the formula, for q, k, v, bias and mask."""
    qkv, options = made(name, dtype, device)
    if "bias" in options:
        options["bias"] = options["bias"].clamp(min=-3)
    names = [name for name in ("bias", "head_mask") if name in options]
    leaves = [x.detach().requires_grad_() for x in (*qkv, *(options[name] for name in names))]
    grad = torch.randn(TOKENS, 3, 26, device=device, dtype=dtype)
    y = run(*leaves[:3], {**options, **dict(zip(names, leaves[3:], strict=True))})
    got = torch.autograd.grad(y, leaves, grad)
    wide = [x.detach().cpu().double().requires_grad_() for x in leaves]
    right = torch.autograd.grad(
        expected(*wide[:3], {**options, **dict(zip(names, wide[3:], strict=True))}), wide, grad.cpu().double()
    )
    for mine, theirs in zip(got, right, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.cpu().double(), theirs, atol=2e-5, rtol=2e-5)


def test_is_the_cpu_operator_and_the_gpu_one():
    """The same bits as `attention`; on another device what `attention_cuda` says, here of tensors without data."""
    (q, k, v), options = made("mask", torch.float32)
    y = run(q, k, v, options)
    assert torch.equal(y, bk.ops.attention(q, k, v, ends(), head_mask=options["head_mask"]))
    assert bk.attention_varlen is attention_varlen
    q, cu = q.to("meta"), ends().to("meta")
    counts = torch.empty(5, dtype=torch.int32, device="meta")
    assert attention_varlen(q, q, q, cu, cu, LONGEST, LONGEST, seqused_k=counts).shape == q.shape


def test_bool_masks_and_flash_attns_own_defaults():
    (q, k, v), _ = made("plain", torch.float32)
    cu = ends()
    mask = torch.tensor([True, False, True])
    y = attention_varlen(q, k, v, cu, cu, LONGEST, LONGEST, 0.0, None, False, (-1, -1), 0.0, False, head_mask=mask)
    assert not y[:, 1].any()
    assert torch.equal(y[:, ::2], attention_varlen(q, k, v, cu, cu, LONGEST, LONGEST)[:, ::2])


def test_compiled_in_one_graph():
    (q, k, v), options = made("mask", torch.float32)
    compiled = torch.compile(attention_varlen, fullgraph=True, backend="aot_eager")
    cu = ends()
    got = compiled(q, k, v, cu, cu, LONGEST, LONGEST, **options)
    assert torch.equal(got, attention_varlen(q, k, v, cu, cu, LONGEST, LONGEST, **options))


def test_nothing():
    for tokens, heads, lengths in ((0, 2, (0, 0)), (0, 2, ()), (3, 0, (3,))):
        x, cu = torch.randn(tokens, heads, 8), ends(lengths)
        assert attention_varlen(x, x, x, cu, cu, 3, 3).shape == x.shape


X, CU = torch.zeros(15, 3, 8), ends((5, 1, 9))
WRONG = {
    "q as a list": ({"q": [1.0]}, "q to be a tensor. Got list"),
    "no k": ({"k": None}, "k to be a tensor. Got NoneType"),
    "cu_seqlens as a list": ({"cu_seqlens_q": [0, 15]}, "cu_seqlens_q to be a tensor. Got list"),
    "a mask as a list": ({"head_mask": [1, 1, 0]}, "head_mask to be a tensor or None. Got list"),
    "q of two dimensions": ({"q": X[0]}, "q of shape [total_q, heads, head_dim]. Got [3, 8]"),
    "q of integers": ({"q": X.int()}, "Got torch.int32"),
    "fewer keys than queries": (
        {"k": X[:14]},
        "k of q's shape [15, 3, 8], as there is no attention to other sequences",
    ),
    "grouped queries": ({"v": X[:, :1]}, "or by grouped queries. Got [15, 1, 8]"),
    "v of another dtype": ({"v": X.half()}, "v of q's dtype torch.float32. Got torch.float16"),
    "k on another device": ({"k": X.to("meta")}, "k on q's device cpu. Got meta"),
    "cu_seqlens on another device": ({"cu_seqlens_k": CU.to("meta")}, "cu_seqlens_k on q's device cpu. Got meta"),
    "a bias on another device": ({"bias": torch.zeros(1, 1, 9, 9, device="meta")}, "bias on q's device cpu. Got meta"),
    "q on another device": ({"q": X.to("meta")}, "k on q's device meta. Got cpu"),
    "cu_seqlens of int64": (
        {"cu_seqlens_q": CU.long()},
        "int32 of shape [sequences + 1]. Got torch.int64",
    ),
    "cu_seqlens of nothing": ({"cu_seqlens_q": CU[:0]}, "Got torch.int32 of shape [0]"),
    "cu_seqlens of two dimensions": ({"cu_seqlens_k": CU[None]}, "cu_seqlens_k int32 of shape [sequences + 1]"),
    "other sequences of keys": (
        {"cu_seqlens_k": CU[:3]},
        "as many sequences as cu_seqlens_q, 3. Got 2",
    ),
    "cu_seqlens that fall": (
        {"cu_seqlens_q": torch.tensor([0, 7, 5, 15], dtype=torch.int32)},
        "cu_seqlens_q to rise from 0 to q's 15 tokens. Got [0, 7, 5, 15]",
    ),
    "cu_seqlens from 1": ({"cu_seqlens_q": CU.clamp(min=1)}, "to rise from 0 to q's 15 tokens. Got [1, 5, 6, 15]"),
    "cu_seqlens that end too soon": ({"cu_seqlens_q": CU.clamp(max=14)}, "to q's 15 tokens. Got [0, 5, 6, 14]"),
    "cu_seqlens past the end": ({"cu_seqlens_q": CU + CU}, "to q's 15 tokens. Got [0, 10, 12, 30]"),
    "keys of other lengths": (
        {"cu_seqlens_k": torch.tensor([0, 4, 6, 15], dtype=torch.int32)},
        "cu_seqlens_k as cu_seqlens_q, [0, 5, 6, 15], as queries and keys are of the same tokens. Got [0, 4, 6, 15]",
    ),
    "a longer sequence": ({"max_seqlen_q": 8, "max_seqlen_k": 8}, "max_seqlen_q 9 or more, as the longest"),
    "two longest lengths": ({"max_seqlen_k": 10}, "max_seqlen_k as max_seqlen_q, 9. Got 10"),
    "a negative length": ({"max_seqlen_q": -1, "max_seqlen_k": -1}, "max_seqlen_q 0 or more. Got -1"),
    "dropout": ({"dropout_p": 0.1}, "dropout_p 0. Got 0.1"),
    "a window": ({"window_size": (64, 0)}, "window_size (-1, -1), no window. Got (64, 0)"),
    "a window of nothing": ({"window_size": None}, "window_size (-1, -1), no window. Got None"),
    "a cap": ({"softcap": 30.0}, "softcap 0, no cap. Got 30.0"),
    "a scale of 0": ({"softmax_scale": 0.0}, "softmax_scale above 0, or None for 1 / sqrt(head_dim). Got 0.0"),
    "a mask of other heads": ({"head_mask": torch.ones(3, 4)}, "head_mask of shape [sequences, heads] = [3, 3] or [3]"),
    "a mask of integers": ({"head_mask": torch.ones(3, 3).int()}, "Got torch.int32"),
    "a bias of bools": ({"bias": torch.ones(1, 3, 9, 9).bool()}, "Got torch.bool"),
    "a bias of three dimensions": ({"bias": torch.ones(3, 9, 9)}, "Got shape [3, 9, 9]"),
    "a bias of more keys": ({"bias": torch.ones(1, 1, 9, 10)}, "= [3, 3, 9, 9]. Got shape [1, 1, 9, 10]"),
    "counts of other sequences": ({"seqused_k": CU}, "seqused_k int32 of shape [sequences] = [3]. Got torch.int32"),
    "counts past the end": (
        {"seqused_k": CU[1:]},
        "from 0 to the sequences' lengths [5, 1, 9]. Got [5, 6, 15]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    wrong, said = WRONG[case]
    good = {"q": X, "k": X, "v": X, "cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 9, "max_seqlen_k": 9}
    with pytest.raises(RuntimeError, match=f"^attention_varlen: expected .*{re.escape(said)}"):
        attention_varlen(**{**good, **wrong})


@pytest.mark.gpu
def test_the_gpu_is_never_waited_for():
    qkv, options = made("used-bias", torch.float16, "cuda")
    options = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in options.items()}
    cu = ends().cuda()
    attention_varlen(*qkv, cu, cu, LONGEST, LONGEST, **options)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention_varlen(*qkv, cu, cu, LONGEST, LONGEST, **options)
    finally:
        torch.cuda.set_sync_debug_mode(before)
