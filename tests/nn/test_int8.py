"""Int8Linear and Int8Embedding alone: numerics, forms, and everything that a module has to survive."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from bertkern.config import Int8Config
from bertkern.nn import Int8Embedding, Int8Linear

SIZES = [(1, 1), (3, 2), (13, 7), (52, 117), (117, 52), (64, 64), (96, 33)]


def simulated(layer: Int8Linear, x: torch.Tensor) -> torch.Tensor:
    x, step, zero = x.double(), layer.input_scale.double(), int(layer.input_zero_point)
    if zero and step:
        values = ((x / step).round() + zero).clamp(0, 255).sub(zero) * step
    elif step:
        values = (x / step).round().clamp(-127, 127) * step
    elif zero:
        step = x.abs().amax(-1, keepdim=True) / 127
        values = (x / torch.where(step > 0, step, 1.0)).round() * step
    else:
        low, high = (end(x, -1, keepdim=True) for end in (torch.amin, torch.amax))
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = torch.where(high > low, (high - low) / 255, 1.0)
        start = (-low / scale).round()
        values = (((x / scale).round() + start).clamp(0, 255) - start) * scale
    y = values @ (layer.weight_codes.double() * layer.weight_scale.double().reshape(-1, 1)).T
    y = y if layer.bias is None else y + layer.bias.double()
    out = layer.output_scale.double()
    return ((y / out).round().clamp(-127, 127) * out if out else y).float()


@pytest.mark.parametrize("k, n", SIZES)
@pytest.mark.parametrize("weight", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("bias", [True, False])
def test_dynamic(k, n, weight, bias):
    torch.manual_seed(k)
    layer = Int8Linear.from_linear(nn.Linear(k, n, bias=bias), Int8Config(weight=weight)).eval()
    assert layer.weight_scale.numel() == (n if weight == "per_channel" else 1)
    symmetric = Int8Linear.from_codes(layer.weight_codes, layer.weight_scale, layer.bias, input_zero_point=128).eval()
    for shape in ((5, k), (2, 3, k), (k,), (0, k), (1, k)):
        x = torch.randn(shape)
        for here in (layer, symmetric):
            torch.testing.assert_close(here(x), simulated(here, x), atol=2e-2, rtol=1e-3)


@pytest.mark.parametrize("zero_point", [0, 90])
def test_static_input_and_output(zero_point):
    torch.manual_seed(0)
    float_layer = nn.Linear(52, 33)
    form = Int8Linear.from_linear(float_layer)
    layer = Int8Linear.from_codes(
        form.weight_codes,
        form.weight_scale,
        form.bias,
        input_scale=0.03,
        input_zero_point=zero_point,
        output_scale=torch.tensor(0.02),
    ).eval()
    x = torch.randn(7, 52)
    y, expected = layer(x), simulated(layer, x)
    # A value between two codes may go to either.
    assert ((y - expected).abs() <= 0.0201).all() and ((y - expected).abs() > 1e-5).float().mean() < 0.02
    torch.testing.assert_close(y / 0.02, (y / 0.02).round(), atol=1e-3, rtol=0)
    assert "static" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_has_the_dtype_of_the_input(dtype):
    layer = Int8Linear.from_linear(nn.Linear(13, 7)).eval()
    assert layer(torch.randn(3, 13, dtype=dtype)).dtype == dtype
    assert layer(torch.randn(3, 13).double()).dtype == torch.float64


def test_nan_stays_in_its_row():
    layer = Int8Linear.from_linear(nn.Linear(13, 7)).eval()
    x = torch.randn(4, 13)
    clean = layer(x)
    x[2, 5] = float("nan")
    y = layer(x)
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("per", ["per_channel", "per_tensor"])
def test_embedding(per):
    torch.manual_seed(0)
    table = nn.Embedding(3001, 12, padding_idx=1)
    with torch.no_grad():
        table.weight[2500] *= 7
    made = Int8Embedding.from_embedding(table, Int8Config(weight=per))
    whole = Int8Linear.from_linear(nn.Linear(12, 3001, bias=False), Int8Config(weight=per))
    ids = torch.randint(0, 3001, (4, 9))
    largest = (
        table.weight.detach().abs().amax()
        if per == "per_tensor"
        else table.weight.detach().abs().amax(1)[ids][..., None]
    )
    assert ((made(ids) - table(ids)).abs() <= largest / 254 * 1.001).all()
    assert torch.equal(made.dequantize()(ids), made(ids))
    assert made.dequantize().padding_idx == 1
    assert made.weight_scale.shape == whole.weight_scale.shape
    assert made.bfloat16()(ids).dtype == torch.bfloat16 and made.weight_scale.dtype == torch.float32


def test_round_trip_of_the_state_dict():
    torch.manual_seed(0)
    first = Int8Linear.from_linear(nn.Linear(13, 7)).eval()
    second = Int8Linear.from_linear(nn.Linear(13, 7), Int8Config(weight="per_tensor")).eval()
    x = torch.randn(3, 13)
    assert not torch.equal(first(x), second(x))
    assert sorted(first.state_dict()) == [
        "bias",
        "input_scale",
        "input_zero_point",
        "output_scale",
        "weight_codes",
        "weight_scale",
    ]
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    for twin in (copy.deepcopy(first), pickle.loads(pickle.dumps(first)), first.to(torch.bfloat16)):
        assert torch.equal(first(x), twin(x))
        assert b"_packed" not in pickle.dumps(twin)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: s.update(weight_codes=s["weight_codes"].float()),
            "expected int8 of shape .* = \\[7, 13\\]. Got torch.float32",
        ),
        (lambda s: s.update(weight_codes=s["weight_codes"][:, :12]), "Got torch.int8 of shape \\[7, 12\\]"),
        (lambda s: s["weight_codes"].fill_(-128), "Got -128"),
        (lambda s: s.update(weight_scale=s["weight_scale"][:3]), "expected float32 of shape .* = \\[7\\] or \\[1\\]"),
        (lambda s: s["weight_scale"].fill_(float("nan")), "finite scales"),
        (lambda s: s.pop("weight_scale"), "Missing key"),
        (lambda s: s.update(weight=torch.ones(7, 13)), "Unexpected key"),
    ],
)
def test_inconsistent_state_dicts_are_refused(change, message):
    layer = Int8Linear.from_linear(nn.Linear(13, 7))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    state = {key: value.clone() for key, value in before.items()}
    change(state)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert all(torch.equal(before[key], layer.state_dict()[key]) for key in before)


@pytest.mark.parametrize(
    "codes, scale, bias, options, message",
    [
        (torch.ones(7, 13), torch.ones(7), None, {}, "weight_codes int8 of shape \\[N, K\\]. Got torch.float32"),
        (torch.ones(7, dtype=torch.int8), torch.ones(7), None, {}, "weight_codes int8"),
        (
            torch.ones(7, 13, dtype=torch.int8),
            torch.ones(6),
            None,
            {},
            "= \\[7\\] or \\[1\\]. Got torch.float32 of shape \\[6\\]",
        ),
        (torch.ones(7, 13, dtype=torch.int8), torch.ones(7).half(), None, {}, "Got torch.float16"),
        (torch.ones(7, 13, dtype=torch.int8), torch.ones(7), torch.ones(6), {}, "bias of shape \\[N\\] = \\[7\\]"),
        (torch.ones(7, 13, dtype=torch.int8), torch.ones(7), None, {"input_scale": -1.0}, "finite input_scale"),
        (
            torch.ones(7, 13, dtype=torch.int8),
            torch.ones(7),
            None,
            {"output_scale": float("nan")},
            "finite output_scale",
        ),
    ],
)
def test_constructors_refuse_what_does_not_fit(codes, scale, bias, options, message):
    with pytest.raises(ValueError, match=message):
        Int8Linear.from_codes(codes, scale, bias, **options)


def test_constructors_refuse_inf():
    layer, table = nn.Linear(3, 2), nn.Embedding(3, 2)
    layer.weight.data[0, 0] = float("inf")
    table.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        Int8Linear.from_linear(layer)
    with pytest.raises(ValueError, match="finite"):
        Int8Embedding.from_embedding(table)


def test_gradient_goes_through_the_dequantized_weight():
    layer = Int8Linear.from_linear(nn.Linear(13, 7)).eval()
    x = torch.randn(3, 13, requires_grad=True)
    y = layer(x)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, layer.dequantized_weight().sum(0).expand(3, -1))
    layer.train()
    torch.testing.assert_close(layer(x), layer.dequantize()(x))


def test_many_threads():
    torch.manual_seed(0)
    layer = Int8Linear.from_linear(nn.Linear(64, 48)).eval()
    inputs = [torch.randn(5, 64) for _ in range(8)]
    with torch.no_grad():
        expected = [layer(x) for x in inputs]
        layer.__dict__.pop("_packed")
        wrong = []

        def work(x, y):
            with torch.no_grad():
                wrong.extend(1 for _ in range(20) if not torch.equal(layer(x), y))

        workers = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=False)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong


def test_inference_mode():
    with torch.inference_mode():
        layer = Int8Linear.from_linear(nn.Linear(13, 7)).eval()
        x = torch.randn(3, 13)
        y = layer(x)
    assert torch.equal(layer(x.clone()), y)


def test_compile_and_export():
    layer = nn.Sequential(Int8Linear.from_linear(nn.Linear(13, 7)), nn.ReLU()).eval()
    x = torch.randn(3, 13)
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
        assert torch.equal(compiled(x), expected)
        assert torch.equal(compiled(x[:2]), expected[:2])
        rows = torch.export.Dim("rows", min=1, max=64)
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))
        assert "bertkern.linear" in str(program.graph)
        assert torch.equal(program.module()(x[:2]), expected[:2])
