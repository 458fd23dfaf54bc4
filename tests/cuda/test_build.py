"""The CUDA library: how it is built, what it needs, and what is said where it cannot run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bertkern import _cuda
from tests.conftest import ROOT

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None or sys.platform != "linux", reason="needs nvcc")


def output(*command: object) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


# --- a library of one kernel -----------------------------------------------------------------------------------------

KERNEL = """
#include "cuda/negate.h"
#include "cuda/ptx.h"
namespace bertkern::cuda {
BK_KERNEL(128, 1) void negate(float* x, int n) {
  const int i = block_x() * block_threads() + thread_x();
  if (i < n) x[i] = -x[i];
}
cudaError_t launch_negate(float* x, int n, cudaStream_t stream) {
  return BK_LAUNCH(negate, dim3((n + 127) / 128), dim3(128), 0, stream, x, n);
}
}  // namespace bertkern::cuda
"""
HEADER = """
#pragma once
#include <cuda_runtime_api.h>
namespace bertkern::cuda { cudaError_t launch_negate(float* x, int n, cudaStream_t stream); }
"""
BINDINGS = """
#include <torch/csrc/stable/library.h>
#include "cuda/check.h"
#include "cuda/negate.h"
using namespace bertkern::ops;
static Tensor negate(const Tensor& x) {
  const Tensor in = expect_cuda("negate", "x", x, ScalarType::Float, x);
  const OnDevice device(in);
  float* data = static_cast<float*>(in.mutable_data_ptr());
  check_launch("negate", bertkern::cuda::launch_negate(data, static_cast<int>(in.numel()), device.stream()));
  return in;
}
STABLE_TORCH_LIBRARY_FRAGMENT(tiny_cuda, m) { m.def("negate(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(tiny_cuda, CUDA, m) { m.impl("negate", TORCH_BOX(&negate)); }
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """bertkern's build with next to nothing to compile."""
    folder = tmp_path_factory.mktemp("project")
    copied = (
        "setup.py",
        "pyproject.toml",
        "csrc/edge.h",
        *(f"csrc/cuda/{n}" for n in ("check.h", "check.cpp", "ptx.h", "types.h")),
        *(f"csrc/cpu/{n}" for n in ("isa.h", "isa.cpp")),
    )
    for name in copied:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name, text in {
        "README.md": "",
        "bertkern/__init__.py": '__version__ = "0"\n',
        "csrc/bindings.cpp": "",
        "csrc/host.cpp": "#include <pybind11/pybind11.h>\nPYBIND11_MODULE(_host, m) {}\n",
        "csrc/cuda/bindings.cpp": BINDINGS,
        "csrc/cuda/negate.h": HEADER,
        "csrc/cuda/negate.cu": KERNEL,
        "csrc/cuda/emulator/emulator.cpp": "#error This is for tests\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def build(run_python, folder: Path, **variables) -> set[str]:
    """Sources that were compiled."""
    command = ["setup.py", "-q", "build_ext", "--inplace"]
    done = run_python(command, path=[], cwd=folder, MAX_JOBS="2", CXXFLAGS="-O0", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"^\[\d+/\d+\] \w+ csrc/(\S+\.\w+)$", done.stdout, re.MULTILINE))


@needs_nvcc
def test_library_is_built_beside_a_torch_without_cuda_and_loads_there(project, run_python):
    if torch.version.cuda is None:
        assert not {name for name in build(run_python, project, BERTKERN_USE_CUDA=None) if name.startswith("cuda/")}
    forced = {"BERTKERN_USE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0a 8.0+PTX"}
    made = build(run_python, project, **forced)
    assert {name for name in made if "cuda" in name} == {"cuda/bindings.cpp", "cuda/check.cpp", "cuda/negate.cu"}
    library = project / "bertkern/_C_cuda.abi3.so"

    ask = (
        f"import torch; torch.ops.load_library({str(library)!r})\n"
        "print(torch._C._dispatch_has_kernel_for_dispatch_key('tiny_cuda::negate', 'CUDA'))\n"
        "try: torch.ops.tiny_cuda.negate(torch.ones(1))\n"
        "except NotImplementedError: print('not on the CPU')"
    )
    done = run_python(ask, path=[], cwd=project)
    assert done.stdout.split("\n")[:2] == ["True", "not on the CPU"], done.stderr

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BERTKERN_CUDA_LIBRARY", str(library))
        facts = _cuda.build_facts()
    assert facts["targets"] == ["90a", "80"] and facts["ptx"] == ["80"] and facts["cuda"] >= [12, 4]

    # It needs the stable ABI and the system, no Python and no CUDA library; and torch's CUDA runtime does not see its.
    needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", library))
    assert not [name for name in needed if re.match(r"libpython|libtorch_python|libc10|libcuda|libtorch_cuda", name)]
    undefined = [line.split()[-1] for line in output("nm", "-D", "--undefined-only", library).splitlines()]
    system = re.compile(r".*@(GLIBC|GLIBCXX|CXXABI|GCC|LIBGCC)_?[0-9.]*|__gmon_start__|_ITM_.*|__cxa_finalize")
    assert not [n for n in undefined if not system.fullmatch(n) and not re.fullmatch(r"(aoti_torch|torch)_\w+", n)]
    defined = [line.split()[-1] for line in output("nm", "-D", "--defined-only", library).splitlines()]
    assert not [name for name in defined if name.startswith("cuda")], defined
    for place in (project, Path(torch.__file__).parent):
        assert str(place).encode() not in library.read_bytes()

    # A second build compiles what changed, and other architectures are another build of the kernels alone.
    assert not build(run_python, project, **forced)
    with open(project / "csrc/cuda/negate.h", "a") as header:
        header.write("// changed\n")
    assert build(run_python, project, **forced) == {"cuda/bindings.cpp", "cuda/negate.cu"}


# --- what the build says ---------------------------------------------------------------------------------------------

TOOLKIT = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {version}, V{version}.1" ;;
--list-gpu-arch) printf 'compute_80\\ncompute_89\\ncompute_90\\n' ;;
esac
"""
ASK = """
import json, os, runpy, sys
sys.argv = ["setup.py", "--version"]
Cuda = runpy.run_path("setup.py", run_name="__main__")["Cuda"]
for variables in json.loads(os.environ["CASES"]):
    os.environ.update(variables)
    try:
        torch = type("torch", (), {"version": type("version", (), {"cuda": variables.get("torch")})})
        if not Cuda.wanted(torch):
            print("not wanted")
            continue
        cuda = Cuda(["ccache", "g++", "-m64"])
        print(json.dumps([cuda.version, cuda.targets, cuda.ptx, cuda.host]))
    except SystemExit as end:
        print(end)
"""


def test_what_the_build_makes_of_the_machine(run_python, tmp_path):
    """nvcc's version and architectures, and the one line where something does not fit."""
    for version in ("12.8", "11.8"):
        home = tmp_path / version
        (home / "bin").mkdir(parents=True)
        (home / "bin/nvcc").write_text(TOOLKIT.format(version=version))
        (home / "bin/nvcc").chmod(0o755)
        (home / "lib64").mkdir()
        (home / "lib64/libcudart_static.a").touch()
    (tmp_path / "no-runtime").mkdir()
    shutil.copytree(tmp_path / "12.8/bin", tmp_path / "no-runtime/bin")
    new, nowhere = str(tmp_path / "12.8"), str(tmp_path / "nowhere")
    plain = {"BERTKERN_USE_CUDA": "1", "CUDA_HOME": new, "TORCH_CUDA_ARCH_LIST": ""}
    host = ["-ccbin", "g++"]
    lists = {
        "8.0;8.9 9.0a+PTX": [[12, 8], ["80", "89", "90a"], ["90a"], host],
        "Ampere": "bertkern: expected TORCH_CUDA_ARCH_LIST like '8.0 9.0a+PTX'. Got 'Ampere' in it.",
        "7.5": "bertkern: expected architectures from 8.0 on in TORCH_CUDA_ARCH_LIST. Got '7.5'.",
        "12.0": "bertkern: CUDA 12.8 does not know '12.0' of TORCH_CUDA_ARCH_LIST.",
    }
    cases = [
        (plain, [[12, 8], ["80", "90a"], ["80"], host]),  # those of the default that this nvcc knows
        *(({**plain, "TORCH_CUDA_ARCH_LIST": asked}, wanted) for asked, wanted in lists.items()),
        ({**plain, "BERTKERN_USE_CUDA": "0"}, "not wanted"),
        ({**plain, "BERTKERN_USE_CUDA": ""}, "not wanted"),
        ({**plain, "BERTKERN_USE_CUDA": "", "torch": "13.0"}, [[12, 8], ["80", "90a"], ["80"], host]),
        ({**plain, "BERTKERN_USE_CUDA": "", "torch": "13.0", "CUDA_HOME": nowhere}, "not wanted"),
        (
            {**plain, "BERTKERN_USE_CUDA": "maybe"},
            "bertkern: expected BERTKERN_USE_CUDA to be 0, 1 or unset. Got 'maybe'.",
        ),
        (
            {**plain, "CUDA_HOME": nowhere},
            f"bertkern: BERTKERN_USE_CUDA=1, but there is no nvcc in {nowhere}/bin. Set CUDA_HOME to a CUDA toolkit.",
        ),
        (
            {**plain, "CUDA_HOME": str(tmp_path / "11.8")},
            f"bertkern: expected CUDA 12.4 or newer. Got 11.8 ({tmp_path}/11.8/bin/nvcc). "
            "Set CUDA_HOME to a newer toolkit, or BERTKERN_USE_CUDA=0.",
        ),
        (
            {**plain, "CUDA_HOME": str(tmp_path / "no-runtime")},
            f"bertkern: CUDA's libcudart_static.a is not in {tmp_path}/no-runtime/lib64. "
            "Install the toolkit's cudart-dev package.",
        ),
    ]
    done = run_python(ASK, path=[], CASES=json.dumps([variables for variables, _ in cases]))
    lines = [line for line in done.stdout.splitlines() if not re.fullmatch(r"\d+\.\d+\.\d+", line)]
    assert lines == [wanted if isinstance(wanted, str) else json.dumps(wanted) for _, wanted in cases], done.stderr


# --- loading ---------------------------------------------------------------------------------------------------------

FACTS = {"cuda": [13, 0], "targets": ["80", "90a", "120"], "ptx": ["80"]}


@pytest.fixture
def library(tmp_path, monkeypatch) -> Path:
    """A file with the facts of a build, and a process in which nothing was loaded yet."""
    path = tmp_path / "_C_cuda.abi3.so"
    path.write_bytes(b"\x7fELF...\0bertkern-cuda-facts" + json.dumps(FACTS).encode() + b"\0...")
    monkeypatch.setenv("BERTKERN_CUDA_LIBRARY", str(path))
    monkeypatch.setattr(_cuda, "reason", None)
    _cuda.missing.cache_clear()
    yield path
    _cuda.missing.cache_clear()


def loaded(driver: tuple[int, int] | None, cuda: str | None = "13.0") -> tuple[str | None, list[str], list[Path]]:
    """(reason, warnings, libraries that were loaded) of `load` with such a driver and such a torch."""
    libraries: list[Path] = []
    torch = SimpleNamespace(version=SimpleNamespace(cuda=cuda), ops=SimpleNamespace(load_library=libraries.append))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        patch.setattr(_cuda, "driver_version", lambda: driver)
        patch.setattr(_cuda, "reason", None)
        _cuda.load(torch)
        return _cuda.reason, [str(warning.message) for warning in said], libraries


def test_library_is_loaded_where_it_can_run(library):
    assert _cuda.build_facts() == FACTS
    assert loaded((13, 0)) == loaded((14, 1)) == (None, [], [library])
    assert loaded((13, 0), cuda=None) == ("this torch has no CUDA", [], [])
    assert loaded(None) == ("there is no NVIDIA driver", [], [])


def test_driver_older_than_the_build(library):
    reason, said, libraries = loaded((12, 8))
    assert reason.startswith("the NVIDIA driver serves CUDA 12.8, this build needs 13.0. Update the driver")
    assert said == [f"bertkern: its CUDA operators are not used: {reason}."] and not libraries


def test_no_library_or_another(library):
    library.write_bytes(b"")
    reason, said, libraries = loaded((13, 0))
    assert reason == f"{library} is not bertkern's CUDA library. Build it from the sources"
    assert len(said) == 1 and not libraries
    library.unlink()
    reason, said, libraries = loaded((13, 0))
    assert _cuda.build_facts() is None and reason.startswith("not built: ") and not said and not libraries


@pytest.mark.parametrize(
    ("targets", "ptx", "fits", "lacks"),
    [
        (["80"], [], [(8, 0), (8, 9)], [(9, 0), (7, 5)]),
        (["90a"], [], [(9, 0)], [(8, 0), (10, 0)]),
        (["100a", "120"], [], [(10, 0), (12, 0), (12, 1)], [(10, 3), (9, 0)]),
        (["90a"], ["80"], [(8, 0), (8, 6), (10, 3), (12, 0)], [(7, 5)]),
        ([], ["90a"], [(9, 0)], [(10, 0)]),
    ],
)
def test_which_cards_a_build_runs_on(targets, ptx, fits, lacks):
    facts = {"targets": targets, "ptx": ptx}
    assert all(_cuda.runs_on(facts, card) for card in fits)
    assert not any(_cuda.runs_on(facts, card) for card in lacks)


def test_a_missing_architecture_is_said_once(library):
    assert _cuda.missing((9, 0)) is None
    with pytest.warns(UserWarning, match=r"no code for compute capability 7\.5 \(80, 90a, 120 and PTX of 80\)"):
        said = _cuda.missing((7, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _cuda.missing((7, 5)) == said
    assert said.endswith('Build with TORCH_CUDA_ARCH_LIST="7.5"')
