"""Every kernel of the tables, compiled ahead of time for three generations of GPUs: what the machine code says."""

import re
import subprocess
from dataclasses import replace

import pytest

from .found import kernels

BLOCK_SPARSE = kernels("block_sparse")
OTHERS = ("attention", "groupwise", "int8_gemm", "rowwise")
TABLE = sum((kernels(name).TABLE for name in OTHERS), BLOCK_SPARSE.TABLE)
FORMS = [(entry, capability) for entry in TABLE for capability in entry.opcodes]
knobs = kernels("launch").knobs
SHARED_BYTES = kernels("table").SHARED_BYTES


@pytest.fixture(scope="module", autouse=True)
def compiled_here(tmp_path_factory):
    """Nothing comes from a cache of earlier runs."""
    assert not knobs.runtime.interpret, "expected no TRITON_INTERPRET: interpreted functions cannot be compiled"
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


def disassembly(cubin: bytes, folder) -> str:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def instructions(text: str) -> list[str]:
    """The instructions' names with their modifiers, without predicates."""
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.M)


def test_names_are_unique():
    assert len({entry.name for entry in TABLE}) == len(TABLE)


@pytest.mark.parametrize(("entry", "capability"), FORMS, ids=lambda given: getattr(given, "name", given))
def test_machine_code(entry, capability, tmp_path):
    kernel = entry.compile(capability)
    text = disassembly(kernel.asm["cubin"], tmp_path)
    assert re.search(r"\bSTACK:0\b", text) and re.search(r"\bLOCAL:0\b", text), "a stack frame"
    found = instructions(text)
    assert len(found) > 50
    assert not [name for name in found if name.startswith(("LDL", "STL"))]
    # Nothing else multiplies: no tile fell back to another generation's instruction, nor fp32 to one pass of TF32.
    # HFMA2.MMA is no product of matrices: constants are written to registers by it.
    multiplying = {name.removesuffix(".SAT") for name in found if "MMA" in name and name != "HFMA2.MMA"}
    assert multiplying == entry.opcodes[capability]
    assert kernel.metadata.shared <= SHARED_BYTES
    if entry.fetches_ahead:
        # Operands are fetched ahead in 16 bytes at a time, not element by element.
        assert any(name.startswith("LDGSTS") for name in found)
        assert not [name for name in found if name.startswith("LDG.") and name.endswith((".U16", ".U8", ".S8"))]
    if "fp32" in entry.signature.get("x", entry.signature.get("q", "")):
        assert all(found.count(name) % 3 == 0 for name in multiplying)


def test_what_makes_codes_rounds_as_a_processor_does():
    """A multiply and an add in one would round a step or a zero point otherwise; here, a zero point at a tie."""
    rounding = [entry for entry in TABLE if any(entry.signature.get(name) == "*i8" for name in ("codes", "y"))]
    assert {entry.function for entry in rounding} >= {
        kernels("rowwise").quantize, kernels("rowwise").normalize, kernels("groupwise").quantize,
        kernels("int8_gemm").multiply,
    }  # fmt: skip
    for entry in (*rounding, *(entry for entry in TABLE if entry.signature.get("x") == "*i8" and "x_scale" in
                               entry.signature and entry.function is BLOCK_SPARSE.multiply_int8)):  # fmt: skip
        assert entry.options["enable_fp_fusion"] is False, entry.name


def test_an_entry_that_misses_an_argument_is_refused():
    entry = TABLE[0]
    wrong = replace(entry, signature={name: kind for name, kind in entry.signature.items() if name != "T"})
    with pytest.raises(ValueError, match=r"expected each of .* once\. Got \['T'\]"):
        wrong.compile(90)
