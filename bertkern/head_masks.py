"""Head masks at run time, on transformers models of known families as they are, accelerated or quantized.

`places` says where a model's heads come together, `watch` lets a function see and change them there, `head_mask` scales
them. Heads are numbered as the model was built, also where a layer has lost some.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import plan
from .nn.encoder import Unfit
from .nn.head_masks import checked, kept_of, layer_factors, multiplied, scaled, scaled_weights

# Takes a pass through the layers, from 0, and the heads' context [B, L, kept heads, d]; returns what takes its place.
See = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Place:
    """Where the heads of one layer come together.

    Attributes:
        attention: the module that computes attention, which returns its weights second.
        projections: query, key, value, and the projection that takes the heads' contexts side by side.
        kept: the numbers of the heads that the layer still has.
        rows: its rows of a mask: one, but in ALBERT, whose layers run several times, one for each time.
    """

    attention: nn.Module
    projections: tuple[nn.Module, nn.Module, nn.Module, nn.Module]
    kept: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def out(self) -> nn.Module:
        return self.projections[3]


@dataclass(frozen=True)
class Places:
    """The layers of a model's encoder.

    Attributes:
        heads: how many each layer was built with.
        layers: the distinct ones, in their order.
        encoder: the module whose run begins anew with the first row; None where no layer runs twice.
    """

    heads: int
    layers: tuple[Place, ...]
    encoder: nn.Module | None = None

    @property
    def rows(self) -> int:
        """How many rows a mask has."""
        return sum(len(place.rows) for place in self.layers)

    def kept(self) -> list[tuple[int, ...]]:
        """The kept heads by row."""
        by_row = {row: place.kept for place in self.layers for row in place.rows}
        return [by_row[row] for row in range(self.rows)]


def places(model: nn.Module, caller: str = "head_mask") -> Places:
    """Where the heads of `model` come together.

    Raises:
        TypeError, ValueError: not one transformers model of a known family, or a decoder.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: expected a torch.nn.Module. Got {type(model).__name__}.")
    roots = list(plan.pretrained_roots(model).values())
    if len(roots) != 1:
        raise ValueError(f"{caller}: expected a module with one transformers model. Got one with {len(roots)}.")
    root = roots[0]
    found = _albert(root) if getattr(root.config, "model_type", "") == "albert" else _family(root, caller)
    if not found.layers:
        raise ValueError(f"{caller}: expected a model of a known family with layers. Got {type(root).__name__}.")
    for place in found.layers:
        if place.kept and max(place.kept) >= found.heads:
            raise ValueError(
                f"{caller}: expected kept heads below num_attention_heads = {found.heads}. Got {list(place.kept)}."
            )
    return found


def kept_heads(model: nn.Module) -> list[list[int]]:
    """The numbers of the heads that each layer still has, of those that it was built with.

    Example:
        >>> kept_heads(AutoModel.from_pretrained("bert-base-uncased"))[0]
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    """
    return [list(heads) for heads in places(model, "kept_heads").kept()]


@contextmanager
def head_mask(model: nn.Module, mask: Tensor) -> Iterator[nn.Module]:
    """Within it, each head of `model` counts as much as `mask` says: 1 in full, 0 not at all, as in transformers 4.

    What a head hands to the output projection is multiplied by its factor, and attention weights that are asked for
    are, too. Gradients reach the mask. Masks may be nested: their factors multiply. A mask is read on entering and
    holds in every thread; with gradient checkpointing, the backward pass belongs inside, too. Compiled models run
    uncompiled. Fused encoders stay fused and do not compute the attention of heads with a 0 at all.

    `model(..., head_mask=mask)` does the same for one call of an accelerated or quantized model, in its thread alone,
    compiled, too; ALBERT and MPNet refuse the keyword. A model that bertkern has not touched ignores it.

    Args:
        model: a transformers model of a known family or ALBERT, or a module around one; as it is, accelerated or
            quantized.
        mask: [heads], [layers, heads] or [layers, batch, heads], bool, int or float, in the numbering that the model
            was built with: factors of heads that a layer has lost do nothing. The batch is the encoder's, so choices
            count one by one. ALBERT has a row for every time that a layer runs.

    Yields:
        The model.

    Raises:
        TypeError, ValueError: a mask of another type or shape or with NaN or Inf, a model without such heads; in the
            model's call, a batch of another size.

    Example::

        mask = torch.ones(12, 12, requires_grad=True)
        with bk.head_mask(model, mask):
            model(**batch).loss.backward()
        print(mask.grad)

    Source: arXiv 1905.10650; transformers 4, get_head_mask.
    """
    found = places(model)
    scale = _Scale(layer_factors(checked(mask, found.rows, found.heads), found.kept()))
    masked = [p for p in found.layers if p.kept and any(scale.factors[row] is not None for row in p.rows)]
    if not masked:
        yield model
        return
    with watch(found, scale.context, scale.weights, masked):
        try:
            yield model
        finally:
            scale.forget()


@contextmanager
def watch(
    found: Places, see: See, see_weights: See | None = None, layers: Sequence[Place] | None = None
) -> Iterator[None]:
    """Within it, `see` takes the context of a layer's heads before the output projection, and gives what goes on.

    Fused modules then run module by module by themselves.

    Args:
        found: of the model.
        see_weights: takes attention weights [B, kept heads, L, L] where they are asked for.
        layers: of `found`, those to watch; None: all that have a head.
    """
    handles: list[Any] = []
    # Compiled code does not look whether modules have hooks.
    with torch.compiler.set_stance("force_eager"):
        try:
            for place in [place for place in found.layers if place.kept] if layers is None else layers:
                turn = _Turn(place.rows)
                if found.encoder is not None:
                    handles.append(found.encoder.register_forward_pre_hook(turn.restart))
                handles.append(place.out.register_forward_pre_hook(_Context(turn, see, len(place.kept))))
                if see_weights is not None:
                    # Before transformers' own hooks, which collect the weights.
                    hook = _Weights(turn, see_weights)
                    handles.append(place.attention.register_forward_hook(hook, prepend=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


def active_factors(outs: Sequence[nn.Module]) -> list[Tensor | None]:
    """What `head_mask` makes of each layer's heads now: [1 or B, kept heads]; None where all factors are one.

    For a fused encoder that scales or skips heads itself: it may pass over the hooks that `is_mask` knows.

    Args:
        outs: the output projection of every layer, in the order in which they run; one that runs several times stands
            there as often. Where it does not, this is its next run.
    """
    all_runs, runs = Counter(outs), Counter[nn.Module]()
    made = []
    for out in outs:
        factor = None
        for hook in filter(is_mask, out._forward_pre_hooks.values()):
            rows = hook.turn.rows
            row = rows[runs[out]] if all_runs[out] == len(rows) else hook.turn.next()
            factor = multiplied(factor, hook.see.__self__.factors[row])
        made.append(factor)
        runs[out] += 1
    return made


def is_mask(hook: Any) -> bool:
    """Whether a hook is one of `head_mask`'s."""
    owner = getattr(hook, "__self__", None)
    if isinstance(owner, _Turn):
        return True
    return isinstance(hook, _Seen) and isinstance(getattr(hook.see, "__self__", None), _Scale)


class _Scale:
    """Multiplies heads by the factors of their row."""

    def __init__(self, factors: list[Tensor | None]) -> None:
        self.factors = factors

    def context(self, row: int, x: Tensor) -> Tensor:
        return scaled(x, self.factors[row])

    def weights(self, row: int, weights: Tensor) -> Tensor:
        return scaled_weights(weights, self.factors[row])

    def forget(self) -> None:
        self.factors = [None] * len(self.factors)

    def __deepcopy__(self, memo: dict) -> "_Scale":
        # The copy of a masked model is masked as long as the model is.
        return self


class _Turn:
    """Which row of a mask a layer takes: the same always, or one after the other if it runs several times."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        self.rows = rows
        # By thread, for models that serve several.
        self._runs: dict[int, int] = {}

    def restart(self, *_: Any) -> None:
        """A forward pre-hook of the encoder."""
        self._runs[threading.get_ident()] = 0

    def next(self) -> int:
        """The row of the run that begins."""
        if len(self.rows) == 1:
            return self.rows[0]
        run = self._runs.get(threading.get_ident(), 0)
        if run == len(self.rows):
            raise RuntimeError(f"head_mask: expected a layer to run {run} times in its encoder. Got one run more.")
        self._runs[threading.get_ident()] = run + 1
        return self.rows[run]

    def last(self) -> int:
        """The row of the run that ends."""
        if len(self.rows) == 1:
            return self.rows[0]
        return self.rows[self._runs[threading.get_ident()] - 1]


@dataclass(frozen=True)
class _Seen:
    turn: _Turn
    see: See


@dataclass(frozen=True)
class _Context(_Seen):
    """A forward pre-hook of the output projection."""

    heads: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        context = args[0].unflatten(-1, (self.heads, -1))
        return (self.see(self.turn.next(), context).flatten(-2), *args[1:])


@dataclass(frozen=True)
class _Weights(_Seen):
    """A forward hook of the attention."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, tuple) or len(output) < 2 or not isinstance(output[1], Tensor):
            return output
        return (output[0], self.see(self.turn.last(), output[1]), *output[2:])


def _family(root: nn.Module, caller: str) -> Places:
    from .families import layers_of

    made = []
    for row, (_, layer, family) in enumerate(layers_of(root)):
        try:
            parts = family.parts(layer)
        except Unfit as reason:
            raise ValueError(f"{caller}: expected layers of an encoder. Got {reason}.") from None
        linears = [getattr(*slot) for slot in parts.linears()[:4]]
        made.append(_place(parts.query[0], linears, round(parts.scaling**-2), (row,)))
    return Places(getattr(root.config, "num_attention_heads", 0), tuple(made))


def _albert(root: nn.Module) -> Places:
    # Its layers run several times each, so they are found by how the encoder goes through them.
    encoder = root.base_model.encoder
    config = encoder.config
    rows: dict[nn.Module, list[int]] = {}
    row = 0
    for i in range(config.num_hidden_layers):
        group = int(i / (config.num_hidden_layers / config.num_hidden_groups))
        for layer in encoder.albert_layer_groups[group].albert_layers:
            rows.setdefault(layer.attention, []).append(row)
            row += 1
    made = []
    for attention, its_rows in rows.items():
        linears = [attention.query, attention.key, attention.value, attention.dense]
        made.append(_place(attention, linears, attention.attention_head_size, tuple(its_rows)))
    return Places(config.num_attention_heads, tuple(made), encoder)


def _place(attention: nn.Module, linears: list[nn.Module], size: int, rows: tuple[int, ...]) -> Place:
    return Place(attention, tuple(linears), kept_of(attention, linears[0].out_features // size), rows)
