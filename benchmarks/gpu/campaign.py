"""Sections one after another, within a budget; each a file of rows that is there even where it is cut short."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..results import Run, load
from . import process

BUDGET_S = 530.0
SILENCE_S = 75.0  # longer than torch.compile searches for a layer's kernel
TRIES = 4
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Context:
    """What a section gets: where it writes, how long it may take, and the card.

    Attributes:
        run: its rows; `save` writes them.
        card: facts of `card.facts`.
        deadline: of time.monotonic().
        device: "cuda"; "cpu" in tests.
        others: the runs of sections that ended before, by name.
        sizes: arguments of jobs by name, for tests.
    """

    run: Run
    folder: Path
    card: dict[str, Any]
    deadline: float
    device: str = "cuda"
    others: dict[str, Run] = field(default_factory=dict)
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    report: Callable[[str], None] = print

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def save(self) -> None:
        self.run.save(self.folder)

    def take(self, line: str) -> dict[str, Any]:
        """Adds what a job's line says to the run; returns the line, read."""
        try:
            said = json.loads(line)
        except json.JSONDecodeError:
            return {}
        if "row" in said:
            kernel, provider, metric, x, values, config, versions = said["row"]
            self.run.add(kernel, provider, metric, tuple(x), tuple(values), config, versions)
            self.save()
        if "absent" in said:
            self.run.absent.update({name: why for name, why in said["absent"].items() if name not in self.run.absent})
        self.run.facts.update(said.get("fact", {}))
        return said

    def job(self, name: str, seconds: float, silence: float = SILENCE_S, **arguments: Any) -> bool:
        """Runs a job of job.JOBS in a child, anew after a hang or a crash without what it was in; whether it ended."""
        arguments = {"device": self.device, **arguments, **self.sizes.get(name, {})}
        command = [sys.executable, "-m", f"{__package__}.job", name]
        return self.command(lambda skip: [*command, json.dumps(arguments | skip)], seconds, silence)

    def command(self, command: Callable[[dict], Sequence[str]], seconds: float, silence: float) -> bool:
        """As `job`, of any command that is made of {} or {"skip": [...]} and prints a job's lines."""
        end = min(time.monotonic() + seconds, self.deadline)
        skip: list[str] = []
        for _ in range(TRIES):
            state: dict[str, Any] = {}

            def each_line(line: str, state: dict[str, Any] = state) -> None:
                said = self.take(line)
                state.update({key: said[key] for key in ("at", "done") if key in said})
                if "finished" in said:
                    skip.append(said["finished"])

            outcome = process.run(
                command({"skip": list(skip)} if skip else {}),
                end - time.monotonic(),
                each_line,
                silence=silence,
                folder=ROOT,
            )
            if outcome.ok and state.get("done"):
                return True
            at = state.get("at", "before anything")
            self.run.absent[f"{at} "] = f"{outcome}"
            self.report(f"  {at}: {outcome}")
            if time.monotonic() >= end - 1 or "at" not in state:
                return False
            # "case|provider": without the provider; "case|": without the case.
            skip.append(re.sub(r" captured$", "", at.removesuffix("|")))
        return False


@dataclass(frozen=True)
class Section:
    """A part of the campaign: its name, its most seconds, and what runs; it returns whether all of it was done."""

    name: str
    seconds: float
    about: str
    work: Callable[[Context], bool]


def path_of(folder: Path, section: str) -> Path:
    return folder / f"gpu-{section}.json"


def finished(folder: Path, section: str, card: dict[str, Any]) -> Run | None:
    """The section's rows, if it ended, on a card of this name."""
    path = path_of(folder, section)
    if not path.exists():
        return None
    run = load(path)
    return run if run.facts.get("finished") and run.device == card["device"] else None


def run_of(section: str, card: dict[str, Any]) -> Run:
    """An empty run with the facts of the card."""
    facts = {name: value for name, value in card.items() if name not in ("device", "arch")}
    return Run(f"gpu-{section}", card["device"], card["arch"], 1, facts={**facts, "finished": False})


def go(
    sections: Sequence[Section],
    folder: Path,
    card: dict[str, Any],
    *,
    again: bool = False,
    budget: float = BUDGET_S,
    device: str = "cuda",
    sizes: dict[str, dict[str, Any]] | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Run]:
    """Runs the sections in their order.

    Args:
        folder: of the results; sections that ended are read from there.
        again: do them nevertheless.
        budget: seconds for all; a section that the budget leaves less than 5 of is not begun.

    Returns: the runs of sections that were done, now or before, whole or in part.
    """
    end = time.monotonic() + budget
    runs: dict[str, Run] = {}
    for path in sorted(folder.glob("gpu-*.json")):
        found = finished(folder, path.stem.removeprefix("gpu-"), card)
        if found is not None:
            runs[path.stem.removeprefix("gpu-")] = found
    for section in sections:
        if section.name in runs and not again:
            report(f"{section.name}: done before, {runs[section.name].date}; --again does it anew")
            continue
        left = end - time.monotonic()
        if left < 5:
            report(f"{section.name}: not begun, the budget of {budget:g} s is spent")
            continue
        # A longer budget is longer for each.
        seconds = min(section.seconds * max(1.0, budget / BUDGET_S), left)
        report(f"{section.name}: {section.about} (at most {seconds:.0f} s)")
        begin = time.monotonic()
        run = run_of(section.name, card)
        context = Context(run, folder, card, begin + seconds, device, runs, sizes or {}, report)
        context.save()
        done = section.work(context)
        run.facts |= {"finished": done, "wall_s": round(time.monotonic() - begin, 1)}
        context.save()
        runs[section.name] = run
        rows = len(run.rows)
        report(f"{section.name}: {'done' if done else 'cut short'}, {rows} rows, {run.facts['wall_s']:g} s")
    return runs
