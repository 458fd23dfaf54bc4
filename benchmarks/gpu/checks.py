"""Smoke, tests and sanitizer: whether kernels run at all, and are right."""

from __future__ import annotations

import os
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from . import process
from .campaign import ROOT, Context

KERNEL_S = 90.0  # imports, compiling and a first launch, with as many others beside it
SIDE_BY_SIDE = 12
ON_CARD = {"BERTKERN_TEST_DEVICE": "cuda"}


@dataclass(frozen=True)
class Kernel:
    """Something that is smoked: its name, and the command whose exit status says whether it works."""

    name: str
    command: Sequence[str]


def scripts(root: Path = ROOT) -> list[Path]:
    """The scripts of the tests that run every entry of a TABLE, in Triton's interpreter or on a card."""
    return sorted((root / "tests" / "kernels").glob("interpret*.py"))


def grouped(cases: Iterable[str]) -> list[str]:
    """Cases without their shapes, each once: those of one kernel share a process."""
    return list(dict.fromkeys(re.sub(r"-\d+(x\d+)*$", "", case) for case in cases))


def kernels(context: Context) -> list[Kernel]:
    """Of all scripts, and the tests on a card of the CUDA library's operators, one process a file of them."""
    found = []
    for script in scripts():
        cases: list[str] = []
        command = [sys.executable, str(script.relative_to(ROOT))]
        outcome = process.run(
            [*command, "--list"], 60, cases.append, folder=ROOT, environment={**ON_CARD, "PYTHONPATH": str(ROOT)}
        )
        if not outcome.ok:
            context.run.absent[script.name] = str(outcome)
        for name in grouped(cases):
            found.append(Kernel(f"{script.stem.removeprefix('interpret').lstrip('_') or 'block_sparse'} {name}",
                                [*command, "--only", name]))  # fmt: skip
    for path in sorted((ROOT / "tests" / "cuda").glob("test_*.py")):
        if "pytest.mark.gpu" in path.read_text():
            command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
            found.append(Kernel(f"cuda {path.stem.removeprefix('test_')}", [*command, str(path.relative_to(ROOT))]))
    return found


def smoke(context: Context, found: Sequence[Kernel] | None = None, seconds: float = KERNEL_S) -> bool:
    """A row of each kernel, metric "ok": 1 or 0, config says what went wrong. False where the time ran out."""
    found = kernels(context) if found is None else found
    missed = []

    def one(kernel: Kernel) -> None:
        left = min(seconds, context.left())
        if left < 2:
            missed.append(kernel.name)
            return
        outcome = process.run(
            kernel.command, left, folder=ROOT, environment={**ON_CARD, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        )
        config = {"seconds": round(outcome.seconds, 1)} | ({} if outcome.ok else {"said": str(outcome)[:400]})
        context.run.add("smoke", kernel.name, "ok", ("kernel", kernel.name), (float(outcome.ok),) * 3, config)
        if not outcome.ok:
            context.report(f"  {kernel.name}: {outcome}"[:300])

    with ThreadPoolExecutor(min(SIDE_BY_SIDE, os.cpu_count() or 1)) as pool:
        for _ in pool.map(one, found):
            context.save()
    if missed:
        context.run.facts["missed"] = missed
    return not missed and bool(found)


def counts(report: Path) -> dict[str, int]:
    """Of a JUnit file: tests, failures, errors, skipped."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    return {
        name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    }


def tests(context: Context, arguments: Sequence[str] = ("-m", "gpu", "tests")) -> bool:
    """pytest over what is marked `gpu`: rows of kernel "tests", metric "count"."""
    with TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        lines: list[str] = []
        outcome = process.run(command, context.left(), lines.append, folder=ROOT)
        if not report.exists():
            context.run.absent["tests"] = " | ".join(filter(None, [str(outcome), *lines[-3:]]))
            return False
        for name, count in counts(report).items():
            context.run.add("tests", "pytest -m gpu", "count", ("outcome", name), (float(count),) * 3)
    # Which failed: the lines of pytest's summary.
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            context.run.absent[line.split(" - ")[0][:200]] = line.partition(" - ")[2][:300]
            context.report(f"  {line[:300]}")
    context.save()
    return outcome.code in (0, 1)


# Kernels that the sanitizer sees: small, of every kind, and what of the CUDA library is tested on a card.
SANITIZED = (
    ("interpret.py", ("linear-fp16-32x32-128-64x", "linear_int8-fp16-64x64-128-131x", "values_gradient-fp16-32x64-1x")),
    ("interpret_attention.py", ("attend-fp16-64-131x", "attend_keys-fp16-32-131x", "attend_queries-fp16-64-1")),
    ("interpret_groupwise.py", ("multiply-fp16-4n-16x64-partial-5x", "multiply-i8-5n", "quantize", "add_in_order")),
    ("interpret_int8_gemm.py", ("",)),
    ("interpret_rowwise.py", ("",)),
)
TOOLS = ("memcheck", "racecheck")


def sanitizer_path() -> str | None:
    """compute-sanitizer of the PATH, of $CUDA_HOME or of /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def sanitized(tool: str, path: str, root: Path = ROOT) -> list[Kernel]:
    """What runs under a tool."""
    inside = [path, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", sys.executable]
    found = []
    for script, names in SANITIZED:
        if (root / "tests" / "kernels" / script).exists():
            only = [part for name in names if name for part in ("--only", name)] or ["--first", "3"]
            found.append(Kernel(f"{tool} {script}", [*inside, f"tests/kernels/{script}", *only]))
    if (root / "tests" / "cuda").is_dir():
        pytest = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/cuda"]
        found.append(Kernel(f"{tool} tests/cuda", [*inside, *pytest]))
    return found


def sanitizer(context: Context, path: str | None = None) -> bool:
    """A row a tool and script, metric "ok"; where the tool is missing, that is said, and counts as done."""
    path = path or sanitizer_path()
    if path is None:
        context.run.absent["compute-sanitizer"] = "not found on PATH, in $CUDA_HOME or /usr/local/cuda: skipped"
        context.report(f"  compute-sanitizer: {context.run.absent['compute-sanitizer']}")
        return True
    # Without torch's cache each tensor is an allocation of its own, whose ends memcheck knows.
    environment = {**ON_CARD, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in TOOLS:
        for kernel in sanitized(tool, path):
            if context.left() < 5:
                context.run.facts.setdefault("missed", []).append(kernel.name)
                continue
            lines: list[str] = []
            outcome = process.run(kernel.command, context.left(), lines.append, environment=environment, folder=ROOT)
            # pytest without a test that is marked has nothing to be wrong.
            ok = outcome.ok or (outcome.code == 5 and "pytest" in kernel.command)
            errors = [line for line in lines if "=========" in line and ("ERROR" in line or "Invalid" in line)]
            said = {} if ok else {"said": " | ".join([str(outcome), *errors[:3]])[:500]}
            row = {"seconds": round(outcome.seconds, 1), **said}
            context.run.add("sanitizer", kernel.name, "ok", ("tool", tool), (float(ok),) * 3, row)
            context.save()
            if not ok:
                context.report(f"  {kernel.name}: {said['said']}")
    return "missed" not in context.run.facts
