"""What people do with a transformers model goes on working: compile, export, autocast, threads, Trainer, pipelines."""

import re
import threading

import pytest
import torch
import transformers
from transformers.models.mpnet import modeling_mpnet

import bertkern as bk
from tests.families.zoo import FAMILIES, inputs, make, padded

SWAPS = [bk.accelerate, bk.quantize_]


# Older releases of transformers give MPNet a mask of four dimensions, which cannot be judged while tracing.
TRACED = [family for family in FAMILIES if family != "MPNet" or hasattr(modeling_mpnet, "create_bidirectional_mask")]


@pytest.mark.parametrize("family", TRACED)
@pytest.mark.parametrize("swap", SWAPS)
def test_compile(family, swap):
    torch._dynamo.reset()
    model = swap(make(family + "ForSequenceClassification"))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for batch, length in ((3, 11), (2, 7), (5, 16)):
            call = inputs(model, batch, length)
            call["attention_mask"][0, 4:] = 0
            assert torch.equal(compiled(**call).logits, model(**call).logits)
    assert not bk.report(model).fallbacks


def test_compile_before_any_call_and_after_a_load():
    torch._dynamo.reset()
    model, other = bk.quantize_(make("BertModel")), bk.quantize_(make("BertModel", hidden_act="relu"))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    call = inputs(model)
    with torch.no_grad():
        first = compiled(**call).last_hidden_state
        assert torch.equal(first, model(**call).last_hidden_state)
        other.encoder.layer[0].output.dense.weight_scale.mul_(2)
        model.load_state_dict(other.state_dict())
        second = compiled(**call).last_hidden_state
        assert not torch.equal(first, second)
        assert torch.equal(second, model(**call).last_hidden_state)


@pytest.mark.parametrize("family", TRACED)
@pytest.mark.parametrize("swap", SWAPS)
def test_export(family, swap):
    model = swap(make(family + "Model"))
    call = padded(model, "trailing")
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=32)}
    with torch.no_grad():
        program = torch.export.export(model, (), call, dynamic_shapes=dict.fromkeys(call, sizes))
        assert len(re.findall(r"bertkern\.\w*encoder\.", str(program.graph))) == 1
        other = inputs(model, 2, 7)
        got = program.module()(**other)
        assert torch.equal(got.last_hidden_state, model(**other).last_hidden_state)


@pytest.mark.parametrize("swap", SWAPS)
def test_autocast_and_inference_mode(swap):
    model = swap(make("BertForSequenceClassification"))
    call = padded(model, "trailing")
    with torch.no_grad():
        expected = model(**call).logits
    with torch.inference_mode():
        assert torch.equal(model(**call).logits, expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(**call).logits.float(), expected, atol=0.05, rtol=0.05)
    assert torch.equal(model(**call).logits, expected)
    assert not bk.report(model).fallbacks


@pytest.mark.parametrize("swap", SWAPS)
def test_swapped_in_inference_mode(swap):
    expected_model, model = swap(make("BertModel")), make("BertModel")
    call = inputs(model)
    with torch.inference_mode():
        swap(model)
        got = model(**call).last_hidden_state
        assert torch.equal(got, expected_model(**call).last_hidden_state)


@pytest.mark.parametrize("swap", SWAPS)
def test_many_threads_call_one_model(swap):
    model = swap(make("BertForSequenceClassification"))
    calls = [inputs(model, batch, 5 + batch, seed=batch) for batch in range(1, 7)]
    with torch.no_grad():
        expected = [model(**call).logits for call in calls]
    for module in model.modules():
        module.__dict__.pop("_stack", None)
        module.__dict__.pop("_packed", None)
    wrong = []

    def work(call, logits):
        with torch.no_grad():
            wrong.extend(1 for _ in range(5) if not torch.equal(model(**call).logits, logits))

    workers = [threading.Thread(target=work, args=pair) for pair in zip(calls, expected, strict=False)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


class Pairs(torch.utils.data.Dataset):
    def __init__(self, model):
        self.ids = inputs(model, batch=6)["input_ids"]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": index % 2}


@pytest.mark.parametrize("swap", SWAPS)
def test_trainer_evaluates(swap, tmp_path):
    pytest.importorskip("accelerate")
    model = swap(make("BertForSequenceClassification"))
    data = Pairs(model)
    arguments = transformers.TrainingArguments(tmp_path, report_to=[], use_cpu=True, per_device_eval_batch_size=3)
    trainer = transformers.Trainer(model, arguments, eval_dataset=data)
    with torch.no_grad():
        expected = model(input_ids=data.ids, labels=torch.tensor([0, 1] * 3)).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert not bk.report(model).fallbacks


def test_trainer_trains_an_accelerated_model(tmp_path):
    pytest.importorskip("accelerate")
    model = bk.accelerate(make("BertForSequenceClassification"))
    arguments = transformers.TrainingArguments(tmp_path, report_to=[], use_cpu=True, max_steps=3, save_strategy="no")
    before = model.classifier.weight.detach().clone()
    transformers.Trainer(model, arguments, train_dataset=Pairs(model)).train()
    assert not torch.equal(model.classifier.weight, before)
    call = inputs(model.eval())
    with torch.no_grad():
        got = model(**call).logits
        torch.testing.assert_close(got, bk.restore(model)(**call).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("swap", SWAPS)
def test_sentence_transformers(swap, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += ["a", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(tmp_path / "bert")
    make("BertModel", pad_token_id=0).save_pretrained(tmp_path / "bert")
    import sentence_transformers.models as modules

    transformer = modules.Transformer(str(tmp_path / "bert"), max_seq_length=16)
    pooling = modules.Pooling(52)
    model = sentence_transformers.SentenceTransformer(
        modules=[transformer, pooling, modules.Dense(52, 13)], device="cpu"
    )
    sentences = ["a quick brown fox", "the lazy dog", "the quick dog jumps over the lazy brown fox"]
    expected = torch.from_numpy(model.encode(sentences))
    swap(model)
    got = torch.from_numpy(model.encode(sentences))
    torch.testing.assert_close(got, expected, atol=2e-5 if swap is bk.accelerate else 0.3, rtol=1e-4)
    rows = [row for row in bk.report(model).rows if row.runs == "one operator"]
    assert len(rows) == 6 and not bk.report(model).fallbacks
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert bk.plan.quantized_modules(loaded).keys() == bk.plan.quantized_modules(model).keys()
    again = torch.from_numpy(bk.accelerate(loaded).encode(sentences))
    assert torch.equal(again, got)
