"""Memory of a quantized BERT-base: at most while it is made, each way in a fresh process, and its encoder afterwards.

    python -m bertkern bench memory

One layer on top of the model is what converting layer by layer costs; a second copy of the model would show here.
4n128 means 4 bits a weight in 128 groups of output features.
"""

from __future__ import annotations

import ctypes
import gc
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import peak
from .groupings import config_of, parse_groupings
from .harness import Python, Worker, counted
from .models import SEED
from .results import Run

AXIS = "moment"
ROUNDS = 1
OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {}
FLOAT, INT8 = "fp32", "int8"
FORMS = (FLOAT, INT8, "4n128", "2n128")
# The ways to a quantized model: the form it gets, and what they start from.
WAYS = {
    "quantize_": (INT8, "float weights in memory"),
    "from_pretrained, quantize_": (INT8, "a float checkpoint"),
    "from_pretrained of int8": (INT8, "an int8 checkpoint"),
    "quantize_ to 4n128": ("4n128", "float weights in memory"),
    "from_pretrained, quantize_ to 4n128": ("4n128", "a float checkpoint"),
    "from_pretrained of 4n128": ("4n128", "a checkpoint of 4 bits"),
}
# A BERT-base of next to nothing but its encoder.
ENCODER = {"vocab_size": 8, "max_position_embeddings": 16, "type_vocab_size": 1}


def resident_mb(field: str = "VmRSS") -> float:
    """This process's resident memory now, or its high-water mark (VmHWM), in MB of 10^6 bytes. Linux."""
    with open("/proc/self/status") as status:
        kilobytes = next(line.split()[1] for line in status if line.startswith(field + ":"))
    return int(kilobytes) * 1024 / 1e6


def config_for(form: str) -> Any:
    """The config of one of FORMS but fp32."""
    import bertkern

    return bertkern.Int8Config() if form == INT8 else config_of(parse_groupings(form)[0])


def make_quantized(folder: str, out: str, form: str) -> None:
    """Saves the model in `folder` in one of FORMS."""
    from transformers import AutoModel

    import bertkern

    bertkern.quantize_(AutoModel.from_pretrained(folder).eval(), config_for(form)).save_pretrained(out)


def make_encoder(out: str, form: str, seed: int) -> None:
    """Saves a BERT-base encoder of random weights in one of FORMS."""
    import torch
    from transformers import BertConfig, BertModel

    import bertkern

    torch.manual_seed(seed)
    model = BertModel(BertConfig(**ENCODER), add_pooling_layer=False).eval()
    if form != FLOAT:
        bertkern.quantize_(model, config_for(form))
    model.save_pretrained(out)


def encoder_size(folder: str) -> dict[str, float]:
    """MB of an encoder that `make_encoder` saved, in a fresh process: of its file (`file`); after it has run, of all
    its tensors, packed ones among them (`tensors`), and resident (`memory`).

    Of resident ones pages of files count. So do Python's objects and what the loading of transformers keeps, some 4 MB
    for any BERT-base, in fp32 too.
    """
    import torch
    from transformers import BertModel

    _set_up()
    before = resident_mb()
    # AutoModel would add a pooler that is not in the file.
    model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        model(torch.ones(1, 8, dtype=torch.long))
    _return_freed()
    memory = resident_mb() - before
    file = (Path(folder) / "model.safetensors").stat().st_size / 1e6
    return {"file": file, "tensors": tensors_mb(), "memory": memory}


def tensors_mb() -> float:
    """MB of all dense tensors that are alive in this process, memory that several share counted once."""
    import torch

    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.device.type == "cpu"}.values()) / 1e6


def _set_up() -> None:
    """Imports and whatever else is done once, which is no model's."""
    import torch
    from transformers import AutoModel, BertConfig, BertModel
    from transformers.utils.logging import disable_progress_bar

    import bertkern

    disable_progress_bar()
    torch.set_num_threads(1)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    for form in (FLOAT, INT8, "4n128"):
        with tempfile.TemporaryDirectory() as tiny:
            made = BertModel(BertConfig(**sizes, vocab_size=99)).eval()
            if form != FLOAT:
                bertkern.quantize_(made, config_for(form))
            made.save_pretrained(tiny)
            with torch.no_grad():
                AutoModel.from_pretrained(tiny)(torch.ones(1, 8, dtype=torch.long))
    _return_freed()


def _return_freed() -> None:
    """Gives freed memory back to the system, where the C library can."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def measure(way: str, folder: str) -> dict[str, Any]:
    """Makes a quantized BERT-base in this process, in one of WAYS; to be called in a fresh one.

    Args:
        folder: a checkpoint of what the way starts from.

    Returns: MB of the fp32 model's parameters (`model`) and of one layer's (`layer`); resident MB at the highest
        (`peak`) and at the end (`after`), both above the process before the model existed. Pages of files count.
    """
    import torch
    from transformers import AutoModel, BertConfig, BertModel

    import bertkern

    def parameters_mb(module: torch.nn.Module) -> float:
        return sum(p.numel() * p.element_size() for p in module.parameters()) / 1e6

    _set_up()
    with torch.device("meta"):
        skeleton = BertModel(BertConfig())
    found = {"model": parameters_mb(skeleton), "layer": parameters_mb(skeleton.encoder.layer[0])}
    before = resident_mb()
    in_memory = BertModel(BertConfig()).eval() if way.startswith("quantize_") else None
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the high-water mark starts anew: making random weights is not what is measured
    model = AutoModel.from_pretrained(folder).eval() if in_memory is None else in_memory
    if "quantize_" in way:
        bertkern.quantize_(model, config_for(WAYS[way][0]))
    return {**found, "peak": resident_mb("VmHWM") - before, "after": resident_mb() - before}


def run(
    python: Python = None,
    report: Callable[[str], None] = lambda text: None,
    tick: Callable[[str, int, int], None] | None = None,
    **_: Any,
) -> Run:
    """Measures each way, and the encoder of each form, in a fresh process.

    Returns: rows with metric memory_mb, one provider a way; and with metric encoder_mb, one provider a form.

    Raises RuntimeError where the system does not tell how much memory a process uses.
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        raise RuntimeError("bench memory: expected Linux with /proc/self/clear_refs, which resets a process's peak.")
    run = Run("memory-bert-base", peak.cpu_model(), peak.isa(), 1, facts={"model": "bert-base"})
    progress = counted(tick, len(WAYS) + len(FORMS), "{}".format)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {form: Path(temporary, form) for form in ("fp32", *dict.fromkeys(form for form, _ in WAYS.values()))}
        with Worker("memory", 1, python) as worker:
            worker.ask("make_model", folder=str(folders["fp32"]), seed=SEED)
            for form in list(folders)[1:]:
                worker.ask("make_quantized", folder=str(folders["fp32"]), out=str(folders[form]), form=form)
        for way, (form, start) in WAYS.items():
            progress(way)
            with Worker("memory", 1, python) as worker:
                source = "fp32" if "quantize_" in way else form
                found = worker.ask("memory", way=way, folder=str(folders[source]))
            for moment, value in found.items():
                run.add("memory", way, "memory_mb", (AXIS, moment), (value,) * 3, {"starts_from": start})
        for form in FORMS:
            progress(f"the encoder, {form}")
            folder = str(Path(temporary, f"encoder-{form}"))
            with Worker("memory", 1, python) as worker:
                worker.ask("make_encoder", out=folder, form=form, seed=SEED)
            with Worker("memory", 1, python) as worker:
                found = worker.ask("encoder_size", folder=folder)
            for where, value in found.items():
                run.add("memory", form, "encoder_mb", ("where", where), (value,) * 3)
    return run
