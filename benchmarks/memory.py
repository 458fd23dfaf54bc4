"""Peak memory while a model is quantized in place, in a fresh process: the model itself, and what comes on top.

    python -m bertkern bench memory

One layer on top is what converting layer by layer costs; a second copy of the model would show here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import peak
from .harness import Worker
from .results import Run

AXIS = "moment"


def resident_mb(field: str = "VmRSS") -> float:
    """This process's resident memory now, or its high-water mark (VmHWM), in MB of 10^6 bytes. Linux."""
    with open("/proc/self/status") as status:
        kilobytes = next(line.split()[1] for line in status if line.startswith(field + ":"))
    return int(kilobytes) * 1024 / 1e6


def measure() -> dict[str, Any]:
    """Quantizes BERT-base with random weights in this process; to be called in a fresh one.

    Returns: MB above the process before the model existed (`model`, `peak`, `after`), and the size of one layer.
    """
    import torch
    from transformers import BertConfig, BertModel

    import bertkern

    torch.set_num_threads(1)
    tiny = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, vocab_size=99)
    bertkern.quantize_(BertModel(tiny).eval(), bertkern.Int8Config())  # imports and one-time set-up are not the model's
    before = resident_mb()
    model = BertModel(BertConfig()).eval()
    layer = sum(p.numel() * p.element_size() for p in model.encoder.layer[0].parameters())
    loaded = resident_mb() - before
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the high-water mark starts anew
    bertkern.quantize_(model, bertkern.Int8Config())
    high = resident_mb("VmHWM")
    return {"model": loaded, "peak": high - before, "after": resident_mb() - before, "layer": layer / 1e6}


def run(
    python: str | None = None,
    report: Callable[[str], None] = lambda text: None,
    tick: Callable[[str, int, int], None] | None = None,
    **_: Any,
) -> Run:
    """Measures in a fresh process. Returns: rows with metric memory_mb for model, peak, after and one layer."""
    if tick:
        tick("quantizing BERT-base in a fresh process", 0, 0)
    run = Run("memory-bert-base", peak.cpu_model(), peak.isa(), 1)
    with Worker("memory", 1, python) as worker:
        found = worker.ask("memory")
    for moment, value in found.items():
        run.add("memory", "bertkern-int8", "memory_mb", (AXIS, moment), (value,) * 3, {"model": "bert-base"})
    return run
