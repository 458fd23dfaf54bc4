"""A prepared model under transformers' Trainer: it learns, its ranges are saved with it, and it converts."""

import pytest
import torch
from torch.utils.data import Dataset

import bertkern
from bertkern.checkpoints import load_checkpoint
from bertkern.compress.q8bert import FakeQuantLinear, OpSettings, Q8BertConfig, convert, prepare_qat
from tests import reference
from tests.tiny_models import VOCABULARY, tiny

START = 4


class Majority(Dataset):
    """Sequences of small and large ids; the label says which are more."""

    def __init__(self, size: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, 2, (size,), generator=generator)
        large = torch.rand(size, 13, generator=generator) < torch.where(self.labels > 0, 0.9, 0.1)[:, None]
        low = torch.randint(5, VOCABULARY // 2, (size, 13), generator=generator)
        self.ids = torch.where(large, low + VOCABULARY // 2 - 5, low)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": self.labels[index]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(trainer, folder of the saved model) after a hundred steps."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    folder = tmp_path_factory.mktemp("trainer")
    config = Q8BertConfig.uniform(start_step=START, ema_decay=0.9).replace(
        head=OpSettings(start_step=START, ema_decay=0.9, requantize_output=False)
    )
    model = prepare_qat(tiny("BertForSequenceClassification", num_labels=2, initializer_range=0.05), config)
    arguments = TrainingArguments(
        output_dir=str(folder / "runs"),
        max_steps=100,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        learning_rate=1e-3,
        logging_steps=10,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        seed=0,
    )
    trainer = Trainer(model, arguments, train_dataset=Majority(512, 0), eval_dataset=Majority(256, 1))
    trainer.train()
    trainer.save_model(str(folder / "model"))
    return trainer, folder / "model"


def test_the_loss_falls(trained):
    losses = [entry["loss"] for entry in trained[0].state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert trained[0].evaluate()["eval_loss"] < 0.5 * losses[0]


def test_every_range_was_learned(trained):
    layers = [module for module in trained[0].model.modules() if isinstance(module, FakeQuantLinear)]
    assert len(layers) == 14
    for layer in layers:
        assert layer._step == 100 and layer.input_thresh > 0
        assert not layer.settings.requantize_output or layer.output_thresh > 0


def test_ranges_reload(trained):
    trainer, folder = trained
    loaded = load_checkpoint(folder)
    expected = trainer.model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    ids = Majority(8, 2).ids
    assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_training_resumes_from_the_loaded_ranges(trained):
    model = load_checkpoint(trained[1]).train()
    before = float(model.classifier.input_thresh)
    model(Majority(8, 3).ids).logits.sum().backward()
    assert model.classifier._step == 101
    assert float(model.classifier.input_thresh) == pytest.approx(before, rel=0.2)


@pytest.fixture(scope="module")
def int8(trained):
    """The int8 model of the trained one, fused."""
    return bertkern.accelerate(convert(load_checkpoint(trained[1])))


def test_the_trained_model_converts(trained, int8):
    simulated = load_checkpoint(trained[1])
    data = Majority(1000, 4)
    with torch.no_grad():
        expected = simulated(data.ids).logits
        actual = int8(data.ids).logits
        unfused = convert(simulated)(data.ids).logits
    assert (expected.argmax(-1) == data.labels).double().mean() > 0.95
    assert reference.sqnr(expected, actual) >= 40
    assert reference.agreement(expected, actual) >= 0.995
    assert bertkern.cpu_isa() == "portable" or torch.equal(unfused, expected)
    assert not bertkern.report(int8).fallbacks


def test_trainer_evaluates_the_int8_model_before_and_after_saving(trained, int8, tmp_path):
    trainer, _ = trained
    int8.save_pretrained(tmp_path)
    loaded = type(int8).from_pretrained(tmp_path)
    simulated = trainer.evaluate()["eval_loss"]
    kind = type(trainer)
    before, after = (
        kind(model, trainer.args, eval_dataset=trainer.eval_dataset).evaluate()["eval_loss"] for model in (int8, loaded)
    )
    assert before == after
    assert before == pytest.approx(simulated, rel=1e-2)
    assert loaded.config.quantization_config.config.activation == "static"
