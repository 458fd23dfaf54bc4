"""Sparse weights that cannot be, and packed bytes that are damaged: an error that says what was expected."""

import itertools
import math
import struct
from dataclasses import replace

import pytest
import torch

from bertkern import ops
from bertkern.formats import BsrWeight, CsrWeight
from bertkern.formats.int8 import quantize_weight
from tests.formats.matrices import same

from .test_encoder import inputs
from .test_sparse import FORMS, Layer, listed, rows, weight_of

op = torch.ops.bertkern
N, K, BLOCK = 37, 50, (4, 8)
WEIGHT, BIAS = weight_of(N, K, BLOCK)
BLOCKS = BsrWeight.from_dense(WEIGHT, BLOCK)
CODES = quantize_weight(WEIGHT)
CODE_BLOCKS = BsrWeight.from_dense(CODES.codes, BLOCK)


def changed(tensor, place, value):
    made = tensor.clone()
    made[place] = value
    return made


def sparse(n=N, k=K, scale=None, bias=BIAS, rest=(0.0, 0, 0.0, 0), like=BLOCKS, **tensors):
    parts = {**like.tensors(), **tensors}
    return op.pack_sparse_linear(parts["crow"], parts["col"], parts["values"], n, k, scale, bias, *rest)


def code_blocks(**changes):
    return sparse(**{"like": CODE_BLOCKS, "scale": CODES.scale, **changes})


CROW, COL, VALUES = BLOCKS.crow, BLOCKS.col, BLOCKS.values
FIRST = int((CROW.diff() >= 2).nonzero()[0])  # a block row of two blocks at least
AT = int(CROW[FIRST])


@pytest.mark.parametrize(
    "changes, message",
    [
        # the row pointers
        ({"crow": CROW.long()}, r"expected crow of dtype int32. Got int64."),
        ({"crow": CROW.float()}, r"expected crow of dtype int32. Got float32."),
        ({"crow": CROW[:-1]}, r"expected crow of shape \[ceil\(N / rows\) \+ 1\] = \[11\]. Got \[10\]."),
        ({"crow": CROW[:0]}, r"expected crow of shape .* = \[11\]. Got \[0\]."),
        ({"crow": CROW[None]}, r"expected crow of shape .* = \[11\]. Got \[1, 11\]."),
        ({"crow": changed(CROW, 0, 1)}, rf"expected crow from 0 to {len(COL)}. Got 1 to {len(COL)}."),
        ({"crow": changed(CROW, 0, -1)}, rf"expected crow from 0 to {len(COL)}. Got -1 to {len(COL)}."),
        ({"crow": changed(CROW, -1, 999)}, rf"expected crow from 0 to {len(COL)}. Got 0 to 999."),
        ({"crow": changed(CROW, 3, -5)}, r"expected crow to ascend. Got \d+ before -5 at row 2."),
        ({"crow": changed(CROW, 3, 2**31 - 1)}, r"expected crow to ascend. Got \d+ before 2147483647 at row 2."),
        ({"crow": changed(CROW, 3, -(2**31))}, r"expected crow to ascend. Got \d+ before -2147483648 at row 2."),
        # the columns
        ({"col": COL.long()}, r"expected col of dtype int32. Got int64."),
        ({"col": COL[:-1]}, rf"expected col of shape \[blocks\] = \[{len(COL)}\]. Got \[{len(COL) - 1}\]."),
        ({"col": COL[:, None]}, rf"expected col of shape \[blocks\] = .* Got \[{len(COL)}, 1\]."),
        ({"col": changed(COL, AT, 7)}, r"expected col in \[0, 7\). Got 7 in row"),
        ({"col": changed(COL, AT, -1)}, r"expected col in \[0, 7\). Got -1 in row"),
        ({"col": changed(COL, -1, 2**31 - 1)}, r"expected col in \[0, 7\). Got 2147483647 in row 9."),
        ({"col": changed(COL, AT + 1, int(COL[AT]))}, r"expected col to ascend within a row. Got \d+ twice"),
        ({"col": changed(COL, slice(AT, AT + 2), COL[AT : AT + 2].flip(0))}, r"expected col to ascend within a row."),
        # the values
        ({"values": VALUES.double()}, r"expected values of dtype float32, bfloat16, float16 or int8. Got float64."),
        ({"values": VALUES.int()}, r"expected values of dtype float32, bfloat16, float16 or int8. Got int32."),
        ({"values": VALUES[:, 0]}, r"expected values of shape \[blocks, rows, columns\] .* Got"),
        ({"values": VALUES[None]}, r"expected values of shape \[blocks, rows, columns\] .* Got"),
        ({"values": torch.tensor(1.0)}, r"expected values of shape \[blocks, rows, columns\] .* Got \[\]."),
        ({"values": VALUES[:, :0]}, r".* with rows and columns in \[1, 2\^31\). Got \[\d+, 0, 8\]."),
        ({"values": VALUES[:, :, :0]}, r".* with rows and columns in \[1, 2\^31\). Got \[\d+, 4, 0\]."),
        ({"values": torch.empty(0, 2**62, 1)}, r".* with rows and columns in \[1, 2\^31\). Got"),
        ({"values": torch.empty(0, 1, 2**31)}, r".* with rows and columns in \[1, 2\^31\). Got"),
        ({"values": VALUES[:-1]}, rf"expected col of shape \[blocks\] = \[{len(COL) - 1}\]. Got \[{len(COL)}\]."),
        ({"values": VALUES[:, :2]}, r"expected crow of shape \[ceil\(N / rows\) \+ 1\] = \[20\]. Got \[11\]."),
        ({"values": VALUES[:, :, :4].repeat(1, 1, 8)}, r"expected col in \[0, 2\). Got"),
        # the sizes
        ({"n": -1}, r"expected n and k in \[0, 2\^31\). Got -1 and 50."),
        ({"k": -1}, r"expected n and k in \[0, 2\^31\). Got 37 and -1."),
        ({"n": 2**31}, r"expected n and k in \[0, 2\^31\). Got 2147483648 and 50."),
        ({"k": 2**63 - 1}, r"expected n and k in \[0, 2\^31\). Got 37 and 9223372036854775807."),
        ({"n": -(2**63)}, r"expected n and k in \[0, 2\^31\). Got -9223372036854775808 and 50."),
        ({"n": 36}, r"expected crow of shape .* = \[10\]. Got \[11\]."),
        ({"n": 41}, r"expected crow of shape .* = \[12\]. Got \[11\]."),
        ({"k": 48}, r"expected col in \[0, 6\). Got 6 in row"),
        ({"k": 65537}, r"expected K <= 65536. Got 65537."),
        ({"k": 2**31 - 1}, r"expected K <= 65536. Got 2147483647."),
        ({"k": 131073, "values": VALUES.bfloat16()}, r"expected K <= 131072. Got 131073."),
        # bias and what belongs to int8
        ({"bias": BIAS[:-1]}, r"expected bias of shape \[N\] = \[37\]. Got \[36\]."),
        ({"bias": BIAS.double()}, r"expected bias of dtype float32, bfloat16 or float16. Got float64."),
        ({"scale": CODES.scale}, r"expected weight_scale with int8 values, and only there. Got one."),
        ({"rest": (0.1, 0, 0.0, 0)}, r"expected input_scale, .* with int8 values only. Got float values."),
        ({"rest": (0.0, 3, 0.0, 0)}, r"expected input_scale, .* with int8 values only. Got float values."),
        ({"rest": (0.0, 0, 0.1, 0)}, r"expected input_scale, .* with int8 values only. Got float values."),
        ({"rest": (math.nan, 0, 0.0, 0)}, r"expected input_scale, .* with int8 values only. Got float values."),
        ({"rest": (0.0, 0, 0.0, 3)}, r"expected form 0 \(by rule\), 1 \(panels\) or 2 \(tokens\). Got 3."),
        ({"rest": (0.0, 0, 0.0, -1)}, r"expected form 0 \(by rule\), 1 \(panels\) or 2 \(tokens\). Got -1."),
    ],
)
def test_pack(changes, message):
    sparse()
    with pytest.raises(RuntimeError, match="pack_sparse_linear: " + message):
        sparse(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scale": None}, r"expected weight_scale with int8 values, and only there. Got none."),
        ({"scale": CODES.scale[:-1]}, r"expected weight_scale of shape \[N\] = \[37\] or \[1\]. Got \[36\]."),
        ({"scale": CODES.scale[None]}, r"expected weight_scale of shape \[N\] = \[37\] or \[1\]. Got \[1, 37\]."),
        ({"scale": CODES.scale[:0]}, r"expected weight_scale of shape \[N\] = \[37\] or \[1\]. Got \[0\]."),
        ({"scale": CODES.scale.double()}, r"expected weight_scale of dtype float32. Got float64."),
        (
            {"values": changed(CODE_BLOCKS.values, (1, 0, 2), -128)},
            r"expected values in \[-127, 127\]. Got -128 at element 34.",
        ),
        ({"rest": (-1.0, 0, 0.0, 0)}, r"expected input_scale >= 0 \(0: per token\). Got -1."),
        ({"rest": (math.nan, 0, 0.0, 0)}, r"expected input_scale >= 0 \(0: per token\). Got nan."),
        ({"rest": (0.1, 0, math.inf, 0)}, r"expected output_scale >= 0 \(0: none\). Got inf."),
        ({"rest": (0.1, 256, 0.0, 0)}, r"expected input_zero_point in \[0, 255\]. Got 256."),
        (
            {"rest": (0.0, 7, 0.0, 0)},
            r"expected input_zero_point = 0, or 128 for symmetric ranges, beside input_scale = 0 .per token.. Got 7.",
        ),
        ({"k": 32769}, r"expected K <= 32768, beyond which an int32 sum could overflow. Got 32769."),
    ],
)
def test_pack_int8(changes, message):
    code_blocks()
    with pytest.raises(RuntimeError, match="pack_sparse_linear: " + message):
        code_blocks(**changes)


def test_the_largest_sums():
    k = 32768
    weight, x = torch.full((3, k), 127, dtype=torch.int8), torch.full((2, k), 255, dtype=torch.uint8)
    for block, form in itertools.product(((1, 1), (4, 64), (16, 128)), FORMS):
        packed = ops.pack_sparse_linear(listed(weight, block), torch.ones(1), form=form)
        for codes, zero, total in ((x, 0, 127 * 255 * k), (x - 255, 255, -127 * 255 * k)):
            y = ops.qgemm(codes, torch.ones(1), zero, packed, 3)
            assert torch.equal(y, torch.full((2, 3), float(total)))


def test_what_a_person_calls():
    for bad in (WEIGHT, None, CODES):
        with pytest.raises(ValueError, match=r"expected weight to be a BsrWeight or a CsrWeight\. Got"):
            ops.pack_sparse_linear(bad)
    for form in ("dense", 1, None):
        with pytest.raises(ValueError, match=r"expected form to be one of auto, panels, tokens. Got"):
            ops.pack_sparse_linear(BLOCKS, form=form)
    csr = CsrWeight.from_dense(WEIGHT)
    for shape in ((), (8,), (8, 8, 8), (8.0, 8), ("8", 8)):
        with pytest.raises(ValueError, match=r"pack_sparse_linear: expected shape to be two sizes \(N, K\)\. Got"):
            ops.pack_sparse_linear(replace(csr, shape=shape))
    for values in (csr.values[None], csr.values[:, None], torch.tensor(1.0)):
        with pytest.raises(RuntimeError, match=r"expected (values|col) of shape"):
            ops.pack_sparse_linear(replace(csr, values=values))
    with pytest.raises(TypeError):
        ops.pack_sparse_linear(csr, None, None, 0.1)


def test_other_devices():
    arguments = [*CODE_BLOCKS.tensors().values(), N, K, CODES.scale, BIAS]
    for place in (0, 1, 2, 5, 6):
        moved = [part.to("meta") if i == place else part for i, part in enumerate(arguments)]
        match = r"pack_sparse_linear: expected tensors on one device. Got cpu and meta\."
        with pytest.raises(RuntimeError, match=match):
            op.pack_sparse_linear(*moved)
    everything = [part.to("meta") if isinstance(part, torch.Tensor) else part for part in arguments]
    with pytest.raises(RuntimeError, match=r"pack_sparse_linear: expected tensors with data, .* Got none\."):
        op.pack_sparse_linear(*everything)


# --- damaged bytes -------------------------------------------------------------------------------------------------

# LinearHeader: csrc/cpu/gemm/linear.h
HEADER = "<Iiqqfifihhiqq"
FIELDS = (
    *("magic", "kind", "n", "k", "input_scale", "input_zero", "output_scale", "has_bias"),
    *("layout", "features", "check", "entries", "weight_dwords"),
)


def header_of(packed):
    return dict(zip(FIELDS, struct.unpack(HEADER, packed[:64].numpy().tobytes()), strict=True))


def sealed(header):
    """The header's bytes with the check that they must have."""
    words = struct.unpack("<16I", struct.pack(HEADER, *{**header, "check": 0}.values()))
    check = 2166136261
    for word in words:
        check = (check ^ word) * 16777619 % 2**32
    signed = check - 2**32 if check >= 2**31 else check
    return struct.pack(HEADER, *{**header, "check": signed}.values())


def with_header(packed, data):
    made = packed.clone()
    made[:64] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return made


PACKED = {
    f"{kind} {form}": Layer(kind, WEIGHT, BIAS, BLOCK, form).packed
    for kind, form in itertools.product(("int8", "fp32", "bf16"), FORMS)
} | {"dense int8": ops.pack_qlinear(CODES.codes, CODES.scale, BIAS), "dense fp32": ops.pack_linear(WEIGHT, BIAS)}
PACKED["no features"] = Layer("fp32", torch.zeros(0, 50), None, (16, 4), "panels").packed


def refuse(packed, n=N, k=K):
    """Every operator says no."""
    x, codes, steps = rows(3, k), torch.zeros(3, k, dtype=torch.int8), torch.ones(1)
    for name, call in (
        ("unpack_linear", lambda: ops.unpack_linear(packed)),
        ("linear", lambda: ops.linear(x, packed, n)),
        ("qgemm", lambda: ops.qgemm(codes, steps, 0, packed, n)),
        ("qgemm_requantize", lambda: ops.qgemm_requantize(codes, steps, 0, packed, n)),
        ("qgemm_seconds", lambda: ops.qgemm_seconds(codes, steps, [packed], n)),
        ("encoder", lambda: op.encoder(inputs(2, 3, k), None, None, [packed] * 6, torch.ones(1, 4, k), [1], 1, 1e-5)),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: expected packed weights"):
            call()


@pytest.mark.parametrize("name", PACKED)
def test_bytes_cut_off_or_added(name):
    packed = PACKED[name]
    for end in (0, 1, 4, 63, 64, 65, len(packed) // 2, len(packed) - 4, len(packed) - 1):
        if end < len(packed):
            refuse(packed[:end].clone())
    refuse(torch.cat([packed, packed[-4:]]))
    refuse(torch.zeros(len(packed), dtype=torch.uint8))
    refuse(torch.full((len(packed),), 255, dtype=torch.uint8))


@pytest.mark.parametrize("name", PACKED)
def test_every_damaged_byte_of_a_header(name):
    packed = PACKED[name]
    for place, flip in itertools.product(range(64), (1, 0x80, 0xFF)):
        damaged = packed.clone()
        damaged[place] ^= flip
        with pytest.raises(RuntimeError, match="unpack_linear: expected packed weights"):
            ops.unpack_linear(damaged)
    # A smaller K would have the same size in bytes, and an index that reads beyond a row of x.
    header = header_of(packed)
    refuse(with_header(packed, struct.pack(HEADER, *{**header, "k": 8}.values())), k=8)


@pytest.mark.parametrize("name", PACKED)
def test_headers_whose_sizes_do_not_fit(name):
    """With the right check beside them, so that only the sizes are wrong."""
    packed = PACKED[name]
    header = header_of(packed)
    assert sealed(header) == packed[:64].numpy().tobytes()
    entries, dwords = header["entries"], header["weight_dwords"]
    numbers = [
        -1,
        1,
        2**31,
        2**32,
        2**61,
        2**62,
        2**63 - 1,
        -(2**63),
        entries + 1,
        entries - 1,
        dwords + 16,
        dwords - 16,
    ]
    changes = [{field: value} for field in ("entries", "weight_dwords") for value in numbers]
    changes += [
        {"entries": entries + a, "weight_dwords": dwords - a} for a in (1, 2, 16, 32, entries, -entries, -dwords)
    ]
    changes += [{"entries": a, "weight_dwords": b} for a, b in itertools.product((2**60, 2**62, -(2**62)), repeat=2)]
    changes += [{"n": value} for value in (-1, -32, 65, 96, 2**31, 2**31 + 1, 2**40, 2**63 - 1, -(2**63))]
    changes += [{"k": value} for value in (-1, 2**31 + 1, 2**40, 2**63 - 1, -(2**63))]
    changes += [{"n": 2**31, "k": 2**31}, {"n": 2**31, "k": 2**31, "weight_dwords": 2**62}]
    changes += [{"kind": value} for value in (-1, 3, 2**31 - 1, -(2**31))]
    changes += [{"layout": value} for value in (-1, 3, 32767, -32768)]
    if header["layout"] or not header["features"]:  # ordered lists of all dwords are dense weights and panels alike
        changes += [{"layout": (header["layout"] + 1) % 3}]
    changes += [{"features": value} for value in (-1, 3, 5, 8, 32, 33, 32767)]
    changes += [{"features": value} for value in (0, 1, 2, 4) if value != header["features"]]
    changes += [{"magic": 0}, {"magic": 0x324B4C42}]
    for change in changes:
        if all(header[field] == value for field, value in change.items()):
            continue
        with pytest.raises(RuntimeError, match="unpack_linear: expected packed weights"):
            ops.unpack_linear(with_header(packed, sealed({**header, **change})))


def test_packed_weights_at_an_odd_address():
    for packed in PACKED.values():
        for by in (1, 2, 4):
            refuse(torch.cat([torch.zeros(by, dtype=torch.uint8), packed])[by:], header_of(packed)["n"])
        moved = torch.cat([torch.zeros(8, dtype=torch.uint8), packed])[8:]
        assert same(ops.unpack_linear(moved)[0], ops.unpack_linear(packed)[0])
