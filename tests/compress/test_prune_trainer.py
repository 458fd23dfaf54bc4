"""PruneCallback under transformers' Trainer: zeros are exact at every step, in checkpoints, after resuming."""

import warnings

import pytest
import torch
from torch.utils.data import Dataset

import bertkern as bk
from tests.tiny_models import VOCABULARY, tiny

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

CONFIG = bk.BlockPruneConfig(sparsity=0.75, block=(16, 4))
SCHEDULE = bk.PruneSchedule(begin=2, end=8, frequency=2, initial=0.25)
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


class Words(Dataset):
    """Random ids; the label is whether the first one is large."""

    def __init__(self, size: int):
        self.ids = torch.randint(5, VOCABULARY, (size, 11), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (ids[0] > VOCABULARY // 2).long()}


class Watch(TrainerCallback):
    """What stands in the model after every step, when nobody else writes to it any more."""

    def __init__(self, pruning: bk.PruneCallback):
        self.pruning, self.steps, self.substeps = pruning, {}, 0

    def on_substep_end(self, args, state, control, **_):
        self.substeps += 1

    def on_step_end(self, args, state, control, *, model, **_):
        for name, mask in self.pruning.pruner.masks.pruned.items():
            assert torch.equal(model.get_parameter(name) == 0, mask), name
        self.steps[state.global_step] = float((model.get_parameter(QUERY) == 0).double().mean())


def trainer(folder, model=None, callback=None, **options):
    """A Trainer of AdamW with weight decay, 12 steps unless told otherwise."""
    arguments = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "seed": 0,
    }
    model = tiny("BertForSequenceClassification", num_labels=2) if model is None else model
    callback = callback or bk.PruneCallback(CONFIG, SCHEDULE)
    watch = Watch(callback)
    made = Trainer(
        model,
        TrainingArguments(**{**arguments, **options}),
        train_dataset=Words(72),
        eval_dataset=Words(16),
        callbacks=[callback, watch],
    )
    return made, watch


def sparsity(step: int) -> float:
    """Of the query, 3 x 12 blocks, by the formula."""
    if step < 2:
        return 0.0
    last = min(step - step % 2, 8)
    return round(36 * (0.75 + (0.25 - 0.75) * (1 - (last - 2) / 6) ** 3)) / 36


@pytest.mark.parametrize("accumulate", [1, 3])
def test_zeros_are_exact_at_every_step(accumulate, tmp_path):
    made, watch = trainer(tmp_path, gradient_accumulation_steps=accumulate)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    made.train()
    assert watch.substeps == 12 * (accumulate - 1)
    assert watch.steps == {step: pytest.approx(sparsity(step)) for step in range(1, 13)}
    after = made.model.state_dict()
    assert after.keys() == before.keys(), "plain weights"
    table = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])
    assert (after["classifier.weight"] != 0).all() and int((after[table] == 0).sum()) == int((before[table] == 0).sum())
    assert not made.model.get_parameter(QUERY)._backward_hooks, "nothing is held after training"

    made.save_model(str(tmp_path / "model"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert all(torch.equal(value, after[name]) for name, value in loaded.state_dict().items())
    masks = watch.pruning.pruner.masks.pruned
    assert len(masks) == 13 and all(torch.equal(loaded.get_parameter(n) == 0, mask) for n, mask in masks.items())


@pytest.mark.parametrize("stop", [1, 5, 8, 10])
def test_resuming_from_a_checkpoint_is_as_if_never_stopped(stop, tmp_path):
    whole, _ = trainer(tmp_path / "runs", save_strategy="steps", save_steps=stop)
    whole.train()
    again, watch = trainer(tmp_path / "other", model=tiny("BertForSequenceClassification", seed=9, num_labels=2))
    again.train(resume_from_checkpoint=str(tmp_path / "runs" / f"checkpoint-{stop}"))
    assert watch.steps == {step: pytest.approx(sparsity(step)) for step in range(stop + 1, 13)}
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())


def test_checkpoints_hold_the_zeros(tmp_path):
    made, _ = trainer(tmp_path, save_strategy="steps", save_steps=4)
    made.train()
    for step in (4, 8, 12):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"checkpoint-{step}")
        assert float((loaded.get_parameter(QUERY) == 0).double().mean()) == pytest.approx(sparsity(step))


class Worse(Trainer):
    """Every evaluation is worse than the one before."""

    def _evaluate(self, *args, **kwargs):
        metrics = super()._evaluate(*args, **kwargs)
        return {**metrics, "eval_loss": float(self.state.global_step)}


def test_the_best_model_is_a_pruned_one(tmp_path):
    callback = bk.PruneCallback(CONFIG, SCHEDULE)
    options = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    made, _ = trainer(tmp_path, callback=callback, load_best_model_at_end=True, **options)
    made.__class__ = Worse
    made.train()
    assert made.state.best_global_step == 8, "the first one that is pruned as asked"
    assert float((made.model.get_parameter(QUERY) == 0).double().mean()) == 0.75


def test_a_training_that_ends_too_early_is_told(tmp_path):
    made, watch = trainer(tmp_path, max_steps=5)
    with pytest.warns(UserWarning, match="training ends after 5 steps, the schedule after 8"):
        made.train()
    assert watch.steps[5] == pytest.approx(sparsity(5))


def test_training_twice_prunes_twice(tmp_path):
    callback = bk.PruneCallback(CONFIG, bk.PruneSchedule.one_shot(1))
    for max_steps in (2, 3):
        made, watch = trainer(tmp_path, callback=callback, max_steps=max_steps)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            made.train()
        assert watch.steps == {1: 0.75, **dict.fromkeys(range(2, max_steps + 1), 0.75)}


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"expected a config such as BlockPruneConfig. Got PruneSchedule"):
        bk.PruneCallback(SCHEDULE, CONFIG)
    with pytest.raises(TypeError, match=r"expected schedule to be a PruneSchedule. Got NoneType"):
        bk.PruneCallback(CONFIG, None)


def test_the_package_names_the_callback():
    from bertkern.compress import prune

    assert prune.PruneCallback is bk.PruneCallback
    with pytest.raises(AttributeError, match="no attribute 'Callback'"):
        _ = prune.Callback
