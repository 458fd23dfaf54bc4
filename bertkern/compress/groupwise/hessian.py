"""How sharply the loss bends with the weights of every encoder layer: the top eigenvalue of its Hessian."""

import csv
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from bertkern.reports import table
from bertkern.versioned import Versioned, is_number

from .curvature import Curvature, Loss, check_precision, differentiable
from .eigen import METHODS, Eigenpairs, lanczos, power
from .places import Place, chosen, outputs_of, places
from .samples import Examples

ITERATIONS, TOLERANCE = 30, 0.05
# Products that a layer gets at least in the first sample: what the gradient has nothing of, such as the negative
# direction of a saddle, has to grow from the random part of the start. Later ones start from there.
_EXPLORED = 6


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Versioned):
    """What `hessian_sensitivity` found; `print` it.

    Attributes:
        layers: their names in the base model: patterns of a config.
        weights: how many weights each has.
        eigenvalues: of each layer, one a sample: the largest in magnitude, with its sign.
        errors: |Hv - value v| of each as a share of |value|: an eigenvalue is as near, and as a rule much nearer.
        examples: in each sample.
        products: of the Hessian of a layer and a vector, all together.
        method: "lanczos" or "power".
        version: of this record; a file of an unknown version is refused.
    """

    layers: tuple[str, ...]
    weights: tuple[int, ...]
    eigenvalues: tuple[tuple[float, ...], ...]
    errors: tuple[tuple[float, ...], ...]
    examples: int
    products: int
    method: str = "lanczos"
    version: int = 1

    KIND: ClassVar[str] = "hessian_sensitivity"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "weights", "eigenvalues", "errors"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or len(value) != len(self.layers) or not value:
                raise ValueError(f"{self._name}: expected {name} to be a list, one for each layer. Got {value!r}.")
            object.__setattr__(self, name, tuple(tuple(x) if isinstance(x, list) else x for x in value))
        if not all(isinstance(name, str) for name in self.layers) or len(set(self.layers)) != len(self.layers):
            raise ValueError(f"{self._name}: expected layers to be different names. Got {self.layers!r}.")
        if not all(type(count) is int and count > 0 for count in self.weights):
            raise ValueError(f"{self._name}: expected weights to be whole numbers above 0. Got {self.weights!r}.")
        for name in ("eigenvalues", "errors"):
            rows = getattr(self, name)
            fits = all(isinstance(row, tuple) and len(row) == self.samples > 0 for row in rows)
            if not fits or not all(is_number(x) and math.isfinite(x) for row in rows for x in row):
                raise ValueError(f"{self._name}: expected {name} to be finite numbers, one a sample. Got {rows!r}.")
        self._expect_whole("examples", 1)
        self._expect_whole("products", 0)
        self._expect_one_of("method", METHODS)

    @property
    def samples(self) -> int:
        """How many samples there were."""
        first = self.eigenvalues[0]
        return len(first) if isinstance(first, tuple) else 0

    @property
    def mean(self) -> tuple[float, ...]:
        """Of each layer's eigenvalues."""
        return tuple(map(statistics.fmean, self.eigenvalues))

    @property
    def spread(self) -> tuple[float, ...]:
        """The standard deviation of each layer's eigenvalues over the samples."""
        return tuple(map(statistics.pstdev, self.eigenvalues))

    @property
    def sensitivity(self) -> dict[str, float]:
        """|mean| + standard deviation, by layer."""
        pairs = zip(self.layers, self.mean, self.spread, strict=True)
        return {name: abs(mean) + spread for name, mean, spread in pairs}

    def save_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes a line for every layer: its name, weights, mean, std, sensitivity and eigenvalues."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            samples = [f"sample {i}" for i in range(self.samples)]
            writer.writerow(["layer", "weights", "mean", "std", "sensitivity", *samples])
            for name, count, mean, spread, values in zip(
                self.layers, self.weights, self.mean, self.spread, self.eigenvalues, strict=True
            ):
                numbers = (mean, spread, self.sensitivity[name], *values)
                writer.writerow([name, count, *map(repr, numbers)])

    def __str__(self) -> str:
        rows = []
        for name, mean, spread, values, errors in zip(
            self.layers, self.mean, self.spread, self.eigenvalues, self.errors, strict=True
        ):
            numbers = (self.sensitivity[name], mean, spread, min(values), max(values))
            rows.append([name, *(f"{x:.4g}" for x in numbers), f"{max(errors):.1%}"])
        title = (
            f"Top Hessian eigenvalue by layer: {self.samples} samples of {self.examples} examples, "
            f"{self.products} Hessian-vector products"
        )
        head = ["layer", "|mean| + std", "mean", "std", "lowest", "highest", "residual"]
        return "\n".join([title, *table(head, rows)])


def hessian_sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    samples: int = 10,
    fraction: float = 0.1,
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
    method: str = "lanczos",
    layers: Iterable[str] | None = None,
    seed: int = 0,
    tokenizer: Callable[..., Any] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Sensitivity:
    """The eigenvalue of largest magnitude, with its sign, of the Hessian of the loss with respect to the weights of
    each encoder layer: the matrices of a layer together, biases and LayerNorms not, other layers held.

    Each sample is a random share of the examples, drawn anew. One graph of the gradients of all layers serves all
    products of a sample that fits into one chunk; a product of layer i then costs 6 passes through a layer and 2
    through every layer above. Lanczos' method starts at the gradient and at what the last sample found; a sample of a
    layer takes it some 2 to 8 products, the first at least 6, and power iteration several times as many.

    The model runs in evaluation mode with attention in plain formulas and is left as it was.

    Args:
        model: a transformers model of a known family, or a module around one; as it is or accelerated, fp32 or float64.
        batches: batches, each a mapping of tensors that the model takes, with labels; or what `loss` takes. Mappings,
            tuples and lists of tensors [B, ...] are cut into examples, which are put side by side with trailing padding
            (labels of -100, weightless by the attention mask); other batches are drawn whole and count alike. Strings,
            or lists of them: become mappings by `tokenizer`, without labels.
        loss: loss(model, batch), the mean over the batch or one value per example. None: the `loss` of the model's
            output. A sample of several chunks has the mean of their losses, weighted by examples.
        samples: how many.
        fraction: the share of the examples in each, at least one.
        iterations: products a layer and sample at most.
        tolerance: |Hv - value v| as a share of |value| at which to stop. An eigenvalue is as near, and as a rule much
            nearer.
        method: "lanczos", or "power" as in the paper.
        layers: names such as "encoder.layer.3"; None: all.
        seed: of the samples and of the random part of the starts.
        tokenizer: for batches of strings.
        batch_size: examples in a chunk at most; None: as many as take some 4 GB, 1024 tokens of BERT-base, 4096 of a
            MiniLM of 6 layers. Samples of several chunks make their graphs anew for every product: more than twice the
            time.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: no such model, no batches or ones that give no loss, a loss that is not finite or does
            not depend on a layer, weights in half precision or codes, an unknown layer, an argument out of range.

    Example::

        found = bk.hessian_sensitivity(model, train_loader)
        print(found)
        print(bk.assign_bits(found, model, average_bits=3))

    Source: arXiv 1909.05840, section 3.1.
    """
    caller = "hessian_sensitivity"
    _expect_counts(caller, samples=samples, iterations=iterations)
    if method not in METHODS:
        raise ValueError(f"{caller}: expected method to be one of {METHODS}. Got {method!r}.")
    found = chosen(places(model, caller), layers, caller)
    search = Search(model, batches, loss, fraction, tolerance, seed, tokenizer, batch_size, caller)
    weights = {name: sum(w.numel() for w in place.weights(caller)) for name, place in found.items()}
    values: dict[str, list[float]] = {name: [] for name in found}
    errors: dict[str, list[float]] = {name: [] for name in found}
    last: dict[str, Tensor] = {}
    products = 0
    bar = tqdm(total=samples * len(found), desc="hessian", unit="layer", disable=not progress)
    with bar, torch.inference_mode(False), differentiable(model):
        for _ in range(samples):
            curvature = search.curvature(found)
            for name, start, explore in search.starts(curvature, last):
                pairs = search.solve(curvature, name, start, iterations, method, explore)
                values[name].append(pairs.values[0])
                errors[name].append(pairs.errors[0])
                last[name] = pairs.vectors[0]
                bar.update()
            products += curvature.products
            # Before the next sample has a graph.
            del curvature
    return Sensitivity(
        layers=tuple(found),
        weights=tuple(weights.values()),
        eigenvalues=tuple(map(tuple, values.values())),
        errors=tuple(map(tuple, errors.values())),
        examples=search.count,
        products=products,
        method=method,
    )


class Search:
    """What samples of the data say of the Hessian; the rest of the arguments is that of `hessian_sensitivity`."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Loss | None,
        fraction: float,
        tolerance: float,
        seed: int,
        tokenizer: Callable[..., Any] | None,
        batch_size: int | None,
        caller: str,
    ) -> None:
        for name, value in (("fraction", fraction), ("tolerance", tolerance)):
            if not is_number(value) or not 0 < value <= 1:
                raise ValueError(f"{caller}: expected {name} to be a number above 0 and up to 1. Got {value!r}.")
        if batch_size is not None:
            _expect_counts(caller, batch_size=batch_size)
        check_precision(model, caller)
        self.examples = Examples(batches, model, tokenizer, caller)
        self.count = max(1, round(fraction * len(self.examples)))
        self._model, self._loss, self._caller = model, loss, caller
        self._fraction, self._tolerance, self._batch_size = fraction, tolerance, batch_size
        self._outputs = outputs_of(model, caller)
        self._generator = torch.Generator().manual_seed(seed)

    def curvature(self, layers: dict[str, Place]) -> Curvature:
        """The Hessian over the next sample."""
        numbers = self.examples.draw(self._fraction, self._generator)
        chunks = self.examples.chunks(numbers, self._batch_size, self._outputs)
        return Curvature(self._model, layers, chunks, self._loss, self._caller)

    def starts(self, curvature: Curvature, last: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, bool]]:
        """By layer, where to start: the gradient, what the last sample found, and something of everything; and whether
        that leaves much to be found."""
        for name, gradient in curvature.gradients().items():
            noise = torch.randn(gradient.shape, generator=self._generator, dtype=gradient.dtype).to(gradient.device)
            start, length = noise / noise.norm(), float(gradient.norm())
            # Of a loss at its minimum there is nothing but rounding.
            known = name in last and length > torch.finfo(gradient.dtype).eps
            if known:
                start *= 0.3
            if name in last:
                start += last[name]
            if length:
                start += gradient / length
            yield name, start, not known

    def solve(
        self,
        curvature: Curvature,
        name: str,
        start: Tensor,
        iterations: int,
        method: str = "lanczos",
        explore: bool = True,
        count: int = 1,
    ) -> Eigenpairs:
        """The top `count` eigenpairs of a layer; one by "power"."""

        def product(vector: Tensor) -> Tensor:
            return curvature.product(name, vector)

        if method == "power":
            return power(product, start, iterations, self._tolerance)
        return lanczos(product, start, iterations, self._tolerance, count, _EXPLORED if explore else 1)


def unlabelled_loss(model: nn.Module, batch: Any) -> Tensor:
    """A loss for sentences without labels: how far the model's outputs move from what they are now, one a sentence.

    Logits move by the Kullback-Leibler divergence, single ones by half the square, other models' sentence embeddings
    (means over real tokens) by 1 - cosine. The value is 0, and so is the gradient; the second derivatives say what a
    change of the weights does.

    Args:
        batch: a mapping of tensors that the model takes, with an attention mask where there is padding.
    """
    inputs = {key: value for key, value in batch.items() if key not in ("label", "labels", "label_ids")}
    output = model(**inputs)
    mask = inputs.get("attention_mask")
    scores = [output[key] for key in ("logits", "start_logits", "end_logits") if output.get(key) is not None]
    if scores:
        return sum(_moved(logits, mask, positions="logits" not in output) for logits in scores)
    hidden = output["last_hidden_state"]
    shares = torch.ones_like(hidden[..., :1]) if mask is None else mask[..., None].to(hidden.dtype)
    pooled = (hidden * shares).sum(1)
    return 1 - F.cosine_similarity(pooled, pooled.detach(), dim=-1)


def _moved(logits: Tensor, mask: Tensor | None, positions: bool) -> Tensor:
    """How far logits are from themselves, [B]; a mean over real tokens where there are logits for each."""
    by_token = mask is not None and logits.shape == mask.shape
    if by_token and positions:
        logits = logits.masked_fill(mask == 0, torch.finfo(logits.dtype).min)
    elif by_token:
        logits = logits[..., None]
    if logits.shape[-1] == 1:
        moved = (logits - logits.detach()).square().sum(-1) / 2
    else:
        scores = logits.log_softmax(-1)
        moved = F.kl_div(scores, scores.detach(), reduction="none", log_target=True).sum(-1)
    if moved.dim() == 1:
        return moved
    shares = torch.ones_like(moved) if mask is None or mask.shape != moved.shape else mask.to(moved.dtype)
    return (moved * shares).sum(-1) / shares.sum(-1).clamp(min=1)


def _expect_counts(caller: str, **values: Any) -> None:
    for name, value in values.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{caller}: expected {name} to be a whole number of at least 1. Got {value!r}.")
