"""torch.compile over the GPU's path: the operators are known to it, one graph, the same results."""

from __future__ import annotations

import pytest
import torch

import bertkern as bk
from tests.gpu.measures import sqnr
from tests.gpu.test_encoder import CONFIGS, batch_of, run_by
from tests.tiny_models import tiny


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("config", ["float", "int8", "groupwise"])
@pytest.mark.parametrize("name", ["BertModel", "DistilBertModel"])
def test_one_graph(on_gpu, name, config):
    model = run_by(tiny(name), CONFIGS[config])
    batch = batch_of(model, "all")
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            got = compiled(**batch).last_hidden_state
            assert sqnr(got, expected) > 100
    assert not bk.report(model).fallbacks


def test_the_encoder_is_not_left_out(on_gpu):
    """What is compiled are the operators, not the plain path."""
    model = bk.quantize_(tiny("BertModel"), measure=False)
    batch, seen = batch_of(model, "all"), []

    def backend(graph, example):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.no_grad():
        model(**batch)
        torch.compile(model, backend=backend, fullgraph=True)(**batch)
    names = [name for name in seen if "bertkern" in name]
    for wanted, count in (
        ("embed_cuda", 1), ("arrange_cuda", 1), ("int8_linear_cuda", 8), ("attention_packed_cuda", 2),
        ("add_layernorm_quantize_cuda", 3), ("add_layernorm_cuda", 1), ("gather_rows_cuda", 2),
    ):  # fmt: skip
        assert sum(wanted in name for name in names) == count, (wanted, names)
