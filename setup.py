"""Build of bertkern's compiled modules; everything that needs no program is in pyproject.toml.

    bertkern/_C.abi3.so        the operators: torch's stable ABI, no Python; one build for every Python, torch >= 2.10
    bertkern/_C_cuda.abi3.so   the same for NVIDIA GPUs, where nvcc is here and torch has CUDA, or BERTKERN_USE_CUDA=1
    bertkern/_host.*.so        pybind11: processor features, build facts, peak probes; the operators work without it

Every kernel is compiled for the instruction set that its file name states, by the table ISA_FLAGS; everything else is
compiled for the baseline processor, and dispatch at run time keeps processors away from kernels that they lack.

Environment: CXX, CXXFLAGS, MAX_JOBS, DEBUG=1 mean what they mean elsewhere, and so do CUDA_HOME and
TORCH_CUDA_ARCH_LIST ("9.0a 12.0+PTX"; default: all of CUDA_TARGETS that nvcc knows, and PTX for the rest).
BERTKERN_USE_CUDA=1 builds for CUDA beside a CPU-only torch too (the library runs beside any CUDA torch >= 2.10), =0
never. BERTKERN_SANITIZE=address,undefined builds with sanitizers. BERTKERN_VERBOSE=1 prints the compiler's commands.
"""

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import setuptools
from setuptools import find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.extension import Extension

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)  # every path below is relative to the checkout: no machine's paths in objects, so builds can be compared

# One line per instruction set. `-ffp-contract=off` below leaves it to the intrinsics alone where a multiply and an add
# are fused: results then depend neither on the compiler nor on what it inlines.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
ISA_FLAGS = {
    "portable": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512vnni": [*AVX512, "-mavx512vnni"],
    "avx512bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}

COMMON_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]
OPTIMIZED_FLAGS = ["-O3", "-DNDEBUG", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
DEBUG_FLAGS = ["-O0", "-g", "-ffp-contract=off"]
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI as of torch 2.10

# Ampere; Hopper and Blackwell with what only those have; consumer Blackwell. The PTX serves other cards from 8.0 on.
CUDA_TARGETS = ("80", "90a", "100a", "120")
CUDA_PTX = "80"
OLDEST_CUDA = (12, 4)
CUDA_MODULE = "bertkern._C_cuda"

INSTALL = "pip install --no-build-isolation ."
TOOLS = "pip install -U 'setuptools>=77' 'pybind11>=2.12' ninja"

# What torch says while it is imported is not about this build: it needs neither numpy nor a GPU.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: "No CUDA runtime" not in str(record.msg))


def stop(line: str) -> None:
    """End the build with one line that says what to do."""
    raise SystemExit(f"bertkern: {line}")


# Without build isolation nobody else looks: an older one lacks `bdist_wheel`, and that is all it would say.
if int(setuptools.__version__.split(".")[0]) < 77:
    stop(f"expected setuptools 77 or newer. Got {setuptools.__version__}. Run: {TOOLS}, then: {INSTALL}")


def debug() -> bool:
    return os.environ.get("DEBUG", "0") not in ("", "0", "OFF")


class Toolchain:
    """What the build needs from the machine, checked before anything is compiled."""

    def __init__(self) -> None:
        self.torch = self.find_torch()
        self.pybind11_include = self.find_pybind11()
        self.ninja = self.find_ninja()
        self.cxx = shlex.split(os.environ.get("CXX", "c++"))
        self.compiler, self.machine = self.probe_compiler()

    @staticmethod
    def find_torch():
        try:
            import torch.utils.cpp_extension
        except ImportError as error:
            if isinstance(error, ModuleNotFoundError) and error.name == "torch":
                stop(
                    f"this build sees no torch. Run: pip install 'torch>=2.10', then: {INSTALL} "
                    "(without that option pip hides an installed torch from it)"
                )
            stop(f"torch does not import ({error}). Reinstall it, then: {INSTALL}")
        version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
        if version < (2, 10):
            stop(f"expected torch 2.10 or newer. Got {torch.__version__}. Run: pip install -U torch, then: {INSTALL}")
        return torch

    @staticmethod
    def find_pybind11() -> str:
        try:
            import pybind11
        except ImportError:
            stop(f"pybind11 is not installed here. Run: {TOOLS}, then: {INSTALL}")
        return pybind11.get_include()

    @staticmethod
    def find_ninja() -> str:
        # pip puts ninja beside the interpreter, where PATH does not lead unless the environment is activated.
        search = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
        ninja = shutil.which("ninja", path=search)
        if not ninja:
            stop(f"ninja is not installed here. Run: {TOOLS}, then: {INSTALL}")
        os.environ["PATH"] = search  # torch's builder looks for it too
        return ninja

    def probe_compiler(self) -> tuple[str, str]:
        """(name and version of the compiler, machine it compiles for)."""
        if not shutil.which(self.cxx[0]):
            stop(f"no C++ compiler '{self.cxx[0]}' here. Install g++ 11 or newer or clang++ 14 or newer, or set CXX.")
        try:
            ask = [*self.cxx, *shlex.split(os.environ.get("CXXFLAGS", ""))]
            triple = subprocess.check_output([*ask, "-dumpmachine"], text=True, stderr=subprocess.STDOUT).strip()
            name = subprocess.check_output([*ask, "--version"], text=True, stderr=subprocess.STDOUT).splitlines()[0]
        except (OSError, subprocess.CalledProcessError) as error:
            stop(f"the C++ compiler '{self.cxx[0]}' does not run ({error}). Set CXX to g++ or clang++.")
        return name, triple.split("-")[0]


class Cuda:
    """nvcc, and what it is asked to compile for."""

    def __init__(self, cxx: list[str]) -> None:
        self.home, self.nvcc = self.find_nvcc()
        if not self.nvcc:
            stop(
                f"BERTKERN_USE_CUDA=1, but there is no nvcc in {self.home}/bin. Set CUDA_HOME to a CUDA toolkit."
                if self.home
                else "BERTKERN_USE_CUDA=1, but there is no nvcc here. Install the CUDA toolkit, or set CUDA_HOME to it."
            )
        self.version = self.probe(cxx)
        self.targets, self.ptx = self.find_targets()
        folders = [Path(self.home, name) for name in ("lib64", "lib", f"targets/{os.uname().machine}-linux/lib")]
        self.libraries = next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)
        if self.libraries is None:
            stop(f"CUDA's libcudart_static.a is not in {folders[0]}. Install the toolkit's cudart-dev package.")

    @staticmethod
    def wanted(torch) -> bool:
        """Whether to build for CUDA: as BERTKERN_USE_CUDA says, else where nvcc is here and torch has CUDA."""
        asked = os.environ.get("BERTKERN_USE_CUDA", "")
        if asked not in ("", "0", "1"):
            stop(f"expected BERTKERN_USE_CUDA to be 0, 1 or unset. Got '{asked}'.")
        if asked:
            return asked == "1"
        return torch.version.cuda is not None and bool(Cuda.find_nvcc()[1])

    @staticmethod
    def find_nvcc() -> tuple[str | None, str | None]:
        """(toolkit's folder, nvcc in it): CUDA_HOME, else where PATH leads, else the usual place."""
        named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        if named:
            return named, shutil.which("nvcc", path=str(Path(named, "bin")))
        found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        if not found:
            return None, None
        # What is found may be a link or a script that starts the real one, which knows where it is.
        asked = subprocess.run([found, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.*)$", asked.stderr, re.MULTILINE)
        return str((Path(top[1]) if top else Path(found).resolve().parent.parent).resolve()), found

    def probe(self, cxx: list[str]) -> tuple[int, int]:
        """The toolkit's version; stops where nvcc does not run, is too old, or refuses the C++ compiler."""
        try:
            text = subprocess.check_output([self.nvcc, "--version"], text=True, stderr=subprocess.STDOUT)
            major, minor = re.search(r"release (\d+)\.(\d+)", text).groups()
        except (OSError, subprocess.CalledProcessError, AttributeError) as error:
            stop(f"'{self.nvcc}' does not run ({error}). Set CUDA_HOME to a CUDA toolkit, or BERTKERN_USE_CUDA=0.")
        version = int(major), int(minor)
        if version < OLDEST_CUDA:
            stop(
                f"expected CUDA {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]} or newer. Got {major}.{minor} ({self.nvcc}). "
                "Set CUDA_HOME to a newer toolkit, or BERTKERN_USE_CUDA=0."
            )
        self.host = ["-ccbin", next(word for word in reversed(cxx) if not word.startswith("-"))]
        return version

    def find_targets(self) -> tuple[list[str], list[str]]:
        """(architectures to compile for, those whose PTX is kept)."""
        text = subprocess.check_output([self.nvcc, "--list-gpu-arch"], text=True)
        known = {name.removeprefix("compute_") for name in text.split()}
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        if not asked.strip():
            return [name for name in CUDA_TARGETS if name.rstrip("af") in known], [CUDA_PTX]
        targets, ptx = [], []
        for word in asked.replace(";", " ").split():
            parts = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", word)
            if not parts:
                stop(f"expected TORCH_CUDA_ARCH_LIST like '8.0 9.0a+PTX'. Got '{word}' in it.")
            name = parts[1] + parts[2]
            if int(parts[1]) < 8:
                stop(f"expected architectures from 8.0 on in TORCH_CUDA_ARCH_LIST. Got '{word}'.")
            if name.rstrip("af") not in known:
                stop(f"CUDA {self.version[0]}.{self.version[1]} does not know '{word}' of TORCH_CUDA_ARCH_LIST.")
            targets.append(name)
            ptx += [name] if parts[3] else []
        return targets, ptx

    def flags(self) -> list[str]:
        codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in self.targets]
        codes += [f"-gencode=arch=compute_{name},code=compute_{name}" for name in self.ptx]
        kind = ["-O0", "-g"] if debug() else ["-O3", "-DNDEBUG"]
        host = "-Xcompiler=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-Wall"
        return ["-std=c++17", *kind, *self.host, host, *codes]

    def facts(self) -> str:
        """Header with what the library says of itself; bertkern/_cuda.py finds it in the file by its first word."""
        facts = {"cuda": list(self.version), "targets": self.targets, "ptx": self.ptx}
        return f'#pragma once\n\n#define BERTKERN_CUDA_FACTS R"json(bertkern-cuda-facts{json.dumps(facts)})json"\n'


class Library(Extension):
    """A compiled module: sources found by pattern, each with the flags that its file name asks for."""

    def __init__(self, name: str, sources: list[Path], **keywords) -> None:
        super().__init__(name, sorted(map(str, sources)), language="c++", **keywords)


def libraries() -> list[Library]:
    """The operators take all of csrc but the host module and the probes; what tells processors apart is in both.

    The CUDA library is listed wherever it has sources; the build leaves it out where it is not wanted.
    """
    every = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.c*") if path.suffix in (".cpp", ".cu")}
    cuda = {path for path in every if path.is_relative_to("csrc/cuda")}
    every -= cuda
    cuda = {path for path in cuda if not path.is_relative_to("csrc/cuda/emulator")}  # that one is for tests
    probes = {path for path in every if path.is_relative_to("csrc/cpu/probe")} | {Path("csrc/host.cpp")} & every
    isa = {Path("csrc/cpu/isa.cpp")}
    return [
        Library("bertkern._C", [*(every - probes)], py_limited_api=True),
        Library("bertkern._host", [*(probes | isa)]),
        *([Library(CUDA_MODULE, [*cuda], py_limited_api=True)] if cuda else []),
    ]


def isa_of(source: str) -> str:
    return Path(source).stem if Path(source).stem in ISA_FLAGS else "portable"


def escape(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class Graph:
    """One ninja file for all modules: every core has work to the end, and what is up to date is left alone.

    Header dependencies come from the compiler (-MMD); a change of flags, of the compiler or of torch rebuilds too, for
    ninja compares the commands.
    """

    def __init__(self, tools: Toolchain, cuda: Cuda | None = None) -> None:
        self.tools = tools
        self.cuda = cuda
        self.x86 = tools.machine in ("x86_64", "amd64")
        sanitizers = os.environ.get("BERTKERN_SANITIZE", "")
        kind = "-debug" * debug() + (f"-{sanitizers.replace(',', '-')}" if sanitizers else "")
        python = f"cp{sys.version_info.major}{sys.version_info.minor}"
        # The folder is pinned: setuptools' own choice is a fresh temporary one under `pip install -e .`.
        self.folder = Path("build") / f"{tools.machine}-{python}-torch{tools.torch.__version__}{kind}"

        flags = DEBUG_FLAGS if debug() else OPTIMIZED_FLAGS
        link = [] if debug() else ["-Wl,-S"]
        if sanitizers:
            flags = ["-O1", "-g", "-fno-omit-frame-pointer", "-ffp-contract=off", f"-fsanitize={sanitizers}"]
            link = [f"-fsanitize={sanitizers}"]
        self.flags = [*COMMON_FLAGS, *flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        if sys.platform == "darwin":
            self.link = ["-bundle", "-undefined", "dynamic_lookup", *link]
        else:
            self.link = ["-shared", "-Wl,--as-needed", *link]
        self.link += shlex.split(os.environ.get("LDFLAGS", ""))

    def isa_flags(self, source: str) -> list[str]:
        flags = ISA_FLAGS[isa_of(source)] if self.x86 else []
        return [*flags, "-Wno-uninitialized"] if flags else []  # GCC 12 warns about its own intrinsics' headers

    def compiles(self, source: str) -> bool:
        return self.x86 or isa_of(source) == "portable"

    def target(self, library: Library) -> Path:
        return self.folder / f"{library.name.rpartition('.')[2]}.so"

    def module_flags(self, library: Library) -> tuple[list[str], list[str]]:
        """(compiler flags, libraries) of one module."""
        if not library.py_limited_api:
            includes = [f"-I{self.folder}", "-isystem", self.tools.pybind11_include]
            return [*includes, "-isystem", sysconfig.get_path("include")], ["-pthread"]
        from torch.utils.cpp_extension import include_paths, library_paths

        # The headers' __FILE__ ends up in the library: strip this machine's part of it.
        includes = [flag for path in include_paths() for flag in ("-isystem", path, f"-fmacro-prefix-map={path}/=")]
        libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]
        if library.name == CUDA_MODULE:
            # The runtime is inside and not seen outside: torch has one of its own. No libcuda, no torch_cuda: the
            # library also loads where neither is (csrc/cuda/stream.h).
            includes += [f"-I{self.folder}", "-isystem", f"{self.cuda.home}/include"]
            libraries += [f"-L{self.cuda.libraries}", "-lcudart_static", "-Wl,--exclude-libs,ALL"]
            libraries += ["-ldl", "-lrt", "-pthread"]
        return [TORCH_TARGET, *includes], libraries

    def text(self, modules: list[Library]) -> str:
        lines = [
            f"builddir = {escape(str(self.folder))}",
            f"cxx = {shlex.join(self.tools.cxx)}",
            f"flags = {shlex.join([*self.flags, '-Icsrc'])}",
            "rule compile",
            "  command = $cxx $flags $module $isa -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $name $in",
            "rule link",
            f"  command = $cxx $in -o $out {shlex.join(self.link)} $libraries",
            "  description = link $out",
        ]
        if self.cuda:
            lines += [
                f"nvcc = {shlex.join([self.cuda.nvcc, *self.cuda.flags(), '-Icsrc'])}",
                "rule cuda",
                "  command = $nvcc -MD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
                "  description = cuda $in",
            ]
        for library in modules:
            compile_flags, link_libraries = self.module_flags(library)
            folder = self.folder / self.target(library).stem
            objects = []
            for source in filter(self.compiles, library.sources):
                suffix = ".cu.o" if source.endswith(".cu") else ".o"  # gemm.cu and gemm.cpp may stand side by side
                objects.append(escape(str(folder / Path(source).relative_to("csrc").with_suffix(suffix))))
                if source.endswith(".cu"):
                    lines.append(f"build {objects[-1]}: cuda {escape(source)}")
                    continue
                lines += [
                    f"build {objects[-1]}: compile {escape(source)}",
                    f"  module = {shlex.join(compile_flags)}",
                    f"  isa = {shlex.join(self.isa_flags(source))}",
                    f"  name = {isa_of(source)}",
                ]
            lines += [
                f"build {escape(str(self.target(library)))}: link {' '.join(objects)}",
                f"  libraries = {shlex.join(link_libraries)}",
            ]
        return "\n".join(lines) + "\n"

    def facts(self) -> str:
        """Header with the facts that `_host.build_facts()` hands on as JSON."""
        facts = {
            "compiler": self.tools.compiler,
            "machine": self.tools.machine,
            "flags": shlex.join(self.flags),
            "isa_flags": {isa: shlex.join(flags) for isa, flags in ISA_FLAGS.items() if self.x86 or not flags},
            "torch": self.tools.torch.__version__,
            "stable_abi": "2.10",
            "python": sys.version.split()[0],
        }
        return f'#pragma once\n\ninline constexpr const char* kBuildFacts = R"json({json.dumps(facts)})json";\n'

    def run(self, modules: list[Library]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        headers = {"build_facts.h": self.facts()} | ({"cuda_facts.h": self.cuda.facts()} if self.cuda else {})
        for name, text in headers.items():
            header = self.folder / name
            if not header.exists() or header.read_text() != text:
                header.write_text(text)
        (self.folder / "build.ninja").write_text(self.text(modules))
        command = [self.tools.ninja, "-f", str(self.folder / "build.ninja")]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if os.environ.get("BERTKERN_VERBOSE", "0") not in ("", "0"):
            command.append("-v")
        if subprocess.run(command).returncode:
            stop("the compiler reported errors, see above.")


def build_command() -> type[build_ext]:
    """torch's extension builder with the compiling done by Graph; without torch, a command that says what to do.

    Only building needs torch: a source archive or the metadata can be made without it.
    """
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError:
        BuildExtension = build_ext

    class Build(BuildExtension):
        def run(self) -> None:
            self.tools = Toolchain()
            self.cuda = Cuda(self.tools.cxx) if Cuda.wanted(self.tools.torch) else None
            if not self.cuda:
                self.extensions = [library for library in self.extensions if library.name != CUDA_MODULE]
            super().run()

        def build_extensions(self) -> None:
            graph = Graph(self.tools, self.cuda)
            graph.run(self.extensions)
            for library in self.extensions:
                path = Path(self.get_ext_fullpath(library.name))
                path.parent.mkdir(parents=True, exist_ok=True)
                # A running process may have the old library mapped: replace the file, never write into it.
                shutil.copyfile(graph.target(library), path.with_suffix(".new"))
                os.replace(path.with_suffix(".new"), path)

    return Build


class CompilerFirst(build):
    """What is missing is said before a hundred lines about copied files, which pip would print with it."""

    sub_commands = sorted(build.sub_commands, key=lambda command: command[0] != "build_ext")


packages = find_packages(include=["bertkern", "bertkern.*"])
# Folders of their own in the checkout; inside the package where it is installed, so that they collide with nobody's.
packages += ["bertkern.benchmarks", "bertkern.benchmarks.engines", "bertkern.benchmarks.gpu"]
package_dir = {"bertkern.benchmarks": "benchmarks"}
if (ROOT / "kernels" / "__init__.py").exists():
    packages.append("bertkern.kernels")
    package_dir["bertkern.kernels"] = "kernels"

setup(
    packages=packages,
    package_dir=package_dir,
    ext_modules=libraries(),
    include_package_data=False,  # else results of the benchmarks and more: all that git holds
    cmdclass={"build": CompilerFirst, "build_ext": build_command()},
    # One wheel for every Python, for the operators' sake (free-threaded Python has none such); doctor says where _host
    # does not fit.
    options={} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
