"""Runs the attention kernels in Triton's interpreter, as interpret.py does the block-sparse ones; no bits of a result
are left from what was in its memory before, which is NaN everywhere.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from bertkern import _triton
from bertkern.ops import attention_triton as ops
from tests.kernels.attention_reference import attention_reference
from tests.kernels.interpret import ON_CARD, run

kernels = _triton.kernels("attention")

# Largest error as a share of the largest result: of fp32 sums, of fp16 as stored, of bf16 as cut off when stored. On a
# card tensor cores cut off what they add up, and of fp32 products what two parts in TF32 do not hold.
TOLERANCE = {torch.float32: 2e-5 if ON_CARD else 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
NAN = float("nan")


class Recorder:
    """Stands for a kernel and notes what it is launched with."""

    launches: ClassVar[list[tuple[Any, dict[str, Any]]]] = []

    def __init__(self, function: Any) -> None:
        self.function, self.arg_names = function, function.arg_names

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(**arguments: Any) -> None:
            self.launches.append((self.function, arguments))
            self.function[grid](**arguments)

        return launch


def packed(tokens: int, heads: int, d: int, dtype: torch.dtype) -> Tensor:
    """q, k and v as one [tokens, 3, heads, d] among NaN, which begins rows at multiples of 16 bytes."""
    wide = d + 8 + -d % 8
    around = torch.full((tokens + 8, 3, heads + 1, wide), NAN, dtype=dtype)
    inside = around[4 : 4 + tokens, :, :heads, :d]
    inside.copy_(torch.randn(tokens, 3, heads, d))
    return inside


def ends(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def near(got: Tensor, expected: Tensor, what: str, dtype: torch.dtype) -> None:
    assert got.shape == expected.shape and got.isfinite().all(), what
    bound = TOLERANCE[dtype] * max(1.0, expected.abs().max().item() if expected.numel() else 0)
    error = (got.double() - expected.double()).abs().max().item() if got.numel() else 0
    assert error <= bound, f"{what}: differs by {error}, more than {bound}"


def agree(
    dtype: torch.dtype,
    d: int,
    lengths: tuple[int, ...],
    *,
    bias: torch.dtype | None = None,
    bias_shape: tuple[int, int] = (1, 0),
    causal: bool = False,
    mask: bool = False,
    heads: tuple[int, ...] | None = None,
    scale: float | None = None,
    spare: int = 0,
) -> None:
    """Results and all gradients against the float64 formula; `spare` tokens stand in no sequence."""
    here = 2 if heads is None else len(heads)
    originally = here if heads is None else max(heads) + 1
    longest = max(lengths)
    x = packed(sum(lengths) + spare, here, d, dtype)
    leaves: dict[str, Tensor] = {"qkv": x}
    if bias is not None:
        shape = (len(lengths) if bias_shape[0] == 0 else 1, originally if bias_shape[1] == 0 else 1)
        table = torch.randn(*shape, longest, longest)
        table[torch.rand(table.shape) < 0.1] = float("-inf")
        table[:, :, longest // 2] = float("-inf")  # a query without any key
        leaves["bias"] = table.to(bias)
    if mask:
        factors = torch.rand(len(lengths), originally) + 0.5
        factors[0, 0 if heads is None else heads[0]] = 0
        leaves["head_mask"] = factors
    for leaf in leaves.values():
        leaf.requires_grad_()
    options = {name: leaves[name] for name in ("bias", "head_mask") if name in leaves}
    options |= {"causal": causal, "heads": heads, "scale": scale}
    grad = torch.randn(x.shape[0], here, d).to(dtype)
    out = ops.attention_cuda(*x.unbind(1), ends(lengths), longest, **options)
    assert out.dtype == dtype
    got = torch.autograd.grad(out, list(leaves.values()), grad)
    double = [leaf.detach().double().requires_grad_() for leaf in leaves.values()]
    options |= {name: y for name, y in zip(leaves, double, strict=True) if name != "qkv"}
    expected = attention_reference(*double[0].unbind(1), lengths, **options)
    near(out, expected, "out", dtype)
    for name, mine, theirs in zip(leaves, got, torch.autograd.grad(expected, double, grad.double()), strict=True):
        # A gradient is as exact as what it is stored in, and as what it is made of.
        near(mine, theirs, f"gradient of {name}", max(dtype, leaves[name].dtype, key=TOLERANCE.__getitem__))
    if spare:
        assert not out[-spare:].any() and not got[0][-spare:].any()


def problem(form: Any, lengths: tuple[int, ...]) -> None:
    """A form of the table, by whatever kernels it takes."""
    if form.counts:
        with_counts(form, lengths)
        return
    some = {"mask": True, "heads": (3, 0)} if form.some else {}
    agree(form.dtype, form.d, lengths, bias=form.bias, causal=form.causal, spare=3, **some)


def with_counts(form: Any, lengths: tuple[int, ...]) -> None:
    """The first tokens of a sequence are its keys, all, some or none; the others are queries; nothing else is read."""
    heads = 2
    x = packed(sum(lengths) + 3, heads, form.d, form.dtype)
    counts = [(length, 2 * length // 3, 0)[i % 3] for i, length in enumerate(lengths)]
    mask = torch.tensor([[1.0, 0.5], [0, 2], [1, 1]])[: len(lengths)] if form.some else None
    length = max(lengths)
    hidden = torch.zeros(len(lengths), 1, length, length, dtype=torch.float64)
    for sequence, count in enumerate(counts):
        hidden[sequence, :, :, count:] = float("-inf")
    q, k, v = x.double().unbind(1)
    expected = attention_reference(q, k, v, lengths, bias=hidden, head_mask=None if mask is None else mask.double())
    begin = 0
    for tokens, count in zip(lengths, counts, strict=True):
        x[begin + count : begin + tokens, 1:] = NAN
        begin += tokens
    numbers = torch.arange(heads, dtype=torch.int32) if form.some else None
    sequences = kernels.Sequences(
        ends(lengths), length, form.d**-0.5, numbers=numbers, factors=mask, counts=torch.tensor(counts).int()
    )
    near(kernels.attention(*x.unbind(1), sequences)[0], expected, "out", form.dtype)


@functools.cache
def launched(form: Any, lengths: tuple[int, ...]) -> list[tuple[Any, dict[str, Any]]]:
    torch.manual_seed(0)
    Recorder.launches.clear()
    problem(form, lengths)
    return list(Recorder.launches)


def entry_of(entry: Any, form: Any, lengths: tuple[int, ...]) -> None:
    """The form is right, and what was launched is what the table says of it."""
    launches = [arguments for function, arguments in launched(form, lengths) if function is entry.function]
    assert len(launches) == 1
    (arguments,) = launches
    assert {name: arguments[name] for name in entry.constexprs} == dict(entry.constexprs)
    assert {name: arguments[name] for name in entry.options} == dict(entry.options)
    types = {name: kind[1:] for name, kind in entry.signature.items() if kind.startswith("*")}
    assert {name: kernels.TYPES[arguments[name].dtype] for name in types} == types
    assert not [name for name in entry.aligned if arguments[name].data_ptr() % 16]


# --- what the table does not show ------------------------------------------------------------------------------------


def skipped_heads() -> None:
    """Of a head with factor 0 nothing is read, forward or backward."""
    q, k, v = packed(70, 3, 32, torch.float32).unbind(1)
    cu, mask = ends((40, 30)), torch.tensor([[1.0, 0, 1], [0, 0.5, 1]])
    expected = attention_reference(q, k, v, (40, 30), head_mask=mask)
    for x in (q, k, v):
        x[:40, 1] = NAN
        x[40:, 0] = float("inf")
        x.requires_grad_()
    bias = torch.zeros(1, 3, 40, 40, requires_grad=True)
    out = ops.attention_cuda(q, k, v, cu, 40, head_mask=mask, bias=bias)
    near(out, expected, "out", torch.float32)
    assert not out[:40, 1].any() and not out[40:, 0].any()
    grads = torch.autograd.grad(out, (q, k, v, bias), torch.randn(out.shape))
    assert all(grad.isfinite().all() for grad in grads)
    assert not any(grad[:40, 1].any() or grad[40:, 0].any() for grad in grads[:3])


def hidden_keys() -> None:
    """-inf hides a key, all of them give zeros; finfo.min everywhere gives what eager gives: the mean of the values."""
    x = packed(33, 1, 16, torch.float32).requires_grad_()
    bias = torch.zeros(1, 1, 33, 33)
    bias[0, 0, :, 20:] = float("-inf")
    bias[0, 0, 5] = float("-inf")
    bias[0, 0, 7] = torch.finfo(torch.float32).min
    out = ops.attention_cuda(*x.unbind(1), ends((33,)), 33, bias=bias)
    assert not out[5].any()
    near(out[7], x[:, 2].mean(0), "a row of finfo.min", torch.float32)
    near(out, attention_reference(*x.unbind(1), (33,), bias=bias), "out", torch.float32)
    (grad,) = torch.autograd.grad(out[5].sum(), x)
    assert not grad.any()
    (mine,) = torch.autograd.grad(ops.attention_cuda(*x.unbind(1), ends((33,)), 33, bias=bias)[7].sum(), x)
    near(mine[:, 2, 0], torch.full((33, 16), 1 / 33), "gradient of a row of finfo.min", torch.float32)


def huge_scores() -> None:
    """No exponent overflows, forward or backward."""
    for dtype in (torch.float32, torch.float16):
        x = (packed(65, 1, 16, dtype) * 40).detach().requires_grad_()
        out = ops.attention_cuda(*x.unbind(1), ends((65,)), 65, scale=1.0)
        near(out, attention_reference(*x.double().unbind(1), (65,), scale=1.0), "out", dtype)
        assert torch.autograd.grad(out.float().sum(), x)[0].isfinite().all()


def alone_as_in_a_batch() -> None:
    """A sequence's bits depend neither on those beside it nor on max_length, forward or backward."""
    lengths = (3, 70, 129)
    for dtype, causal in ((torch.float32, False), (torch.float16, True)):
        x, grad = packed(sum(lengths), 2, 26, dtype).requires_grad_(), torch.randn(sum(lengths), 2, 26).to(dtype)
        bias = torch.randn(1, 2, 200, 200)
        together = ops.attention_cuda(*x.unbind(1), ends(lengths), 200, bias=bias, causal=causal)
        (dx,) = torch.autograd.grad(together, x, grad)
        begin = 0
        for length in lengths:
            rows = slice(begin, begin + length)
            begin += length
            own = x[rows].detach().requires_grad_()
            table = bias[..., :length, :length]
            alone = ops.attention_cuda(*own.unbind(1), ends((length,)), length, bias=table, causal=causal)
            assert torch.equal(alone, together[rows])
            assert torch.equal(torch.autograd.grad(alone, own, grad[rows])[0], dx[rows])


def read_in_place() -> None:
    """Views whose rows begin at multiples of 16 bytes are not copied; others are, and give the same."""
    x = packed(48, 2, 32, torch.float16)
    views, bias = x.unbind(1), torch.randn(1, 1, 64, 64)[..., :48, :48]
    Recorder.launches.clear()
    expected = ops.attention_cuda(*views, ends((48,)), 48, bias=bias)
    ((_, arguments),) = Recorder.launches
    assert [arguments[name].data_ptr() for name in "qkv"] == [view.data_ptr() for view in views]
    assert arguments["bias"].data_ptr() == bias.data_ptr()
    # Askew: rows of 35 elements, elements two apart, keys and values of one token for all.
    odd = torch.randn(48, 2, 35, dtype=torch.float16)[..., 1:33].copy_(views[0])
    apart = torch.randn(48, 2, 64, dtype=torch.float16)[..., ::2].copy_(views[1])
    assert torch.equal(ops.attention_cuda(odd, apart, views[2], ends((48,)), 48, bias=bias), expected)
    same = x[:1].expand(48, -1, -1, -1).unbind(1)
    # Heads before tokens, as a transposed view; and a bias of one row, or one column, for all.
    turned = torch.stack([view.transpose(0, 1).contiguous().transpose(0, 1) for view in views])
    assert torch.equal(ops.attention_cuda(*turned, ends((48,)), 48, bias=bias), expected)
    near(ops.attention_cuda(*same, ends((48,)), 48), same[2].double(), "one token for all", torch.float16)
    for shape in ((1, 2, 1, 48), (2, 1, 48, 1)):
        table = torch.randn(shape, requires_grad=True)
        got = ops.attention_cuda(*views, ends((30, 18)), 48, bias=table)
        wide = table.detach().double().requires_grad_()
        theirs = attention_reference(*views, (30, 18), bias=wide.expand(-1, -1, 48, 48))
        near(got, theirs, f"bias {shape}", torch.float16)
        grad = torch.randn(got.shape).half()
        mine, exact = torch.autograd.grad(got, table, grad)[0], torch.autograd.grad(theirs, wide, grad.double())[0]
        near(mine, exact, f"gradient of bias {shape}", torch.float16)


def lengths_that_lie() -> None:
    """What cu_seqlens says is not checked on a GPU: nothing outside of the tensors is read, and all is written."""
    tokens = 40
    x = packed(tokens, 2, 16, torch.float32)
    views, grad = x.unbind(1), torch.randn(tokens, 2, 16)
    for said in (
        [0, 50],
        [0, 30, 20, 40],
        [5, 20, 40],
        [0, -7, 40],
        [0, 10, 10, 25],
        [0, 2**31 - 1],
        [-(2**31), 9],
        [0],
    ):
        cu = torch.tensor(said, dtype=torch.int32)
        for length in (1, 16, 40, 100):
            sequences = kernels.Sequences(cu, length, 0.25, causal=True)
            out, statistics = kernels.attention(*views, sequences)
            assert out.isfinite().all(), (said, length)
            for found in kernels.attention_gradients(grad, *views, out, statistics, sequences)[:3]:
                assert found.isfinite().all(), (said, length)
            assert not out[max(0, min(said[-1], tokens)) :].any() or said[-1] < max(said)
    # Longer than max_length: what lies beyond gets zeros, and is no key.
    sequences = kernels.Sequences(ends((10, 30)), 20, 0.25)
    out, statistics = kernels.attention(*views, sequences)
    expected = torch.cat([attention_reference(*(y[rows] for y in views), (rows.stop - rows.start,))
                          for rows in (slice(0, 10), slice(10, 30))])  # fmt: skip
    near(out[:30], expected, "out", torch.float32)
    assert not out[30:].any()


def empty() -> None:
    for tokens, heads, lengths, longest in (
        (0, 2, (), 0),
        (0, 2, (0, 0), 5),
        (4, 0, (4,), 4),
        (4, 2, (), 3),
        (4, 2, (0,), 0),
    ):
        x = torch.randn(tokens, 3, heads, 16, requires_grad=True)
        mask = torch.rand(len(lengths), heads, requires_grad=True)
        bias = torch.randn(1, heads, longest, longest, requires_grad=True)
        out = ops.attention_cuda(*x.unbind(1), ends(lengths), longest, head_mask=mask, bias=bias)
        assert out.shape == (tokens, heads, 16) and not out.any()
        for leaf, grad in zip((x, mask, bias), torch.autograd.grad(out.sum(), (x, mask, bias)), strict=True):
            assert grad.shape == leaf.shape and not grad.any()


CHECKS = (
    skipped_heads, hidden_keys, huge_scores, alone_as_in_a_batch, read_in_place, lengths_that_lie, empty,
)  # fmt: skip
# Odd lengths and heads, and every option beside every other one that it could disturb.
PROBLEMS: dict[str, dict[str, Any]] = {
    "one-by-one": {"d": 16, "lengths": (1, 1, 1)},
    "prime": {"d": 64, "lengths": (2, 3, 5, 7, 11, 13, 31, 37, 61, 67)},
    "long": {"d": 32, "lengths": (151,), "causal": True},
    "a-token-more": {"d": 64, "lengths": (63, 64, 65, 127, 128, 129), "mask": True},
    "tiny-head": {"d": 1, "lengths": (5, 40), "bias": torch.float32},
    "thirteen": {"d": 13, "lengths": (33, 97), "causal": True, "mask": True},
    "eighty": {"d": 80, "lengths": (17, 66), "bias": torch.float16, "bias_shape": (0, 1), "causal": True},
    "scale": {"d": 24, "lengths": (50,), "scale": 0.7, "spare": 5},
    "bias-of-each": {"d": 32, "lengths": (9, 70), "bias": torch.float32, "bias_shape": (0, 0), "mask": True},
    "bias-of-all": {"d": 32, "lengths": (9, 70), "bias": torch.bfloat16, "bias_shape": (1, 1)},
    "kept": {"d": 26, "lengths": (45, 20), "heads": (1, 4, 6), "bias": torch.float32, "mask": True, "causal": True},
    "kept-unsorted": {"d": 16, "lengths": (20,), "heads": (5, 0), "bias": torch.float32, "bias_shape": (0, 0)},
    "kept-bias-of-all": {"d": 16, "lengths": (20, 7), "heads": (5,), "bias": torch.float32, "bias_shape": (1, 1)},
    "bf16": {"d": 40, "lengths": (5, 71), "dtype": torch.bfloat16, "bias": torch.bfloat16, "mask": True},
    "fp16": {"d": 96, "lengths": (71, 2), "dtype": torch.float16, "mask": True},
}  # fmt: skip


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for form in kernels.FORMS:
        for entry in kernels.TABLE:
            if entry.name.partition("-")[2] == form.name:
                for lengths in entry.shapes:
                    name = f"{entry.name}-{'x'.join(map(str, lengths))}"
                    yield name, functools.partial(entry_of, entry, form, lengths)
    for name, asked in PROBLEMS.items():
        yield name, functools.partial(agree, **{"dtype": torch.float32, **asked})
    for check in CHECKS:
        yield check.__name__, check


def main() -> int:
    ops._triton_for = lambda q: kernels if kernels.supported(q.shape[2], q.dtype) else None
    # Fills what is allocated with NaN.
    torch.use_deterministic_algorithms(True)
    for kernel in ("attend", "attend_queries", "attend_keys", "attend_bias", "attend_factors"):
        setattr(kernels, kernel, Recorder(getattr(kernels, kernel)))
    return run(cases())


if __name__ == "__main__":
    sys.exit(main())
