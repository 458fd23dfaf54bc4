"""Times calls on a card: graphs of many calls between two events, providers in turns, weights cold or hot.

On a CPU a `HostClock` stands for the card, so that all of it can be tested; its times mean nothing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..harness import Samples

COLD_L2 = 4  # copies of a weight add up to so many times the L2
MOST_COPIES = 256
TURN_MS = 3.0


def cloned(value: Any) -> Any:
    """A copy of all tensors in lists, tuples and dataclasses; strides are kept."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(cloned, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(cloned, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: cloned(getattr(value, name)) for name in names})
    return value


def size_of(value: Any) -> int:
    """Bytes of all tensors that `cloned` would copy."""
    if isinstance(value, Tensor):
        if value.layout == torch.sparse_bsr:
            return sum(size_of(part) for part in (value.crow_indices(), value.col_indices(), value.values()))
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(map(size_of, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return sum(size_of(getattr(value, field.name)) for field in dataclasses.fields(value))
    return 0


def copies(weights: Any, l2: int) -> list[Any]:
    """The weights and copies of them, until they are `COLD_L2` times as many bytes as the L2."""
    wanted = 1 + COLD_L2 * l2 // max(1, size_of(weights))
    return [weights, *(cloned(weights) for _ in range(min(wanted, MOST_COPIES) - 1))]


class HostClock:
    """Times calls by the host's clock: for devices whose calls return when they are done."""

    l2 = 1 << 16

    def prepare(self, calls: Sequence[Callable[[], Any]]) -> tuple[Callable[[], None], str]:
        """What runs all calls once, and by which method."""

        def replay() -> None:
            for call in calls:
                call()

        return replay, "host"

    def milliseconds(self, replay: Callable[[], None], times: int) -> float:
        """Of `times` replays together."""
        begin = time.perf_counter()
        for _ in range(times):
            replay()
        return (time.perf_counter() - begin) * 1e3

    def wait(self) -> None:
        """Until everything is done."""


class CardClock:
    """Times calls by events of the current card."""

    def __init__(self) -> None:
        self.l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size

    def prepare(self, calls: Sequence[Callable[[], Any]]) -> tuple[Callable[[], None], str]:
        """A graph's replay, or the calls themselves where they cannot be captured."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for call in calls[:3]:
                call()
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        except RuntimeError:
            torch.cuda.synchronize()

            def replay() -> None:
                for call in calls:
                    call()

            return replay, "events"
        return graph.replay, "graph"

    def milliseconds(self, replay: Callable[[], None], times: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def wait(self) -> None:
        torch.cuda.synchronize()


def clock_of(device: str) -> HostClock | CardClock:
    return CardClock() if device == "cuda" else HostClock()


@dataclasses.dataclass
class Timed:
    """A provider that is ready: its calls, captured together, and how many there are of them."""

    name: str
    replay: Callable[[], None]
    calls: int
    how: str
    times: int = 1


def ready(clock: Any, name: str, call: Callable[[Any], Any], weights: Any, cold: bool) -> Timed:
    """Captures calls: one for each copy of cold weights, else 10 with the same."""
    held = copies(weights, clock.l2) if cold else [weights] * 10
    calls = [lambda w=w: call(w) for w in held]
    replay, how = clock.prepare(calls)
    made = Timed(name, replay, len(calls), how)
    clock.milliseconds(replay, 1)
    once = clock.milliseconds(replay, 1)
    made.times = max(1, min(50, int(TURN_MS / max(once, 1e-3))))
    return made


def take_turns(clock: Any, timed: Sequence[Timed], rounds: int) -> dict[str, Samples]:
    """Milliseconds a call; each round begins one provider further, so none always follows the same one."""
    samples = {one.name: Samples() for one in timed}
    for number in range(rounds):
        shift = number % max(1, len(timed))
        for one in [*timed[shift:], *timed[:shift]]:
            one.replay()
            total = clock.milliseconds(one.replay, one.times)
            samples[one.name].ms.append(total / (one.times * one.calls))
            samples[one.name].probe.append(None)
            samples[one.name].calls += one.times * one.calls
    return samples


def alone(clock: Any, call: Callable[[], Any], times: int) -> list[float]:
    """Milliseconds of single calls on an idle card, the host's part included."""
    found = []
    for _ in range(times):
        clock.wait()
        found.append(clock.milliseconds(call, 1))
    return found


def host_milliseconds(clock: Any, call: Callable[[], Any], times: int) -> list[float]:
    """What the host takes until a call returns, the card idle before."""
    found = []
    for _ in range(times):
        clock.wait()
        begin = time.perf_counter()
        call()
        found.append((time.perf_counter() - begin) * 1e3)
    clock.wait()
    return found
