"""Opening engines for a run, judging their outputs, and pairing those that are worth a ratio."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

from . import engines
from .harness import Python, Spec, Worker, WorkerError

REFERENCE = "torch-fp32"
OURS = "bertkern-int8"


def start(
    specs: Sequence[str],
    family: str,
    threads: int,
    python: Python,
    stack: ExitStack,
    options: Callable[[str], dict[str, Any]] = lambda spec: {},
    report: Callable[[str], None] = lambda text: None,
) -> tuple[list[Worker], dict[str, dict[str, Any]], dict[str, str]]:
    """Starts one worker an engine, however often it is named, opens it with its options, and reports absent ones.

    Returns: workers that live until `stack` closes, what each said at opening, and the absent ones with the reason.
    Raises ValueError for a name that does not exist.
    """
    expect_known(specs, family)
    workers, opened, absent = [], {}, {}
    for spec in dict.fromkeys(specs):
        name = Spec.parse(spec).name
        worker = stack.enter_context(Worker(spec, threads, python))
        try:
            reply = worker.ask("open", engine=f"{family}/{name}", threads=threads, **options(spec))
        except WorkerError as error:
            reply = {"failed": f"failed: {error}"}
        if "versions" in reply:
            workers.append(worker)
            opened[spec] = reply
        else:
            absent[spec] = f"needs {reply['absent']}" if "absent" in reply else reply["failed"]
            report(f"{spec}: absent, {absent[spec]}" if "absent" in reply else absent[spec])
            worker.close()
    return workers, opened, absent


def open_reference(worker: Worker, engine: str, **options: Any) -> None:
    """Opens what all outputs are compared with. Raises WorkerError where it cannot be had."""
    opened = worker.ask("open", engine=engine, threads=worker.threads, **options)
    if "absent" in opened:
        raise WorkerError(f"{engine}: the reference of every engine needs {opened['absent']}.")


def expect_known(specs: Iterable[str], family: str) -> None:
    """Raises ValueError for an engine that the family does not have."""
    for spec in specs:
        name = Spec.parse(spec).name
        if name not in engines.FAMILIES[family]:
            raise ValueError(f"engine: expected one of {', '.join(engines.FAMILIES[family])}. Got {name!r}.")


def of_dtypes(specs: Iterable[str], dtypes: Sequence[str]) -> list[str]:
    """The specs of these precisions; raises ValueError where none is."""
    found = {spec: precision(spec) for spec in specs}
    left = [spec for spec, dtype in found.items() if dtype in dtypes]
    if not left:
        others = ", ".join(f"{spec} ({dtype})" for spec, dtype in found.items())
        raise ValueError(f"engines: expected one at least of the dtypes {', '.join(dtypes)}. Got {others}.")
    return left


def precision(spec: str) -> str:
    """fp32, bf16 or int8, of an engine or a linear layer's provider; one name has one precision."""
    name = Spec.parse(spec).name
    return next(table[name].precision for table in engines.FAMILIES.values() if name in table)


def check(spec: str, got: dict[str, float]) -> dict[str, float]:
    """Returns what `engines.agreement` found, or raises WorkerError where the engine's outputs are wrong."""
    cosine, sqnr = engines.COSINE_FLOOR[precision(spec)], engines.SQNR_FLOOR_DB[precision(spec)]
    if got["sqnr_db"] < sqnr or got["cosine"] < cosine:
        raise WorkerError(
            f"{spec}: outputs differ from {REFERENCE}: expected cosine >= {cosine} and SQNR >= {sqnr:g} dB. "
            f"Got {got['cosine']:.5f} and {got['sqnr_db']:.1f} dB."
        )
    return got


def does_all(theirs: Spec, ours: Spec) -> bool:
    """Whether one engine computes all that another of its name leaves out: what a pattern took, masked heads, padding.

    Patterns must be spelled out: "dense" for the whole model.
    """
    if theirs.isa != ours.isa:
        return False
    if theirs.pattern == "dense" != ours.pattern:
        return theirs.name == ours.name.removesuffix("-masked")
    return theirs.pattern == ours.pattern and theirs.name == f"{ours.name}-padded"


def spelled(specs: Iterable[str], pattern: str) -> dict[str, Spec]:
    """Specs with their pattern, `pattern` where they name none."""
    parsed = {spec: Spec.parse(spec) for spec in specs}
    return {spec: made._replace(pattern=made.pattern or pattern) for spec, made in parsed.items()}


def rivals(specs: Iterable[str], pattern: str = "dense") -> list[tuple[str, str]]:
    """(rival, bertkern) pairs worth a ratio: under one cap; float bertkern only beside its own precision.

    On a pruned model, rivals on the same one and on the whole one count, and so does bertkern itself where it computes
    all of it, or the padding, too.

    Args:
        pattern: of specs that name none.
    """
    parsed = spelled(specs, pattern)
    pairs = []
    for fast, ours in parsed.items():
        for slow, theirs in parsed.items() if ours.name.startswith("bertkern") else ():
            rival = not theirs.name.startswith("bertkern") and precision(fast) in ("int8", precision(slow))
            same = theirs.isa == ours.isa and theirs.pattern in ("dense", ours.pattern)
            if does_all(theirs, ours) or (rival and same):
                pairs.append((slow, fast))
    return pairs


class Probe(Worker):
    """A process that only looks at the machine: what it can do, and whether something else is at work."""

    def __init__(self, threads: int, python: Python = None):
        super().__init__("probe", threads, python)

    def quiet(self, _: Worker) -> float:
        """For `take_turns`: how undisturbed the machine is on all threads."""
        return self.ask("quiet", threads=self.threads)["quiet"]

    def peak(self, precision: str = "int8") -> float | None:
        """The register peak of all threads together, GMAC/s."""
        return self.ask("peak", threads=self.threads, precision=precision)["peak"]


def verified(
    workers: Iterable[Worker],
    case: object,
    inputs: Callable[[str], dict[str, Any]],
    expected: Callable[[str], str],
    report: Callable[[str], None],
) -> tuple[list[Worker], dict[str, dict[str, float]]]:
    """Gives workers a case, and compares their outputs with a file; those that are wrong or cannot are reported.

    Args:
        inputs: by spec, the arguments of the engine's `prepare`.
        expected: by spec, the file that a reference saved.

    Returns: the workers that may be timed, and what `check` found by spec.
    """
    ready, agreement = [], {}
    for worker in workers:
        try:
            worker.ask("prepare", **inputs(worker.spec))
            agreement[worker.spec] = check(worker.spec, worker.ask("compare", path=expected(worker.spec)))
            ready.append(worker)
        except WorkerError as error:
            report(f"{case}: left out: {error}")
    return ready, agreement
