"""Peak memory while BERT-base becomes int8, each way in a fresh process: the model itself, and what comes on top.

    python -m bertkern bench memory

One layer on top is what converting layer by layer costs; a second copy of the model would show here.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import peak
from .harness import Python, Worker
from .models import SEED
from .results import Run

AXIS = "moment"
ROUNDS = 1
OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {}
# The ways to an int8 model, and what they start from.
WAYS = {
    "quantize_": "float weights in memory",
    "from_pretrained, quantize_": "a float checkpoint",
    "from_pretrained of int8": "an int8 checkpoint",
}


def resident_mb(field: str = "VmRSS") -> float:
    """This process's resident memory now, or its high-water mark (VmHWM), in MB of 10^6 bytes. Linux."""
    with open("/proc/self/status") as status:
        kilobytes = next(line.split()[1] for line in status if line.startswith(field + ":"))
    return int(kilobytes) * 1024 / 1e6


def make_int8(folder: str, out: str) -> None:
    """Saves the int8 form of the model in `folder`."""
    from transformers import AutoModel

    import bertkern

    bertkern.quantize_(AutoModel.from_pretrained(folder).eval()).save_pretrained(out)


def measure(way: str, folder: str) -> dict[str, Any]:
    """Makes BERT-base int8 in this process, in one of WAYS; to be called in a fresh one.

    Args:
        folder: a checkpoint of what the way starts from.

    Returns: MB of the fp32 model's parameters (`model`) and of one layer's (`layer`); resident MB at the highest
        (`peak`) and at the end (`after`), both above the process before the model existed. Pages of files count.
    """
    import torch
    from transformers import AutoModel, BertConfig, BertModel
    from transformers.utils.logging import disable_progress_bar

    import bertkern

    def parameters_mb(module: torch.nn.Module) -> float:
        return sum(p.numel() * p.element_size() for p in module.parameters()) / 1e6

    disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tiny:  # imports and one-time set-up are not the model's
        sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
        bertkern.quantize_(BertModel(BertConfig(**sizes, vocab_size=99)).eval()).save_pretrained(tiny)
        AutoModel.from_pretrained(tiny)
    with torch.device("meta"):
        skeleton = BertModel(BertConfig())
    found = {"model": parameters_mb(skeleton), "layer": parameters_mb(skeleton.encoder.layer[0])}
    before = resident_mb()
    in_memory = BertModel(BertConfig()).eval() if way == "quantize_" else None
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the high-water mark starts anew: making random weights is not what is measured
    model = AutoModel.from_pretrained(folder).eval() if in_memory is None else in_memory
    if way != "from_pretrained of int8":
        bertkern.quantize_(model)
    return {**found, "peak": resident_mb("VmHWM") - before, "after": resident_mb() - before}


def run(
    python: Python = None,
    report: Callable[[str], None] = lambda text: None,
    tick: Callable[[str, int, int], None] | None = None,
    **_: Any,
) -> Run:
    """Measures each way in a fresh process. Returns: rows with metric memory_mb, one provider a way.

    Raises RuntimeError where the system does not tell how much memory a process uses.
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        raise RuntimeError("bench memory: expected Linux with /proc/self/clear_refs, which resets a process's peak.")
    run = Run("memory-bert-base", peak.cpu_model(), peak.isa(), 1, facts={"model": "bert-base"})
    with tempfile.TemporaryDirectory() as temporary:
        fp32, int8 = Path(temporary, "fp32"), Path(temporary, "int8")
        with Worker("memory", 1, python) as worker:
            worker.ask("make_model", folder=str(fp32), seed=SEED)
            worker.ask("make_int8", folder=str(fp32), out=str(int8))
        for i, way in enumerate(WAYS):
            if tick:
                tick(way, i, len(WAYS))
            with Worker("memory", 1, python) as worker:
                found = worker.ask("memory", way=way, folder=str(int8 if way.endswith("int8") else fp32))
            for moment, value in found.items():
                run.add("memory", way, "memory_mb", (AXIS, moment), (value,) * 3, {"starts_from": WAYS[way]})
    return run
