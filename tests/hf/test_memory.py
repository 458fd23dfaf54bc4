"""Quantizing needs no more memory than the model and one layer."""

import subprocess
import sys

import pytest

CODE = """
import torch, bertkern as bk
from transformers import BertConfig, BertModel, BertForMaskedLM

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

# What is imported and allocated at first use is not the model's.
bk.quantize_(BertModel(BertConfig(vocab_size=50, hidden_size=24, num_attention_heads=2, num_hidden_layers=1)))
model = BertForMaskedLM(BertConfig(num_hidden_layers=4)).eval()
layer = sum(p.numel() * p.element_size() for p in model.bert.encoder.layer[0].parameters()) / 1024
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = kilobytes("VmRSS")
bk.quantize_(model, bk.Int8Config(weight={weight!r}))
print(int(kilobytes("VmHWM") - before), int(layer), int(kilobytes("VmRSS") - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("weight", ["per_channel", "per_tensor"])
def test_peak(weight):
    done = subprocess.run([sys.executable, "-c", CODE.format(weight=weight)], capture_output=True, text=True)
    if "clear_refs" in done.stderr:
        pytest.skip("the peak cannot be reset here")
    over, layer, after = map(int, done.stdout.split())
    assert over <= layer
    assert after < 0
