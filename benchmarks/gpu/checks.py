"""Smoke, tests and sanitizer: whether kernels run at all, and are right."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import process
from .campaign import ROOT, Context

SILENCE_S = 45.0  # imports, compiling and a first launch, with as many others beside it
SIDE_BY_SIDE = 12
MOST_NAMES = 12  # of kernels in one child: enough of them for its imports not to count
ON_CARD = {"BERTKERN_TEST_DEVICE": "cuda"}
ENDED = (0, 1, 5)  # all was run, something was wrong, there was nothing to run
Said = dict[str, str]


@dataclass(frozen=True)
class Kernel:
    """A command whose exit status says whether it works, and its name."""

    name: str
    command: Sequence[str]


@dataclass(frozen=True)
class Group:
    """What one child runs, case after case: `command(done)` leaves those out.

    The child says {"at": case} before each, and {"case": case, "said": "ok", or what is wrong} after it.
    """

    name: str
    command: Callable[[Sequence[str]], Sequence[str]]


def case_by_case(group: Group, left: Callable[[], float], silence: float = SILENCE_S) -> Said:
    """What each case said. A child that hangs, crashes or loses the card costs the case that it was in: another one
    goes on behind that. Cases that no time was left for are not there."""
    said: Said = {}
    while left() >= 2:
        before, now = len(said), ""

        def each_line(line: str) -> None:
            nonlocal now
            try:
                read = json.loads(line)
            except json.JSONDecodeError:
                return
            if isinstance(read, dict):
                now = read.get("at", now)
                said.update({read["case"]: read["said"]} if "case" in read else {})

        outcome = process.run(
            group.command(list(said)),
            left(),
            each_line,
            silence=silence,
            folder=ROOT,
            environment={**ON_CARD, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        if outcome.code in ENDED:
            # A script ends so, too, where it does not even begin.
            return said if said or outcome.code != 1 else {"before anything": str(outcome)}
        if left() < 2:
            return said
        if now not in said:
            said[now or "before anything"] = str(outcome)
        if not now or len(said) == before:
            return said
    return said


def scripts(root: Path = ROOT) -> list[Path]:
    """The scripts of the tests that run every entry of a TABLE, in Triton's interpreter or on a card."""
    return sorted((root / "tests" / "kernels").glob("interpret*.py"))


def kernel_of(case: str) -> str:
    """A case without its shape, or a test without its parameters."""
    return re.sub(r"-\d+(x\d+)*$", "", case.partition("[")[0] if "::" in case else case)


def grouped(cases: Iterable[str]) -> list[str]:
    """The kernels of cases, each once."""
    return list(dict.fromkeys(map(kernel_of, cases)))


def _scripted(script: Path, names: Sequence[str]) -> Group:
    """The cases of some kernels of a script."""

    def command(done: Sequence[str]) -> list[str]:
        only, skip = (
            [part for name in found for part in (option, name)]
            for option, found in (("--only", names), ("--skip", done))
        )
        return [sys.executable, str(script.relative_to(ROOT)), "--say", *only, *skip]

    return Group(script.stem.removeprefix("interpret").lstrip("_") or "block_sparse", command)


def _listed(script: Path) -> tuple[process.Outcome, list[str]]:
    cases: list[str] = []
    command = [sys.executable, str(script.relative_to(ROOT)), "--list"]
    environment = {**ON_CARD, "PYTHONPATH": str(ROOT)}
    return process.run(command, 60, cases.append, folder=ROOT, environment=environment), cases


def kernels(context: Context, found: Sequence[Path] | None = None) -> list[Group]:
    """Of all scripts, some kernels at a time, those of a script dealt out in turn."""
    found = scripts() if found is None else found
    groups = []
    with ThreadPoolExecutor(max(1, len(found))) as pool:
        for script, (outcome, cases) in zip(found, pool.map(_listed, found), strict=True):
            if not outcome.ok:
                context.run.absent[script.name] = str(outcome)
                context.report(f"  {script.name}: {outcome}"[:300])
            names = grouped(cases)
            parts = -(-len(names) // MOST_NAMES)
            groups += [_scripted(script, names[part::parts]) for part in range(parts)]
    return groups


def marked(folders: Sequence[str], without: Sequence[str] = ()) -> list[str]:
    """The test files below some folders with tests for a card: what takes the fixture `device` has some, too."""
    asks = re.compile(r'pytest\.mark\.gpu|usefixtures\("device"|def test_\w+\([^)]*\bdevice\b')
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("test_*.py"))
    found = [str(path.relative_to(ROOT)) for path in paths if asks.search(path.read_text())]
    return [path for path in found if path not in without]


def library() -> list[str]:
    """The test files of the CUDA library's kernels."""
    return [*marked(["tests/cuda"]), "tests/kernels/test_int8_op.py"]


def sharded(name: str, files: Sequence[str], shards: int) -> list[Group]:
    """`pytest -m gpu` over files, each test in one of so many children (see tests/conftest.py)."""

    def part(number: int) -> Group:
        def command(done: Sequence[str]) -> list[str]:
            pytest = ["-m", "pytest", "-s", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--shard={number}/{shards}"]
            return [sys.executable, *pytest, *files, *(f"--done={test}" for test in done)]

        return Group(name, command)

    return [part(number) for number in range(shards)] if files else []


def _side_by_side(
    context: Context, groups: Sequence[Group], silence: float, take: Callable[[Group, Said], None]
) -> None:
    lock = threading.Lock()

    def one(group: Group) -> None:
        said = case_by_case(group, context.left, silence)
        with lock:
            take(group, said)
            context.save()

    with ThreadPoolExecutor(min(SIDE_BY_SIDE, os.cpu_count() or 1)) as pool:
        list(pool.map(one, groups))


def smoke(context: Context, groups: Sequence[Group] | None = None, silence: float = SILENCE_S) -> bool:
    """A row of each kernel, metric "ok": 1 or 0, config says what went wrong. False where the time ran out."""
    if groups is None:
        groups = [*kernels(context), *sharded("cuda", library(), 4)]

    def take(group: Group, said: Said) -> None:
        for kernel in grouped(said):
            wrong = {case: text for case, text in said.items() if kernel_of(case) == kernel and not _fine(text)}
            config = {"cases": sum(kernel_of(case) == kernel for case in said)}
            if wrong:
                case, text = next(iter(wrong.items()))
                config |= {"wrong": len(wrong), "said": f"{case}: {_last(text)}"[:400]}
                context.report(f"  {group.name} {config['said']}"[:300])
            row = f"{group.name} {kernel.rpartition('/')[2]}"
            context.run.add("smoke", row, "ok", ("kernel", row), (float(not wrong),) * 3, config)

    _side_by_side(context, groups, silence, take)
    return context.left() >= 2 and bool(context.run.rows)


def _fine(said: str) -> bool:
    return said == "ok" or said.startswith("skipped")


def _last(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def tests(context: Context, groups: Sequence[Group] | None = None, silence: float = 2 * SILENCE_S) -> bool:
    """pytest over what is marked `gpu` and was no part of `smoke`: rows of kernel "tests", metric "count"."""
    if groups is None:
        found = marked(["tests"], ("tests/kernels/test_on_card.py", *library()))
        groups = sharded("tests", found, SIDE_BY_SIDE)
    counts = dict.fromkeys(("tests", "failures", "skipped"), 0)

    def take(group: Group, said: Said) -> None:
        counts["tests"] += len(said)
        counts["skipped"] += sum(text.startswith("skipped") for text in said.values())
        wrong = {test: _last(text) for test, text in said.items() if not _fine(text)}
        counts["failures"] += len(wrong)
        for test, text in wrong.items():
            context.run.absent[test[:200]] = text[:300]
            context.report(f"  {test}: {text}"[:300])

    _side_by_side(context, groups, silence, take)
    for name, count in counts.items():
        context.run.add("tests", "pytest -m gpu", "count", ("outcome", name), (float(count),) * 3)
    context.save()
    return context.left() >= 2 and counts["tests"] > 0


# Kernels that the sanitizer sees: small, of every kind, and what of the CUDA library is tested on a card.
SANITIZED = (
    ("interpret.py", ("linear-fp16-32x32-128-64x", "linear_int8-fp16-64x64-128-131x", "values_gradient-fp16-32x64-1x")),
    ("interpret_attention.py", ("attend-fp16-64-131x", "attend_keys-fp16-32-131x", "attend_queries-fp16-64-1")),
    ("interpret_groupwise.py", ("multiply-fp16-4n-16x64-partial-5x", "multiply-i8-5n", "quantize", "add_in_order")),
    ("interpret_int8_gemm.py", ("",)),
    ("interpret_rowwise.py", ("",)),
)
# Of the tests of the CUDA library, by their parameters: a tool makes them ten times and more as long.
SMALL = "136 or 26 or bad_input or 2-k-24"
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
        pytest = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-k", SMALL, "tests/cuda"]
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
    lock = threading.Lock()

    def one(named: tuple[str, Kernel]) -> None:
        tool, kernel = named
        lines: list[str] = []
        outcome = process.run(
            kernel.command, max(context.left(), 0.1), lines.append, environment=environment, folder=ROOT
        )
        errors = [line for line in lines if "=========" in line and ("ERROR" in line or "Invalid" in line)]
        # pytest without a test that is marked has nothing to be wrong; and what took too long was not seen whole.
        ok = outcome.ok or (outcome.code == 5 and "pytest" in kernel.command)
        with lock:
            if outcome.code is None and not errors:
                context.run.facts.setdefault("missed", []).append(kernel.name)
                context.report(f"  {kernel.name}: not whole within {outcome.seconds:.0f} s")
            else:
                said = {} if ok else {"said": " | ".join([str(outcome), *errors[:3]])[:500]}
                row = {"seconds": round(outcome.seconds, 1), **said}
                context.run.add("sanitizer", kernel.name, "ok", ("tool", tool), (float(ok),) * 3, row)
                if not ok:
                    context.report(f"  {kernel.name}: {said['said']}")
            context.save()

    with ThreadPoolExecutor(min(SIDE_BY_SIDE, os.cpu_count() or 1)) as pool:
        list(pool.map(one, [(tool, kernel) for tool in TOOLS for kernel in sanitized(tool, path)]))
    return "missed" not in context.run.facts
