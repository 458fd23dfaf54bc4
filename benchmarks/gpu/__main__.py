"""The command line: `python -m benchmarks.gpu`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __doc__ as about
from . import campaign, goals, process, sections

FOLDER = Path(__file__).resolve().parents[1] / "results" / "gpu"
NO_CARD = 2
EXAMPLES = """\
examples:
  python -m benchmarks.gpu                                everything, within 9 minutes, from a library that is built
  python -m benchmarks.gpu --list                         the sections, and which of them are done
  python -m benchmarks.gpu --sections smoke,tests         whether it works at all
  python -m benchmarks.gpu --sections ops --again         measure operators anew
  python -m benchmarks.gpu --budget 300 --out somewhere   less time, other files
  python -m benchmarks.gpu --goals                        asked, measured, met: of results that are there; needs no card

exit status: 0 all sections done, 1 some cut short, 2 no card.
"""


def parse_sections(text: str) -> list[campaign.Section]:
    """`ops,models` as sections, in the order of the campaign. Raises ValueError for others."""
    known = {section.name: section for section in sections.SECTIONS}
    asked = [name.strip() for name in text.split(",")]
    for name in asked:
        if name not in known:
            raise ValueError(f"sections: expected some of {', '.join(known)}. Got {name!r}.")
    return [section for name, section in known.items() if name in asked]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description=about,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--sections", help="comma-separated; default: all, in the order above")
    made.add_argument("--again", action="store_true", help="do sections anew that ended before")
    made.add_argument("--budget", type=float, default=campaign.BUDGET_S, metavar="SECONDS", help="of all; default 530")
    made.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="default: benchmarks/results/gpu")
    made.add_argument("--list", action="store_true", help="show the sections, and run nothing")
    made.add_argument("--goals", action="store_true", help="show asked, measured, met, and run nothing")
    return made


def find_card(seconds: float = 120.0) -> dict[str, Any] | None:
    """Facts of the card, asked for in a child; None without one, or where asking does not end."""
    found: dict[str, Any] = {}

    def each_line(line: str) -> None:
        found.update(json.loads(line).get("fact", {}))

    command = [sys.executable, "-m", f"{__package__}.job", "card", "{}"]
    outcome = process.run(command, seconds, each_line, folder=campaign.ROOT)
    if not outcome.ok:
        print(f"Asking for a card failed, {outcome}", file=sys.stderr)
    return found.get("card")


def _list(folder: Path) -> None:
    for section in sections.SECTIONS:
        path = campaign.path_of(folder, section.name)
        run = campaign.load(path) if path.exists() else None
        state = "not run" if run is None else ("done" if run.facts.get("finished") else "cut short")
        when = "" if run is None else f" {run.date}, {run.device}"
        print(f"{section.name:10} {section.seconds:4.0f} s  {section.about}: {state}{when}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked for; returns the exit status."""
    reader = parser()
    asked = reader.parse_args(arguments)
    try:
        chosen = parse_sections(asked.sections) if asked.sections else list(sections.SECTIONS)
        if not asked.budget > 0:
            raise ValueError(f"budget: expected seconds above 0. Got {asked.budget:g}.")
    except ValueError as error:
        reader.error(str(error))
    if asked.list:
        _list(asked.out)
        return 0
    if asked.goals:
        goals.lines(
            goals.judge(row for path in sorted(asked.out.glob("gpu-*.json")) for row in campaign.load(path).rows)
        )
        return 0
    there = next(above for above in (asked.out, *asked.out.absolute().parents) if above.exists())
    if not there.is_dir():
        reader.error(f"out: expected a folder. Got the file {there}.")
    card = find_card()
    if card is None:
        print(
            "No CUDA card here: nothing was run. (python -m benchmarks.gpu --help says what would be.)", file=sys.stderr
        )
        return NO_CARD
    print(f"{card['device']}, {card['arch']}, driver {card['smi'].get('driver_version', '?')}")
    runs = campaign.go(chosen, asked.out, card, again=asked.again, budget=asked.budget)
    _draw(runs, asked.out)
    print()
    goals.lines(goals.judge(sections.rows_of(runs)))
    return int(not all(section.name in runs and runs[section.name].facts["finished"] for section in chosen))


def _draw(runs: dict[str, Any], folder: Path) -> None:
    try:
        from . import plots
    except ImportError:
        return
    for name, run in runs.items():
        try:
            plots.save(run, folder)
        except (RuntimeError, ValueError) as error:
            print(f"{name}: no plot: {error}")


if __name__ == "__main__":
    raise SystemExit(main())
