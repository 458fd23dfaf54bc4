"""Build of bertkern's two compiled modules; everything that needs no program is in pyproject.toml.

    bertkern/_C.abi3.so   the operators: torch's stable ABI, no Python; one build serves every Python and torch >= 2.10
    bertkern/_host.*.so   pybind11: processor features, build facts, peak probes; the operators work without it

Every kernel is compiled for the instruction set that its file name states, by the table ISA_FLAGS; everything else is
compiled for the baseline processor, and dispatch at run time keeps processors away from kernels that they lack.

Environment: CXX, CXXFLAGS, MAX_JOBS, DEBUG=1 mean what they mean elsewhere. BERTKERN_SANITIZE=address,undefined builds
with sanitizers. BERTKERN_VERBOSE=1 prints the compiler's commands.
"""

import json
import logging
import os
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
}

COMMON_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]
OPTIMIZED_FLAGS = ["-O3", "-DNDEBUG", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
DEBUG_FLAGS = ["-O0", "-g", "-ffp-contract=off"]
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI as of torch 2.10

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


class Library(Extension):
    """A compiled module: sources found by pattern, each with the flags that its file name asks for."""

    def __init__(self, name: str, sources: list[Path], **keywords) -> None:
        super().__init__(name, sorted(map(str, sources)), language="c++", **keywords)


def libraries() -> list[Library]:
    """The operators take all of csrc but the host module and the probes; what tells processors apart is in both."""
    every = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.cpp")}
    probes = {path for path in every if path.is_relative_to("csrc/cpu/probe")} | {Path("csrc/host.cpp")} & every
    isa = {Path("csrc/cpu/isa.cpp")}
    return [
        Library("bertkern._C", [*(every - probes)], py_limited_api=True),
        Library("bertkern._host", [*(probes | isa)]),
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

    def __init__(self, tools: Toolchain) -> None:
        self.tools = tools
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
        return [TORCH_TARGET, *includes], [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]

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
        for library in modules:
            compile_flags, link_libraries = self.module_flags(library)
            folder = self.folder / self.target(library).stem
            objects = []
            for source in filter(self.compiles, library.sources):
                objects.append(escape(str(folder / Path(source).relative_to("csrc").with_suffix(".o"))))
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
        header = self.folder / "build_facts.h"
        if not header.exists() or header.read_text() != self.facts():
            header.write_text(self.facts())
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
            super().run()

        def build_extensions(self) -> None:
            graph = Graph(self.tools)
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
packages += ["bertkern.benchmarks", "bertkern.benchmarks.engines"]
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
