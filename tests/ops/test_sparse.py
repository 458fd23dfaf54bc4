"""Sparse weights in every operator: float64 beside them for floats, the dense operator's very bits for int8."""

import itertools
import math

import pytest
import torch

from bertkern import ops
from bertkern.formats import BsrWeight, CsrWeight
from bertkern.formats.int8 import quantize_weight
from tests import reference
from tests.formats.matrices import same

from .test_encoder import every_padding, inputs

encoder = torch.ops.bertkern.encoder
ROWS = (0, 1, 2, 7, 15, 16, 17, 40, 129)
# (1, 1) goes as CSR; the last is larger than every matrix here.
BLOCKS = (
    *((1, 1), (1, 4), (4, 1), (4, 4), (2, 3), (6, 5), (8, 8), (16, 4), (16, 16), (32, 32), (64, 64), (128, 128)),
    (1000, 900),
)
SHAPES = ((1, 1), (1, 131), (131, 1), (31, 37), (33, 17), (64, 128), (97, 521), (717, 833))  # N, K
FORMS = ("panels", "tokens")
KINDS = ("int8", "fp32", "bf16")
# Tokens of 1, 2 and 4 features, panels of halves and of wholes.
SOME = (((1, 1), "tokens"), ((2, 3), "tokens"), ((4, 4), "tokens"), ((16, 4), "panels"), ((32, 32), "panels"))


def weight_of(n, k, block=(1, 1), density=0.4, seed=0):
    """[n, k] in fp32 with about `density` of its blocks, and a bias; outputs have a magnitude near 1."""
    generator = torch.Generator().manual_seed(seed + 31 * n + k)
    kept = torch.rand(-(-n // block[0]), -(-k // block[1]), generator=generator) < density
    mask = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:n, :k]
    weight = torch.randn(n, k, generator=generator) / math.sqrt(max(1, k * density))
    return weight * mask, torch.randn(n, generator=generator)


def rows(m, k, seed=1):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed))


def listed(weight, block):
    return CsrWeight.from_dense(weight) if block == (1, 1) else BsrWeight.from_dense(weight, block)


class Layer:
    """One weight, packed sparse and dense, and the reference's function of fp32 rows."""

    def __init__(self, kind, weight, bias, block, form, **static):
        self.kind, self.n, self.k = kind, *weight.shape
        self.scale = torch.empty(0)
        if kind == "int8":
            codes = quantize_weight(weight if self.k else torch.zeros(self.n, 1))
            self.weight, self.scale = codes.codes[:, : self.k], codes.scale
            self.dense = ops.pack_qlinear(self.weight, self.scale, bias, **static)
            packed = ops.pack_sparse_linear(listed(self.weight, block), self.scale, bias, form=form, **static)
        else:
            self.weight = weight.bfloat16() if kind == "bf16" else weight
            self.dense = ops.pack_linear(self.weight, bias)
            packed = ops.pack_sparse_linear(listed(self.weight, block), None, bias, form=form)
        self.packed, self.bias = packed, bias

    def plain(self, x):
        if self.kind == "int8":
            return reference.int8_linear(self.weight, self.scale, self.bias)(x)
        return reference.dense(self.weight, self.bias)(x.bfloat16() if self.kind == "bf16" else x)

    def check(self, y, expected, dense):
        """y, of the sparse weights, is what the dense ones give; and what float64 gives, if told."""
        if self.kind == "int8":
            assert torch.equal(y, dense)
        elif expected is not None:
            rtol, atol = (1e-4, 5e-5) if self.kind == "bf16" else (1e-5, 5e-6)
            torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=atol)

    def unpacks(self):
        weight, scale, bias = ops.unpack_linear(self.packed)
        assert same(weight, self.weight) and torch.equal(scale, self.scale)
        assert torch.equal(bias, torch.zeros(self.n) if self.bias is None else self.bias)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_and_shape(block, form):
    for (n, k), kind in itertools.product(SHAPES, KINDS):
        layer = Layer(kind, *weight_of(n, k, block), block, form)
        layer.unpacks()
        x = rows(max(ROWS), k)
        x = x.bfloat16().float() if kind == "bf16" else x
        expected, dense = layer.plain(x), ops.linear(x, layer.dense, n)
        for m in ROWS:
            layer.check(ops.linear(x[:m], layer.packed, n), expected[:m], dense[:m])
        if kind == "int8":
            assert ((dense.double() - expected).abs() < 0.2).all()  # the reference may round a code the other way


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", ((1, 1), (4, 1), (16, 4), (32, 32)))
@pytest.mark.parametrize("kind", KINDS)
def test_density_from_nothing_to_everything(kind, block, form):
    n, k = 101, 263
    x = rows(40, k).bfloat16().float()
    for density in (0.0, 0.01, 0.5, 0.97, 1.0):
        layer = Layer(kind, *weight_of(n, k, block, density), block, form)
        layer.unpacks()
        for m in (1, 40):
            y = ops.linear(x[:m], layer.packed, n)
            layer.check(y, layer.plain(x[:m]), ops.linear(x[:m], layer.dense, n))
            if density == 0:
                assert torch.equal(y, layer.bias.expand(m, n))
    nothing = Layer(kind, torch.zeros(n, k), None, block, form)
    assert torch.equal(ops.linear(x, nothing.packed, n, "relu"), torch.zeros(40, n))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_panels_halves_and_columns_of_zeros(kind, form):
    n, k = 160, 300
    weight, bias = weight_of(n, k)
    weight[32:64] = 0  # a panel
    weight[64:80] = weight[112:128] = 0  # the first half of a panel, the second half of another
    weight[[0, 31, 130, 159]] = 0
    weight[:, 128:256] = 0  # a chunk, in fp32
    x = rows(33, k).bfloat16().float()
    for block in ((1, 1), (2, 2), (4, 4), (16, 1)):
        layer = Layer(kind, weight, bias, block, form)
        layer.unpacks()
        y = ops.linear(x, layer.packed, n)
        layer.check(y, layer.plain(x), ops.linear(x, layer.dense, n))
        assert torch.equal(y[:, 32:80], bias[32:80].expand(33, 48))


def test_sizes_of_zero():
    for form, kind, (n, k) in itertools.product(("auto", *FORMS), KINDS, ((0, 0), (0, 5), (5, 0))):
        for block in ((1, 1), (2, 3), (16, 16)):
            layer = Layer(kind, torch.zeros(n, k), torch.arange(n).float(), block, form)
            layer.unpacks()
            assert torch.equal(ops.linear(rows(3, k), layer.packed, n), torch.arange(n).float().expand(3, n))


def test_the_rule_for_the_form():
    def layout(block, form="auto"):
        packed = ops.pack_sparse_linear(listed(weight_of(96, 64, block)[0], block), form=form)
        return packed[40:44].view(torch.int16).tolist()  # LinearHeader: layout, features

    assert [layout(block) for block in ((1, 1), (1, 4), (3, 3), (2, 3), (6, 1), (4, 1), (8, 8))] == [
        *([2, 1],) * 3,
        *([2, 2],) * 2,
        *([2, 4],) * 2,
    ]
    assert [layout(block) for block in ((16, 4), (32, 32), (48, 1))] == [[1, 0]] * 3
    assert layout((32, 32), "tokens") == [2, 4] and layout((1, 1), "panels") == [1, 0]


def test_packed_weights_are_no_larger_than_their_canonical_form():
    for kind, block in itertools.product(KINDS, ((1, 1), (1, 4), (4, 4), (16, 4), (16, 16), (32, 32), (64, 64))):
        if kind != "fp32" and block == (1, 1):
            continue  # a step of K holds several elements
        layer = Layer(kind, *weight_of(768, 768, block, 0.3), block, "auto")
        vectors = 64 + 768 * (16 if kind == "int8" else 4)
        # A step of K is one fp32 value: its 1x4 blocks have four 16-bit indices where the canonical form has one of 32.
        most = 1.23 if (kind, block) == ("fp32", (1, 4)) else 1.15
        assert layer.packed.numel() <= most * listed(layer.weight, block).nbytes + vectors, (kind, block)


@pytest.mark.parametrize("block, form", SOME)
@pytest.mark.parametrize("kind", KINDS)
def test_every_epilogue(kind, block, form):
    n, k = 117, 260
    weight, bias = weight_of(n, k, block)
    for offset in (bias, None):
        layer = Layer(kind, weight, offset, block, form)
        for m in (1, 7, 17, 40):
            x = rows(m, k).bfloat16().float()
            total = layer.plain(x)
            for (name, number), residual in itertools.product(ops.ACTIVATIONS.items(), (None, rows(m, n, 2))):
                expected = reference.activate(total, number)
                expected = expected if residual is None else expected + residual
                y = ops.linear(x, layer.packed, n, name, residual)
                layer.check(y, expected, ops.linear(x, layer.dense, n, name, residual))
                for dtype in (torch.bfloat16, torch.float16):
                    assert torch.equal(ops.linear(x, layer.packed, n, name, residual, dtype), y.to(dtype))
                    taken = ops.linear(x.to(dtype), layer.packed, n, name, residual)
                    assert taken.dtype == dtype
                    if dtype == torch.bfloat16:  # which holds this x exactly
                        assert torch.equal(taken, y.to(dtype))


@pytest.mark.parametrize("block, form", SOME)
def test_ready_codes(block, form):
    n, k = 117, 1100
    weight, bias = weight_of(n, k, block)
    for zero, offset in ((0, bias), (77, None)):
        layer = Layer("int8", weight, offset, block, form, input_scale=0.03, input_zero_point=zero)
        for m in ROWS:
            generator = torch.Generator().manual_seed(m)
            unsigned = torch.randint(0, 256, (m, k), generator=generator, dtype=torch.uint8)
            signed = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)
            steps, residual = torch.rand(m, generator=generator) * 0.01, rows(m, n, 3)
            for codes, zero_point, scale in (
                (signed, 0, steps),
                (unsigned, 77, steps),
                (unsigned, 255, torch.tensor([0.01])),
            ):
                call = (codes, scale, zero_point)
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    rest = (n, "gelu", residual, dtype)
                    assert torch.equal(ops.qgemm(*call, layer.packed, *rest), ops.qgemm(*call, layer.dense, *rest))
                expected = reference.qgemm(codes, scale.expand(m), zero_point, layer.weight, layer.scale, offset)
                y = ops.qgemm(*call, layer.packed, n)
                torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=5e-5)
                for name, step, out_zero in (("none", 0.0, 0), ("gelu", 0.0, 0), ("none", 0.05, 0), ("relu", 0.03, 9)):
                    ours = ops.qgemm_requantize(*call, layer.packed, n, name, step, out_zero)
                    theirs = ops.qgemm_requantize(*call, layer.dense, n, name, step, out_zero)
                    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    seconds = ops.qgemm_seconds(signed, steps, [layer.packed], n, "gelu", True, calls=3)
    assert len(seconds) == 3 and all(0 < second < 10 for second in seconds)


@pytest.mark.parametrize("block, form", SOME)
def test_static_ranges_and_requantized_output(block, form):
    n, k = 97, 260
    weight, bias = weight_of(n, k, block)
    for static in (
        {"input_scale": 0.03},
        {"input_scale": 0.03, "input_zero_point": 100},
        {"input_zero_point": 128},
        {"output_scale": 0.05},
        {"input_scale": 0.02, "output_scale": 0.04},
    ):
        layer = Layer("int8", weight, bias, block, form, **static)
        for m, name in itertools.product((1, 17, 129), ("none", "gelu")):
            x = rows(m, k)
            y = ops.linear(x, layer.packed, n, name)
            assert torch.equal(y, ops.linear(x, layer.dense, n, name))
            if name == "none" and "output_scale" in static:
                codes = y.double() / static["output_scale"]
                assert (codes - codes.round()).abs().max() < 1e-4


def test_one_scale_for_all_rows():
    weight, bias = weight_of(45, 77)
    codes = quantize_weight(weight, per_channel=False)
    x = rows(9, 77)
    for form in FORMS:
        packed = ops.pack_sparse_linear(CsrWeight.from_dense(codes.codes), codes.scale, bias, form=form)
        expected = ops.linear(x, ops.pack_qlinear(codes.codes, codes.scale, bias), 45)
        assert torch.equal(ops.linear(x, packed, 45), expected)


def test_fp16_values_become_fp32():
    weight, bias = weight_of(45, 77)
    half = weight.half()
    for block, form in itertools.product(((1, 1), (4, 4)), FORMS):
        packed = ops.pack_sparse_linear(listed(half, block), None, bias.half(), form=form)
        twin = ops.pack_sparse_linear(listed(half.float(), block), None, bias.half().float(), form=form)
        assert torch.equal(packed, twin)


@pytest.mark.parametrize("block, form", SOME)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_nothing_else(kind, block, form):
    """Alone or in a batch, whatever is split: many chunks of K are taken together where there are few rows."""
    n, k = 197, 1300
    layer = Layer(kind, *weight_of(n, k, block), block, form)
    x = rows(129, k)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            whole = ops.linear(x, layer.packed, n, "gelu")
            results.append(whole)
            for m in ROWS:
                assert torch.equal(ops.linear(x[:m], layer.packed, n, "gelu"), whole[:m])
            assert torch.equal(torch.cat([ops.linear(row, layer.packed, n, "gelu")[None] for row in x]), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_nan_inf_and_negative_zero_in_a_weight(dtype, form):
    n, k = 70, 300
    weight, bias = weight_of(n, k)
    weight = weight.to(dtype)
    weight[40:60] = 0
    strange = weight.clone()
    strange[3, 7], strange[50, 299], strange[69, 0], strange[45, 128] = math.nan, math.inf, -math.inf, math.nan
    kept = torch.ones(n, dtype=torch.bool)
    kept[[3, 45, 50, 69]] = False
    for block, m in itertools.product(((1, 1), (2, 3), (4, 4), (16, 4), (128, 512)), (1, 17)):
        x = rows(m, k).to(dtype).float().abs()
        packed = ops.pack_sparse_linear(listed(strange, block), None, bias, form=form)
        assert same(ops.unpack_linear(packed)[0], strange)
        y = ops.linear(x, packed, n)
        clean = ops.linear(x, ops.pack_sparse_linear(listed(weight, block), None, bias, form=form), n)
        assert torch.equal(y[:, kept], clean[:, kept])
        assert y[:, [3, 45]].isnan().all()
        assert (y[:, 50] == math.inf).all() and (y[:, 69] == -math.inf).all()

    # The sign of a zero in a stored block is kept, in a block of nothing but such zeros too.
    zeros = torch.zeros(4, 4, dtype=dtype)
    zeros[1, 2] = zeros[3, 0] = -0.0
    weight = BsrWeight(
        torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32), zeros[None], (4, 4)
    )
    packed = ops.pack_sparse_linear(weight, None, bias[:4], form=form)
    assert torch.equal(ops.unpack_linear(packed)[0].signbit(), zeros.signbit())
    assert torch.equal(ops.linear(rows(5, 4), packed, 4), bias[:4].expand(5, 4))


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("block, form", SOME)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_inf_stay_in_their_row_of_x(kind, block, form, bad):
    n, k, column = 45, 277, 276
    layer = Layer(kind, *weight_of(n, k, block), block, form)
    x = rows(19, k)
    clean = ops.linear(x, layer.packed, n)
    x[3, column] = bad
    y = ops.linear(x, layer.packed, n)
    others = torch.arange(19) != 3
    assert torch.equal(y[others], clean[others])
    meets = layer.weight[:, column] != 0
    assert meets.any()
    if kind == "int8":
        assert y[3].isnan().all()
    else:
        assert not y[3, meets].isfinite().any()
        # A zero is multiplied or skipped, as it lies beside others.
        assert (y[3].isnan() | (y[3] == clean[3]))[~meets].all()


@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_a_static_scale_tells_a_row_that_is_not_finite(bad):
    x = rows(19, 64)
    x[3, 5] = bad
    codes, scale = ops.quantize_rows(x)
    for block, form in SOME:
        layer = Layer("int8", *weight_of(40, 64, block), block, form)
        got, steps = ops.qgemm_requantize(codes, scale, 0, layer.packed, 40, "none", 0.1)
        assert steps.isnan().nonzero().tolist() == [[3]]
        again, steps = ops.qgemm_requantize(codes, scale, 0, layer.packed, 40)
        assert steps.isnan().nonzero().tolist() == [[3]] and got.shape == again.shape


def test_views_and_strides():
    weight, bias = weight_of(45, 77, (4, 4))
    canonical = BsrWeight.from_dense(weight, (4, 4))
    expected = ops.pack_sparse_linear(canonical, None, bias)

    def strided(tensor):
        made = torch.stack([tensor, tensor], dim=-1)[..., 0]
        assert not made.is_contiguous()
        return made

    made = BsrWeight(strided(canonical.crow), strided(canonical.col), strided(canonical.values), (45, 77))
    assert torch.equal(ops.pack_sparse_linear(made, None, strided(bias)), expected)
    flipped = BsrWeight(
        canonical.crow, canonical.col, canonical.values.transpose(1, 2).contiguous().transpose(1, 2), (45, 77)
    )
    assert torch.equal(ops.pack_sparse_linear(flipped, None, bias), expected)
    x = rows(30, 77)
    y = ops.linear(x, expected, 45)
    assert torch.equal(ops.linear(x.view(2, 3, 5, 77), expected, 45), y.view(2, 3, 5, 45))
    assert torch.equal(ops.linear(x.t().contiguous().t(), strided(expected), 45), y)
    assert torch.equal(ops.linear(x[::3], expected, 45), y[::3])


def test_values_outside_of_the_matrix_are_left_out():
    weight, bias = weight_of(45, 77, (16, 8), 1.0)
    canonical = BsrWeight.from_dense(weight, (16, 8))
    values = canonical.values.clone()
    values[canonical.col == 9, :, 5:] = math.nan
    values[canonical.crow[-2] :, 13:] = math.inf
    full = BsrWeight(canonical.crow, canonical.col, values, (45, 77))
    for form in FORMS:
        clean = ops.pack_sparse_linear(canonical, None, bias, form=form)
        assert torch.equal(ops.pack_sparse_linear(full, None, bias, form=form), clean)


PATTERNS = {
    "tokens": ["tokens"] * 6,
    "panels": ["panels"] * 6,
    "one operand": ["dense", "panels", "panels", "tokens", "panels", "tokens"],
    "two operands": ["tokens", "dense", "tokens", "dense", "tokens", "panels"],
    "two beside": ["panels", "tokens", "tokens", "tokens", "dense", "dense"],
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", KINDS)
def test_encoder(kind, pattern):
    """Dense and sparse layers side by side, over both ways of splitting the work."""
    hidden, ffn, heads = 52, 117, [2, 4]
    layers = []
    for i, (n, k) in enumerate((((hidden, hidden),) * 4 + ((ffn, hidden), (hidden, ffn))) * 2):
        form = PATTERNS[pattern][i % 6]
        block = ((1, 1), (16, 4), (4, 4), (2, 3))[i % 4]
        layers.append(Layer(kind, *weight_of(n, k, block, 0.5, seed=i), block, "auto" if form == "dense" else form))
    mixed = [layer.dense if PATTERNS[pattern][i % 6] == "dense" else layer.packed for i, layer in enumerate(layers)]
    dense = [layer.dense for layer in layers]
    norms = rows(8, hidden, 4).view(2, 4, hidden) * 0.1
    norms[:, ::2] += 1
    threads = torch.get_num_threads()
    try:
        for (count, length), states in itertools.product(((1, 9), (2, 5), (2, 41)), (False, True)):
            torch.set_num_threads(count)
            x, mask = inputs(8, length, hidden), every_padding(length)
            options = (norms, heads, 1, 1e-12, False, states)
            ours, theirs = encoder(x, mask, None, mixed, *options), encoder(x, mask, None, dense, *options)
            if kind == "int8":
                assert torch.equal(ours, theirs)
            elif kind == "fp32":
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
                plain = [layer.plain for layer in layers]
                expected = reference.encoder(x, mask, None, plain, *options)
                torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=2e-5)
            else:
                assert reference.sqnr(theirs, ours) > 35
            if not states:
                alone = torch.cat([encoder(x[i : i + 1], mask[i : i + 1], None, mixed, *options) for i in range(8)])
                assert torch.equal(alone, ours)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("block, form", (SOME[1], SOME[3]))
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind, block, form):
    weight, bias = weight_of(7, 12, block)
    layer = Layer(kind, weight, bias, block, form)
    x, op = rows(3, 12), torch.ops.bertkern
    torch.library.opcheck(op.linear.default, (x, layer.packed, 7))
    if kind == "int8":
        codes, scale = ops.quantize_rows(x)
        torch.library.opcheck(op.qgemm.default, (codes, scale, 0, layer.packed, 7))
        torch.library.opcheck(op.qgemm_requantize.default, (codes, scale, 0, layer.packed, 7, 1))
    canonical = BsrWeight.from_dense(layer.weight, block)
    arguments = (*canonical.tensors().values(), 7, 12, layer.scale if kind == "int8" else None, bias)
    torch.library.opcheck(op.pack_sparse_linear.default, arguments)
