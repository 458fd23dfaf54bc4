"""The command line: `python -m bertkern {doctor,inspect,quantize,bench,demo}`.

Each command imports what it needs when it runs; mistakes of the caller are found before anything is changed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

ENGINES_HELP = """\
engines (columns of the table; one that is not installed is reported as absent):
  bertkern-int8  bertkern-fp32  torch-fp32  torch-bf16  torch-int8  torchao-int8  onnxruntime-fp32
  onnxruntime-int8  ctranslate2-int8  openvino-bf16  openvino-int8; for gemm: bertkern-kernel
  bertkern-int8  bertkern-linear  torch-int8  torch-bf16  torch-fp32. NAME@avx2 caps an engine's instruction set.
"""


class UsageError(Exception):
    """A mistake of the caller; the message says what was expected and what came."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.command(arguments) or 0
    except UsageError as error:
        return _complain(error, 2)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if os.environ.get("BERTKERN_VERBOSE"):
            raise
        return _complain(error, 1)


def _complain(error: object, status: int) -> int:
    print(f"bertkern: {error}", file=sys.stderr)
    return status


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands, their options and examples."""
    parser = argparse.ArgumentParser(
        prog="python -m bertkern",
        description="Pruned and quantized BERT models, really fast.",
        epilog="Each command has its own --help with examples. BERTKERN_VERBOSE=1 shows tracebacks.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int | None], about: str, epilog: str) -> Any:
        sub = commands.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=command)
        return sub

    sub = add("doctor", doctor, "what this machine and this installation can do", _examples("doctor", "doctor --json"))
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = add(
        "inspect",
        inspect,
        "what a model is made of, and what bertkern would do with it",
        _examples("inspect ./my-bert", "inspect sentence-transformers/all-MiniLM-L6-v2 --json"),
    )
    _model_argument(sub)
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = add(
        "quantize",
        quantize,
        "turn a model into int8 and save it",
        _examples("quantize ./my-bert ./my-bert-int8", "quantize ./my-bert ./out --skip classifier --no-embeddings")
        + "\nThe result loads with: import bertkern; AutoModel.from_pretrained(OUT)\n",
    )
    _model_argument(sub)
    sub.add_argument("out", metavar="OUT", type=Path, help="folder to write, with the tokenizer beside the weights")
    sub.add_argument("--weight", choices=("per_channel", "per_tensor"), default="per_channel", help="%(default)s")
    sub.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="modules to leave; may be repeated")
    sub.add_argument("--no-embeddings", action="store_true", help="leave the embedding tables")
    sub.add_argument("--no-pooler", action="store_true", help="leave the pooler")
    sub.add_argument("--no-head", action="store_true", help="leave the task head")
    sub.add_argument("--force", action="store_true", help="write into OUT even if it holds files")

    _add_bench(add)

    sub = add(
        "demo",
        demo,
        "all-MiniLM-L6-v2 on the STS Benchmark: accuracy, speed and size of int8 beside fp32",
        _examples("demo", "demo --threads 1 --rounds 3 --out build/demo") + "\nFetches 84 MB on the first run.\n",
    )
    sub.add_argument("--engines", default="torch-fp32,torch-int8,bertkern-int8", help="default: %(default)s")
    sub.add_argument("--out", type=Path, default=Path("build/demo"), help="rows and plot; default: %(default)s")
    _timing_arguments(sub, rounds=7)
    return parser


def _add_bench(add: Callable[..., Any]) -> None:
    sub = add(
        "bench",
        bench,
        "time bertkern beside other engines, verified and interleaved",
        _examples(
            "bench",
            "bench encoder --engines bertkern-int8,torch-int8,onnxruntime-int8 --shapes 1x32,8x128",
            "bench encoder --model minilm --shapes 1x16 --threads 1 --plot latency.png",
            "bench gemm --rows 1,128 --layers 3072x768 --json gemm.json",
            "bench memory",
        )
        + f"\n\n{ENGINES_HELP}",
    )
    sub.add_argument(
        "what", nargs="?", choices=("encoder", "gemm", "memory"), default="encoder", help="default: %(default)s"
    )
    sub.add_argument("--engines", help="comma-separated; default: bertkern and torch")
    sub.add_argument("--model", default="bert-base", help="encoder: bert-base (random weights), minilm, or a folder")
    sub.add_argument("--shapes", help="encoder: BATCHxTOKENS, with :SHARE for padding; default 1x16 ... 3x77")
    sub.add_argument("--rows", help="gemm: rows M; default 1,7,16,32,128,1024")
    sub.add_argument("--layers", help="gemm: OUTxIN; default BERT-base's and odd ones")
    sub.add_argument("--epilogues", help="gemm: of fp32,bf16,gelu+q8; default all")
    sub.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or alone to the screen")
    sub.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG")
    sub.add_argument("--out", type=Path, metavar="FOLDER", help="write JSON, CSV and PNG there")
    sub.add_argument("--name", help="added to the names of the files in --out")
    sub.add_argument("--python", help="interpreter that runs the engines; default: this one")
    _timing_arguments(sub, rounds=15)


def _examples(*lines: str) -> str:
    return "examples:\n" + "\n".join(f"  python -m bertkern {line}" for line in lines)


def _model_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", help="folder with a config.json, or a name on the Hugging Face hub")


def _timing_arguments(sub: argparse.ArgumentParser, rounds: int) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    sub.add_argument("--threads", type=_positive, default=cores, help="default: the cores at hand, %(default)s")
    sub.add_argument("--rounds", type=_positive, default=rounds, help="turns of each engine; default: %(default)s")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1. Got {text!r}.")
    return int(text)


# --- commands -------------------------------------------------------------------------------------------------------


def doctor(arguments: argparse.Namespace) -> None:
    """Prints what the build and the machine offer."""
    from bertkern import doctor as examination

    facts = examination.collect()
    print(json.dumps(facts, indent=1, default=str) if arguments.json else examination.text(facts))


def inspect(arguments: argparse.Namespace) -> None:
    """Prints the report of a model."""
    model = load_model(arguments.model)
    import bertkern

    report = bertkern.inspect(model)
    print(json.dumps(report.to_dict(), indent=1) if arguments.json else report)


def quantize(arguments: argparse.Namespace) -> None:
    """Quantizes a model and saves it with its tokenizer."""
    out: Path = arguments.out
    if out.exists() and not out.is_dir():
        raise UsageError(f"OUT: expected a folder. Got the file {out}.")
    if out.is_dir() and any(out.iterdir()) and not arguments.force:
        raise UsageError(f"OUT: {out} holds files; --force writes into it all the same.")
    if out.is_dir() and Path(arguments.model).is_dir() and out.samefile(arguments.model):
        raise UsageError("OUT: expected another folder than MODEL.")
    import bertkern

    config = bertkern.Int8Config(
        weight=arguments.weight,
        embeddings=not arguments.no_embeddings,
        pooler=not arguments.no_pooler,
        head=not arguments.no_head,
        skip=tuple(arguments.skip),
    )
    model = load_model(arguments.model)
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    bertkern.quantize_(model, config)
    model.save_pretrained(out)
    _copy_tokenizer(arguments.model, out)
    after = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(bertkern.report(model))
    print(f"{out}: {after / 1e6:.1f} MB of weights, from {before / 1e6:.1f} MB")


def load_model(name: str) -> Any:
    """The model in the class that its config names, in eval mode. Raises UsageError where there is none."""
    path = Path(name).expanduser()
    if path.exists() and not (path / "config.json").is_file():
        raise UsageError(f"MODEL: expected a folder with a config.json. Got {name}.")
    import transformers

    import bertkern  # noqa: F401 - registers the quantizer, so that int8 models load too

    transformers.utils.logging.disable_progress_bar()
    source = str(path) if path.exists() else name
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(f"MODEL: expected a folder or a name on the hub. Got {name!r} ({first})") from None
    wanted = (getattr(config, "architectures", None) or ["AutoModel"])[0]
    return getattr(transformers, wanted, transformers.AutoModel).from_pretrained(source).eval()


def _copy_tokenizer(source: str, out: Path) -> None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(source).save_pretrained(out)
    except (OSError, ValueError, ImportError):
        print("no tokenizer beside the model: only the weights were saved", file=sys.stderr)


def bench(arguments: argparse.Namespace) -> None:
    """Runs a benchmark and shows, saves and draws its rows."""
    module = _benchmarks(arguments.what)
    options: dict[str, Any] = {"rounds": arguments.rounds, "python": arguments.python, "report": _news}
    if arguments.engines:
        options["specs"] = arguments.engines.split(",")
    others = {"encoder": ("rows", "layers", "epilogues"), "gemm": ("shapes",)}
    for name in others.get(arguments.what, ("rows", "layers", "epilogues", "shapes", "engines")):
        if getattr(arguments, name):
            raise UsageError(f"bench {arguments.what}: --{name} belongs to another benchmark.")
    try:
        if arguments.what == "encoder":
            options |= {"model": arguments.model, "threads": arguments.threads}
            if arguments.shapes:
                options["shapes"] = module.parse_shapes(arguments.shapes)
        elif arguments.what == "gemm":
            if arguments.rows:
                options["rows"] = [_positive(m) for m in arguments.rows.split(",")]
            if arguments.layers:
                options["layers"] = module.parse_layers(arguments.layers)
            if arguments.epilogues:
                options["epilogues"] = module.parse_epilogues(arguments.epilogues)
        with _progress() as tick:
            run = module.run(**options, tick=tick)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UsageError(error) from error
    if arguments.name:
        run.name += f"-{arguments.name}"
    if arguments.json == "-":
        print(json.dumps(run.as_dict(), indent=1))
    else:
        _benchmarks("tables").show(run)
    if arguments.json and arguments.json != "-":
        Path(arguments.json).write_text(json.dumps(run.as_dict(), indent=1) + "\n")
    _save(run, arguments.out, arguments.plot)


def demo(arguments: argparse.Namespace) -> None:
    """Runs the demo; see benchmarks/demo.py."""
    module = _benchmarks("demo")
    with _progress() as tick:
        run = module.run(arguments.engines.split(","), arguments.threads, arguments.rounds, report=_news, tick=tick)
    if "report" in run.facts:
        print(run.facts["report"])
        print()
    _benchmarks("tables").show(run)
    _save(run, arguments.out, None)


def _save(run: Any, folder: Path | None, plot: Path | None) -> None:
    if not run.rows:
        raise RuntimeError("nothing was measured; the lines above say why.")
    plots = _benchmarks("plots")
    written = []
    if folder:
        written += run.save(folder)
        written.append(plots.save(run, folder / f"{run.name}.png"))
    if plot:
        written.append(plots.save(run, plot))
    if written:
        _news("written: " + ", ".join(map(str, written)))


def _news(text: str) -> None:
    print(text, file=sys.stderr)


def _benchmarks(name: str) -> ModuleType:
    """A module of the benchmarks: the folder of that name in a checkout, `bertkern.benchmarks` where installed."""
    root = Path(__file__).resolve().parent.parent
    if (root / "benchmarks" / "harness.py").is_file():
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))
        return importlib.import_module(f"benchmarks.{name}")
    try:
        return importlib.import_module(f"bertkern.benchmarks.{name}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("bertkern.benchmarks"):
            raise
        raise RuntimeError("this installation has no benchmarks: run from a checkout, or pip install .") from None


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, as a function (what, done, total); total 0 = unknown."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None)
