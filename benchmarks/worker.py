"""The process of one engine: reads one JSON request a line, answers each with one JSON line.

The reply pipe is what stdout was at the start; stdout itself then points to stderr, since libraries print.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from . import engines, peak


class Session:
    """The requests that a worker understands; each method takes and returns JSON values."""

    def __init__(self) -> None:
        self.engine: engines.Engine | None = None

    def open(self, engine: str, **options: Any) -> dict[str, Any]:
        """Makes the engine. Reply: `absent` (the missing module) or `versions` and `notes`."""
        missing = engines.missing(engine)
        if missing:
            return {"absent": missing}
        self.engine = engines.create(engine, **options)
        return {"versions": self.engine.versions(), "notes": self.engine.notes}

    def make_model(
        self, folder: str, seed: int, source: str | None = None, pattern: str | None = None
    ) -> dict[str, Any]:
        """Writes the random model, or the one in `source` pruned, so that the parent never has to load torch."""
        from .models import write_pruned, write_random_bert

        if source is None:
            write_random_bert(folder, seed)
        else:
            write_pruned(source, folder, pattern, seed)
        return {}

    def prepare(self, **case: Any) -> dict[str, Any]:
        """Gives the engine its input."""
        self.engine.prepare(**case)
        return {}

    def save(self, path: str) -> dict[str, Any]:
        """Writes the outputs to `path` (npz), for the other engines to compare with."""
        import numpy as np

        np.savez(path, **self.engine.outputs())
        return {}

    def compare(self, path: str) -> dict[str, Any]:
        """Compares the outputs with the file that the reference engine saved."""
        import numpy as np

        with np.load(path) as reference:
            return engines.agreement(dict(reference), self.engine.outputs())

    def describe(self) -> dict[str, Any]:
        """What the engine can tell of its model: `size_mb` as saved, `report` of what was swapped."""
        return {"size_mb": self.engine.size_mb(), "report": self.engine.report()}

    def turn(self, seconds: float) -> dict[str, Any]:
        """One untimed call, then timed calls for `seconds`, at least one. Reply: `ms`, one value a call.

        An engine with a `turn` of its own takes its times itself.
        """
        if hasattr(self.engine, "turn"):
            return {"ms": self.engine.turn(seconds)}
        run = self.engine.run
        run()
        times: list[float] = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        return {"ms": times}

    def quiet(self, threads: int) -> dict[str, Any]:
        """How undisturbed the machine is right now, see `peak.quiet`."""
        return {"quiet": peak.quiet(threads)}

    def peak(self, threads: int, precision: str = "int8") -> dict[str, Any]:
        """The register peak of this process, GMAC/s, or None."""
        return {"peak": peak.registers(threads, precision)}

    def read(self, threads: int) -> dict[str, Any]:
        """The memory's read bandwidth, GB/s."""
        return {"read": peak.read(threads)}

    def make_quantized(self, folder: str, out: str, form: str) -> dict[str, Any]:
        """Saves a quantized form of the model in `folder`."""
        from .memory import make_quantized

        make_quantized(folder, out, form)
        return {}

    def make_encoder(self, out: str, form: str, seed: int) -> dict[str, Any]:
        """Saves an encoder, see `memory.py`."""
        from .memory import make_encoder

        make_encoder(out, form, seed)
        return {}

    def encoder_size(self, folder: str) -> dict[str, Any]:
        """What a saved encoder takes, see `memory.py`."""
        from .memory import encoder_size

        return encoder_size(folder)

    def memory(self, way: str, folder: str) -> dict[str, Any]:
        """Peak memory of one way to a quantized model, see `memory.py`."""
        from .memory import measure

        return measure(way, folder)


def main() -> None:
    """Answers requests until stdin closes."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    session = Session()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(session, request.pop("do"))(**request)
        except Exception as error:  # whatever an engine raises is a reply
            import traceback

            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
