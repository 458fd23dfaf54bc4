"""BERT-base on a card: one sentence, a batch half of padding, and a pruned model; ours beside torch's.

latency_ms is of a call on an idle card, the host's part included; device_ms that of a captured graph of the call, where
it can be captured; host_us what the host needs until the call returns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from ..harness import Samples, quantile, ratio
from .timing import alone, clock_of, host_milliseconds, ready

AXIS = "batch x tokens"
# Name: batch, tokens, share of padding, pruned.
CASES = {
    "1x128": (1, 128, 0.0, False),
    "64x128:0.5": (64, 128, 0.5, False),
    "64x128:0.5 pruned": (64, 128, 0.5, True),
}
FEED_FORWARD_GONE, HEADS_GONE = 0.65, 0.5


@dataclass(frozen=True)
class Engine:
    """A way to run the model: `make(model)` may change it; one that is `compiled` takes minutes to get ready."""

    name: str
    make: Callable[[Any], Any]
    floor_db: float = 30.0
    dtype: torch.dtype = torch.bfloat16
    compiled: bool = False


def _accelerated(model: Any) -> Any:
    import bertkern as bk

    return _captured(bk.accelerate(model))


def _int8(model: Any) -> Any:
    import bertkern as bk

    return _captured(bk.quantize_(model, bk.Int8Config()))


def _captured(model: Any) -> Any:
    """With CUDA graphs, where bertkern has them."""
    import bertkern as bk

    if hasattr(bk, "cuda_graphs"):
        bk.cuda_graphs(model)
    return model


def _compiled(model: Any) -> Any:
    return torch.compile(model, mode="max-autotune", dynamic=False)


ENGINES = (
    Engine("bertkern-int8", _int8, 15.0),
    Engine("bertkern-bf16", _accelerated),
    Engine("bertkern-fp16", _accelerated, 40.0, torch.float16),
    Engine("torch-eager-bf16", lambda model: model),
    Engine("torch-eager-fp16", lambda model: model, 40.0, torch.float16),
    Engine("torch-compile-bf16", _compiled, compiled=True),
)


def bert(layers: int, pruned: bool, hidden: int, heads: int) -> Any:
    """BertModel with random weights; pruned: zeros in the columns that a head or a feed-forward unit goes through."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(2018)
    config = BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden
    )
    model = BertModel(config).eval()
    if pruned:
        size = hidden // heads
        with torch.no_grad():
            for layer in model.encoder.layer:
                out, second = layer.attention.output.dense.weight, layer.output.dense.weight
                for head in torch.randperm(heads)[: round(HEADS_GONE * heads)].tolist():
                    out[:, head * size : (head + 1) * size] = 0
                units = second.shape[1]
                second[:, torch.randperm(units)[: round(FEED_FORWARD_GONE * units)]] = 0
    return model


def batch_of(batch: int, tokens: int, padding: float, device: str) -> dict[str, torch.Tensor]:
    """Random tokens; lengths that leave a share of padding, the first sentence as long as the batch."""
    torch.manual_seed(2018)
    ids = torch.randint(1000, 30000, (batch, tokens))
    least = max(1, round(tokens * (1 - 2 * padding)))
    lengths = torch.linspace(tokens, least, batch).round().long()
    mask = torch.arange(tokens) < lengths[:, None]
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.long().to(device)}


def job(
    say: Any,
    device: str = "cuda",
    skip: Collection[str] = (),
    rounds: int = 7,
    calls: int = 20,
    layers: int = 12,
    hidden: int = 768,
    heads: int = 12,
    only: Collection[str] = tuple(CASES),
    engines: Collection[str] = tuple(engine.name for engine in ENGINES),
) -> None:
    """Measures; `skip` as of ops.job, `only` and `engines` by name."""
    clock, skip = clock_of(device), set(skip)
    asked = [x for x in CASES if x in only]
    known: dict[str, dict[str, Samples]] = {}
    # What has to be compiled comes when all else is measured: it may use up the time.
    for compiled in (False, True):
        for x in asked:
            name = f"{x}+compiled" if compiled else x
            here = [e for e in ENGINES if e.compiled == compiled and e.name in engines and f"{x}|{e.name}" not in skip]
            if not here or name in skip:
                continue
            batch, tokens, padding, pruned = CASES[x]
            say(at=f"{x}|")
            whole, given = bert(layers, pruned, hidden, heads), batch_of(batch, tokens, padding, device)
            with torch.inference_mode():
                expected = copy.deepcopy(whole).float().to(device)(**given).last_hidden_state.double()
            runs: dict[str, Callable[[], Any]] = {}
            for engine in here:
                say(at=f"{x}|{engine.name}")
                try:
                    runs[engine.name] = _ready(engine, whole, given, expected, device)
                except Exception as error:  # whatever an engine raises is said, and costs its column alone
                    text = (str(error).splitlines() or [""])[0][:300]
                    say(absent={f"model {engine.name}": f"{x}: {type(error).__name__}: {text}"})
            known.setdefault(x, {})
            _measure(say, clock, x, runs, rounds, calls, known[x])
            say(at=f"{x}|", finished=name)


def _ready(engine: Engine, whole: Any, given: dict, expected: torch.Tensor, device: str) -> Callable[[], Any]:
    model = engine.make(copy.deepcopy(whole).to(device=device, dtype=engine.dtype))

    def run() -> Any:
        with torch.inference_mode():
            return model(**given).last_hidden_state

    for _ in range(3):
        got = run()
    live = given["attention_mask"].bool()
    got, wanted = got.double()[live], expected[live]
    db = float(10 * torch.log10(wanted.square().sum() / (got - wanted).square().sum().clamp(min=1e-30)))
    if not db >= engine.floor_db:
        raise ValueError(f"wrong: {db:.1f} dB from fp32, {engine.floor_db:g} asked for")
    return run


def _measure(
    say: Any, clock: Any, x: str, runs: dict[str, Callable], rounds: int, calls: int, known: dict[str, Samples]
) -> None:
    """Rows of `runs`, which become known; ratios of them and of what was known before."""
    samples: dict[str, Samples] = {name: Samples() for name in runs}
    for number in range(rounds):
        names = list(runs)
        shift = number % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            say(at=f"{x}|{name}")
            samples[name].ms.append(quantile(alone(clock, runs[name], calls), 0.5))
            samples[name].probe.append(None)
    for name, s in samples.items():
        say.row("model", name, "latency_ms", (AXIS, x), (s.median, s.p20, s.p80), {"rounds": rounds, "calls": calls})
        host = host_milliseconds(clock, runs[name], calls)
        say.row("model", name, "host_us", (AXIS, x), [1e3 * quantile(host, q) for q in (0.5, 0.2, 0.8)])
        if not name.startswith("torch-compile"):  # which replays a graph of its own
            say(at=f"{x}|{name} captured")
            _captured_rows(say, clock, x, name, runs[name], rounds)
    before, every = set(known), known | samples
    for fast in every:
        for slow in every:
            new = fast not in before or slow not in before
            if new and fast.startswith("bertkern") and not slow.startswith("bertkern"):
                say.row("model", f"{slow} / {fast}", "ratio", (AXIS, x), ratio(every[slow], every[fast]))
    known |= samples


def _captured_rows(say: Any, clock: Any, x: str, name: str, run: Callable[[], Any], rounds: int) -> None:
    try:
        one = ready(clock, name, lambda _: run(), (), cold=False)
    except Exception as error:
        say(absent={f"model {name} captured": f"{x}: {type(error).__name__}: {str(error).splitlines()[:1]}"})
        return
    if one.how == "events":
        say(absent={f"model {name} captured": f"{x}: it cannot be captured"})
        return
    ms = [clock.milliseconds(one.replay, one.times) / (one.times * one.calls) for _ in range(rounds)]
    say.row("model", name, "device_ms", (AXIS, x), [quantile(ms, q) for q in (0.5, 0.2, 0.8)])
