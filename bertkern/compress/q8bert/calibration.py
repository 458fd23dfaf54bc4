"""Post-training quantization: activation ranges from running the fp32 model over a user's data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..batches import Batches
from ..observation import observe
from ..observers import Observer, named_observer
from .config import EMBEDDINGS, Q8BertConfig
from .prepare import check_model, prepare_qat
from .roles import Role

# Rounding outputs, too, is for models that were trained to bear it: all-MiniLM-L6-v2, only calibrated, loses 0.037 of
# its 0.820 Spearman on STS-B with it, and 0.007 without.
CALIBRATED = Q8BertConfig.uniform(requantize_output=False)


@dataclass(frozen=True)
class Range:
    """Calibrated ranges max|x| of a linear's input and, where it is requantized, of its output."""

    input: float
    output: float | None = None


def calibrate(
    model: nn.Module,
    batches: Any,
    config: Q8BertConfig = CALIBRATED,
    *,
    tokenizer: Callable[..., Any] | None = None,
    observer: str | Callable[[], Observer] = "absmax",
    batch_size: int = 32,
    progress: bool = True,
) -> dict[str, Range]:
    """Finds the activation ranges of a trained fp32 model, then prepares it with them, ready for `convert`.

    The model runs in evaluation mode without gradients. Positions that an attention mask marks as padding do not
    count. Operations of mode "dynamic" need no range and get none.

    Args:
        model: as for `prepare_qat`. Nothing of it changes until every range is known.
        batches: an iterable of batches (a DataLoader, a list), or a single one. A batch is a mapping of tensors, a
            tuple of tensors in the order of the model's arguments, a tensor of ids, or a list of strings.
        config: what is quantized, and how. The default is the paper's without requantized outputs.
        tokenizer: a transformers tokenizer, for strings. A SentenceTransformer brings its own.
        observer: "absmax" (nothing is clipped), "percentile" (99.99 % of the values are inside), "ema" (Q8BERT's
            moving average), or what makes an observer: `lambda: Percentile(99.9)`. Where a few values are far out,
            "percentile" gains; cutting off what the model lives on ruins it. all-MiniLM-L6-v2, 512 sentences of the
            STS-B training set: 0.8131 (absmax), 0.8183 (99.99 %), 0.7868 (99.9 %) of 0.8203; dynamic 0.8192.
        batch_size: how many of a list of strings run at once.
        progress: show a progress bar.

    Returns:
        The ranges by module name, in the order of the model.

    Raises:
        ValueError, TypeError: no batch, a batch of an unknown kind, Inf or NaN among the activations, a layer that no
            batch reached, and whatever `prepare_qat` raises. The model is as it was.

    Example::

        calibrate(model, sentences, tokenizer=tokenizer, observer="percentile")
        convert(model)
    """
    roles = check_model(model, config)
    make_observer = named_observer(observer)
    watched = [role for role in roles if role.op not in EMBEDDINGS and getattr(config, role.op).mode == "ema"]
    ranges = _observe(model, watched, Batches(batches, model, tokenizer, batch_size), config, make_observer, progress)
    prepare_qat(model, config)
    for role in roles:
        if role.name in ranges:
            role.module.set_ranges(ranges[role.name].input, ranges[role.name].output)
    return ranges


def _observe(
    model: nn.Module,
    roles: list[Role],
    batches: Batches,
    config: Q8BertConfig,
    make_observer: Callable[[], Observer],
    progress: bool,
) -> dict[str, Range]:
    inputs = {role.name: make_observer() for role in roles}
    outputs = {role.name: make_observer() for role in roles if getattr(config, role.op).requantize_output}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        inputs[name].update(x)
        if name in outputs:
            outputs[name].update(y)

    observe(model, {role.name: role.module for role in roles}, batches, see, progress=progress)
    ranges = {n: Range(inputs[n].range(), outputs[n].range() if n in outputs else None) for n in inputs}
    for name, found in ranges.items():
        if found.input <= 0 or (found.output is not None and found.output <= 0):
            raise ValueError(f"calibrate: expected activations of {name} other than zero. Got only zeros.")
    return ranges
