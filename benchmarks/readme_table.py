"""Writes the README's table of measured numbers from `results/`, between two markers.

    python -m benchmarks.readme_table            rewrite it
    python -m benchmarks.readme_table --check    exit with 1 if it is not what the results say

Numbers in the README come from here and from nowhere else.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .results import Run, load
from .sparse import skips
from .tables import SparsePoint, facts_line, milliseconds, share_of_zeros
from .tables_qbert import methods, score

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- measured: begin (benchmarks/readme_table.py) -->", "<!-- measured: end -->"
EMPTY = "*Not measured yet: `benchmarks/campaign.sh` measures and fills this.*"
GPU_BEGIN, GPU_END = (
    "<!-- measured on a card: begin (benchmarks/readme_table.py) -->",
    "<!-- measured on a card: end -->",
)
GPU_EMPTY = (
    "**No kernel of this path has run on a card yet.** Triton's are compiled for sm_80, 90 and 100 and for AMD's "
    "gfx942, and run in Triton's interpreter; there are no timings. `python -m benchmarks.gpu` on a card checks them, "
    "measures them beside torch, and fills this."
)


def table(results: Path) -> str:
    """The Markdown between the markers: a part for each of the `PARTS` whose results are there."""
    runs = ([results / f"{name}.json" for name in names] for names in PARTS)
    parts = [
        draw(*(load(path) for path in paths if path.exists()))
        for paths, draw in zip(runs, PARTS.values(), strict=True)
        if any(path.exists() for path in paths)
    ]
    return "\n\n".join(parts) or EMPTY


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _encoder(run: Run) -> str:
    shapes = run.x_values("latency_ms")
    names = sorted(run.providers("latency_ms"), key=lambda name: not name.startswith("bertkern"))
    rows = []
    for name in names:
        found = [run.find(name, "latency_ms", x) for x in shapes]
        rows.append([_strong(name), *(milliseconds(row.median) if row else "-" for row in found)])
    ours = next((name for name in names if name.startswith("bertkern-int8")), None)
    gains = [_gain(run, ours, x) for x in shapes] if ours else []
    if any(gains):
        rows.append(["ahead of the fastest other int8", *gains])
    text = _markdown(["BERT-base, ms (batch x tokens)", *shapes], rows)
    return f"{text}\n\nMedians of {run.facts['rounds']} interleaved turns; {facts_line(run)}."


def _gain(run: Run, ours: str, shape: str) -> str:
    """The smallest paired ratio to an int8 rival."""
    ratios = [
        row.median
        for row in run.rows
        if row.metric == "ratio" and row.x_value == shape and row.provider.endswith(f"-int8 / {ours}")
    ]
    return f"**{min(ratios):.2f}x**" if ratios else ""


def _strong(name: str) -> str:
    return f"**{name}**" if name.startswith("bertkern") else name


def _demo(run: Run) -> str:
    calls = run.x_values("sentences_s")
    rows = []
    for name in run.providers("spearman"):
        size = run.find(name, "size_mb", "weights")
        rates = [run.find(name, "sentences_s", x) for x in calls]
        score = run.find(name, "spearman", "STS-B").median
        row = [_strong(name), f"{score:.4f}", f"{size.median:.0f}" if size else "-"]
        rows.append(row + [f"{rate.median:,.0f}" if rate else "-" for rate in rates])
    header = ["all-MiniLM-L6-v2", "Spearman, STS-B test", "MB", *(f"sentences/s, {x} at a time" for x in calls)]
    return _markdown(header, rows)


def _sparse(run: Run) -> str:
    """Times faster than dense of ours over zeros, and the break-even, of one layer; unstructured fp32 beside rivals."""
    points = [SparsePoint.parse(x) for x in run.x_values("latency_ms")]
    layers = list(dict.fromkeys(point.layer for point in points))
    layer = next((name for name in layers if name.startswith("128x")), layers[0])
    zeros = sorted({point.zeros for point in points})
    rows = []
    for pair in run.providers("ratio"):
        slow, _, fast = pair.partition(" / ")
        own = slow == f"bertkern-{fast.rpartition('-')[2]}"
        if not fast.startswith("bertkern") or (slow.endswith("-int8") and not own):
            continue
        for block in dict.fromkeys(point.block for point in points):
            found = [run.find(pair, "ratio", f"{layer} {block}@{z:g}") for z in zeros]
            if any(found) and (own or (fast.endswith("-fp32") and block == "1x1")):
                at = run.find(pair, "break_even", f"{layer} {block}")
                name = f"**{fast}** {block}" if own else f"{fast} {block}, times {slow}"
                gains = (f"{row.median:.2f}x" if row else "-" for row in found)
                # Beside a rival that skips zeros too there is no such point.
                rows.append([name, *gains, share_of_zeros(at) if at else "" if skips(slow) else "-"])
    header = [f"{layer} (M x N x K): times dense of ours, at zeros", *(f"{z:.0%}" for z in zeros), "ahead from"]
    text = _markdown(header, rows)
    return f"{text}\n\nMedians of {run.facts['rounds']} interleaved turns; {facts_line(run)}."


def _attention(run: Run) -> str:
    """Times faster than torch's attention at the same data type, and what fewer heads take of the time of all."""
    shapes = run.x_values("ratio")
    rows = []
    for pair in run.providers("ratio"):
        slow, _, fast = pair.partition(" / ")
        if not slow.startswith("torch-eager"):
            found = [run.find(pair, "ratio", x) for x in shapes]
            rows.append([f"**{fast}**, times {slow}", *(f"{row.median:.2f}x" if row else "-" for row in found)])
    for name in run.providers("time_share"):
        found = [run.find(name, "time_share", x) for x in shapes]
        if all(found) and found[0].config["kept"] in (6, 3) and "mask" not in name:
            kept = f"{found[0].config['kept']} of {found[0].config['heads']} heads"
            rows.append(
                [f"{name.partition(':')[0]}, {kept}: share of the time", *(f"{share.median:.2f}" for share in found)]
            )
    text = _markdown([f"Attention, {run.facts['model']} (batch x tokens)", *shapes], rows)
    return f"{text}\n\nMedians of {run.facts['rounds']} interleaved turns; {facts_line(run)}."


def _sentences(run: Run) -> str:
    """sentence-transformers' backends beside bertkern."""
    batch = run.x_values("sentences_s")[0]
    rows = []
    for name in sorted(run.providers("sentences_s"), key=lambda name: not name.startswith("bertkern")):
        score, rate = run.find(name, "spearman", "STS-B"), run.find(name, "sentences_s", batch)
        gains = [row for row in run.rows if row.metric == "ratio" and row.provider.startswith(f"{name} / bertkern")]
        gain = f"{gains[0].median:.2f}x" if gains else ""
        rows.append([_strong(name), f"{score.median:.4f}" if score else "-", f"{rate.median:,.0f}", gain])
    header = [
        f"all-MiniLM-L6-v2 in sentence-transformers, batches of {batch}",
        "Spearman",
        "sentences/s",
        "bertkern's times",
    ]
    text = _markdown(header, rows)
    return f"{text}\n\nMedians of {run.facts['rounds']} interleaved turns; {facts_line(run)}."


def _groupwise(run: Run) -> str:
    """Times faster than int8 of ours and than other engines at the same bits, of the layer with the most outputs."""
    cases = [x.split() for x in run.x_values("ratio")]
    layer = max((shape.partition("x")[2] for shape, _ in cases), key=lambda name: int(name.partition("x")[0]))
    shapes = list(dict.fromkeys(shape for shape, _ in cases if shape.partition("x")[2] == layer))
    rows = []
    for grouping in dict.fromkeys(grouping for _, grouping in cases):
        for pair in run.providers("ratio"):
            found = [run.find(pair, "ratio", f"{shape} {grouping}") for shape in shapes]
            if any(found):
                slow, _, fast = pair.partition(" / ")
                rows.append(
                    [
                        f"**{fast}** {grouping}, times {slow}",
                        *(f"{row.median:.2f}x" if row else "-" for row in found),
                    ]
                )
    text = _markdown(["Group-wise weights (M x N x K)", *shapes], rows)
    said = "4n128 is 4 bits in 128 groups of outputs, 4k64 groups of 64 inputs, 2+4n128 groups of 2 and 4 bits in turn"
    return f"{text}\n\n{said}. Medians of {run.facts['rounds']} interleaved turns; {facts_line(run)}."


def _qbert(run: Run) -> str:
    """Scores of the first task by bits and groups: after training, and in training."""
    metric, task = next((row.metric, row.config["task"]) for row in run.rows if row.metric in ("spearman", "accuracy"))
    whole, trained = (score(run, method, metric, task, "fp32") for method in ("as is", "trained"))
    columns, rows = methods(run, task), []
    if whole:
        size = run.find("as is", "size_mb", whole.x_value)
        beside = [trained if name == "qat" else whole for name in columns]
        cells = [f"{row.median:.4f}" if row else "-" for row in beside]
        rows.append(["fp32", "32", f"{size.median:.0f}", *cells])
    prefix = f"{task} "
    for form in (x.removeprefix(prefix) for x in run.x_values(metric) if x.startswith(prefix)):
        found = [score(run, name, metric, task, form) for name in columns]
        first = next((row for row in found if row), None)
        if first:
            size, bits = run.find(first.provider, "size_mb", first.x_value), first.config["average_bits"]
            scores = [f"{row.median:.4f}" if row else "-" for row in found]
            rows.append([f"**{form}**", f"{bits:g}", f"{size.median:.0f}", *scores])
    text = _markdown([f"{run.facts['model']}, {metric} on {task}", "bits", "MB", *columns], rows)
    after = [name for name in columns if name != "qat"]
    said = f"{', '.join(after)}: rounded after training. " if after else ""
    if "qat" in columns:
        said += "qat: trained with rounded weights, the median of its seeds; fp32 there is trained as long. "
    return f"{text}\n\n{said}Activations and tables have 8 bits. {facts_line(run)}."


def _left_out(*runs: Run) -> str:
    """What the engines need without padding, or without some of the heads, of the time with them."""
    rows = []
    for run in runs:
        what = "padding" if run.name.startswith("padding") else "heads"
        for row in run.rows:
            if row.metric == "time_share":
                case = f"{row.x_value}, {run.threads} threads"
                rows.append([f"**{row.provider}**", what, case, f"{row.config['kept']:.1%}", f"{row.median:.1%}"])
    return _markdown(["BERT-base without", "left out", "on", "work left", "time left"], rows)


# What the README shows, in this order: names of results, and what draws those of them that are there.
PARTS = {
    ("encoder-bert-base-2t",): _encoder,
    ("demo-minilm-2t",): _demo,
    ("sentences-minilm-2t",): _sentences,
    ("sparse-1t",): _sparse,
    ("groupwise-1t",): _groupwise,
    ("qbert-minilm-2t",): _qbert,
    ("attention-12x64-2t",): _attention,
    ("padding-bert-base-2t", "heads-bert-base-heads@0.5-2t"): _left_out,
}


def gpu_table(results: Path) -> str:
    """The Markdown of the card: models in ms, and what was asked for beside what was measured."""
    from .gpu.goals import judge
    from .gpu.goals import table as asked

    runs = [load(path) for path in sorted((results / "gpu").glob("gpu-*.json"))]
    rows = [row for run in runs for row in run.rows]
    timed = [run for run in runs if any(row.metric == "latency_ms" for row in run.rows)]
    if not timed:
        return GPU_EMPTY
    parts = [_gpu_models(run) for run in timed if run.name == "gpu-models"]
    found = [line for line in asked(judge(rows)) if line[2] != "-"]
    if found:
        parts.append(_markdown(["figure", "asked", "measured", "", "worst at"], found))
    said = dict.fromkeys(f"{run.device}, {run.isa}, {run.date[:10]}" for run in timed)
    checks = [row for row in rows if row.metric == "ok" and row.kernel == "smoke"]
    ran = f"{sum(row.median for row in checks):.0f} of {len(checks)} kernels ran and were right; " if checks else ""
    return "\n\n".join([*parts, f"{ran}{'; '.join(said)}."])


def _gpu_models(run: Run) -> str:
    shapes = run.x_values("latency_ms")
    rows = []
    for name in run.providers("latency_ms"):
        found = [run.find(name, "latency_ms", x) for x in shapes]
        rows.append([_strong(name), *(milliseconds(row.median) if row else "-" for row in found)])
    return _markdown(["BERT-base on a card, ms (batch x tokens: padding)", *shapes], rows)


def insert(readme: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """README with `text` between two markers. Raises ValueError where they are missing."""
    before, found, rest = readme.partition(begin)
    _, ending, after = rest.partition(end)
    if not found or not ending:
        raise ValueError(f"README: expected the markers {begin} and {end}.")
    return f"{before}{begin}\n{text}\n{end}{after}"


def main() -> int:
    """Rewrites or checks README.md of this checkout."""
    parser = argparse.ArgumentParser(description="Fill the README's table of measured numbers.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the table is stale")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    old = readme.read_text()
    results = ROOT / "benchmarks" / "results"
    new = insert(insert(old, table(results)), gpu_table(results), GPU_BEGIN, GPU_END)
    if arguments.check:
        if old != new:
            print("README.md: the table is stale; run: python -m benchmarks.readme_table", file=sys.stderr)
        return int(old != new)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
