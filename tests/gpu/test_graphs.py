"""Pools of CUDA graphs: their logic, on a stand-in for torch.cuda."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch

import bertkern as bk
from bertkern.gpu.graphs import GraphPool, bucket
from tests.gpu.fake_cuda import FakeCuda
from tests.gpu.measures import sqnr
from tests.tiny_models import inputs, tiny


def pool_of(**options) -> tuple[GraphPool, FakeCuda]:
    fake = FakeCuda()
    return GraphPool(cuda=fake, **options), fake


def double(pool: GraphPool, x: torch.Tensor, *, stamp=0, key=None, wide=None, function=None):
    """2 x by a graph."""
    shape = (len(x),) if wide is None else (wide,)
    return pool.run(
        stamp,
        shape if key is None else key,
        function or (lambda x: (2 * x,)),
        {"x": x},
        {"x": (shape, 0)},
        lambda outputs: outputs[0][: len(x)].clone(),
    )


def test_results_are_copies_of_what_each_call_asks():
    pool, fake = pool_of()
    made = [double(pool, torch.arange(3.0) + i) for i in range(4)]
    for i, y in enumerate(made):
        assert torch.equal(y, 2 * (torch.arange(3.0) + i))
    assert (fake.captures, fake.replays, len(pool)) == (1, 4, 1)


def test_what_lies_beyond_an_input_is_filled_again():
    pool, fake = pool_of()
    seen = []

    def total(x):
        seen.append(x.clone())
        return (x.cumsum(0),)

    assert double(pool, torch.ones(7), wide=8, function=total).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert double(pool, torch.ones(2), wide=8, function=total).tolist() == [1, 2]
    assert seen[-1].tolist() == [1, 1, 0, 0, 0, 0, 0, 0] and fake.captures == 1


def test_the_least_recently_used_graph_goes_first():
    pool, fake = pool_of(max_graphs=2)
    for size in (1, 2, 1, 3, 1, 2):
        assert torch.equal(double(pool, torch.ones(size)), torch.full((size,), 2.0))
    # 3 took the place of 2, then 2 that of 3.
    assert (fake.captures, fake.resets, len(pool)) == (4, 2, 2)
    assert fake.finished == 2 and len(fake.pools) == 1


def test_another_stamp_drops_all_graphs():
    pool, fake = pool_of()
    double(pool, torch.ones(1)), double(pool, torch.ones(2))
    assert torch.equal(double(pool, torch.ones(1), stamp=1, function=lambda x: (3 * x,)), torch.full((1,), 3.0))
    assert (fake.captures, fake.resets, len(pool)) == (3, 2, 1)


def test_out_of_memory_is_said_once_and_not_tried_again():
    pool, fake = pool_of()
    fake.fails = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB.")
    with pytest.warns(UserWarning, match=r"cuda_graphs: runs uncaptured.*out of memory"):
        assert double(pool, torch.ones(1)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert double(pool, torch.ones(1)) is None
        assert double(pool, torch.ones(2)) is None
    fake.fails = None
    assert double(pool, torch.ones(1)) is None, "a key that failed is not captured at every call"
    assert double(pool, torch.ones(3)) is not None
    # With other weights it is tried again.
    assert double(pool, torch.ones(1), stamp=1) is not None


def test_a_function_that_goes_another_way_is_not_captured():
    pool, fake = pool_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert double(pool, torch.ones(1), function=lambda x: None) is None
    assert fake.captures == 0 and len(pool) == 0


def test_aside_while_capturing():
    pool, fake = pool_of()
    fake.busy = True
    assert double(pool, torch.ones(1)) is None
    assert fake.captures == 0


def test_errors_that_are_no_runtime_errors_pass():
    pool, _ = pool_of()
    with pytest.raises(ZeroDivisionError):
        double(pool, torch.ones(1), function=lambda x: (x / (1 // 0),))
    assert double(pool, torch.ones(2)) is not None


def test_threads_take_turns():
    pool, _ = pool_of(max_graphs=2)
    wrong = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for i in range(60):
            x = torch.randn(1 + (seed + i) % 3, generator=generator)
            y = double(pool, x)
            if y is None or not torch.equal(y, 2 * x):
                wrong.append(x)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_mode_and_no_grad_share_a_graph():
    pool, fake = pool_of()
    with torch.inference_mode():
        assert double(pool, torch.ones(2)).tolist() == [2, 2]
    with torch.no_grad():
        assert double(pool, torch.full((2,), 2.0)).tolist() == [4, 4]
    assert fake.captures == 1


def test_copies_of_a_pool_are_empty():
    pool, _ = pool_of(max_graphs=5)
    double(pool, torch.ones(1))
    for made in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert len(made) == 0 and made.max_graphs == 5


def test_buckets():
    assert [bucket(length, 512) for length in (1, 16, 17, 128, 129, 192, 193, 500, 512, 600)] == [
        16, 16, 32, 128, 192, 192, 256, 512, 512, 600,
    ]  # fmt: skip
    assert bucket(35, 40) == 40 and bucket(3, 2) == 3


# --- models ----------------------------------------------------------------------------------------------------------


def captured(model) -> tuple[torch.nn.Module, FakeCuda]:
    """The module that holds the pool, and what stands for torch.cuda there."""
    bk.cuda_graphs(model, max_graphs=3)
    holders = [module for module in model.modules() if module.__dict__.get("_graphs") is not None]
    assert len(holders) == 1
    fake = FakeCuda()
    holders[0].__dict__["_graphs"] = GraphPool(3, fake)
    return holders[0], fake


def outputs_of(model, batch) -> list[torch.Tensor]:
    with torch.no_grad():
        made = model(**batch)
    return [made[name] for name in ("last_hidden_state", "pooler_output", "logits") if made.get(name) is not None]


@pytest.mark.parametrize(
    ("name", "quantized"),
    [
        ("BertModel", False),
        ("BertModel", True),
        ("BertForSequenceClassification", True),
        ("RobertaModel", True),
        ("ElectraModel", False),
        ("DistilBertForTokenClassification", True),
        ("MPNetModel", False),
        ("AlbertModel", True),
    ],
)
def test_a_model_gives_the_same_by_graphs(on_gpu, name, quantized):
    model = tiny(name)
    model = bk.quantize_(model, measure=False) if quantized else bk.accelerate(model, measure=False)
    batches = [inputs(model, batch, length) for batch, length in ((2, 9), (2, 14), (3, 14), (2, 11), (1, 5))]
    batches.append({"input_ids": batches[0]["input_ids"]})
    left = {key: value.clone() for key, value in batches[1].items()}
    left["attention_mask"][0, :4] = 0
    batches.append(left)
    expected = [outputs_of(model, batch) for batch in batches]
    _, fake = captured(model)
    for batch, wanted in [*zip(batches, expected, strict=True)] * 2:
        for mine, theirs in zip(outputs_of(model, batch), wanted, strict=True):
            # torch's sums depend on the padding, and a code at a border on a last bit.
            assert sqnr(mine, theirs) > (35 if quantized else 100)
    assert fake.replays == 2 * len(batches)


def test_one_graph_serves_a_bucket(on_gpu):
    model = bk.accelerate(tiny("BertModel"), measure=False)
    _, fake = captured(model)
    for length in (1, 7, 16, 12):
        outputs_of(model, inputs(model, 2, length))
    assert fake.captures == 1
    outputs_of(model, inputs(model, 2, 17))
    outputs_of(model, inputs(model, 1, 16))
    assert fake.captures == 3


def test_changed_and_moved_weights_drop_graphs(on_gpu):
    model = bk.accelerate(tiny("BertModel"), measure=False)
    batch = inputs(model)
    _, fake = captured(model)
    outputs_of(model, batch)
    for number, change in enumerate(
        (
            lambda: model.encoder.layer[1].output.dense.weight.mul_(1.5),
            lambda: model.embeddings.word_embeddings.weight.add_(0.25),
            lambda: model.pooler.dense.bias.add_(1),
            lambda: model.encoder.layer[0].output.LayerNorm.weight.mul_(0.5),
            lambda: setattr(model.pooler.dense, "weight", torch.nn.Parameter(torch.randn(48, 48))),
            lambda: model.double().float(),
            lambda: model.load_state_dict({name: 1 * tensor for name, tensor in model.state_dict().items()}),
        )
    ):  # fmt: skip
        with torch.no_grad():
            change()
        got = outputs_of(model, batch)
        assert fake.captures == number + 2, number
        again = bk.accelerate(copy.deepcopy(bk.cuda_graphs(copy.deepcopy(model), False)), measure=False)
        for mine, theirs in zip(got, outputs_of(again, batch), strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)


def test_another_models_changes_drop_nothing(on_gpu):
    model, other = (bk.accelerate(tiny("BertModel"), measure=False) for _ in range(2))
    batch = inputs(model)
    _, fake = captured(model)
    outputs_of(model, batch)
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight.mul_(2)
    outputs_of(other, batch)
    outputs_of(model, batch)
    assert (fake.captures, fake.resets) == (1, 0)


def test_calls_that_ask_for_more_run_uncaptured(on_gpu):
    model = bk.quantize_(tiny("BertModel"), measure=False)
    batch = inputs(model)
    expected = outputs_of(model, batch)
    _, fake = captured(model)
    with torch.no_grad():
        model(**batch, output_hidden_states=True)
        model(inputs_embeds=torch.randn(2, 5, 48))
        assert bk.encode_packed(model, **batch).hidden.shape[0] == int(batch["attention_mask"].sum())
    assert fake.replays == 0
    mine = model(**batch).last_hidden_state.detach()
    real = batch["attention_mask"] > 0
    assert sqnr(mine[real], expected[0][real]) > 20
    assert fake.replays == 0, "with gradients"
    seen = []
    handle = model.pooler.dense.register_forward_hook(lambda *_: seen.append(1))
    outputs_of(model, batch), outputs_of(model, batch)
    assert len(seen) == 2 and fake.replays == 0
    handle.remove()
    mask = torch.ones(2, 4)
    mask[0, 1] = 0
    with bk.head_mask(model, mask):
        masked = outputs_of(model, batch)
    assert fake.replays == 0 and not torch.equal(masked[0], expected[0])
    outputs_of(model, batch)
    assert fake.replays == 1
    model.train()
    with torch.no_grad():
        model(**batch)
    assert fake.replays == 1


def test_sequences_without_a_token_attend_to_their_own_length(on_gpu):
    model = tiny("BertModel", _attn_implementation="eager")
    model = bk.accelerate(model, measure=False)
    batch = inputs(model, 2, 9)
    batch["attention_mask"][1] = 0
    expected = outputs_of(model, batch)
    _, fake = captured(model)
    for mine, theirs in zip(outputs_of(model, batch), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)
    assert fake.replays == 1


def test_the_switch():
    model = bk.accelerate(tiny("BertForSequenceClassification"), measure=False)
    assert bk.cuda_graphs(model) is model and model.bert._graphs.max_graphs == 16
    assert copy.deepcopy(model).bert._graphs is not model.bert._graphs
    bk.cuda_graphs(model, enabled=False)
    assert model.bert._graphs is None
    bk.cuda_graphs(model, max_graphs=2)
    # On a CPU nothing is captured.
    outputs_of(model, inputs(model))
    assert len(model.bert._graphs) == 0
    bk.restore(model)
    assert "_graphs" not in model.bert.__dict__


def test_bad_input():
    with pytest.raises(TypeError, match=r"cuda_graphs: expected a torch\.nn\.Module\. Got str\."):
        bk.cuda_graphs("model")
    with pytest.raises(ValueError, match="expected an accelerated or quantized transformers model"):
        bk.cuda_graphs(tiny("BertModel"))
    with pytest.raises(ValueError, match=r"expected max_graphs of at least 1\. Got 0"):
        bk.cuda_graphs(bk.accelerate(tiny("BertModel"), measure=False), max_graphs=0)
