"""Quantizing needs no more memory than the model and one layer, loading an int8 model no float copy."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

import bertkern as bk

CODE = """
import sys, torch, bertkern as bk
from transformers import AutoModel, BertConfig, BertModel, BertForMaskedLM

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

def restart():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

folder, form = sys.argv[1:]
config = bk.GroupwiseConfig(bits=int(form)) if form.isdigit() else bk.Int8Config(weight=form)
torch.set_num_threads(1)
# What is imported and allocated at first use is not the model's.
small = BertModel(BertConfig(vocab_size=50, hidden_size=24, num_attention_heads=2, num_hidden_layers=1))
bk.quantize_(small.eval(), config).save_pretrained(folder + "/small")
AutoModel.from_pretrained(folder + "/small")

model = BertForMaskedLM(BertConfig(num_hidden_layers=4)).eval()
size, layer = (sum(p.nbytes for p in module.parameters()) // 1024 for module in (model, model.bert.encoder.layer[0]))
model.save_pretrained(folder + "/fp32")
restart()
before = kilobytes("VmRSS")
bk.quantize_(model, config)
print(int(kilobytes("VmHWM") - before), layer, int(kilobytes("VmRSS") - before))
model.save_pretrained(folder + "/int8")

del model
before = kilobytes("VmRSS")
restart()
model = bk.quantize_(BertForMaskedLM.from_pretrained(folder + "/fp32").eval(), config)
print(int(kilobytes("VmHWM") - before - size), layer, int(kilobytes("VmRSS") - before - size))

del model
before = kilobytes("VmRSS")
restart()
model = BertForMaskedLM.from_pretrained(folder + "/int8")
print(int(kilobytes("VmHWM") - before - size // 2), layer, int(kilobytes("VmRSS") - before - size // 2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("form", ["per_channel", "per_tensor", "4"])
def test_peak(form, tmp_path):
    command = [sys.executable, "-c", CODE, str(tmp_path), form]
    done = subprocess.run(command, capture_output=True, text=True)
    if "clear_refs" in done.stderr:
        pytest.skip("the peak cannot be reset here")
    assert done.returncode == 0, done.stderr
    # In memory, from a file, and what was saved: kB above the float model (the int8 one: above half of it).
    for line in done.stdout.splitlines():
        over, layer, after = map(int, line.split())
        assert over <= layer
        assert after < 0


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
