"""Runs the kernels of csrc/cuda on the host: their source, compiled by the C++ compiler against csrc/cuda/emulator.

    library = emulated("rowwise/norm.cu", 'extern "C" int norm(void* x, int64_t rows) { return launch_norm(...); }')
    library.norm(x, x.shape[0])  # tensors are written in place

`glue` is C++ behind the source, in one translation unit with it: it wraps launchers into C functions that return a
cudaError_t. Arguments: tensors (also None, strided: the storage between first and last element) are void*, integers
int64_t, floats float. Every tensor stands between guards, which hold NaN and must not change.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

# csrc/cuda/types.h
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}

CSRC = ROOT / "csrc"
EMULATOR = [CSRC / "cuda" / "emulator" / name for name in ("emulator.cpp", "instructions.cpp")]
GUARD = 4096
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-unknown-pragmas",
]
SEEN = ["-fsanitize=thread"]  # the compiler calls emulator.cpp before each access; its own runtime is not linked


class EmulatorError(RuntimeError):
    """A launch that the card would refuse, or during which the emulator saw a mistake."""


def cuda_headers() -> Path | None:
    """The folder with cuda_fp16.h, of a toolkit or of NVIDIA's packages."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        homes.append(str(Path(nvcc).resolve().parent.parent))
    folders = [Path(home) / "include" for home in [*filter(None, homes), "/usr/local/cuda"]]
    folders += sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("*/include"))
    return next((folder for folder in folders if (folder / "cuda_fp16.h").exists()), None)


def skip_without_emulator() -> None:
    """Skips the test, or the module that calls it while it is imported, where the emulator cannot be built."""
    if not shutil.which(compiler()[0]):
        pytest.skip(f"needs a C++ compiler ({compiler()[0]})", allow_module_level=True)
    if cuda_headers() is None:
        pytest.skip("needs CUDA's headers (cuda_fp16.h)", allow_module_level=True)


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def _compile(name: str, text: str, *flags: str) -> Path:
    """An object file or a library, made anew where the text, a header or the flags have changed."""
    headers = sorted(path for pattern in ("*.h", "*.inc", "*.cu") for path in CSRC.rglob(pattern))
    seen = hashlib.sha256()
    for part in [text, repr([*compiler(), *FLAGS, *flags, cuda_headers()]), *(path.read_text() for path in headers)]:
        seen.update(part.encode() + b"\0")
    folder = ROOT / "build" / "emulated"
    target = folder / f"{name}-{seen.hexdigest()[:16]}.o"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}.o")
        source = target.with_suffix(f".{os.getpid()}.cpp")
        source.write_text(text)
        include = ["-I", str(CSRC), "-isystem", str(cuda_headers())]
        command = [*compiler(), *FLAGS, *flags, *include, "-c", str(source), "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        source.unlink()
        os.replace(unfinished, target)
    return target


class Library:
    """C functions by name; see the text at the top of this module."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.bk_emulator_error.restype = ctypes.c_char_p
        self._library.bk_emulator_tensor.argtypes = [ctypes.c_void_p] * 4

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self._library, name)

        def call(*arguments: object) -> None:
            guarded = [Guarded(a) if isinstance(a, torch.Tensor) else None for a in arguments]
            for g in filter(None, guarded):
                self._library.bk_emulator_tensor(*g.bounds())
            code = function(*(g.pointer if g else _plain(a) for a, g in zip(arguments, guarded, strict=True)))
            self._library.bk_emulator_forget_tensors()
            if code:
                raise EmulatorError(self._library.bk_emulator_error().decode() or f"cudaError_t {code}")
            for number, g in enumerate(guarded):
                if g:
                    g.take_back(f"{name}, argument {number}")

        return call


def _plain(argument: object) -> object:
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return argument


class Guarded:
    """A copy of a tensor's storage between two guards, aligned as the tensor is (modulo 256)."""

    def __init__(self, tensor: torch.Tensor) -> None:
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.flat = tensor.as_strided((span if tensor.numel() else 0,), (1,)).view(torch.uint8)
        self.memory = torch.full((self.flat.numel() + 2 * GUARD + 512,), 0xFF, dtype=torch.uint8)
        self.first = GUARD + (tensor.data_ptr() - self.memory.data_ptr() - GUARD) % 256
        self.inside = self.memory[self.first : self.first + self.flat.numel()]
        self.inside.copy_(self.flat)
        self.pointer = ctypes.c_void_p(self.memory.data_ptr() + self.first)

    def bounds(self) -> tuple[int, int, int, int]:
        """Addresses: where the guard before it begins, the tensor begins and ends, the guard behind it ends."""
        memory, begin = self.memory.data_ptr(), self.memory.data_ptr() + self.first
        return memory, begin, begin + self.flat.numel(), memory + self.memory.numel()

    def take_back(self, what: str) -> None:
        """Copies what the kernel wrote back; raises where it wrote into a guard."""
        self.flat.copy_(self.inside)
        before, after = self.memory[: self.first], self.memory[self.first + self.flat.numel() :]
        for place, guard in (("before", before.flip(0)), ("behind", after)):
            touched = (guard != 0xFF).nonzero()
            if len(touched):
                raise EmulatorError(f"{what}: a write {int(touched[0])} bytes {place} the tensor")


@functools.cache
def emulated(source: str | None, glue: str = "") -> Library:
    """csrc/cuda/<source> and `glue` as a library of the host, compiled once for all tests."""
    skip_without_emulator()
    include = f'#include "cuda/{source}"\n' if source else '#include "cuda/ptx.h"\n'
    kernels = _compile(Path(source or "glue").stem, include + glue.replace('extern "C"', EXPORT), *SEEN)
    runners = [_compile(path.stem, path.read_text(), "-O2") for path in EMULATOR]
    parts = list(map(str, [kernels, *runners]))
    library = kernels.with_suffix(f".{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}.so")
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}.so")
        command = [*compiler(), "-shared", *parts, "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        os.replace(unfinished, library)
    return Library(library)


EXPORT = 'extern "C" __attribute__((visibility("default")))'
