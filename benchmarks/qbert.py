"""The tables of Q-BERT on what is at hand: bits, groups and mixed precision, after training and in training.

    python -m bertkern bench qbert
    python -m bertkern bench qbert --only "STS-B 3n128,STS-B 2k64"
    python -m bertkern bench qbert --finished
    python -m bertkern bench qbert --kept-rows benchmarks/results/qbert-rows.jsonl
    python -m bertkern bench qbert --quick

all-MiniLM-L6-v2 on the STS Benchmark (Spearman), and fine-tuned on Rotten Tomatoes (accuracy). 4n128 means 4 bits in
128 groups of output features, 4k64 groups of 64 along K, 2/4n128 2 or 4 bits a layer, 3 on average, given out by the
Hessian, by the reversed order or at random. Activations have 8 bits, tables too; pooler and head stay float. After
training: ranges from the smallest to the largest weight (minmax), of the least squared error (mse), and compensated by
512 sentences of the training set. In training (qat): once more through the training set, from the trained model, beside
the float model trained as long (trained). Three seeds of training, and of random orders. Rows are kept as they are
made, in the user's cache or in the file of --kept-rows, the Hessian beside them: a run that was stopped goes on, there
or on another machine that has the files, and several may run at once with rows of their own (--only).
At last the speed of sentences in batches of 32. --finished makes no more rows: those that are there, and the speed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from . import demo, fetch, peak
from .encoder import save_batches
from .groupings import Grouping, config_of, parse_groupings
from .harness import Python, Spec, WorkerError, counted, quantile, ratio, take_turns
from .opening import REFERENCE, Probe, start
from .results import Run

ROUNDS = 7
AXIS = "task, bits and groups"
FLOAT = "fp32"
TASKS = ("STS-B", "Rotten Tomatoes")
GROUPINGS = tuple(f"{bits}{groups}" for groups in ("n1", "n12", "n128", "n384", "k64") for bits in (8, 4, 3, 2))
MIXED = ("2/4n128", "2/3n128")
ORDERS = ("sensitivity", "reversed", "random")
AFTER = ("minmax", "mse", "compensate")
# What training is shown with: on both tasks, and on the first alone.
TRAINED = ("2k64", *(f"2/4n128 {order}" for order in ORDERS), "4n128", "3n128", "2n128")
TRAINED_ONCE = ("4n1", "4n12", "4n384", *(f"2/3n128 {order}" for order in ORDERS))
SEEDS = (0, 1, 2)
QUICK = ("4n128", "2k64", "2/4n128 sensitivity")
SPEEDS = ("8n128", "4n128", "3n128", "2n128", "4k64", "2k64")
CALIBRATION = 512  # sentences

OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "only": ("only", lambda text: text.split(",")),
    "quick": ("quick", bool),
    "finished": ("finished", bool),
    "kept_rows": ("kept_rows", Path),
}


@dataclass(frozen=True)
class Case:
    """One score.

    Attributes:
        form: `4n128`, or `2/4n128 sensitivity`; "fp32" for the float model.
        method: of `AFTER`, "qat", "trained" (the float model after as much training), or "as is".
        seed: of training and of random orders; 0 elsewhere.
    """

    task: str
    form: str
    method: str
    seed: int = 0
    quick: bool = False

    def __str__(self) -> str:
        return f"{self.task} {self.form} {self.method}"

    @property
    def widths(self) -> tuple[int, ...]:
        """The bits that layers may have."""
        bits = self.form.partition(" ")[0].partition("n" if "n" in self.form.partition(" ")[0] else "k")[0]
        return tuple(map(int, bits.split("/")))

    @property
    def grouping(self) -> Grouping:
        """The groups, at the first of the widths."""
        return parse_groupings(self.form.partition(" ")[0].rpartition("/")[2])[0]._replace(bits=self.widths[:1])

    @property
    def order(self) -> str:
        """Of mixed bits."""
        return self.form.partition(" ")[2]


def cases(quick: bool) -> Iterator[Case]:
    """All rows, those that are soon there first."""
    mixed = [f"{form} {order}" for form in MIXED for order in ORDERS]
    for task in TASKS:
        yield Case(task, FLOAT, "as is", quick=quick)
        for form in QUICK if quick else (*GROUPINGS, *mixed):
            # On the second task the rows of the paper's own groups and ours do.
            few = task == TASKS[0] or "n128" in form or "k64" in form
            for method in AFTER if few else AFTER[:2]:
                for seed in SEEDS if form.endswith("random") else SEEDS[:1]:
                    yield Case(task, form, method, seed, quick)
    parts = [(task, (FLOAT, *(QUICK if quick else TRAINED))) for task in TASKS]
    for some in [parts] if quick else [parts, [(TASKS[0], TRAINED_ONCE)]]:
        for seed in SEEDS[:1] if quick else SEEDS:
            for task, forms in some:
                for form in forms:
                    yield Case(task, form, "trained" if form == FLOAT else "qat", seed, quick)


def run(
    only: Sequence[str] | None = None,
    quick: bool = False,
    finished: bool = False,
    kept_rows: Path | None = None,
    threads: int = 2,
    rounds: int = ROUNDS,
    seconds: float = 0.2,
    python: Python = None,
    report: Callable[[str], None] = lambda text: None,
    tick: Callable[[str, int, int], None] | None = None,
) -> Run:
    """Scores, then times; arguments as in `encoder.run`.

    Args:
        only: of the rows `TASK FORM METHOD` those that hold one of these texts; then nothing is timed.
        quick: few rows, little data, one seed: shows that all of it runs.
        finished: of the rows only those that earlier runs have made.
        kept_rows: file of JSON lines in which rows are kept; default: in the user's cache.

    Returns: rows with metrics spearman or accuracy, size_mb, and of STS-B sentences_s and ratio.

    Raises:
        ValueError: no row holds a text of `only`, none is finished, or `kept_rows` is no such file.
    """
    wanted = [case for case in cases(quick) if only is None or any(text in str(case) for text in only)]
    if not wanted:
        raise ValueError(f"only: expected part of a row such as '{next(cases(quick))}'. Got {','.join(only)!r}.")
    import torch

    made = Run(f"qbert-minilm-{threads}t", peak.cpu_model(), peak.isa(), threads)
    made.facts = {"model": "all-MiniLM-L6-v2", "quick": quick}
    cache = fetch.cache_dir() / "qbert"
    cache.mkdir(parents=True, exist_ok=True)
    place = kept_rows or cache / "rows.jsonl"
    if place.is_dir():
        raise ValueError(f"kept_rows: expected a file. Got the folder {str(place)!r}.")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"kept_rows: expected a folder to write into. Got {place.parent}: {error.strerror}.") from None
    rows, before = Kept(place), torch.get_num_threads()
    left = [case for case in wanted if case not in rows]
    if finished:
        wanted, left = [case for case in wanted if case in rows], []
        if not wanted:
            raise ValueError(f"finished: expected rows of an earlier run in {place}. Got none.")
    elif len(left) < len(wanted):
        report(f"{len(wanted) - len(left)} of {len(wanted)} rows are there already, from {place}.")
    torch.set_num_threads(threads)
    try:
        scores = Scores(cache, quick, tick, place.parent)
        for done, case in enumerate(left, len(wanted) - len(left)):
            if tick:
                tick(str(case), done, len(wanted))
            start = time.monotonic()
            found = scores.of(case)
            rows[case] = {**found, "seconds": round(time.monotonic() - start)}
            report(f"{case}, seed {case.seed}: {found['score']:.4f} after {rows[case]['seconds']} s")
    finally:
        torch.set_num_threads(before)
    _record(made, wanted, rows)
    if only is None:
        _time(made, threads, rounds, seconds, python, report, tick)
    return made


class Kept:
    """What was found of each case, in a file of JSON lines that grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._rows = path, {}
        for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
            # The last line may be half of one where a run was killed.
            with suppress(json.JSONDecodeError):
                row = json.loads(line)
                if not isinstance(row, dict) or not {"key", "score", "size_mb", "average_bits", "metric"} <= row.keys():
                    raise ValueError(f"kept_rows: expected rows of this benchmark in {path}. Got {line[:60]!r}.")
                self._rows[row["key"]] = row

    def __contains__(self, case: Case) -> bool:
        return self._key(case) in self._rows

    def __getitem__(self, case: Case) -> dict[str, Any]:
        return self._rows[self._key(case)]

    def __setitem__(self, case: Case, found: dict[str, Any]) -> None:
        row = {"key": self._key(case), **found}
        with self._path.open("a+b") as file:
            whole = not file.tell() or self._path.read_bytes().endswith(b"\n")
            file.write(("" if whole else "\n").encode() + json.dumps(row).encode() + b"\n")
        self._rows[row["key"]] = row

    @staticmethod
    def _key(case: Case) -> str:
        import bertkern

        return json.dumps({**asdict(case), "version": bertkern.__version__}, sort_keys=True)


class Scores:
    """Makes the models and judges them; what several cases need is made once."""

    def __init__(
        self, cache: Path, quick: bool, tick: Callable[[str, int, int], None] | None, beside: Path | None = None
    ) -> None:
        self._cache, self._quick, self._tick, self._beside = cache, quick, tick, beside or cache
        self._tasks: dict[str, Any] = {}

    def of(self, case: Case) -> dict[str, Any]:
        """score, size_mb, and average bits of a case."""
        import torch

        import bertkern as bk
        from bertkern.compress.groupwise import GroupwiseQatCallback, convert

        task = self._task(case.task)
        model = task.model()
        average = None
        if case.form == FLOAT:
            if case.method == "trained":
                model = task.train(model, case.seed)
        else:
            config, average = self._config(case, model)
            if case.method == "qat":
                callback = GroupwiseQatCallback(config)
                model = convert(task.train(model, case.seed, [callback], task.low_bit_rate))
            elif case.method == "compensate":
                sentences = task.calibration[: CALIBRATION // (8 if self._quick else 1)]
                weights = bk.compensate(model, sentences, config, tokenizer=task.tokenizer, progress=False)
                model = bk.quantize_(model, config, weights=weights)
            else:
                model = bk.quantize_(model, config)
        tensors = {id(tensor): tensor for tensor in model.state_dict().values() if isinstance(tensor, torch.Tensor)}
        size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
        return {"score": task.score(model), "size_mb": size, "average_bits": average, "metric": task.metric}

    def _task(self, name: str) -> Any:
        from .qbert_tasks import TASKS as KNOWN

        if name not in self._tasks:
            self._tasks[name] = KNOWN[name](self._cache, self._quick, self._tick)
        return self._tasks[name]

    def _config(self, case: Case, model: Any) -> tuple[Any, float]:
        """The config of a case, and the average bits of its codes."""
        # Ranges that are searched serve training, too; what is compensated has grids of its own, its tables keep 0.
        how = {"method": case.method if case.method in ("minmax", "mse") else "mse"}
        if case.method == "compensate":
            how["whole_zero"] = True
        if not case.order:
            return config_of(case.grouping, **how), float(case.widths[0])
        import bertkern as bk

        chosen = bk.assign_bits(
            self._hessian(case.task, model),
            model,
            choices=case.widths,
            average_bits=sum(case.widths) / 2,
            rule="sorted",
            order=case.order,
            seed=case.seed,
            progress=False,
        )
        return config_of(case.grouping, **how, layer_bits=chosen.layer_bits), chosen.average_bits

    def _hessian(self, name: str, model: Any) -> Any:
        """Found once, then read from the file beside the rows."""
        import bertkern as bk

        count, samples = (2, 2) if self._quick else (8, 10)
        path = self._beside / f"qbert-sensitivity-{name.lower().replace(' ', '-')}-{count}-{samples}.json"
        if not path.is_file():
            task = self._task(name)
            found = bk.hessian_sensitivity(task.trainable(model), task.batches(count), samples=samples, progress=False)
            path.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
        return bk.Sensitivity.from_dict(json.loads(path.read_text("utf-8")))


def _record(made: Run, wanted: Sequence[Case], kept: Kept) -> None:
    """The rows of the scores, seeds taken together."""
    together: dict[tuple[str, str, str], list[Case]] = {}
    for case in wanted:
        together.setdefault((case.task, case.form, case.method), []).append(case)
    import bertkern

    versions = {"bertkern": bertkern.__version__}
    for (task, form, method), same in together.items():
        found = [kept[case] for case in same]
        scores = [row["score"] for row in found]
        x = (AXIS, f"{task} {form}")
        config = {"seeds": len(same), "scores": [round(score, 4) for score in scores], "task": task}
        config |= {"average_bits": found[0]["average_bits"]} if found[0]["average_bits"] else {}
        values = tuple(quantile(scores, share) for share in (0.5, 0.2, 0.8))
        made.add("qbert", method, found[0]["metric"], x, values, config, versions)
        made.add("qbert", method, "size_mb", x, (found[0]["size_mb"],) * 3, {"task": task}, versions)


def _time(
    made: Run,
    threads: int,
    rounds: int,
    seconds: float,
    python: Python,
    report: Callable[[str], None],
    tick: Callable[[str, int, int], None] | None,
) -> None:
    """Sentences a second of STS-B's test set, a tenth of its batches of 32."""
    folder = fetch.fetch(fetch.MINILM, tick)
    pairs = fetch.sts_pairs(fetch.fetch(fetch.STSB, tick))
    grouped, _ = demo.batches([text for first, second, _ in pairs for text in (first, second)], folder, demo.BATCH)
    chosen = grouped[5::10]
    specs = [REFERENCE, "bertkern-fp32", "bertkern-int8", *(f"bertkern-groupwise:{form}" for form in SPEEDS)]

    def options(spec: str) -> dict[str, Any]:
        form = Spec.parse(spec).pattern
        return {"model": str(folder), **({"grouping": form} if form else {})}

    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory()))
        probe = stack.enter_context(Probe(threads, python))
        workers, opened, absent = start(specs, "model", threads, python, stack, options, report)
        made.absent |= absent
        inputs = save_batches(scratch / "speed.npz", chosen)
        ready = []
        for worker in workers:
            try:
                worker.ask("prepare", inputs=inputs)
                ready.append(worker)
            except WorkerError as error:
                report(str(error))
        progress = counted(tick, rounds * len(ready), "{}".format)
        samples = take_turns(ready, rounds, seconds, probe.quiet, progress=progress)
    count = sum(len(batch["input_ids"]) for batch in chosen)
    for spec, s in samples.items():
        x = ("sentences a call", str(demo.BATCH))
        rates = tuple(count / ms * 1e3 for ms in (s.median, s.p80, s.p20))
        config = {"accepted": round(s.accepted_share, 2), "rounds": rounds, "sentences": count}
        made.add("qbert", spec, "sentences_s", x, rates, config, opened[spec]["versions"])
        if spec != REFERENCE and REFERENCE in samples:
            made.add("qbert", f"{REFERENCE} / {spec}", "ratio", x, ratio(samples[REFERENCE], s))
