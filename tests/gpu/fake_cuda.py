"""A stand-in for torch.cuda's graphs on CPU tensors: a replay runs the function again and fills its first outputs."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import torch


class FakeGraph:
    """Runs `function` at every replay; what it returns goes into the tensors that the capture returned."""

    def __init__(self, fake: FakeCuda, function: Any, outputs: Any) -> None:
        self.fake, self.function, self.outputs, self.alive = fake, function, outputs, True

    def replay(self) -> None:
        assert self.alive, "a graph that was reset"
        # What a replay overwrites must be free: the one before has been waited for.
        assert self.fake.waited == self.fake.recorded, "a replay that does not wait for the one before"
        self.fake.replays += 1
        self.fake.inside = threading.get_ident()
        made = self.function()
        self.fake.inside = None
        for own, new in zip(self.outputs, made, strict=True):
            if own is not None:
                own.copy_(new)

    def reset(self) -> None:
        self.alive = False
        self.fake.resets += 1
        for own in self.outputs:
            if own is not None:
                own.fill_(float("nan"))


class FakeCuda:
    """What `bertkern.gpu.graphs.Cuda` is, counted.

    Attributes:
        fails: the error that the next captures raise.
    """

    def __init__(self) -> None:
        self.captures = self.replays = self.resets = self.recorded = self.waited = self.finished = 0
        self.fails, self.busy = None, False
        # The thread whose stream is being captured.
        self.inside: int | None = None
        self.pools: list[Any] = []

    def capturing(self) -> bool:
        return self.busy or self.inside == threading.get_ident()

    def on(self, device: torch.device):
        return nullcontext()

    def new_pool(self) -> Any:
        self.pools.append(object())
        return self.pools[-1]

    def capture(self, function: Any, pool: Any) -> tuple[Any, Any]:
        assert pool in self.pools
        self.inside = threading.get_ident()
        try:
            made = function()
            if made is None:
                return None, None
            if self.fails is not None:
                raise self.fails
            outputs = [None if tensor is None else torch.full_like(tensor, float("nan")) for tensor in made]
        finally:
            self.inside = None
        self.captures += 1
        return FakeGraph(self, function, outputs), outputs

    def wait(self, event: int) -> None:
        self.waited = event

    def record(self, event: Any) -> int:
        self.recorded += 1
        return self.recorded

    def finish(self, event: Any) -> None:
        self.finished += 1
        self.waited = event
