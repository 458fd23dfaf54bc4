"""Second moments of the inputs of a model's linear layers, encoder layer after encoder layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertkern import plan
from bertkern.nn.packing import plain_path

from ..batches import Call
from ..observation import CurrentMask, evaluating


class Stages:
    """Within it, a model is watched, and some of its linear layers may compute with other weights; then all is undone.

    Iterates over lists of names: the layers of one encoder layer, or one that stands outside of them, in the order in
    which they run.

    Args:
        watched: linear layers by name.
        calls: what the model is called with; the first tells in which order the layers run.
        judged: calls on which `deviation` compares.

    Raises:
        ValueError: no call, or a layer that the first one does not reach.
    """

    def __init__(
        self, model: nn.Module, watched: Mapping[str, nn.Module], calls: Sequence[Call], judged: Sequence[Call] = ()
    ) -> None:
        if not calls:
            raise ValueError("compensate: expected at least one batch. Got none.")
        self._model, self._watched, self._calls, self._judged = model, watched, calls, judged
        self._mask = CurrentMask()
        self._runs: dict[str, int] = {}
        self._standing: set[str] = set()
        self._source: dict[str, str] = {}
        self._undo = ExitStack()

    def __enter__(self) -> Stages:
        # The plain path, because the fused operators run no hooks of the modules that they stand for.
        for context in (evaluating(self._model), torch.no_grad(), plain_path()):
            self._undo.enter_context(context)
        try:
            for pretrained in plan.pretrained_roots(self._model).values():
                handle = pretrained.register_forward_pre_hook(self._mask.remember, with_kwargs=True)
                self._undo.callback(handle.remove)
            self._find_order()
            self._expect_outputs()
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._undo.close()

    def __len__(self) -> int:
        return len(self._stages)

    def __iter__(self) -> Iterator[list[str]]:
        return iter(self._stages)

    def moments(self, stage: Sequence[str], done: Callable[[], Any]) -> list[tuple[list[str], Tensor]]:
        """(names, mean of x x' over real tokens, float64 [K, K]) of each distinct input of the layers of a stage.

        Args:
            done: called after each batch.

        Raises:
            ValueError: an input with Inf or NaN.
        """
        sums: dict[str, Tensor] = {}
        counts = dict.fromkeys(stage, 0)
        left = 0

        def see(name: str, x: Tensor) -> None:
            nonlocal left
            if self._source[name] == name:
                x = self._mask.real_tokens(x).reshape(-1, x.shape[-1]).float()
                product = x.T @ x
                sums[name] = sums[name].add_(product) if name in sums else product.double()
                counts[name] += len(x)
            left -= 1
            if not left:
                raise _Reached

        with self._watching(stage, see):
            for args, kwargs in self._calls:
                left = sum(self._runs[name] for name in stage)
                with suppress(_Reached):
                    self._model(*args, **kwargs)
                done()
        made = []
        for source, total in sums.items():
            if not bool(torch.isfinite(total.diagonal()).all()):
                raise ValueError(f"compensate: expected the input of {source} to be finite. Got Inf or NaN.")
            names = [name for name in stage if self._source[name] == source]
            made.append((names, total.div_(max(1, counts[source]))))
        return made

    def stand_in(self, name: str, weight: Tensor) -> None:
        """From now on the layer computes with `weight`."""
        linear = self._watched[name]
        if name not in self._standing:
            self._standing.add(name)
            self._undo.callback(vars(linear).pop, "forward")
        # On the object, before the class: parameters, ties and masks stay as they are.
        linear.forward = lambda x: F.linear(x, weight.to(x.dtype), linear.bias)

    def deviation(self, stage: Sequence[str]) -> float:
        """How far what comes out of a stage on the judged calls is from what the model gave before any stood in.

        The mean over real tokens of the squared distance, as a share of the squared size. Of an encoder layer that
        comes behind its LayerNorm, so no output counts for more than the layers behind see of it. 0 where nothing is
        known, of a layer whose parts are called one by one.
        """
        layer = self._layer_of[stage[0]]
        if len(self._expected[layer]) < len(self._judged):
            return 0.0
        shares = []
        for call, expected in zip(self._judged, self._expected[layer], strict=True):
            found = self._outputs([layer], call)[layer]
            size = expected.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
            shares.append(((found - expected).square().sum(-1) / size).flatten())
        return float(torch.cat(shares).mean()) if shares else 0.0

    def _expect_outputs(self) -> None:
        layers = list(dict.fromkeys(self._layer_of.values()))
        self._expected: dict[str, list[Tensor]] = {layer: [] for layer in layers}
        for call in self._judged:
            for layer, output in self._outputs(layers, call).items():
                self._expected[layer].append(output)

    def _outputs(self, layers: Sequence[str], call: Call) -> dict[str, Tensor]:
        """What comes out of layers for real tokens, [..., features], when they run for the last time."""
        found: dict[str, Tensor] = {}
        left = sum(self._layer_runs[layer] for layer in layers)

        def hook(layer: str) -> Callable[..., None]:
            def see(module: nn.Module, args: Any, output: Any) -> None:
                nonlocal left
                first = output[0] if isinstance(output, tuple) else output
                if isinstance(first, Tensor):
                    found[layer] = self._mask.real_tokens(first).float()
                left -= 1
                if not left:
                    raise _Reached

            return see

        handles = [self._model.get_submodule(layer).register_forward_hook(hook(layer)) for layer in layers]
        args, kwargs = call
        try:
            with suppress(_Reached):
                self._model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _find_order(self) -> None:
        inputs: dict[str, list[Tensor]] = {}

        def see(name: str, x: Tensor) -> None:
            # Kept, so that no other tensor takes the place of one: query, key and value have the same.
            inputs.setdefault(name, []).append(x)

        args, kwargs = self._calls[0]
        with self._watching(self._watched, see):
            self._model(*args, **kwargs)
        missed = [name for name in self._watched if name not in inputs]
        if missed:
            raise ValueError(f"compensate: expected the first batch to reach {missed[0]}. Got one that does not.")
        stages: dict[str, list[str]] = {}
        self._layer_of: dict[str, str] = {}
        first: dict[tuple[str, tuple[int, ...]], str] = {}
        for name, seen in inputs.items():
            self._runs[name] = len(seen)
            layer = self._layer_of[name] = _layer(self._model, name)
            self._source[name] = first.setdefault((layer, tuple(map(id, seen))), name)
            stages.setdefault(layer, []).append(name)
        self._stages = list(stages.values())
        # Every run of a layer runs each of its linears as often.
        self._layer_runs = {layer: self._runs[names[0]] for layer, names in stages.items()}

    @contextmanager
    def _watching(self, names: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
        def hook(name: str) -> Callable[..., None]:
            return lambda module, args: see(name, args[0])

        handles = [self._watched[name].register_forward_pre_hook(hook(name)) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Reached(Exception):
    """All layers of a stage have run: the rest of the model need not."""


def _layer(model: nn.Module, name: str) -> str:
    """The outermost member of a ModuleList that holds the module, or the module itself."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList):
            return ".".join(parts[: depth + 1])
    return name
