"""Whole models on a card: what test_encoder.py, test_graphs.py and test_compile.py say of CPU tensors."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import bertkern as bk
from bertkern.config import Int8Config
from bertkern.nn.gpu_encoder import GpuStack
from tests.gpu.measures import sqnr
from tests.gpu.test_encoder import CONFIGS, NAMES, batch_of, run_by
from tests.tiny_models import main_output, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]


def on_card(batch: dict[str, torch.Tensor], device: str = "cuda") -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_families_and_formats(name, config, dtype):
    model = tiny(name)
    batch = batch_of(model, "all")
    with torch.no_grad():
        expected = main_output(run_by(copy.deepcopy(model), CONFIGS[config], exact_attention=True)(**batch))
        card = run_by(model, CONFIGS[config], exact_attention=True).to(dtype).cuda()
        got = main_output(card(**on_card(batch))).cpu()
    assert got.dtype == dtype and not bk.report(card).fallbacks
    least = {torch.float32: 40, torch.float16: 38, torch.bfloat16: 25}[dtype]
    assert sqnr(got, expected) > least
    assert not got[1, 9:].any()


def test_a_forward_pass_waits_for_nothing():
    for config in (None, Int8Config()):
        model = run_by(tiny("BertModel").half().cuda(), config)
        batch = on_card(batch_of(model, "all"))
        with torch.no_grad():
            model(**batch)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                model(**batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "DistilBertModel", "MPNetModel", "AlbertModel"])
def test_graphs_give_the_same(name):
    model = bk.quantize_(tiny(name).half().cuda(), measure=False)
    batches = [on_card(batch_of(model, kind)) for kind in ("none", "trailing", "all")]
    with torch.no_grad():
        expected = [main_output(model(**batch)) for batch in batches]
        bk.cuda_graphs(model, max_graphs=2)
        for _ in range(3):
            for batch, wanted in zip(batches, expected, strict=True):
                assert sqnr(main_output(model(**batch)), wanted) > 45
        next(module for module in model.modules() if type(module) is torch.nn.LayerNorm).bias.add_(1)
        changed = main_output(model(**batches[0]))
        bk.cuda_graphs(model, enabled=False)
        assert sqnr(changed, main_output(model(**batches[0]))) > 45 and sqnr(changed, expected[0]) < 40


def test_graphs_of_threads_and_streams():
    model = bk.cuda_graphs(bk.quantize_(tiny("BertModel").half().cuda(), measure=False), max_graphs=2)
    batches = [on_card(batch_of(model, kind)) for kind in ("none", "trailing", "left", "all")]
    with torch.no_grad():
        expected = [main_output(model(**batch)) for batch in batches]
    torch.cuda.synchronize()
    wrong: list[float] = []

    def work(start: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for i in range(20):
                number = (start + i) % len(batches)
                found = sqnr(main_output(model(**batches[number])), expected[number])
                wrong.extend([found] if found < 45 else [])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_graph_of_the_users_own():
    model = bk.cuda_graphs(bk.quantize_(tiny("BertModel").half().cuda(), measure=False))
    batch = on_card(batch_of(model, "all"))
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = model(**batch).last_hidden_state
        graph.replay()
        assert sqnr(got, expected) > 45


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode):
    model = bk.quantize_(tiny("BertModel").half().cuda(), measure=False)
    batch = on_card(batch_of(model, "all"))
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        compiled = torch.compile(model, mode=mode)
        for _ in range(4):
            got = compiled(**batch).last_hidden_state.clone()
            assert sqnr(got, expected) > 40


def test_tensors_of_two_places_are_refused():
    model = bk.quantize_(tiny("BertModel").half().cuda(), measure=False)
    batch = batch_of(model, "all")
    with torch.no_grad(), pytest.raises(RuntimeError):
        model(**batch)
    with torch.no_grad(), pytest.raises(RuntimeError):
        model(input_ids=batch["input_ids"].cuda(), attention_mask=batch["attention_mask"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_another_device_than_the_current_one():
    model = bk.cuda_graphs(bk.quantize_(tiny("BertModel").half().to("cuda:1"), measure=False))
    assert isinstance(model.encoder._stack, GpuStack)
    batch = on_card(batch_of(model, "all"), "cuda:1")
    with torch.no_grad():
        got = [model(**batch).last_hidden_state for _ in range(2)]
    assert torch.equal(*got) and got[0].device.index == 1
