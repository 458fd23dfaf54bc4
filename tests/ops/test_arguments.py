"""Arguments of a wrong type: an error that names the operation and the argument, the same for every public function."""

import inspect

import pytest
import torch
from torch import Tensor

from bertkern import ops
from bertkern.formats.groupwise import quantize_groupwise
from bertkern.formats.int8 import quantize_weight
from bertkern.ops.attention_packed import attention_packed_cuda
from bertkern.ops.attention_triton import attention_cuda
from bertkern.ops.int8_triton import int8_linear_cuda, pack_int8_weight
from bertkern.ops.rowwise_triton import add_layernorm_cuda, embed_cuda, quantize_rows_cuda

WEIGHT, BIAS = torch.randn(7, 12), torch.randn(7)
INT8, LOW = quantize_weight(WEIGHT), quantize_groupwise(WEIGHT, bits=4, group_size=4)
X, GAMMA = torch.randn(3, 12), torch.ones(12)
PACKED, PACKED_INT8 = ops.pack_linear(WEIGHT, BIAS), ops.pack_qlinear(INT8.codes, INT8.scale, BIAS)
ROWS, STEPS = ops.quantize_rows(X)
TABLES = {"ids": [torch.tensor([[1]])], "tables": [torch.randn(3, 12)], "scales": [torch.ones(1)]}
HEADS, ENDS = torch.randn(5, 2, 8), torch.tensor([0, 5], dtype=torch.int32)
QKV = {"q": HEADS, "k": HEADS, "v": HEADS}
CODES = dict.fromkeys("qkv", HEADS.to(torch.int8))
PER_HEAD = {"bias": torch.zeros(1, 2, 5, 5), "head_mask": torch.ones(1, 2)}
FLASH = {"cu_seqlens_q": ENDS, "cu_seqlens_k": ENDS, "max_seqlen_q": 5, "max_seqlen_k": 5}
WIDE, SUMS = pack_int8_weight(INT8.codes)

# Functions with arguments that they take.
CALLS = {
    ops.pack_linear: {"weight": WEIGHT, "bias": BIAS},
    ops.pack_qlinear: {"weight_codes": INT8.codes, "weight_scale": INT8.scale, "bias": BIAS, "input_zero_point": 0},
    ops.pack_groupwise: {"weight": LOW, "bias": BIAS},
    ops.unpack_groupwise: {"packed": ops.pack_groupwise(LOW), "bits": LOW.bits},
    ops.unpack_linear: {"packed": PACKED},
    ops.linear: {"x": X, "packed": PACKED, "out_features": 7, "residual": torch.zeros(3, 7), "activation": "gelu"},
    ops.quantize_rows: {"x": X, "scale": 0.5},
    ops.qgemm: {"codes": ROWS, "scale": STEPS, "zero_point": 0, "packed": PACKED_INT8, "out_features": 7},
    ops.qgemm_requantize: {"codes": ROWS, "scale": STEPS, "zero_point": 0, "packed": PACKED_INT8, "out_features": 7},
    ops.add_layernorm: {"x": X, "residual": X, "weight": GAMMA, "bias": GAMMA, "eps": 1e-5},
    ops.embed: {**TABLES, "weight": GAMMA, "bias": GAMMA},
    ops.attention: {**QKV, **PER_HEAD, "cu_seqlens": ENDS, "key_counts": ENDS[1:], "scale": 0.5},
    ops.qattention: {**CODES, **PER_HEAD, "scales": [torch.ones(5)] * 3, "cu_seqlens": ENDS, "out_dtype": HEADS.dtype},
    ops.attention_requantize: {**QKV, **PER_HEAD, "cu_seqlens": ENDS},
    ops.attention_varlen: {**QKV, **PER_HEAD, **FLASH, "seqused_k": ENDS[1:]},
    attention_cuda: {**QKV, **PER_HEAD, "cu_seqlens": ENDS, "max_length": 5, "heads": [0, 1]},
    attention_packed_cuda: {**QKV, **PER_HEAD, "cu_seqlens": ENDS, "max_length": 5, "counts": ENDS[1:]},
    int8_linear_cuda: {"codes": ROWS, "scale": STEPS, "weight": WIDE, "weight_scale": INT8.scale, "weight_sums": SUMS},
    quantize_rows_cuda: {"x": X, "live": ENDS[1:]},
    add_layernorm_cuda: {"x": X, "residual": X, "weight": GAMMA, "bias": GAMMA, "eps": 1e-5},
    embed_cuda: {**TABLES, "weight": GAMMA, "bias": GAMMA, "eps": 1e-5, "out_dtype": HEADS.dtype},
}  # fmt: skip


def told(function, name: str, wrong: object, text: str) -> None:
    with pytest.raises((RuntimeError, ValueError)) as error:
        function(**{**CALLS[function], name: wrong})
    assert str(error.value) == f"{function.__name__}: expected {name} to be {text}."


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_no_tensor(function):
    function(**CALLS[function])
    optional = {name for name, p in inspect.signature(function).parameters.items() if "None" in p.annotation}
    for name, value in CALLS[function].items():
        if isinstance(value, Tensor):
            expected = "a tensor or None" if name in optional else "a tensor"
            told(function, name, 0.5, f"{expected}. Got float")
            told(function, name, [1.0, 2], f"{expected}. Got list of float and int")
            if name not in optional:
                told(function, name, None, "a tensor. Got NoneType")


@pytest.mark.parametrize(
    "function, name, wrong, text",
    [
        (ops.embed, "ids", TABLES["ids"][0], "a list of tensors. Got Tensor"),
        (ops.embed, "tables", [None], "a list of tensors. Got list of NoneType"),
        (ops.embed, "scales", (0.5,), "a list of tensors. Got tuple of float"),
        (embed_cuda, "ids", None, "a list of tensors. Got NoneType"),
        (ops.qattention, "scales", [None] * 3, "a list of tensors. Got list of NoneType"),
        (ops.qattention, "out_dtype", "float32", "a torch.dtype or None. Got str"),
        (ops.linear, "out_features", 7.0, "an int. Got float"),
        (ops.linear, "activation", ["gelu"], "a str or an int. Got list of str"),
        (ops.linear, "activation", "swish", "one of none, gelu, gelu_tanh, relu, tanh, silu. Got 'swish'"),
        (ops.qgemm, "activation", None, "one of none, gelu, gelu_tanh, relu, tanh, silu. Got None"),
        (ops.add_layernorm, "eps", "1e-5", "a float. Got str"),
        (ops.attention, "scale", "1", "a float or None. Got str"),
        (ops.attention_varlen, "max_seqlen_q", None, "an int. Got NoneType"),
        (ops.attention_varlen, "softmax_scale", "1", "a float or None. Got str"),
        (attention_cuda, "heads", 2, "a list of ints or None. Got int"),
        (attention_cuda, "max_length", 5.0, "an int. Got float"),
    ],
)  # fmt: skip
def test_other_types(function, name, wrong, text):
    told(function, name, wrong, text)


def test_every_public_function_answers_so():
    """Those of `bertkern.ops` that take tensors are all explained."""
    functions = {name: getattr(ops, name) for name in ops.__all__ if callable(getattr(ops, name))}
    assert {name for name, function in functions.items() if not hasattr(function, "__wrapped__")} == {"cpu_isa"}


def test_other_failures_stay_as_they_are():
    with pytest.raises(RuntimeError, match=r"^linear: expected x of shape .* Got \[3, 11\]\.$"):
        ops.linear(X[:, :11], PACKED, 7)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'out_features'"):
        ops.linear(X, PACKED)
    # Types that torch takes are not blamed for what else is wrong.
    with pytest.raises(RuntimeError, match=r"^attention: expected head_mask of shape \[B, H\] = \[1, 2\]"):
        ops.attention(*QKV.values(), ENDS, head_mask=torch.ones(3, 2), scale=torch.tensor(0.5), causal=1)
    with pytest.raises(RuntimeError, match=r"^attention_cuda: expected heads to be the different numbers of the 2"):
        attention_cuda(*QKV.values(), ENDS, 5, heads=range(3))


def test_compiled_in_one_graph():
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*QKV.values(), ENDS), ops.attention(*QKV.values(), ENDS))
