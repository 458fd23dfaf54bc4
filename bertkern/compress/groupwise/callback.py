"""Quantization-aware training under transformers' Trainer."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bertkern.config import GroupwiseConfig

from .conversion import convert
from .prepare import KINDS, prepare_qat


class GroupwiseQatCallback(TrainerCallback):
    """Trains the model of a Trainer as a low-bit one; see `prepare_qat`.

    The model is prepared when the Trainer is made, or when training begins for a callback that is added later.
    Checkpoints hold the float weights and the ranges; training goes on from them. One from before the first quantized
    step never counts as the best.

    Args:
        config: what is quantized, and how.
        start_step: optimizer steps in floating point before the first quantized one; under gradient accumulation
            as many times more batches.
        weight_decay, input_decay: see `prepare_qat`.
        convert: whether the model is converted when training ends; else it stays prepared, for `convert`.

    Raises:
        TypeError: something else than a GroupwiseConfig.

    Example::

        arguments = TrainingArguments(learning_rate=2e-5, per_device_train_batch_size=32, ...)
        callback = bk.GroupwiseQatCallback(bk.GroupwiseConfig(bits=4), convert=True)
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()

    Source: arXiv 1909.05840.
    """

    def __init__(
        self,
        config: GroupwiseConfig,
        *,
        start_step: int = 0,
        weight_decay: float | None = None,
        input_decay: float = 0.99,
        convert: bool = False,
    ) -> None:
        if not isinstance(config, GroupwiseConfig):
            raise TypeError(f"GroupwiseQatCallback: expected a GroupwiseConfig. Got {type(config).__name__}.")
        self.config, self.start_step, self.convert = config, start_step, convert
        self._decays = {"weight_decay": weight_decay, "input_decay": input_decay}

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        if model is not None:
            self._prepare(model, args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        self._prepare(model, args)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step <= self.start_step:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        if self.convert:
            convert(model.eval())

    def _prepare(self, model: nn.Module, args: TrainingArguments) -> None:
        if not any(isinstance(module, KINDS) for module in model.modules()):
            # Layers count batches.
            start = self.start_step * args.gradient_accumulation_steps
            prepare_qat(model, self.config, start_step=start, **self._decays)
