"""The operator tests again under each instruction set that this machine has, and equal integers on all of them."""

import pytest
import torch

from bertkern import ops

LEVELS = ("portable", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx")
HERE = LEVELS[: LEVELS.index(ops.cpu_isa())]  # the active one is what the other tests run

HASH = """
import hashlib, torch
from bertkern import ops
from bertkern.formats import BsrWeight
generator = torch.Generator().manual_seed(0)
digest = hashlib.sha256()
for m, k, n in ((1, 5, 3), (17, 768, 65), (29, 833, 96), (14, 3072, 32)):
    codes = torch.randint(0, 256, (m, k), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    codes[0], weight[0] = 255, 127  # the largest sums
    packed = ops.pack_qlinear(weight, torch.ones(1))
    digest.update(ops.qgemm(codes, torch.ones(1), 77, packed, n).numpy().tobytes())
    digest.update(ops.qgemm((codes.int() - 128).to(torch.int8), torch.ones(1), 0, packed, n).numpy().tobytes())
    # Where bytes are multiplied in 16 bits: sums at the bounds of four products, of two, beyond them, and all at once.
    for largest in (32, 33, 64, 65, 100):
        weight = torch.randint(-largest, largest + 1, (n, k), generator=generator, dtype=torch.int8)
        weight[1], weight[2] = largest, -largest
        digest.update(ops.qgemm(codes, torch.ones(1), 77, ops.pack_qlinear(weight, torch.ones(1)), n).numpy().tobytes())
    weight = (torch.randn(n, k, generator=generator) * 38).round().clamp(-127, 127).to(torch.int8)
    digest.update(ops.qgemm(codes, torch.ones(1), 77, ops.pack_qlinear(weight, torch.ones(1)), n).numpy().tobytes())
    for block, form in (((1, 1), "tokens"), ((2, 4), "tokens"), ((4, 1), "tokens"), ((16, 4), "panels")):
        kept = torch.rand(-(-n // block[0]), -(-k // block[1]), generator=generator) < 0.4
        mask = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:n, :k]
        blocks = BsrWeight.from_dense(weight * mask, block)
        packed = ops.pack_sparse_linear(blocks, torch.ones(1), form=form)
        digest.update(ops.qgemm(codes, torch.ones(1), 77, packed, n).numpy().tobytes())
print(digest.hexdigest())
"""


NAMES = ("linear", "attention", "attention_codes", "encoder", "encoder_codes", "mobilebert", "sparse")
FILES = [f"tests/ops/test_{name}.py" for name in NAMES]


@pytest.mark.parametrize("isa", HERE)
def test_operators(isa, run_python):
    # What tracing makes of an operator has nothing to do with its kernels.
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES, "-k", "not opcheck and not traced"]
    result = run_python(arguments, BERTKERN_CPU_ISA=isa)
    assert result.returncode == 0, result.stdout[-3000:]


def test_integers_are_equal_on_all(run_python):
    digests = {}
    for isa in LEVELS[: len(HERE) + 1]:
        result = run_python(HASH, BERTKERN_CPU_ISA=isa)
        assert result.returncode == 0, result.stderr[-2000:]
        digests[isa] = result.stdout.strip()
    assert len(set(digests.values())) == 1, digests


PACK = """
import sys, torch
from bertkern import ops
from bertkern.formats import BsrWeight
generator = torch.Generator().manual_seed(0)
weight = (torch.randn(70, 203, generator=generator) * 38).round().clamp(-127, 127).to(torch.int8)
scale = torch.rand(70, generator=generator)
mask = (torch.rand(5, 51, generator=generator) < 0.4).repeat_interleave(16, 0).repeat_interleave(4, 1)[:70, :203]
made = [(weight, ops.pack_qlinear(weight, scale))]
for form in ("panels", "tokens"):
    made.append((weight * mask, ops.pack_sparse_linear(BsrWeight.from_dense(weight * mask, (16, 4)), scale, form=form)))
torch.save(made, sys.argv[1])
"""


MULTIPLY = """
import sys, torch
from bertkern import ops
x = torch.randint(0, 256, (29, 203), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
made = []
for weight, packed in torch.load(sys.argv[1], weights_only=True):
    assert torch.equal(ops.unpack_linear(packed)[0], weight)
    made.append([ops.qgemm(x[:m], torch.ones(1), 7, packed, 70) for m in (1, 9, 29)])
torch.save(made, sys.argv[2])
"""


@pytest.mark.parametrize("isa", HERE)
def test_weights_packed_here_for_another_one(isa, run_python, tmp_path):
    def run(code, where, *files):
        done = run_python(["-c", code, *(str(tmp_path / file) for file in files)], BERTKERN_CPU_ISA=where)
        assert done.returncode == 0, done.stderr[-2000:]
        return torch.load(tmp_path / files[-1], weights_only=True)

    run(PACK, None, "packed.pt")
    here, there = (run(MULTIPLY, where, "packed.pt", f"{where}.pt") for where in (None, isa))
    for ours, theirs in zip(here, there, strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("isa", HERE)
def test_weights_packed_for_another_one(isa, run_python, tmp_path):
    result = run_python(["-c", PACK, str(tmp_path / "packed.pt")], BERTKERN_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr[-2000:]
    x = torch.randint(0, 256, (29, 203), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    for weight, packed in torch.load(tmp_path / "packed.pt", weights_only=True):
        codes, scale, _ = ops.unpack_linear(packed)
        assert torch.equal(codes, weight)
        here = ops.pack_qlinear(weight, scale)
        for m in (1, 9, 29):
            assert torch.equal(*(ops.qgemm(x[:m], torch.ones(1), 7, w, 70) for w in (packed, here)))
