"""Pruning under transformers' Trainer."""

import warnings
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .config import PruneConfig
from .pruner import Pruner
from .schedule import PruneSchedule


class PruneCallback(TrainerCallback):
    """Prunes the model that a Trainer trains; see `Pruner`.

    Steps are those of the optimizer, however many batches' gradients each accumulates. Checkpoints, evaluations and the
    final model hold the zeros as plain dense weights. Where training resumes from a checkpoint, masks are found again
    in its zeros. A checkpoint from before the end of the schedule never counts as the best one: it would come back with
    fewer zeros than asked.

    Args:
        config: what is pruned, how far and in which shape.
        schedule: when, in optimizer steps.

    Attributes:
        pruner: of the current or last training; None before.

    Raises:
        TypeError: something else than a config or a schedule.

    Example::

        callback = bk.PruneCallback(bk.UnstructuredPruneConfig(sparsity=0.9), bk.PruneSchedule(end=2000))
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()

    Source: arXiv 2002.08307.
    """

    def __init__(self, config: PruneConfig, schedule: PruneSchedule) -> None:
        if not isinstance(config, PruneConfig):
            raise TypeError(f"PruneCallback: expected a config such as BlockPruneConfig. Got {type(config).__name__}.")
        if not isinstance(schedule, PruneSchedule):
            raise TypeError(f"PruneCallback: expected schedule to be a PruneSchedule. Got {type(schedule).__name__}.")
        self.config, self.schedule = config, schedule
        self.pruner: Pruner | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        self._release()
        if 0 < state.max_steps < self.schedule.end:
            warnings.warn(
                f"PruneCallback: training ends after {state.max_steps} steps, the schedule after {self.schedule.end}: "
                "the model will not reach the sparsity asked.",
                stacklevel=2,
            )
        self.pruner = Pruner(model, self.config, self.schedule, step=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.pruner.step()
        if state.global_step <= self.schedule.end:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._release()

    def _release(self) -> None:
        if self.pruner is not None:
            self.pruner.remove()
