"""CUDA graphs of functions of tensors, kept in a bounded pool: a call of a known shape is one launch.

An entry is the graph of a function for one key, with tensors of its own for the inputs, into which a call copies its
own, and the outputs, which a call copies out of. All graphs of a pool share their memory, so a replay waits, on the
device, for the one before it, whatever the stream: they may come from any thread and any stream. The one that was
used longest ago goes when there are too many.

Graphs hold the addresses of weights. `stamp` says what they were captured from: with another one, all are dropped.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., "Sequence[Tensor | None] | None"]
# Runs before a capture: they load kernels, and make what is made once.
WARM_UPS = 2
# How many keys are remembered that could not be captured.
_REFUSED = 256


class Cuda:
    """What a pool asks of torch.cuda."""

    def capturing(self) -> bool:
        """Whether the current stream is being captured."""
        return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

    def on(self, device: torch.device) -> AbstractContextManager[Any]:
        """Within it, `device` is the current one."""
        return nullcontext() if torch.cuda.current_device() == device.index else torch.cuda.device(device)

    def new_pool(self) -> Any:
        """Memory that graphs share."""
        return torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], Any], pool: Any) -> tuple[Any, Any]:
        """The graph of `function`, and what it returned; None, and that, where it returned None before."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    made = function()
                if made is None:
                    return None, None
            del made
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on allocating.
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                made = function()
        finally:
            current.wait_stream(side)
        return graph, made

    def wait(self, event: Any) -> None:
        """Has the current stream wait for what `record` gave."""
        torch.cuda.current_stream().wait_event(event)

    def record(self, event: Any) -> Any:
        """An event, or `event` again, at the end of what the current stream has been given."""
        event = torch.cuda.Event() if event is None else event
        event.record()
        return event

    def finish(self, event: Any) -> None:
        """Waits, on the host, for an event."""
        event.synchronize()


@dataclass
class _Entry:
    graph: Any
    inputs: dict[str, Tensor]
    outputs: Sequence[Tensor | None]


@dataclass
class _Device:
    """What is kept of one device."""

    pool: Any
    done: Any = None
    entries: OrderedDict[Hashable, _Entry] = field(default_factory=OrderedDict)


class GraphPool:
    """Graphs of functions, at most `max_graphs` of each device.

    Args:
        max_graphs: the bound.
        cuda: what stands for torch.cuda.
    """

    def __init__(self, max_graphs: int = 16, cuda: Any = None) -> None:
        self.max_graphs = max_graphs
        self._cuda = Cuda() if cuda is None else cuda
        self._lock = threading.Lock()
        self._devices: dict[torch.device, _Device] = {}
        self._refused: OrderedDict[Hashable, None] = OrderedDict()
        self._stamp: Any = None
        self._warned = False

    def __len__(self) -> int:
        return sum(len(device.entries) for device in self._devices.values())

    def __deepcopy__(self, memo: dict) -> GraphPool:
        # Graphs hold addresses.
        return GraphPool(self.max_graphs)

    def __reduce__(self) -> tuple:
        return GraphPool, (self.max_graphs,)

    def run(
        self,
        stamp: Any,
        key: Hashable,
        function: Function,
        inputs: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[tuple[int, ...], float]],
        take: Callable[[Sequence[Tensor | None]], Any],
    ) -> Any:
        """What `take` makes of function(**inputs), by a graph; None where there is none, and none can be made.

        Args:
            stamp: what the function's weights are, compared by ==.
            key: what the function computes beside them, shapes among it.
            function: of tensors alone; it returns tensors, or None where this call has to go another way.
            inputs: on one device, as large as their `shapes` or smaller.
            shapes: of the tensors that the function gets, and what they hold beyond the inputs.
            take: makes copies of the outputs, which the next replay overwrites.
        """
        device = next(iter(inputs.values())).device
        if self._cuda.capturing():
            return None
        with self._lock, self._cuda.on(device):
            # By ==, not by identity: what is stamped is small.
            if self._stamp != stamp:
                self._drop()
                self._stamp = stamp
            if (device, key) in self._refused:
                return None
            kept = self._devices.get(device)
            if kept is None:
                kept = self._devices[device] = _Device(self._cuda.new_pool())
            if kept.done is not None:
                self._cuda.wait(kept.done)
            entry = kept.entries.get(key)
            if entry is None:
                entry = self._captured(kept, key, function, inputs, shapes)
                if entry is None:
                    self._refuse((device, key))
                    return None
            kept.entries.move_to_end(key)
            for name, tensor in inputs.items():
                _fill(entry.inputs[name], tensor, shapes[name][1])
            entry.graph.replay()
            taken = take(entry.outputs)
            kept.done = self._cuda.record(kept.done)
        return taken

    def _captured(
        self,
        kept: _Device,
        key: Hashable,
        function: Function,
        inputs: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[tuple[int, ...], float]],
    ) -> _Entry | None:
        try:
            # Tensors that are made here serve calls in inference mode and others.
            with torch.inference_mode(False), torch.no_grad():
                # Outside of the pool's memory: nothing else may come to lie there.
                own = {
                    name: torch.empty(shapes[name][0], dtype=tensor.dtype, device=tensor.device)
                    for name, tensor in inputs.items()
                }
                for name, tensor in inputs.items():
                    _fill(own[name], tensor, shapes[name][1])
                graph, outputs = self._cuda.capture(lambda: function(**own), kept.pool)
        except RuntimeError as error:  # out of memory is one
            if not self._warned:
                self._warned = True
                reason = str(error).strip().split("\n")[0]
                warnings.warn(f"cuda_graphs: runs uncaptured: a capture failed ({reason}).", stacklevel=5)
            return None
        if graph is None:
            return None
        entry = kept.entries[key] = _Entry(graph, own, outputs)
        if len(kept.entries) > self.max_graphs:
            if kept.done is not None:
                # It may still be running.
                self._cuda.finish(kept.done)
            kept.entries.popitem(last=False)[1].graph.reset()
        return entry

    def _refuse(self, key: Hashable) -> None:
        self._refused[key] = None
        if len(self._refused) > _REFUSED:
            self._refused.popitem(last=False)

    def clear(self) -> None:
        """Drops all graphs."""
        with self._lock:
            self._drop()
            self._stamp = None

    def _drop(self) -> None:
        for device in self._devices.values():
            if device.done is not None:
                self._cuda.finish(device.done)
            for entry in device.entries.values():
                entry.graph.reset()
        self._devices.clear()
        self._refused.clear()


def _fill(own: Tensor, given: Tensor, beyond: float) -> None:
    """Copies `given` into the beginning of each dimension of `own`, and `beyond` everywhere else."""
    if own.shape == given.shape:
        own.copy_(given)
        return
    own.fill_(beyond)
    own[tuple(slice(size) for size in given.shape)].copy_(given)


def bucket(length: int, limit: int) -> int:
    """The length that sequences of `length` tokens are padded to: the next multiple of 16, from 128 on of 64; at most
    `limit`, and never less than the length itself."""
    step = 16 if length <= 128 else 64
    return max(length, min(-(-length // step) * step, limit))
