"""Runs small models by the GPU's path in Triton's interpreter, every operator by its kernel, against the CPU's path.

As interpret.py otherwise; what is compared with is made on the CPU there, too.
"""

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

import bertkern as bk
from bertkern import _triton, gpu
from bertkern.config import GroupwiseConfig, Int8Config
from bertkern.nn.sparse import Form, sparsify
from bertkern.ops import attention_triton, block_sparse, groupwise_triton, int8_triton, rowwise_triton
from tests.gpu.measures import sqnr
from tests.kernels.interpret import ON_CARD, run
from tests.tiny_models import tiny

CALLS: Counter = Counter()
DEVICE = "cuda" if ON_CARD else "cpu"


class Counted:
    """Stands for a module of kernels and counts the calls that come through."""

    def __init__(self, name: str) -> None:
        self.module = _triton.kernels(name)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.module, name)
        if callable(found) and not isinstance(found, type) and name != "supported":
            CALLS[name] += 1
        return found


# What finds the kernels of an operator.
KERNELS = ((rowwise_triton, "_triton_for"), (attention_triton, "_triton_for"), (int8_triton, "_launcher"))


def install() -> None:
    """Has every operator of the path take its kernels."""
    rowwise, attention, block = Counted("rowwise"), Counted("attention"), Counted("block_sparse")
    groupwise, int8 = Counted("groupwise"), Counted("int8_gemm")
    rowwise_triton._triton_for = lambda x, width: rowwise
    attention_triton._triton_for = lambda q: attention
    block_sparse._triton_for = lambda values, shape: block if block.supported(shape, values.dtype) else None
    groupwise_triton._triton_for = lambda x, quantized: groupwise
    int8_triton._launcher = lambda call: int8.int8_linear


def batch() -> dict[str, torch.Tensor]:
    """Trailing and leading padding, a hole, and a sequence of one token."""
    ids = torch.randint(5, 120, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, 6:] = mask[1, :2] = mask[1, 4] = mask[2, 1:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def there(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in given.items()}


def agree(name: str, config: Any, dtype: torch.dtype, least: float, kernels: set[str], **options: Any) -> None:
    """Hidden and pooled states by the kernels, and by the CPU's in fp32."""
    model = tiny(name, num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64)
    given = batch()

    def made(model: torch.nn.Module) -> torch.nn.Module:
        if config is None:
            return bk.accelerate(model, measure=False, **options)
        calibration = {"calibration": [given], "progress": False} if config.activation == "static" else {}
        return bk.quantize_(model, config, measure=False, **calibration, **options)

    with torch.no_grad():
        expected = made(copy.deepcopy(model))(**given)
        before, gpu.runs_on = gpu.runs_on, lambda device: True
        CALLS.clear()
        try:
            given = there(given)
            model = made(model.to(DEVICE, dtype))
            got = model(**given)
        finally:
            gpu.runs_on = before
    assert not bk.report(model).fallbacks, bk.report(model).fallbacks
    assert set(CALLS) == kernels, CALLS
    for mine, theirs in zip(got.to_tuple(), expected.to_tuple(), strict=True):
        assert mine.dtype == dtype and sqnr(mine.cpu(), theirs) > least, sqnr(mine.cpu(), theirs)


def int8_codes() -> None:
    """By kernels and in plain PyTorch a quantized model has the same codes, so nearly the same bits."""
    model = tiny("BertModel", hidden_size=32, num_attention_heads=2, intermediate_size=64).to(DEVICE)
    before, gpu.runs_on = gpu.runs_on, lambda device: True
    try:
        bk.quantize_(model, measure=False, exact_attention=True)
        with torch.no_grad():
            got = model(**there(batch())).last_hidden_state
            for module, name in KERNELS:
                setattr(module, name, lambda *_: None)
            expected = model(**there(batch())).last_hidden_state
    finally:
        install()
        gpu.runs_on = before
    assert sqnr(got, expected) > 60, sqnr(got, expected)


def sparse_blocks() -> None:
    model = tiny("BertModel", hidden_size=32, num_attention_heads=2, intermediate_size=64)
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.intermediate.dense.weight[16:32] = 0
        expected = model(**batch()).last_hidden_state
        for layer in model.encoder.layer:
            sparsify(layer.intermediate.dense, Form("panels", 16, 16))
        before, gpu.runs_on = gpu.runs_on, lambda device: True
        CALLS.clear()
        try:
            got = bk.accelerate(model.to(DEVICE), measure=False)(**there(batch())).last_hidden_state.cpu()
        finally:
            gpu.runs_on = before
    assert CALLS["block_sparse_linear"] == 2
    real = batch()["attention_mask"] > 0
    assert sqnr(got[real], expected[real]) > 100


ROWS = {"embeddings", "arrangement", "gather_rows", "add_layernorm"}
PATHS = {
    "BertModel-float": ("BertModel", None, torch.float32, 100, ROWS | {"attention"}, {}),
    "BertModel-fp16": ("BertModel", None, torch.float16, 45, ROWS | {"attention"}, {}),
    "RobertaModel-float": ("RobertaModel", None, torch.float32, 100, ROWS | {"attention"}, {}),
    "BertModel-int8": (
        "BertModel", Int8Config(), torch.float32, 40, ROWS | {"attention", "quantize_rows", "int8_linear"},
        {"exact_attention": True},
    ),
    "RobertaModel-int8-fp16": (
        "RobertaModel", Int8Config(), torch.float16, 38, ROWS | {"attention", "quantize_rows", "int8_linear"},
        {"exact_attention": True},
    ),
    "DistilBertModel-int8": (
        "DistilBertModel", Int8Config(weight="per_tensor"), torch.float32, 40,
        ROWS | {"attention", "quantize_rows", "int8_linear"}, {"exact_attention": True},
    ),
    "BertModel-static": (
        "BertModel", Int8Config(activation="static"), torch.float32, 40,
        ROWS | {"attention", "quantize_rows", "int8_linear"}, {"exact_attention": True},
    ),
    "BertModel-groupwise": (
        "BertModel", GroupwiseConfig(bits=4, groups=None, group_size=8), torch.float16, 38,
        ROWS | {"attention", "groupwise_linear", "quantize_activations", "Weight"} - {"Weight"},
        {"exact_attention": True},
    ),
}  # fmt: skip


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for name, (model, config, dtype, least, kernels, options) in PATHS.items():
        yield name, lambda a=(model, config, dtype, least, kernels), o=options: agree(*a, **o)
    for check in (int8_codes, sparse_blocks):
        yield check.__name__, check


def main() -> int:
    # Models and batches are made on the CPU; what runs by the kernels goes to the card.
    torch.set_default_device(None)
    install()
    return run(cases())


if __name__ == "__main__":
    sys.exit(main())
