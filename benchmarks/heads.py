"""BERT with fewer heads, end to end: removed for good by `prune_heads`, or masked at run time by `head_mask`.

    python -m bertkern bench heads
    python -m bertkern bench heads --share 0.75 --shapes 8x128,1x16,1x384 --engines bertkern-int8,bertkern-int8-masked

Random heads of each layer go. NAME is the engine on what is left, NAME:dense on the whole model, and NAME-masked has
all heads, and a mask on those that the others lost. Outputs are compared with torch's of the pruned or the whole model.
Half of the heads are a sixth of BERT-base's multiply-adds, so the whole model should take 1.2 times as long; asked for
is 1.17 at 8x128, and no loss at 1x16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import encoder, models
from .encoder import Case, parse_shapes
from .harness import Python, Spec
from .opening import REFERENCE
from .options import parse_specs
from .results import Run

ENGINES = ("bertkern-fp32", "bertkern-fp32-masked", REFERENCE)
SHAPES = "8x128,1x16"
SHARE = 0.5
ROUNDS = 15

OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "engines": ("specs", parse_specs),
    "model": ("model", str),
    "shapes": ("shapes", parse_shapes),
    "share": ("share", models.parse_share),
}


def run(
    specs: Sequence[str] = ENGINES,
    shapes: Sequence[Case] = tuple(parse_shapes(SHAPES)),
    model: str = "bert-base",
    share: float = SHARE,
    threads: int = 2,
    rounds: int = ROUNDS,
    seconds: float = 0.25,
    python: Python = None,
    report: Callable[[str], None] = lambda text: None,
    tick: Callable[[str, int, int], None] | None = None,
) -> Run:
    """Measures engines without a share of each layer's heads, each beside itself with all of them.

    Args:
        share: of the heads that go; the other arguments as in `encoder.run`.

    Returns: rows as of `encoder.run`.
    """
    whole = [f"{spec.replace('-masked', '')}:dense" for spec in specs if not Spec.parse(spec).pattern]
    specs = list(dict.fromkeys([*specs, *whole]))
    pattern = models.parse_pattern(f"{models.HEADS}{share}")
    return encoder.run(
        specs, shapes, model, threads, rounds, seconds, python, pattern, kind="heads", report=report, tick=tick
    )
