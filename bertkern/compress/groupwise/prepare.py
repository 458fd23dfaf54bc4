"""Quantization-aware training: the model's own layers become ones that round as low-bit layers would."""

from torch import nn

from bertkern.config import GroupwiseConfig

from .choosing import Matrix, choose
from .modules import FakeQuantGroupwiseEmbedding, FakeQuantGroupwiseLinear, Settings

KINDS = (FakeQuantGroupwiseLinear, FakeQuantGroupwiseEmbedding)


def prepare_qat(
    model: nn.Module,
    config: GroupwiseConfig | None = None,
    *,
    start_step: int = 0,
    weight_decay: float | None = None,
    input_decay: float = 0.99,
) -> nn.Module:
    """Makes `model` train and evaluate as if it were low-bit, in place, and returns it.

    What the config would quantize computes with rounded weights and inputs, gradients pass straight through, as in
    Q-BERT. Names, parameters, their ties and the module objects stay, so an optimizer made before goes on to work. Then
    train as the task is trained: the paper fine-tunes BERT-base from the trained float model, on GLUE's tasks with
    learning rate 2e-5 and 32 sequences a batch. `convert` makes the low-bit model.

    Args:
        model: as for `quantize_`.
        config: what is quantized, and how. With method "mse" ranges are searched anew every hundred steps.
        start_step: training steps in floating point before the first quantized one.
        weight_decay: the weights' ranges are moving averages over training steps, of this decay (the authors' code has
            0.99, and method "percentile"); None: of the weights as they are.
        input_decay: of the moving average that the ranges of static activations are.

    Raises:
        ValueError, TypeError: before the first change: no layer to quantize, one that is not a plain torch layer
            (already prepared, accelerated, adapted), weights with Inf or NaN, or a decay outside of [0, 1).

    Example::

        prepare_qat(model, bk.GroupwiseConfig(bits=3))
        Trainer(model, ...).train()
        convert(model.eval())

    Source: arXiv 1909.05840.
    """
    config = GroupwiseConfig() if config is None else config
    if type(start_step) is not int or start_step < 0:
        raise ValueError(f"prepare_qat: expected start_step to be a whole number of at least 0. Got {start_step!r}.")
    for name, decay in (("weight_decay", weight_decay), ("input_decay", input_decay)):
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"prepare_qat: expected {name} to be at least 0 and below 1. Got {decay!r}.")
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            if isinstance(module, KINDS):
                raise TypeError(f"prepare_qat: expected a model that is not prepared. Got {name} prepared already.")
    chosen = choose(model, config, "prepare_qat")
    for matrices, plain in ((chosen.linears | chosen.tied, nn.Linear), (chosen.tables, nn.Embedding)):
        for name, matrix in matrices.items():
            _check(name, matrix.module, plain)

    def settings(matrix: Matrix, linear: bool, rows: bool) -> Settings:
        keeps = not rows and (weight_decay is not None or config.method == "mse")
        return Settings(
            config=config,
            bits=matrix.bits,
            axis="n" if rows else config.axis,
            group_size=matrix.group_size,
            activation=config.activation if linear and matrix.rounds else "float",
            start_step=start_step,
            keeps_range=keeps,
            weight_decay=weight_decay or 0.0,
            input_decay=input_decay,
        )

    for matrix in chosen.linears.values():
        FakeQuantGroupwiseLinear.adopt(matrix.module, settings(matrix, True, False))
    for matrix in chosen.tied.values():
        FakeQuantGroupwiseLinear.adopt(matrix.module, settings(matrix, True, True))
    for matrix in chosen.tables.values():
        FakeQuantGroupwiseEmbedding.adopt(matrix.module, settings(matrix, False, True))
    return model


def _check(name: str, module: nn.Module, plain: type[nn.Module]) -> None:
    if type(module) is not plain:
        raise TypeError(
            f"prepare_qat: expected {name} to be a plain {plain.__name__}. Got {type(module).__name__}: "
            "bertkern.restore the model first."
        )
    if plain is nn.Embedding and module.max_norm is not None:
        raise ValueError(f"prepare_qat: expected {name} without max_norm. Got {module.max_norm}.")
