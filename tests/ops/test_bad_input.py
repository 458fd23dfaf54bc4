"""What operators are asked wrongly: an error that says what was expected and what came, the same for every operator."""

import pytest
import torch

from bertkern import ops
from bertkern.formats.int8 import quantize_weight

from .test_encoder import inputs, stack

op = torch.ops.bertkern
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT, BIAS = torch.randn(7, 12, generator=GENERATOR), torch.randn(7, generator=GENERATOR)
CODES = quantize_weight(WEIGHT)
X = torch.randn(3, 12, generator=GENERATOR)
PACKED, PACKED_INT8 = ops.pack_linear(WEIGHT, BIAS), ops.pack_qlinear(CODES.codes, CODES.scale, BIAS)
ROWS, STEPS = ops.quantize_rows(X)
IDS, TABLE, ONE = torch.tensor([[1, 3, 0]]), torch.randn(5, 12), torch.ones(1)
GAMMA, BETA = torch.ones(12), torch.zeros(12)
LINEARS, _, NORMS = stack(1, 32, 40, "fp32")
HIDDEN, MASK = inputs(2, 9, 32), torch.ones(2, 9)
POSITIONS = torch.zeros(1, 2, 9, 9)

# Each operator with arguments that it takes.
CALLS = {
    "pack_linear": [WEIGHT, BIAS],
    "pack_qlinear": [CODES.codes, CODES.scale, BIAS],
    "linear": [X, PACKED, 7, 0, torch.zeros(3, 7)],
    "qgemm": [ROWS, STEPS, 0, PACKED_INT8, 7, 0, torch.zeros(3, 7)],
    "qgemm_requantize": [ROWS, STEPS, 0, PACKED_INT8, 7],
    "add_layernorm": [X, X, GAMMA, BETA, 1e-5],
    "embed": [[IDS], [TABLE], [ONE], GAMMA, BETA, 1e-5],
    "encoder": [HIDDEN, MASK, POSITIONS, LINEARS, NORMS, [2], 1, 1e-5],
}


def moved(argument, place):
    """The argument with its tensor, or the one in its list at this place, on the meta device."""
    if isinstance(argument, list):
        return [item.to("meta") if i == place else item for i, item in enumerate(argument)]
    return argument.to("meta")


@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_on_another_device(name):
    call = getattr(op, name).default
    call(*CALLS[name])
    for position, argument in enumerate(CALLS[name]):
        several = argument if isinstance(argument, list) else [argument]
        for place in (i for i, item in enumerate(several) if isinstance(item, torch.Tensor)):
            arguments = [*CALLS[name]]
            arguments[position] = moved(argument, place)
            with pytest.raises(RuntimeError, match=rf"{name}: expected tensors on one device. Got cpu and meta\."):
                call(*arguments)


@pytest.mark.parametrize("name", CALLS)
def test_all_tensors_on_the_meta_device(name):
    def meta(argument):
        if isinstance(argument, list):
            return [item.to("meta") if isinstance(item, torch.Tensor) else item for item in argument]
        return argument.to("meta") if isinstance(argument, torch.Tensor) else argument

    call = getattr(op, name).default
    expected, got = call(*CALLS[name]), call(*map(meta, CALLS[name]))
    for ours, theirs in zip(*[x if isinstance(x, (tuple, list)) else [x] for x in (got, expected)], strict=True):
        assert ours.device.type == "meta" and ours.shape == theirs.shape and ours.dtype == theirs.dtype


def test_packed_weights_without_data():
    with pytest.raises(RuntimeError, match=r"unpack_linear: expected packed weights with data"):
        ops.unpack_linear(PACKED.to("meta"))


@pytest.mark.parametrize("name", ["linear", "qgemm", "qgemm_requantize", "add_layernorm", "embed", "encoder"])
def test_non_contiguous_tensors(name):
    def strided(argument):
        if isinstance(argument, list):
            return [strided(item) for item in argument]
        if not isinstance(argument, torch.Tensor):
            return argument
        made = torch.stack([argument, argument], dim=-1)[..., 0]
        assert argument.numel() == 1 or not made.is_contiguous()
        return made

    call = getattr(op, name).default
    expected, got = call(*CALLS[name]), call(*map(strided, CALLS[name]))
    for ours, theirs in zip(*[x if isinstance(x, (tuple, list)) else [x] for x in (got, expected)], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: HIDDEN.double()}, r"encoder: expected x of dtype float32, bfloat16 or float16. Got float64."),
        ({0: HIDDEN.int()}, r"encoder: expected x of dtype float32, bfloat16 or float16. Got int32."),
        ({0: HIDDEN[..., :31]}, r"encoder: expected norms of shape \[layers, 4, H\] = \[1, 4, 31\]. Got \[1, 4, 32\]."),
        (
            {0: HIDDEN[..., :31], 4: NORMS[..., :31]},
            r"encoder: expected q of layer 0 of shape \[N, K\] = \[32, 31\]. Got \[32, 32\].",
        ),
        ({1: MASK[:1]}, r"encoder: expected mask of shape \[B, L\] = \[2, 9\] on the CPU. Got \[1, 9\]."),
        ({1: MASK.to(torch.complex64)}, r"encoder: expected mask of dtype bool, an integer or a float."),
        ({1: MASK.to(torch.float8_e4m3fn)}, r"encoder: expected mask of dtype bool, an integer or a float."),
        ({2: POSITIONS.double()}, r"encoder: expected position_bias of dtype float32. Got float64."),
        (
            {2: POSITIONS.expand(3, -1, -1, -1)},
            r"position_bias of shape \[1 or B, heads, L, L\] = \[2, 2, 9, 9\]. Got \[3",
        ),
        ({3: LINEARS[:5]}, r"encoder: expected 6 packed linears a layer .* for 1 layers. Got 5."),
        (
            {3: [LINEARS[0][:-1], *LINEARS[1:]]},
            r"encoder: expected packed weights for q of layer 0. Got 4287 other values.",
        ),
        ({4: NORMS.double()}, r"encoder: expected norms of dtype float32. Got float64."),
        ({5: [], 3: []}, r"encoder: expected 6 packed linears a layer .* for 0 layers. Got 0."),
        ({5: [0]}, r"encoder: expected layer 0's width 32 to be a multiple of its 0 heads."),
        ({5: [-2]}, r"encoder: expected layer 0's width 32 to be a multiple of its -2 heads."),
        ({6: 6}, r"encoder: expected activation 0 \(none\), .* Got 6."),
        ({7: float("nan")}, r"encoder: expected eps >= 0. Got nan."),
        ({7: -1.0}, r"encoder: expected eps >= 0. Got -1."),
    ],
)
def test_encoder(change, message):
    with pytest.raises(RuntimeError, match=message):
        op.encoder(*[change.get(position, argument) for position, argument in enumerate(CALLS["encoder"])])


def test_empty_tensors():
    for batch, length in ((0, 9), (2, 0), (0, 0)):
        x, mask = torch.zeros(batch, length, 32), torch.ones(batch, length)
        bias = torch.zeros(1, 2, length, length)
        for empty_attends in (False, True):
            rest = (bias, LINEARS, NORMS, [2], 1, 1e-5, False)
            assert op.encoder(x, mask, *rest, False, empty_attends).shape == (batch, length, 32)
            assert op.encoder(x, None, *rest, True, empty_attends).shape == (1, batch, length, 32)
        ids = torch.zeros(batch, length, dtype=torch.long)
        assert ops.embed([ids], [TABLE], [ONE], GAMMA, BETA).shape == (batch, length, 12)
        assert ops.embed([ids], [TABLE[:0]], [ONE], GAMMA, BETA).shape == (batch, length, 12)
        assert ops.linear(torch.zeros(batch, length, 12), PACKED, 7).shape == (batch, length, 7)
        assert ops.add_layernorm(torch.zeros(batch, length, 12), None, GAMMA, BETA).shape == (batch, length, 12)
    assert ops.qgemm(ROWS[:0], STEPS[:0], 0, PACKED_INT8, 7).shape == (0, 7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_in_their_row(bad):
    x = X.clone()
    x[1, 3] = bad
    others = [0, 2]
    for call in (
        lambda x: ops.linear(x, PACKED, 7),
        lambda x: ops.linear(x, PACKED_INT8, 7),
        lambda x: ops.add_layernorm(x, X, GAMMA, BETA),
        lambda x: ops.quantize_rows(x)[0].float(),
        lambda x: ops.quantize_rows(x)[1],
    ):
        assert torch.equal(call(x)[others], call(X)[others])
    assert ops.linear(x, PACKED_INT8, 7)[1].isnan().all() and ops.add_layernorm(x, X, GAMMA, BETA)[1].isnan().all()
    assert not ops.linear(x, PACKED, 7)[1].isfinite().any()
