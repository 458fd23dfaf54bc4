"""The switch for CUDA graphs of accelerated and quantized models."""

from torch import nn

from .gpu.graphs import GraphPool
from .swap import expect_module


def cuda_graphs(model: nn.Module, enabled: bool = True, *, max_graphs: int = 16) -> nn.Module:
    """Has an accelerated or quantized model replay CUDA graphs where it is on a GPU; in place, returns the model.

    A call without gradients that asks for the last hidden states alone, of ids [B, L] and a mask [B, L], is then one
    launch instead of some ninety: embeddings, encoder and pooler of BERT, RoBERTa, ELECTRA and DistilBERT, the encoder
    of the others. Graphs are captured at the first call of a batch and a length, which is rounded up (multiples of 16,
    from 128 tokens on of 64); whatever the mask, one serves. Results are copies. Calls of several threads and streams
    take turns. Weights that change, move or are exchanged drop the graphs. Other calls, calls that are being captured
    or compiled themselves, and calls for which no memory is left run as without.

    Args:
        model: a transformers model, or a module with one inside, that `accelerate` or `quantize_` has made run by the
            kernels. On a CPU the switch does nothing until the model is moved.
        enabled: whether; False drops all graphs.
        max_graphs: how many are kept of each device; the one that was used longest ago goes first.

    Raises:
        TypeError, ValueError: no module, one without a fused encoder, or a bound below 1.

    Example::

        model = bk.cuda_graphs(bk.quantize_(model.half().cuda().eval()))
    """
    expect_module("cuda_graphs", model)
    if enabled and max_graphs < 1:
        raise ValueError(f"cuda_graphs: expected max_graphs of at least 1. Got {max_graphs}.")
    from .families._fused import FusedEncoder
    from .families._model import FusedModel

    modules = list(model.modules())
    models = [module for module in modules if isinstance(module, FusedModel)]
    inside = {id(module) for root in models for module in root.modules()}
    encoders = [module for module in modules if isinstance(module, FusedEncoder) and id(module) not in inside]
    found = models + encoders
    if not found:
        raise ValueError("cuda_graphs: expected an accelerated or quantized transformers model. Got none.")
    for module in found:
        before = module.__dict__.pop("_graphs", None)
        if before is not None:
            before.clear()
        if enabled:
            module.__dict__["_graphs"] = GraphPool(max_graphs)
    return model
