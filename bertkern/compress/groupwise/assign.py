"""How many bits each encoder layer gets, within a budget."""

import csv
import math
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from tqdm.auto import tqdm

from bertkern.nn.int8 import finite
from bertkern.reports import table
from bertkern.versioned import Versioned, is_number

from .curvature import Loss
from .hessian import Sensitivity, hessian_sensitivity, unlabelled_loss
from .knapsack import Option, cheapest
from .places import places
from .sizes import Grouping, expect_choices, shapes_of

RULES = ("sorted", "exact")
ORDERS = ("sensitivity", "reversed", "random")

Shapes = Mapping[str, Sequence[tuple[int, int]]]
Errors = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True, kw_only=True)
class BitAssignment(Versioned):
    """What `assign_bits` chose; `print` it.

    Attributes:
        layers: names in the base model: patterns of a config.
        bits: of each layer's matrices.
        weights: how many weights each has.
        sizes: bytes of each: codes, scales, zero points and the groups' bits.
        sensitivity: of each; None: without data, every layer counts the same.
        errors: of each, the sum of squares of what rounding changes; None where nothing asked for it.
        choices: bits that were allowed.
        rule: "sorted" or "exact".
        order: of "sorted".
        version: of this record; a file of an unknown version is refused.
    """

    layers: tuple[str, ...]
    bits: tuple[int, ...]
    weights: tuple[int, ...]
    sizes: tuple[int, ...]
    sensitivity: tuple[float, ...] | None = None
    errors: tuple[float, ...] | None = None
    choices: tuple[int, ...]
    rule: str
    order: str = "sensitivity"
    version: int = 1

    KIND: ClassVar[str] = "bit_assignment"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "bits", "weights", "sizes", "sensitivity", "errors"):
            value = getattr(self, name)
            if value is None and name in ("sensitivity", "errors"):
                continue
            if not isinstance(value, (tuple, list)) or len(value) != len(self.layers) or not value:
                raise ValueError(f"{self._name}: expected {name} to be a list, one for each layer. Got {value!r}.")
            object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "choices", expect_choices(self._name, self.choices))
        if not all(isinstance(name, str) for name in self.layers) or len(set(self.layers)) != len(self.layers):
            raise ValueError(f"{self._name}: expected layers to be different names. Got {self.layers!r}.")
        if any(bits not in self.choices for bits in self.bits):
            raise ValueError(f"{self._name}: expected bits among {self.choices}. Got {self.bits!r}.")
        for name in ("weights", "sizes"):
            if not all(type(count) is int and count > 0 for count in getattr(self, name)):
                raise ValueError(f"{self._name}: expected {name} to be whole numbers above 0. Got others.")
        for name in ("sensitivity", "errors"):
            values = getattr(self, name) or ()
            if not all(is_number(x) and 0 <= x < math.inf for x in values):
                raise ValueError(f"{self._name}: expected {name} to be finite numbers from 0 on. Got {values!r}.")
        self._expect_one_of("rule", RULES)
        self._expect_one_of("order", ORDERS)

    @property
    def layer_bits(self) -> dict[str, int]:
        """Bits by pattern, as configs take them: {"encoder.layer.3": 2, ...}."""
        return dict(zip(self.layers, self.bits, strict=True))

    @property
    def average_bits(self) -> float:
        """Of the codes, over all weights."""
        return sum(b * w for b, w in zip(self.bits, self.weights, strict=True)) / sum(self.weights)

    @property
    def nbytes(self) -> int:
        """Of all layers together."""
        return sum(self.sizes)

    def save_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes a line for every layer: its name, bits, weights, bytes, sensitivity and error."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["layer", "bits", "weights", "bytes", "sensitivity", "error"])
            for i, name in enumerate(self.layers):
                numbers = ("" if values is None else repr(values[i]) for values in (self.sensitivity, self.errors))
                writer.writerow([name, self.bits[i], self.weights[i], self.sizes[i], *numbers])

    def __str__(self) -> str:
        rows = []
        for i, name in enumerate(self.layers):
            numbers = ("" if values is None else f"{values[i]:.4g}" for values in (self.sensitivity, self.errors))
            rows.append([name, str(self.bits[i]), *numbers, f"{self.sizes[i] / 1e6:.3f}"])
        how = {"exact": "the least sum of sensitivity x squared error", "sorted": f"sorted, order {self.order}"}[
            self.rule
        ]
        if self.sensitivity is None:
            how = "the least squared error of the weights, without data"
        fp32 = 4 * sum(self.weights)
        head = ["layer", "bits", "sensitivity", "squared error", "MB"]
        return "\n".join(
            [
                f"Bits by layer: {how}",
                *table(head, rows),
                f"{self.average_bits:.2f} bits on average, {self.nbytes / 1e6:.2f} MB of {fp32 / 1e6:.2f} MB as fp32",
                "Matrices outside of these layers have the bits of the config.",
            ]
        )


def assign_bits(
    sensitivity: Sensitivity | Mapping[str, float] | None,
    model: nn.Module | Shapes,
    *,
    choices: Iterable[int] = (2, 4),
    average_bits: float | None = None,
    target_size_mb: float | None = None,
    rule: str = "exact",
    order: str = "sensitivity",
    quantization_error: Errors | None = None,
    groups: int = 128,
    group_size: int | None = None,
    axis: str = "n",
    symmetric: bool = False,
    shared: bool = False,
    whole_zero: bool | None = None,
    method: str = "minmax",
    seed: int = 0,
    progress: bool = True,
) -> BitAssignment:
    """Bits for every encoder layer, so that the layers fit a budget.

    They go into a config as its `layer_bits`. Its `bits` are then those of matrices outside of the encoder layers, such
    as the pooler, which no budget counts.

        sorted  the paper's: layers get the most bits that the budget allows, the most sensitive first, each at most as
                many as the one before
        exact   the least sum over layers of sensitivity x squared error that the budget allows; of equal sums the
                smallest layers. With the largest eigenvalue as sensitivity, half of that sum bounds what the rounding
                of each layer alone adds to the loss, to second order

    Args:
        sensitivity: of `hessian_sensitivity`, or numbers from 0 on by layer. None: every layer counts the same, which
            needs no data; "exact" alone.
        model: the model, or the shapes (N, K) of the matrices by layer.
        choices: bits that a layer may get, from 2 to 8.
        average_bits: the budget as bits of the codes, over all weights of the layers.
        target_size_mb: the budget as MB of 10^6 bytes of the layers' matrices: codes, scales, zero points and bits.
        order: of "sorted": "sensitivity", or for comparison "reversed" or "random".
        quantization_error: sums of squared errors by layer and bits, for "exact". None: of rounding these weights.
        groups, group_size, axis, symmetric, shared: how matrices are cut into groups; group_size counts where it is
            given, else groups of ceil(side / groups).
        whole_zero, method: how the model's weights are rounded, as in `GroupwiseConfig`; they bear upon the errors.
        seed: of the order "random".
        progress: show a progress bar while errors are computed.

    Raises:
        TypeError, ValueError: no such model or shapes, layers that differ, no budget or two, one that is too small, an
            argument out of range.

    Example:
        >>> shapes = {f"encoder.layer.{i}": [(768, 768)] * 4 + [(3072, 768), (768, 3072)] for i in range(3)}
        >>> assign_bits({"encoder.layer.0": 3.0, "encoder.layer.1": 9.0, "encoder.layer.2": 1.0}, shapes,
        ...             average_bits=3, rule="sorted").layer_bits
        {'encoder.layer.0': 2, 'encoder.layer.1': 4, 'encoder.layer.2': 2}

    Source: arXiv 1909.05840, section 3.1.
    """
    caller = "assign_bits"
    choices = expect_choices(caller, choices)
    grouping = Grouping(groups, group_size, axis, symmetric, shared, whole_zero, method).check(caller)
    if rule not in RULES:
        raise ValueError(f"{caller}: expected rule to be one of {RULES}. Got {rule!r}.")
    if order not in ORDERS:
        raise ValueError(f"{caller}: expected order to be one of {ORDERS}. Got {order!r}.")
    if rule == "exact" and order != "sensitivity":
        raise ValueError(f'{caller}: expected rule "sorted" with order {order!r}. Got "exact".')
    if rule == "sorted" and sensitivity is None:
        raise ValueError(f'{caller}: expected a sensitivity with rule "sorted". Got none.')
    shapes = _shapes(model, caller)
    scores = _scores(sensitivity, shapes, caller)
    weights = {name: sum(n * k for n, k in layer) for name, layer in shapes.items()}
    sizes = {
        name: {bits: sum(grouping.nbytes(shape, bits) for shape in layer) for bits in choices}
        for name, layer in shapes.items()
    }
    budget, taken = _budget(average_bits, target_size_mb, weights, sizes, choices, caller)
    errors = None
    if rule == "exact":
        errors = quantization_error
        if errors is None:
            if isinstance(model, Mapping):
                raise ValueError(f"{caller}: expected a model, or quantization_error with shapes. Got shapes alone.")
            errors = quantization_errors(model, choices, grouping, progress=progress)
        _check_errors(errors, shapes, choices, caller)
        items = [
            [Option(taken[name][bits], scores.get(name, 1.0) * float(errors[name][bits])) for bits in choices]
            for name in shapes
        ]
        # There is one: the smallest sizes were compared with the budget.
        picked = [choices[i] for i in cheapest(items, budget)]
    else:
        picked = _sorted(_order(scores, order, seed), taken, choices, budget)
    bits = dict(zip(shapes, picked, strict=True))
    return BitAssignment(
        layers=tuple(shapes),
        bits=tuple(picked),
        weights=tuple(weights.values()),
        sizes=tuple(sizes[name][b] for name, b in bits.items()),
        sensitivity=tuple(scores[name] for name in shapes) if scores else None,
        errors=None if errors is None else tuple(float(errors[name][b]) for name, b in bits.items()),
        choices=choices,
        rule=rule,
        order=order,
    )


def choose_bits(
    model: nn.Module,
    sentences: Sequence[str] | None = None,
    tokenizer: Callable[..., Any] | None = None,
    *,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    samples: int = 10,
    fraction: float = 0.1,
    seed: int = 0,
    progress: bool = True,
    **budget: Any,
) -> BitAssignment:
    """Bits for every encoder layer by the best criterion that the data allow, by the rule "exact"; see `assign_bits`.

    With labelled batches the sensitivity to their loss counts; with sentences alone, how far the outputs move from what
    they are (`unlabelled_loss`); without both, the error of the weights alone.

    Args:
        sentences, tokenizer: real sentences without labels.
        batches, loss: of `hessian_sensitivity`, instead.
        samples, fraction, seed, progress: of `hessian_sensitivity`.
        budget: average_bits or target_size_mb, choices and groups, of `assign_bits`.

    Raises:
        TypeError, ValueError: what `hessian_sensitivity` and `assign_bits` raise; both sentences and batches.

    Example::

        chosen = choose_bits(model, average_bits=3)
        print(chosen)
        bk.quantize_(model, bk.GroupwiseConfig(bits=4, pooler=True, layer_bits=chosen.layer_bits))  # the pooler: 4 bits
    """
    if sentences is not None and batches is not None:
        raise ValueError("choose_bits: expected sentences or batches. Got both.")
    if sentences is not None:
        batches, loss = sentences, unlabelled_loss if loss is None else loss
    found = None
    if batches is not None:
        found = hessian_sensitivity(
            model,
            batches,
            loss=loss,
            samples=samples,
            fraction=fraction,
            seed=seed,
            tokenizer=tokenizer,
            progress=progress,
        )
    return assign_bits(found, model, rule="exact", progress=progress, **budget)


def quantization_errors(
    model: nn.Module, choices: Iterable[int], grouping: Grouping | None = None, *, progress: bool = True
) -> dict[str, dict[int, float]]:
    """By layer and bits, the sum over its matrices of the squared differences that rounding to nearest makes.

    Raises:
        ValueError: weights that are not finite, or that have no values.
    """
    caller = "quantization_errors"
    choices, grouping = expect_choices(caller, choices), (grouping or Grouping()).check(caller)
    found = places(model, caller)
    made: dict[str, dict[int, float]] = {}
    for name, place in tqdm(found.items(), desc="rounding errors", unit="layer", disable=not progress):
        matrices = place.matrices(caller).values()
        if not all(map(finite, matrices)):
            raise ValueError(f"{caller}: expected finite weights in {name}. Got NaN or Inf.")
        made[name] = {bits: sum(grouping.error(weight, bits) for weight in matrices) for bits in choices}
    return made


def _shapes(model: nn.Module | Shapes, caller: str) -> dict[str, tuple[tuple[int, int], ...]]:
    if not isinstance(model, Mapping):
        return shapes_of(places(model, caller), caller)
    made = {name: tuple(map(tuple, shapes)) for name, shapes in model.items()}
    for name, shapes in made.items():
        fits = all(len(shape) == 2 and all(type(side) is int and side > 0 for side in shape) for shape in shapes)
        if not isinstance(name, str) or not shapes or not fits:
            raise ValueError(f"{caller}: expected shapes (N, K) of the matrices by layer. Got {model[name]!r}.")
    if not made:
        raise ValueError(f"{caller}: expected at least one layer. Got none.")
    return made


def _scores(sensitivity: Any, shapes: Shapes, caller: str) -> dict[str, float]:
    if sensitivity is None:
        return {}
    scores = sensitivity.sensitivity if isinstance(sensitivity, Sensitivity) else sensitivity
    if not isinstance(scores, Mapping):
        got = type(sensitivity).__name__
        raise TypeError(f"{caller}: expected a Sensitivity or a mapping of layers to numbers. Got {got}.")
    if set(scores) != set(shapes):
        raise ValueError(f"{caller}: expected a sensitivity of each of {list(shapes)}. Got those of {list(scores)}.")
    for name, value in scores.items():
        if not is_number(value) or not 0 <= value < math.inf:
            raise ValueError(f"{caller}: expected the sensitivity of {name} to be a number from 0 on. Got {value!r}.")
    return {name: float(scores[name]) for name in shapes}


def _budget(
    average_bits: float | None,
    target_size_mb: float | None,
    weights: Mapping[str, int],
    sizes: Mapping[str, Mapping[int, int]],
    choices: tuple[int, ...],
    caller: str,
) -> tuple[int, Mapping[str, Mapping[int, int]]]:
    """What there is to spend, and what each layer takes of it at each number of bits."""
    given = {"average_bits": average_bits, "target_size_mb": target_size_mb}
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1:
        got = "both" if named else "neither"
        raise ValueError(f"{caller}: expected average_bits or target_size_mb. Got {got}.")
    ((name, value),) = named.items()
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{caller}: expected {name} to be a number above 0. Got {value!r}.")
    if average_bits is not None:
        total = sum(weights.values())
        # Rounded up by less than rounding errors of the product, so that an average of 2.3 is reached, too.
        budget = math.floor(average_bits * total * (1 + 1e-12))
        taken = {name: {bits: bits * count for bits in choices} for name, count in weights.items()}
        least = choices[0]
    else:
        budget, taken = math.floor(target_size_mb * 1e6 * (1 + 1e-12)), sizes
        least = sum(size[choices[0]] for size in sizes.values()) / 1e6
    if sum(each[choices[0]] for each in taken.values()) > budget:
        raise ValueError(
            f"{caller}: expected {name} of at least {least:.6g}, what {choices[0]} bits take. Got {value}."
        )
    return budget, taken


def _check_errors(errors: Any, shapes: Shapes, choices: tuple[int, ...], caller: str) -> None:
    for name in shapes:
        row = errors.get(name) if isinstance(errors, Mapping) else None
        for bits in choices:
            value = row.get(bits) if isinstance(row, Mapping) else None
            if not is_number(value) or not 0 <= value < math.inf:
                raise ValueError(
                    f"{caller}: expected a quantization_error of {name} at {bits} bits, a number from 0 on. "
                    f"Got {value!r}."
                )


def _order(scores: Mapping[str, float], order: str, seed: int) -> list[str]:
    """The layers in the order in which they are served; of equal ones the first in the model."""
    if order == "random":
        names = list(scores)
        random.Random(seed).shuffle(names)
        return names
    sign = 1 if order == "reversed" else -1
    return sorted(scores, key=lambda name: sign * scores[name])


def _sorted(
    served: Sequence[str], taken: Mapping[str, Mapping[int, int]], choices: tuple[int, ...], budget: int
) -> list[int]:
    left = budget - sum(each[choices[0]] for each in taken.values())
    most, made = choices[-1], {}
    for name in served:
        extra = {bits: taken[name][bits] - taken[name][choices[0]] for bits in choices}
        most = max(bits for bits in choices if bits <= most and extra[bits] <= left)
        left -= extra[most]
        made[name] = most
    return [made[name] for name in taken]
