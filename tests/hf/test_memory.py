"""Quantizing needs no more memory than the model and one layer, loading an int8 model no float copy."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

import bertkern as bk

CODE = """
import sys, torch, bertkern as bk
from transformers import AutoModel, BertConfig, BertModel, BertForMaskedLM

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

def restart():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

folder, form, way = sys.argv[1:]
config = bk.GroupwiseConfig(bits=int(form)) if form.isdigit() else bk.Int8Config(weight=form)
torch.set_num_threads(1)
# What is imported and allocated at first use is not the model's.
small = BertModel(BertConfig(vocab_size=50, hidden_size=24, num_attention_heads=2, num_hidden_layers=1))
bk.quantize_(small.eval(), config).save_pretrained(folder + "/small")
AutoModel.from_pretrained(folder + "/small")

before = kilobytes("VmRSS")
if way == "in memory":
    model = BertForMaskedLM(BertConfig(num_hidden_layers=4)).eval()
    model.save_pretrained(folder + "/fp32")
    before = kilobytes("VmRSS")
    restart()
    bk.quantize_(model, config)
    peak, after = kilobytes("VmHWM"), kilobytes("VmRSS")
    model.save_pretrained(folder + "/int8")
else:
    restart()
    if way == "from a file":
        model = bk.quantize_(BertForMaskedLM.from_pretrained(folder + "/fp32").eval(), config)
    else:
        model = BertForMaskedLM.from_pretrained(folder + "/int8")
    peak, after = kilobytes("VmHWM"), kilobytes("VmRSS")
print(peak - before, after - before)
"""
WAYS = ("in memory", "from a file", "what was saved")


def float_kilobytes():
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig(num_hidden_layers=4))
    return [sum(p.nbytes for p in module.parameters()) // 1024 for module in (model, model.bert.encoder.layer[0])]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("form", ["per_channel", "per_tensor", "4"])
def test_peak(form, tmp_path):
    size, layer = float_kilobytes()
    # Each way in a process of its own: where a model was freed before, nobody knows what is resident anew.
    for way in WAYS:
        command = [sys.executable, "-c", CODE, str(tmp_path), form, way]
        done = subprocess.run(command, capture_output=True, text=True)
        if "clear_refs" in done.stderr:
            pytest.skip("the peak cannot be reset here")
        assert done.returncode == 0, done.stderr
        peak, after = map(int, done.stdout.split())
        # Beside the float model that is there or comes in; an int8 one takes less than half of it.
        allowed = {"in memory": 0, "from a file": size, "what was saved": size // 2}[way]
        assert peak <= allowed + layer, way
        assert after < allowed, way


def resident_of(file: Path) -> int:
    """Resident bytes of a mapped file."""
    inside, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            inside = line.endswith(str(file))
        elif inside and first == "Rss:":
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("config", [None, bk.Int8Config(), bk.GroupwiseConfig(bits=2)], ids=["float", "int8", "2 bits"])
def test_what_the_kernels_have_copies_of_is_not_resident_beside_them(config, tmp_path):
    sizes = {"vocab_size": 50, "max_position_embeddings": 16, "hidden_size": 512, "intermediate_size": 2048}
    model = BertModel(BertConfig(**sizes, num_hidden_layers=3, num_attention_heads=8)).eval()
    (model if config is None else bk.quantize_(model, config)).save_pretrained(tmp_path)
    del model
    loaded = BertModel.from_pretrained(tmp_path).eval()
    if config is None:
        bk.accelerate(loaded)
    with torch.no_grad():
        loaded(torch.ones(1, 4, dtype=torch.long))
    # The norm of the embeddings is read at every call: its page, and those that the system brings along.
    assert resident_of(tmp_path / "model.safetensors") <= 2**20
