"""The encoder on a GPU, over tensors: what `bertkern.nn` and `bertkern.families` run where a model is on CUDA.

    packing    where tokens stand once the padding is left out, without a word to the host
    rows       hidden states on their way through a layer, and their int8 codes
    linears    linear layers as the GPU's operators take them
    encoder    the layers, one operator after another
    graphs     CUDA graphs of whole models

Written once for every device: on a CPU the operators are plain PyTorch, which is how this package is tested without a
card. Nothing in a forward pass asks the GPU for a value. No card has run it yet.
"""

import torch


def runs_on(device: torch.device) -> bool:
    """Whether models on `device` run by this package."""
    return device.type == "cuda"
