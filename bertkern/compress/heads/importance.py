"""How much a model's loss, or its weights, depend on every attention head."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bertkern.head_masks import Places, places, watch
from bertkern.nn.packing import plain_path
from bertkern.weights import effective

from ..batches import moved
from ..observation import evaluating
from .config import METHODS

# Takes the model and a batch, returns the loss: a scalar that is the mean over the batch, or one value per example.
Loss = Callable[[nn.Module, Any], Tensor]
# Added to a layer's norm by the released code.
_TINY = 1e-20


def head_importance(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    *,
    method: str = "paper",
    normalize: bool | None = None,
    loss: Loss | None = None,
    progress: bool = True,
) -> Tensor:
    """How important every attention head of `model` is: the larger, the more is lost without it.

    The gradient of the loss with respect to a factor on the head, at factor 1, is the sum over tokens and features of
    the head's context times its gradient. One backward pass a batch gives it for all examples and heads; the gradients
    of weights are not computed. The model runs in evaluation mode and is left as it was; masks of `head_mask` hold.

        paper      the absolute value is taken of the sum over an example's tokens; mean over examples
        released   as in the authors' code, it is taken token by token; the sum is divided by the number of tokens, in
                   the last layer by that of examples, and losses that are means over a batch are taken as they are
        magnitude  the sum of the absolute weights of the head's slices of query, key, value and output projection; no
                   data

    Args:
        model: a transformers model of a known family or of ALBERT, or a module around one; on any device.
        dataloader: batches, each a mapping of tensors that the model takes, with labels; or what `loss` takes. Moved to
            the model's device. Not for "magnitude".
        method: one of the above.
        normalize: whether each layer's scores are divided by their L2 norm, so that layers compare. None: for "paper"
            and "released", as the authors did.
        loss: loss(model, batch), the mean over the batch or one value per example. None: the `loss` of the model's
            output. Of means over something other than examples, such as tokens, examples count by what they have of it.
        progress: show a progress bar.

    Returns:
        fp64 [layers, heads] on the CPU, in the numbering that the model was built with; 0 for heads that a layer has
        lost. ALBERT: a row for every time that a layer runs.

    Raises:
        TypeError, ValueError: no such model, no batches, empty ones or ones that give no loss, a loss that is not
            finite or does not depend on the heads, weights that are NaN or Inf.

    Example::

        scores = bk.head_importance(model, dataloader)
        scores.flatten().argsort()[:14]  # the least important tenth of BERT-base

    Source: arXiv 1905.10650, equation 2, and its released code; arXiv 2002.08307 (magnitude).
    """
    if method not in METHODS:
        raise ValueError(f"head_importance: expected method to be one of {METHODS}. Got {method!r}.")
    if not any(normalize is value for value in (True, False, None)):
        raise ValueError(f"head_importance: expected normalize to be True, False or None. Got {normalize!r}.")
    found = places(model, "head_importance")
    if method == "magnitude":
        scores = _magnitudes(found)
    else:
        scores = _sensitivities(model, found, dataloader, method, loss, progress)
    if normalize is None:
        normalize = method != "magnitude"
    return scores / (scores.norm(dim=1, keepdim=True) + _TINY) if normalize else scores


def _magnitudes(found: Places) -> Tensor:
    scores = torch.zeros(found.rows, found.heads, dtype=torch.float64)
    for place in found.layers:
        total = torch.zeros(len(place.kept), dtype=torch.float64)
        for projection, dim in zip(place.projections if place.kept else (), (1, 1, 1, 0), strict=False):
            weight = effective(projection)
            if weight is None:
                raise ValueError(
                    f"head_importance: expected projections with weights. Got {type(projection).__name__} without."
                )
            # A row of the output projection's weight is an output; a head has columns of it.
            total += weight.double().abs().sum(dim).view(len(place.kept), -1).sum(1).cpu()
        if not bool(torch.isfinite(total).all()):
            raise ValueError("head_importance: expected finite weights. Got NaN or Inf.")
        for row in place.rows:
            scores[row, list(place.kept)] = total
    return scores


@torch.inference_mode(False)
def _sensitivities(
    model: nn.Module, found: Places, dataloader: Iterable[Any] | None, method: str, loss: Loss | None, progress: bool
) -> Tensor:
    if dataloader is None or isinstance(dataloader, (str, Tensor)) or not isinstance(dataloader, Iterable):
        got = type(dataloader).__name__
        raise TypeError(f"head_importance: expected dataloader to be an iterable of batches. Got {got}.")
    batches = [dataloader] if isinstance(dataloader, Mapping) else dataloader
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    kept = found.kept()
    sums = [torch.zeros(len(heads), dtype=torch.float64) for heads in kept]
    examples, tokens = 0, 0.0
    contexts: list[tuple[int, Tensor]] = []

    def record(row: int, x: Tensor) -> Tensor:
        # With frozen weights, the first layer's context is where the graph begins.
        x = x if x.requires_grad else x.detach().requires_grad_()
        contexts.append((row, x))
        return x

    with (
        evaluating(model),
        _frozen(model),
        torch.enable_grad(),
        plain_path(),
        watch(found, record),
    ):
        for batch in tqdm(batches, desc="head importance", unit="batch", disable=not progress):
            contexts.clear()
            batch = moved(batch, device)
            sizes = [tensor.shape[0] for tensor in _tensors(batch)]
            if sizes and not any(sizes):
                raise ValueError("head_importance: expected batches of at least one example. Got an empty one.")
            value = _loss(model, batch, loss)
            count = value.numel() if value.dim() else _examples(batch, contexts)
            for row, dot in enumerate(_dots(value, contexts, len(kept))):
                if dot is None:
                    continue
                if method == "released":
                    sums[row] += dot.abs().sum((0, 1)).cpu()
                    continue
                # Sequences of one example, such as its choices, stand one after the other.
                whole = count if dot.shape[0] % count == 0 else dot.shape[0]
                gradients = dot.sum(1).view(whole, -1, dot.shape[-1]).sum(1)
                # Of the mean over a batch, an example's own gradient is the batch's size times its share.
                sums[row] += gradients.abs().sum(0).cpu() * (1 if value.dim() else count)
            examples += count
            tokens += _tokens(batch, contexts)
    if not examples:
        raise ValueError("head_importance: expected at least one batch. Got none.")
    scores = torch.zeros(found.rows, found.heads, dtype=torch.float64)
    for row, (total, heads) in enumerate(zip(sums, kept, strict=True)):
        by_token = method == "released" and row < found.rows - 1
        scores[row, list(heads)] = total / (tokens if by_token else examples)
    return scores


def _dots(value: Tensor, contexts: list[tuple[int, Tensor]], rows: int) -> list[Tensor | None]:
    """By row of a mask, the product of context and gradient, [B, L, kept heads], summed over the runs of the model."""
    total, gradients = value.sum(), []
    if contexts and total.requires_grad:
        gradients = torch.autograd.grad(total, [x for _, x in contexts], allow_unused=True)
    if all(gradient is None for gradient in gradients):
        raise ValueError("head_importance: expected a loss that depends on the model's heads. Got one that does not.")
    dots: list[Tensor | None] = [None] * rows
    for (row, x), gradient in zip(contexts, gradients, strict=True):
        if gradient is None:
            continue
        wide = torch.promote_types(x.dtype, torch.float32)
        dot = (x.detach().to(wide) * gradient.to(wide)).sum(-1)
        before = dots[row]
        if before is not None:
            # A loss that runs the model twice, such as on pairs of sentences of their own lengths.
            if before.shape[0] != dot.shape[0]:
                raise ValueError(
                    f"head_importance: expected all runs of the model on a batch to have {before.shape[0]} sequences. "
                    f"Got {dot.shape[0]}."
                )
            dot = torch.cat([before, dot], 1)
        dots[row] = dot
    return dots


def _loss(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    if loss is not None:
        value = loss(model, batch)
    elif isinstance(batch, Mapping):
        output = model(**batch)
        value = output.get("loss") if isinstance(output, Mapping) else None
    else:
        raise TypeError(
            f"head_importance: expected batches to be mappings, or a loss function. Got {type(batch).__name__}."
        )
    if value is None:
        raise ValueError("head_importance: expected a loss. Got none: batches need labels, or pass loss=.")
    if not isinstance(value, Tensor) or value.dim() > 1 or not value.numel():
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"head_importance: expected a loss of shape [] or [B]. Got {got}.")
    if not bool(torch.isfinite(value.detach()).all()):
        raise ValueError("head_importance: expected a finite loss. Got NaN or Inf.")
    return value


def _tensors(batch: Any) -> list[Tensor]:
    """The tensors in a batch that have a row for every example."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return [value for value in values if isinstance(value, Tensor) and value.dim()]


def _examples(batch: Any, contexts: list[tuple[int, Tensor]]) -> int:
    """How many examples a batch holds."""
    tensors = _tensors(batch) or [x for _, x in contexts]
    return tensors[0].shape[0] if tensors else 0


def _tokens(batch: Any, contexts: list[tuple[int, Tensor]]) -> float:
    """How many tokens a batch holds, padding aside where there is a mask of it."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor):
        return float(mask.sum())
    first = contexts[0][0] if contexts else 0
    return float(sum(x.shape[0] * x.shape[1] for row, x in contexts if row == first))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within it, no parameter of `model` gets a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
