"""The machine code of every CUDA kernel: nothing in local memory, and the instructions that it is written for.

By default for sm_80 and sm_90a; BERTKERN_SASS_TARGETS="80 90a 100a 120" names others.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.cuda.sass_table import KERNELS

CSRC = ROOT / "csrc"
SOURCES = sorted({kernel.source for kernel in KERNELS})
ASKED = os.environ.get("BERTKERN_SASS_TARGETS", "80 90a").split()


def _tool(name: str) -> str | None:
    """A program of the CUDA toolkit, or as Triton brings it."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    homes = [os.environ.get("CUDA_HOME", ""), str(Path(nvcc).resolve().parent.parent)]
    folders = [*(str(Path(home, "bin")) for home in homes if home), os.environ.get("PATH", os.defpath)]
    folders.append(str(Path(sysconfig.get_path("purelib"), "triton", "backends", "nvidia", "bin")))
    return shutil.which(name, path=os.pathsep.join(folders))


NVCC, CUOBJDUMP, FILT = _tool("nvcc"), _tool("cuobjdump"), shutil.which("c++filt")
if not (NVCC and CUOBJDUMP and FILT):
    pytest.skip("needs nvcc, cuobjdump and c++filt", allow_module_level=True)


def _output(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _compiled(source: str, target: str) -> Path:
    """The source's machine code, made anew where it or a header has changed."""
    flags = ["-std=c++17", "-O3", "-DNDEBUG", f"-arch=sm_{target}", "-I", CSRC, "-cubin"]
    seen = hashlib.sha256(repr(flags).encode() + _output(NVCC, "--version").encode())
    for path in [CSRC / "cuda" / source, *sorted(p for kind in ("*.h", "*.inc") for p in CSRC.rglob(kind))]:
        seen.update(path.read_bytes() + b"\0")
    folder = ROOT / "build" / "sass"
    cubin = folder / f"{Path(source).stem}-sm_{target}-{seen.hexdigest()[:16]}.cubin"
    if not cubin.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = cubin.with_suffix(f".{os.getpid()}.cubin")
        _output(NVCC, *flags, CSRC / "cuda" / source, "-o", unfinished)
        os.replace(unfinished, cubin)
    return cubin


@functools.cache
def machine_code(source: str, target: str) -> dict[str, tuple[dict[str, int], str]]:
    """{demangled name: (bytes by resource, instructions)} of all kernels of a source."""
    cubin = _compiled(source, target)
    functions = dict(
        re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", _output(CUOBJDUMP, "-sass", cubin), re.DOTALL)
    )
    usage = {
        name: {kind: int(size) for kind, size in re.findall(r"([A-Z]+):(\d+)", line)}
        for name, line in re.findall(r"Function (\S+):\n\s*(.*)", _output(CUOBJDUMP, "-res-usage", cubin))
    }
    assert functions.keys() == usage.keys()
    return {_output(FILT, name).strip(): (usage[name], code) for name, code in functions.items()}


def _cases() -> list:
    return [pytest.param(source, target, id=f"{source}-sm_{target}") for source in SOURCES for target in ASKED]


@pytest.mark.parametrize(("source", "target"), _cases())
def test_kernels_stay_in_registers(source, target):
    """No stack frame, no spills, no array in local memory: it would cost half the speed, and no other test tells."""
    for name, (usage, code) in machine_code(source, target).items():
        assert usage["STACK"] == 0 and usage["LOCAL"] == 0, f"{name}: {usage}"
        hit = re.search(r"\b(LDL|STL)\b.*", code)
        assert hit is None, f"{name}: {hit.group(0)}"


@pytest.mark.parametrize(("source", "target"), _cases())
def test_kernels_have_the_instructions_they_are_written_for(source, target):
    rows = [kernel for kernel in KERNELS if kernel.source == source and target in kernel.targets]
    counts = [0] * len(rows)
    for name, (_, code) in machine_code(source, target).items():
        matching = [i for i, kernel in enumerate(rows) if re.search(kernel.name, name)]
        assert len(matching) == 1, f"{name}: {len(matching)} rows of the table are about it, not one"
        counts[matching[0]] += 1
        for opcode in rows[matching[0]].wanted(target):
            assert re.search(rf"\b{opcode}", code), f"{name}: no {opcode}"
    assert all(counts), [kernel.name for kernel, count in zip(rows, counts, strict=True) if not count]
