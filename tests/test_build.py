"""The compiled files, the build's own behaviour, and the one line that is said where something is missing."""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bertkern import _lib

ROOT = Path(__file__).resolve().parent.parent
LEVELS = ["portable", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"]
VECTORS = LEVELS[1:-1]
LIBRARY = _lib.LIBRARY
X86 = platform.machine().lower() in ("x86_64", "amd64")
needs_x86 = pytest.mark.skipif(not X86, reason="needs x86-64")


def needs_tool(name: str):
    return pytest.mark.skipif(not shutil.which(name), reason=f"needs {name}")


def output(*command: object) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


# --- what was compiled ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def objects() -> list[Path]:
    """Object files of the build that this Python uses."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = [
        path
        for folder in (ROOT / "build").glob(f"*-{python}-torch{torch.__version__}")
        for path in folder.rglob("*.o")
        if (ROOT / "csrc" / path.relative_to(folder / path.relative_to(folder).parts[0])).with_suffix(".cpp").exists()
    ]
    if not found:
        pytest.skip("bertkern was not built in this checkout")
    return found


def level_of(path: Path) -> str:
    return path.stem if path.stem in LEVELS else "portable"


@needs_x86
@needs_tool("objdump")
def test_baseline_objects_run_anywhere(objects):
    """Whatever is not a kernel of some ISA must not contain an instruction that an old processor lacks."""
    baseline = [path for path in objects if level_of(path) == "portable"]
    assert baseline
    wide = re.compile(r"^\s*[0-9a-f]+:\s+(v(?!err|erw|mcall)[a-z0-9]+\b.*|.*%[yz]mm.*)$", re.MULTILINE)
    for path in baseline:
        hit = wide.search(output("objdump", "-d", "--no-show-raw-insn", path))
        assert hit is None, f"{path.relative_to(ROOT)}: {hit.group(1)}"


@needs_x86
@needs_tool("nm")
def test_levels_share_no_code(objects):
    """Of a function that several objects define (inline, template), the linker keeps any one copy: it must not be able
    to pick the copy that was compiled for a better processor."""
    owners: dict[str, dict[str, Path]] = {}
    for path in objects:
        for line in output("nm", "--defined-only", path).splitlines():
            _, kind, symbol = line.split(maxsplit=2)
            if kind == "W" and symbol != "__clang_call_terminate":
                owners.setdefault(symbol, {})[level_of(path)] = path
    shared = {
        output("c++filt", symbol).strip(): [str(path.relative_to(ROOT)) for path in paths.values()]
        for symbol, paths in owners.items()
        if len(paths) > 1
    }
    assert not shared, f"put these into an anonymous namespace, or keep them out of the ISA files: {shared}"


DOTS = re.compile(r"^(vpdpbusd|vdpbf16ps|vfmadd\d+ps|vpmaddwd)\b")
# Kernels of csrc/cpu/gemm by name, dot and numbers: rows, or R and V; of csrc/cpu/attention by rows and vectors.
KERNELS = re.compile(
    r"::(tile|sparse_tile|tokens|token_panel|score_tile|value_tile)<[^<>]*::((?:Dot|Score|Value)_\w+)((?:, \d+)+)>\("
)


def kernel_loops(path: Path):
    """Yields (kernel, dot, sizes, instructions) of every innermost loop with dot products."""
    for text in output("objdump", "-d", "-C", "--no-show-raw-insn", path).split("\n\n"):
        name = KERNELS.search(text.partition("\n")[0])
        if not name:
            continue
        code = [(int(at, 16), what.strip()) for at, what in re.findall(r"^\s*([0-9a-f]+):\s+(.*)$", text, re.MULTILINE)]
        jumps = [(re.match(r"j\w+\s+([0-9a-f]+)\b", what), at) for at, what in code]
        spans = [(int(jump[1], 16), at) for jump, at in jumps if jump and int(jump[1], 16) <= at]
        framed = any(re.match(r"mov\s+%rsp,%rbp", what) for _, what in code)
        for first, last in spans:
            if any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans):
                continue
            body = [what for at, what in code if first <= at <= last]
            if any(what.startswith("ret") for what in body):
                continue  # a way back from what stands behind the function's end
            if any(DOTS.match(what) for what in body):
                sizes = tuple(map(int, name[3].split(",")[1:]))
                # Without a frame %rbp is a register like others.
                yield name[1], name[2], sizes, [what.replace("(%rbp", "(%rsp") if framed else what for what in body]


@needs_x86
@needs_tool("objdump")
@pytest.mark.parametrize("level", VECTORS)
def test_no_product_goes_through_the_stack(level, objects):
    """Accumulators stay in registers from the first to the last step of K, in every tile, dense and sparse: a compiler
    that spills one of them halves the speed, and no other test would tell."""
    (path,) = [path for path in objects if level_of(path) == level and path.parent.name == "gemm"]
    loops = list(kernel_loops(path))
    for kernel, dot, sizes, body in loops:
        traffic = [what for what in body if "(%rsp" in what]
        assert not traffic, f"{level} {kernel}<{dot}, {sizes}>: {traffic}"
    # All kernels were found: of 14 rows dense and sparse (both halves, then either, also by two), of tokens R x V
    # (one feature: four entries at a time, then one).
    counts: dict[tuple, list[int]] = {}
    for kernel, dot, sizes, body in loops:
        counts.setdefault((kernel, dot, sizes), []).append(sum(bool(DOTS.match(what)) for what in body))
    if level in ("avx512vnni", "avx512bf16"):
        assert counts["tile", "Dot_vnni", (14,)] == [28]
        assert sorted(counts["sparse_tile", "Dot_vnni", (14,)]) == [14, 14, 28, 28, 28]
        assert sorted(counts["token_panel", "Dot_vnni", (1, 8)]) == [8, 32]
        assert counts["token_panel", "Dot_vnni", (2, 8)] == counts["token_panel", "Dot_vnni", (4, 4)] == [16]
    assert {kernel for kernel, *_ in counts} == {"tile", "sparse_tile", "tokens", "token_panel"}


@needs_x86
@needs_tool("objdump")
def test_matrix_units_are_used(objects):
    def tiles(operation, product):
        (path,) = [path for path in objects if level_of(path) == "amx" and path.parent.name == operation]
        return re.findall(rf"{product}\s+(\S+)", output("objdump", "-d", "--no-show-raw-insn", path))

    every = {f"%tmm{b},%tmm{a},%tmm{c}" for a, b, c in ((4, 6, 0), (4, 7, 1), (5, 6, 2), (5, 7, 3))}
    for product in ("tdpbusd", "tdpbf16ps"):
        # With two tiles of rows, with one, and each once more for the last dwords of K.
        found = tiles("gemm", product)
        assert set(found) == every and len(found) >= 12
    lists = tiles("gemm", "tdpbsud")
    assert set(lists) == every and len(lists) >= 6
    for product in ("tdpbf16ps", "tdpbssd"):
        assert set(tiles("attention", product)) == every


@needs_x86
@needs_tool("objdump")
@pytest.mark.parametrize("level", VECTORS)
def test_no_product_of_attention_goes_through_the_stack(level, objects):
    (path,) = [path for path in objects if level_of(path) == level and path.parent.name == "attention"]
    loops = list(kernel_loops(path))
    for kernel, dot, sizes, body in loops:
        traffic = [what for what in body if "(%rsp" in what]
        assert not traffic, f"{level} {kernel}<{dot}, {sizes}>: {traffic}"
    most = 6 if level == "avx2" else 14
    largest = {
        (kernel, dot): sum(bool(DOTS.match(what)) for what in body)
        for kernel, dot, sizes, body in loops
        if sizes == (most, 2)
    }
    values = "Value_bf16" if level == "avx512bf16" else "Value_f32"
    scores = {"avx512vnni": {"Score_s8"}, "avx512bf16": {"Score_s8", "Score_bf16"}}.get(level, {"Score_f32"})
    assert largest == {("value_tile", values): 2 * most, **{("score_tile", score): 2 * most for score in scores}}


@pytest.mark.skipif(sys.platform != "linux", reason="needs ELF")
@needs_tool("readelf")
def test_operators_tie_to_no_python():
    needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", LIBRARY))
    assert not [name for name in needed if re.match(r"libpython|libtorch_python|libc10", name)], needed


@pytest.mark.skipif(sys.platform != "linux", reason="needs ELF")
@needs_tool("nm")
def test_operators_use_the_stable_abi_only():
    undefined = [line.split()[-1] for line in output("nm", "-D", "--undefined-only", LIBRARY).splitlines()]
    system = re.compile(r".*@(GLIBC|GLIBCXX|CXXABI|GCC|OMP|LIBGCC)_?[0-9.]*|__gmon_start__|_ITM_.*|__cxa_finalize")
    stable = re.compile(r"(aoti_torch|torch)_[a-z0-9_]+")
    assert not [name for name in undefined if not system.fullmatch(name) and not stable.fullmatch(name)]


def test_operators_name_no_folder_of_this_machine():
    data = LIBRARY.read_bytes()
    for folder in (ROOT, Path(torch.__file__).parent, Path.home()):
        assert str(folder).encode() not in data


# --- the build itself ----------------------------------------------------------------------------------------------

BINDINGS = """
#include <torch/csrc/stable/library.h>
#include "cpu/isa.h"
STABLE_TORCH_LIBRARY(tiny, m) { m.def("isa() -> int"); }
static int64_t isa() { return static_cast<int64_t>(bertkern::cpu::active_isa()); }
STABLE_TORCH_LIBRARY_IMPL(tiny, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }
"""
HOST = """
#include <pybind11/pybind11.h>
#include "build_facts.h"
PYBIND11_MODULE(_host, m) { m.attr("facts") = kBuildFacts; }
"""
ALONE = (
    "#include <immintrin.h>\nnamespace alone { int one() { return _mm256_extract_epi32(_mm256_set1_epi32(1), 0); } }\n"
)


@pytest.fixture
def project(tmp_path) -> Path:
    """bertkern's build with next to nothing to compile."""
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name, text in {
        "README.md": "",
        "bertkern/__init__.py": '__version__ = "0"\n',
        "csrc/bindings.cpp": BINDINGS,
        "csrc/host.cpp": HOST,
        "csrc/cpu/alone/avx2.cpp": ALONE if X86 else "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for name in ("isa.h", "isa.cpp"):
        shutil.copy(ROOT / "csrc" / "cpu" / name, tmp_path / "csrc" / "cpu")
    return tmp_path


def build(run_python, project: Path, **variables) -> tuple[set[str], str]:
    """(sources that were compiled, all that was printed)"""
    done = run_python(["setup.py", "-q", "build_ext", "--inplace"], path=[], cwd=project, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"^\[\d+/\d+\] \w+ csrc/(\S+\.cpp)$", done.stdout, re.MULTILINE)), done.stdout


def test_second_build_compiles_what_changed(project, run_python):
    plain = {"BERTKERN_SANITIZE": None, "DEBUG": None, "CXXFLAGS": None, "MAX_JOBS": "2"}
    everything = {"bindings.cpp", "host.cpp", "cpu/isa.cpp"} | ({"cpu/alone/avx2.cpp"} if X86 else set())
    assert build(run_python, project, **plain)[0] == everything

    compiled, printed = build(run_python, project, **plain)
    assert not compiled and "no work to do" in printed

    with open(project / "csrc/cpu/isa.h", "a") as header:
        header.write("// changed\n")
    assert build(run_python, project, **plain)[0] == {"bindings.cpp", "cpu/isa.cpp"}

    ask = "import torch; torch.ops.load_library('bertkern/_C.abi3.so'); print(torch.ops.tiny.isa())"
    done = run_python(ask, path=[], cwd=project, BERTKERN_CPU_ISA="portable")
    assert done.stdout.strip() == "0", done.stderr
    done = run_python("from bertkern import _host; print(_host.facts)", path=[], cwd=project)
    assert f'"torch": "{torch.__version__}"' in done.stdout, done.stderr


def failed_build(run_python, project: Path, *arguments: str, path: list[Path] | None = None, **variables) -> str:
    """The line that a build which cannot work prints last, after which nothing is left behind."""
    command = [*arguments] or ["setup.py", "-q", "build_ext", "--inplace"]
    done = run_python(command, path=path or [], cwd=project, **variables)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not (project / "build").exists()
    return done.stderr.strip().splitlines()[-1]


def stub(folder: Path, package: str, text: str) -> Path:
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(text)
    return folder


ABSENT = "raise ModuleNotFoundError(\"No module named '{0}'\", name='{0}')"


def test_build_without_torch(project, run_python, tmp_path):
    path = [stub(tmp_path / "stubs", "torch", ABSENT.format("torch"))]
    line = failed_build(run_python, project, path=path)
    assert line == (
        "bertkern: this build sees no torch. Run: pip install 'torch>=2.10', then: pip install --no-build-isolation . "
        "(without that option pip hides an installed torch from it)"
    )
    done = run_python(["setup.py", "-q", "--version"], path=path, cwd=project)  # metadata needs no torch
    assert done.returncode == 0 and done.stdout.strip() == "0", done.stderr


def test_build_with_old_torch(project, run_python, tmp_path):
    stubs = stub(tmp_path / "stubs", "torch", "__version__ = '2.9.1+cpu'")
    stub(stubs, "torch/utils", "")
    (stubs / "torch/utils/cpp_extension.py").touch()
    assert failed_build(run_python, project, path=[stubs]).startswith(
        "bertkern: expected torch 2.10 or newer. Got 2.9.1+cpu. Run: pip install -U torch"
    )


def test_build_without_pybind11(project, run_python, tmp_path):
    path = [stub(tmp_path / "stubs", "pybind11", ABSENT.format("pybind11"))]
    assert failed_build(run_python, project, path=path).startswith("bertkern: pybind11 is not installed here. Run:")


def test_build_without_ninja(project, run_python):
    hide = (
        "import runpy, shutil, sys; which = shutil.which; sys.argv = ['setup.py', '-q', 'build_ext', '--inplace']\n"
        "shutil.which = lambda name, **keywords: None if name == 'ninja' else which(name, **keywords)\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    line = failed_build(run_python, project, "-c", hide)
    assert line.startswith("bertkern: ninja is not installed here. Run: pip install -U 'setuptools>=77' ")


def test_build_with_old_setuptools(project, run_python):
    old = (
        "import runpy, setuptools, sys; setuptools.__version__ = '65.5.0'; sys.argv = ['setup.py', '--version']\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    line = failed_build(run_python, project, "-c", old)
    assert line.startswith(
        "bertkern: expected setuptools 77 or newer. Got 65.5.0. Run: pip install -U 'setuptools>=77'"
    )


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_build_without_compiler(compiler, project, run_python):
    line = failed_build(run_python, project, CXX=compiler)
    assert line.startswith("bertkern: ") and compiler in line and "CXX" in line


def test_compiler_errors_end_in_one_line(project, run_python):
    (project / "csrc/bindings.cpp").write_text("int main() { return mistake; }\n")
    done = run_python(["setup.py", "-q", "build_ext", "--inplace"], path=[], cwd=project)
    assert done.returncode == 1
    assert "mistake" in done.stdout  # what the compiler says
    assert done.stderr.strip().splitlines()[-1] == "bertkern: the compiler reported errors, see above."
    assert "Traceback" not in done.stderr


# --- loading -------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A bertkern without its library."""
    folder = stub(tmp_path / "checkout", "bertkern", "")
    for name in ("_lib.py", "_cuda.py"):
        shutil.copy(ROOT / "bertkern" / name, folder / "bertkern")
    return folder


def import_error(run_python, checkout: Path, *before: Path, **variables) -> str:
    variables.setdefault("BERTKERN_LIBRARY", None)
    done = run_python("from bertkern import _lib", path=[*before, checkout], cwd=checkout, **variables)
    assert done.returncode == 1
    kind, _, line = done.stderr.strip().splitlines()[-1].partition(": ")
    assert kind == "ImportError"
    return line


def test_import_from_unbuilt_checkout(checkout, run_python):
    (checkout / "setup.py").touch()
    build = "pip install --no-build-isolation -e ."
    assert import_error(run_python, checkout) == f"bertkern's operators are not built. Run in {checkout}: {build}"


def test_import_of_broken_installation(checkout, run_python):
    line = import_error(run_python, checkout)
    assert line.startswith(f"{checkout / 'bertkern'} lacks _C.abi3.so. Reinstall")


def test_import_where_the_checkout_hides_an_installed_wheel(checkout, run_python, tmp_path):
    site = stub(tmp_path / "site", "bertkern", "")
    (site / "bertkern/_C.abi3.so").touch()
    (site / "bertkern-0.dist-info").mkdir()
    (site / "bertkern-0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: bertkern\nVersion: 0\n")
    done = run_python("from bertkern import _lib", path=[checkout, site], cwd=checkout, BERTKERN_LIBRARY=None)
    assert f"has no compiled operators and hides the installed {site / 'bertkern'}." in done.stderr


def test_import_without_torch(checkout, run_python, tmp_path):
    stubs = stub(tmp_path / "stubs", "torch", ABSENT.format("torch"))
    line = import_error(run_python, checkout, stubs)
    assert line == "bertkern needs torch 2.10 or newer. Run: pip install 'torch>=2.10'"


def test_import_with_old_torch(checkout, run_python, tmp_path):
    stubs = stub(tmp_path / "stubs", "torch", "__version__ = '2.9.1+cpu'")
    line = import_error(run_python, checkout, stubs)
    assert line == "bertkern needs torch 2.10 or newer. Got 2.9.1+cpu. Run: pip install -U torch"


def test_import_of_a_library_for_another_platform(checkout, run_python):
    (checkout / "bertkern/_C.abi3.so").write_bytes(b"MZ")
    line = import_error(run_python, checkout)
    assert "does not load here" in line and "built for another platform or torch" in line


def test_named_library(checkout, run_python):
    assert import_error(run_python, checkout, BERTKERN_LIBRARY="/nowhere.so") == (
        "BERTKERN_LIBRARY: there is no file /nowhere.so."
    )
    done = run_python("from bertkern import _lib", path=[checkout], cwd=checkout, BERTKERN_LIBRARY=str(LIBRARY))
    assert done.returncode == 0, done.stderr
