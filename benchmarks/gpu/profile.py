"""Where the time of one case goes, kernel by kernel: torch.profiler over a provider of ours and its rival."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import models, problems, providers

CALLS, MOST = 20, 12


def kernel_times(run: Callable[[], Any], device: str, calls: int = CALLS) -> dict[str, float]:
    """Microseconds a call of each kernel (on a CPU: operator), longest first."""
    from torch.profiler import ProfilerActivity, profile

    run()
    kinds = [ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]
    with profile(activities=kinds) as found:
        for _ in range(calls):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
    times: Counter[str] = Counter()
    for event in found.key_averages():
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if own > 0:
            times[event.key] += own / calls
    return dict(times.most_common())


def job(say: Any, kernel: str, x: str, names: Sequence[str], device: str = "cuda", **sizes: Any) -> None:
    """Rows of kernel "profile", metric kernel_us; x is "case: kernel's name".

    Args:
        kernel: an operator of `problems`, or "model".
        x: the case.
        names: providers.
        sizes: arguments of the function that makes the cases, or `layers`, `hidden` and `heads` of the model.
    """
    for name in names:
        say(at=f"{x}|{name}")
        try:
            times = kernel_times(_call(kernel, x, name, device, sizes), device)
        except Exception as error:  # one that does not run here is said
            say(absent={f"profile {name}": f"{type(error).__name__}: {str(error)[:200]}"})
            continue
        for called, us in list(times.items())[:MOST]:
            say.row("profile", name, "kernel_us", ("case: kernel", f"{x}: {called[:120]}"), [us] * 3)
        say.row("profile", name, "sum_us", ("case", x), [sum(times.values())] * 3)


def _call(kernel: str, x: str, name: str, device: str, sizes: dict[str, Any]) -> Callable[[], Any]:
    if kernel == "model":
        batch, tokens, padding, pruned = models.CASES[x]
        whole = models.bert(sizes.get("layers", 12), pruned, sizes.get("hidden", 768), sizes.get("heads", 12))
        engine = next(engine for engine in models.ENGINES if engine.name == name)
        model = engine.make(whole.to(device=device, dtype=engine.dtype))
        given = models.batch_of(batch, tokens, padding, device)

        def run() -> Any:
            with torch.inference_mode():
                return model(**given)

        return run
    case = next(case for case in getattr(problems, f"{kernel}_cases")(**sizes) if case.x == x)
    provider = next(provider for provider in providers.of(kernel) if provider.name == name)
    problem = problems.problem(case, device)
    weights, call = provider.make(problem)

    def chosen() -> Any:
        with provider.chosen():
            return call(weights)

    return chosen
