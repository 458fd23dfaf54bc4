"""A forward pass by the GPU's path asks the device for nothing: every operator that would wait for it is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bertkern as bk
from bertkern.nn import gpu_encoder
from tests.gpu.test_encoder import CONFIGS, NAMES, batch_of, model_of, run_by
from tests.tiny_models import tiny

_WAITING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::is_nonzero",
    "aten::equal",
    "aten::allclose",
    "aten::masked_select",
    "aten::unique2",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::histc",
    "aten::argwhere",
    "aten::segment_reduce",
}


class Refusing(TorchDispatchMode):
    """Raises at what would wait for a GPU, were the tensors there.

    The operators of bertkern are looked into by their kernels' tests: plain PyTorch stands for them here.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        masks = [x for part in args[1:2] if isinstance(part, (list, tuple)) for x in part if isinstance(x, Tensor)]
        by_mask = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            x.dtype in (torch.bool, torch.uint8) for x in masks
        )
        lengths = name == "aten::repeat_interleave" and (kwargs or {}).get("output_size") is None
        # Tensors made of a list of the host's. (A copy between devices is none where all tensors are on one.)
        host = name == "aten::lift_fresh"
        if name in _WAITING or by_mask or lengths or host:
            raise AssertionError(f"{name} would wait for the GPU")
        if function.namespace == "bertkern":
            with torch._C._DisableTorchDispatch():
                return function(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def test_the_mode_refuses():
    x, keys = torch.ones(3), torch.ones(3, dtype=torch.bool)
    for wait in (
        lambda: x.sum().item(),
        lambda: bool((x > 0).all()),
        lambda: x.nonzero(),
        lambda: x[keys],
        lambda: torch.equal(x, x),
        lambda: torch.tensor([1, 2]),
        lambda: x.repeat_interleave(x.long()),
    ):
        with pytest.raises(AssertionError, match="would wait for the GPU"), Refusing():
            wait()
    with Refusing():
        torch.where(keys, x, 0).cumsum(0)


CASES = [(name, config, "sdpa") for name in NAMES for config in ("float", "int8")]
CASES += [("BertModel", config, "eager") for config in ("int8", "static", "groupwise")]
CASES += [("BertForSequenceClassification", "int8", "sdpa"), ("RobertaForTokenClassification", "float", "sdpa")]


@pytest.mark.parametrize(("name", "config", "attention"), CASES)
def test_a_forward_pass_waits_for_nothing(on_gpu, name, config, attention):
    model = run_by(model_of(name, attention), CONFIGS[config])
    for kind in ("none", "all", "empty"):
        batch = batch_of(model, kind)
        with torch.no_grad():
            expected = model(**batch)[0]
            # Positions are cached by length, and constants by device.
            with Refusing():
                got = model(**batch)[0]
        assert torch.equal(got, expected)
    assert not bk.report(model).fallbacks


def test_what_is_made_while_a_graph_is_captured_is_not_kept(monkeypatch):
    """It lies in the graph's memory, empty until it runs."""
    full, made, capturing = torch.full, [], False
    monkeypatch.setattr(torch, "full", lambda *given, device, **named: made.append(full(*given, **named)) or made[-1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    gpu_encoder._kept.cache_clear()
    for now, count in ((True, 1), (True, 2), (False, 3), (False, 3), (True, 4)):
        capturing = now
        got = gpu_encoder.constant(1, torch.float32, torch.device("cuda:0"))
        assert len(made) == count and got is made[count - 1]
    gpu_encoder._kept.cache_clear()


def test_head_masks_and_hidden_states_wait_for_nothing(on_gpu, monkeypatch):
    model = bk.accelerate(tiny("BertModel"), measure=False)
    batch, mask = batch_of(model, "all"), torch.tensor([[1.0, 0, 0.5, 1], [0, 1, 1, 2]])
    with torch.no_grad():
        model(**batch)
        with bk.head_mask(model, mask):
            expected = model(**batch).last_hidden_state
            with Refusing():
                assert model(**batch).last_hidden_state.shape == expected.shape
        with Refusing():
            assert len(model(**batch, output_hidden_states=True).hidden_states) == 3
