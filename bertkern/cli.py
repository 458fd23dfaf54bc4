"""The command line: `python -m bertkern {doctor,inspect,quantize,prune,bench,demo}`.

Each command imports what it needs when it runs; mistakes of the caller are found before anything is changed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

ENGINES_HELP = """\
engines (columns of the table; one that is not installed is reported as absent):
  bertkern-int8  bertkern-fp32  torch-fp32  torch-bf16  torch-int8  torchao-int8  onnxruntime-fp32
  onnxruntime-int8  ctranslate2-int8  openvino-bf16  openvino-int8  deepsparse-fp32  deepsparse-int8;
  for gemm: bertkern-kernel  bertkern-int8  bertkern-linear  torch-int8  torch-bf16  torch-fp32;
  for sparse: bertkern-sparse-int8  bertkern-int8  onnxruntime-int8  bertkern-sparse-fp32  bertkern-fp32
  torch-fp32  torch-csr-fp32  torch-bsr-fp32  scipy-csr-fp32  bertkern-sparse-bf16  bertkern-bf16  torch-bf16.
NAME@avx2 caps an engine's instruction set; NAME:16x4@0.8 gives it a pruned model, NAME:dense the whole one.
"""

BENCH_OPTIONS = ("engines", "pattern", "shapes", "rows", "layers", "epilogues", "blocks", "zeros", "dtypes")
SCALES = "a scale for each output (per_channel, the default) or for each layer (per_tensor)"
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer_config.json",
)


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
    except Exception as error:
        if os.environ.get("BERTKERN_VERBOSE"):
            raise
        if isinstance(error, ModuleNotFoundError) and error.name:
            package = error.name.partition(".")[0]
            return _complain(f"{package} is not installed here. Run: pip install {package}", 1)
        expected = isinstance(error, (ImportError, OSError, RuntimeError, ValueError))
        return _complain(_line(error) if expected else f"{type(error).__name__}: {_line(error)}", 1)


def _complain(error: object, status: int) -> int:
    print(f"bertkern: {error}", file=sys.stderr)
    return status


def _line(error: object) -> str:
    """The first line of an error's text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines) == 1 else f"{lines[0]} (BERTKERN_VERBOSE=1 shows all of it)"


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
        "what pruning left in a model, what that could gain, and what bertkern would do with it",
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
    sub.add_argument("--weight", choices=("per_channel", "per_tensor"), default="per_channel", help=SCALES)
    sub.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="modules to leave; may be repeated")
    sub.add_argument("--no-embeddings", action="store_true", help="leave the embedding tables")
    sub.add_argument("--no-pooler", action="store_true", help="leave the pooler")
    sub.add_argument("--no-head", action="store_true", help="leave the task head")
    sub.add_argument("--force", action="store_true", help="write into OUT even if it holds files")

    _add_prune(add)
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


def _add_prune(add: Callable[..., Any]) -> None:
    sub = add(
        "prune",
        prune,
        "set the smallest weights of a model to zero and save it",
        _examples(
            "prune ./my-bert --sparsity 0.8 --block 16x4 --out ./my-bert-80",
            "prune ./my-bert --sparsity 0.9 --scope global --out ./out",
            "prune ./my-bert --nm 2:4 --no-pooler --out ./out",
            "prune ./my-bert --sparsity 0.7 --block 32x32 --set 'layer.0.*=0.3' --skip layer.11.output --out ./out",
        )
        + "\nThe result is an ordinary dense checkpoint. Pruning at once costs accuracy: fine-tune it with\n"
        "bertkern.Masks.of_zeros(model).hold(optimizer), or prune while training with bertkern.PruneCallback.\n",
    )
    _model_argument(sub)
    sub.add_argument("--out", required=True, type=Path, help="folder to write, with the tokenizer beside the weights")
    sub.add_argument("--sparsity", type=float, help="share of weights, blocks, rows or columns that become zero")
    shape = sub.add_mutually_exclusive_group()
    shape.add_argument("--block", type=_block, metavar="ROWSxCOLUMNS", help="whole blocks; default: single weights")
    shape.add_argument("--rows", action="store_true", help="whole rows (outputs)")
    shape.add_argument("--columns", action="store_true", help="whole columns (inputs)")
    shape.add_argument("--nm", type=_n_of_m, metavar="N:M", help="keep N of any M neighbours; instead of --sparsity")
    sub.add_argument("--scope", choices=("matrix", "global"), help="the share of each matrix (default), or of them all")
    sub.add_argument("--norm", choices=("l1", "l2", "max"), help="what makes a block or row small; default: l2")
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        type=_override,
        metavar="PATTERN=SPARSITY",
        help="another sparsity for the modules that PATTERN names; may be repeated, the first that fits counts",
    )
    sub.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="modules to leave; may be repeated")
    sub.add_argument(
        "--embeddings",
        action=argparse.BooleanOptionalAction,
        help="prune the word table; default: only with single weights",
    )
    sub.add_argument("--no-pooler", action="store_true", help="leave the pooler")
    sub.add_argument("--head", action="store_true", help="prune the task head, too")
    sub.add_argument("--random", type=int, metavar="SEED", help="random ones instead of the smallest")
    sub.add_argument("--force", action="store_true", help="write into OUT even if it holds files")


def _block(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit()):
        raise argparse.ArgumentTypeError(f"expected ROWSxCOLUMNS, such as 16x4. Got {text!r}.")
    return int(rows), int(columns)


def _n_of_m(text: str) -> tuple[int, int]:
    n, _, m = text.partition(":")
    if not (n.isdigit() and m.isdigit()):
        raise argparse.ArgumentTypeError(f"expected N:M, such as 2:4. Got {text!r}.")
    return int(n), int(m)


def _override(text: str) -> tuple[str, float]:
    pattern, _, sparsity = text.rpartition("=")
    try:
        return pattern, float(sparsity)
    except ValueError:
        pattern = ""
    raise argparse.ArgumentTypeError(f"expected PATTERN=SPARSITY, such as layer.0.*=0.3. Got {text!r}.")


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
            "bench sparse --rows 128 --blocks 1x1,16x4,32x32 --zeros 0,0.5,0.8,0.9 --dtypes int8 --out results",
            "bench memory",
        )
        + f"\n\n{ENGINES_HELP}",
    )
    sub.add_argument(
        "what",
        nargs="?",
        choices=("encoder", "gemm", "sparse", "memory"),
        default="encoder",
        help="default: %(default)s",
    )
    sub.add_argument("--engines", help="comma-separated; default: bertkern and torch")
    sub.add_argument(
        "--model", default="bert-base", help="encoder: bert-base or bert-base-d26 (random weights), minilm, a folder"
    )
    sub.add_argument(
        "--pattern",
        help="encoder: zeros of the weights that every engine gets: 16x4@0.8, 1x1@0.9, d26, dense (default); "
        "NAME:PATTERN sets that of one engine",
    )
    sub.add_argument("--shapes", help="encoder: BATCHxTOKENS, with :SHARE for padding; default 1x16 ... 3x77")
    sub.add_argument("--rows", help="gemm, sparse: rows M; default 1,7,16,32,128,1024; sparse 1,128")
    sub.add_argument(
        "--layers", help="gemm, sparse: OUTxIN; default BERT-base's and odd ones; sparse the feed-forward's"
    )
    sub.add_argument("--epilogues", help="gemm: of fp32,bf16,gelu+q8; default all")
    sub.add_argument("--blocks", help="sparse: ROWSxCOLUMNS, 1x1 is unstructured; default 1x1,1x4,16x4,32x32")
    sub.add_argument("--zeros", help="sparse: shares from 0 to 1; default 0,0.1,0.5,0.75,0.8,0.9")
    sub.add_argument("--dtypes", help="sparse: of int8,fp32,bf16; default int8,fp32")
    sub.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or alone to the screen")
    sub.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG")
    sub.add_argument("--out", type=Path, metavar="FOLDER", help="write JSON, CSV and PNG there")
    sub.add_argument("--name", help="added to the names of the files in --out")
    sub.add_argument(
        "--python",
        action="append",
        metavar="[NAME=]PATH",
        help="interpreter that runs the engines, or those whose names begin with NAME; may be repeated; "
        "default: this one",
    )
    _timing_arguments(sub, rounds=None)


def _examples(*lines: str) -> str:
    return "examples:\n" + "\n".join(f"  python -m bertkern {line}" for line in lines)


def _model_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", help="folder with a config.json, or a name on the Hugging Face hub")


def _timing_arguments(sub: argparse.ArgumentParser, rounds: int | None) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    sub.add_argument("--threads", type=_positive, default=cores, help="default: the cores at hand, %(default)s")
    default = rounds or "15, sparse 5"
    sub.add_argument("--rounds", type=_positive, default=rounds, help=f"turns of each engine; default: {default}")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1. Got {text!r}.")
    return int(text)


# --- commands -------------------------------------------------------------------------------------------------------


def doctor(arguments: argparse.Namespace) -> int:
    """Prints what the build and the machine offer; status 1 where the operators do not load."""
    from bertkern import doctor as examination

    facts = examination.collect()
    print(json.dumps(facts, indent=1, default=str) if arguments.json else examination.text(facts))
    return 1 if facts["build"]["error"] else 0


def inspect(arguments: argparse.Namespace) -> None:
    """Prints the report of a model."""
    model = load_model(arguments.model)
    import bertkern

    report = bertkern.inspect(model)
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=1))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(report)
    else:
        print(report)


def quantize(arguments: argparse.Namespace) -> None:
    """Quantizes a model and saves it with its tokenizer."""
    out: Path = arguments.out
    _check_out(arguments)
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
    after = _save_model(model, arguments.model, out)
    print(bertkern.report(model))
    print(f"{out}: {after / 1e6:.1f} MB of weights, from {before / 1e6:.1f} MB")


def prune(arguments: argparse.Namespace) -> None:
    """Prunes a model at once and saves it with its tokenizer."""
    _check_out(arguments)
    config = _prune_config(arguments)
    import bertkern

    model = load_model(arguments.model)
    masks = bertkern.prune_(model, config)
    size = _save_model(model, arguments.model, arguments.out)
    print(masks.report())
    print(f"{arguments.out}: {size / 1e6:.1f} MB of weights, zeros among them: bertkern.accelerate skips these")


def _prune_config(arguments: argparse.Namespace) -> Any:
    """The config that the options ask for; raises UsageError where they do not go together."""
    from bertkern.compress import prune

    options: dict[str, Any] = {
        "skip": arguments.skip,
        "pooler": not arguments.no_pooler,
        "head": arguments.head,
        "criterion": "magnitude" if arguments.random is None else "random",
        "seed": arguments.random or 0,
    }
    if arguments.embeddings is not None:
        options["embeddings"] = arguments.embeddings
    shares = {"sparsity": arguments.sparsity, "scope": arguments.scope, "overrides": arguments.set or None}
    norm = {"norm": arguments.norm} if arguments.norm else {}
    if arguments.nm:
        for name in ("sparsity", "scope", "norm", "set"):
            if getattr(arguments, name) not in (None, []):
                raise UsageError(f"prune: --{name} does not go together with --nm.")
        kind, options = prune.NmPruneConfig, {**options, "n": arguments.nm[0], "m": arguments.nm[1]}
    else:
        if arguments.sparsity is None:
            raise UsageError("prune: expected --sparsity, a number from 0 to 1, or --nm.")
        options |= {name: value for name, value in shares.items() if value is not None}
        if arguments.block:
            kind, options = prune.BlockPruneConfig, {**options, **norm, "block": arguments.block}
        elif arguments.rows or arguments.columns:
            axis = "rows" if arguments.rows else "columns"
            kind, options = prune.RowColumnPruneConfig, {**options, **norm, "axis": axis}
        elif norm:
            raise UsageError("prune: --norm belongs to blocks, rows or columns.")
        else:
            kind = prune.UnstructuredPruneConfig
    try:
        return kind(**options)
    except ValueError as error:
        raise UsageError(error) from error


def _check_out(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    if out.exists() and not out.is_dir():
        raise UsageError(f"OUT: expected a folder. Got the file {out}.")
    if out.is_dir() and any(out.iterdir()) and not arguments.force:
        raise UsageError(f"OUT: {out} holds files; --force writes into it all the same.")
    if out.is_dir() and Path(arguments.model).is_dir() and out.samefile(arguments.model):
        raise UsageError("OUT: expected another folder than MODEL.")


def _save_model(model: Any, source: str, out: Path) -> int:
    """Writes the model with what stands beside it in `source`; returns the bytes of its weights."""
    with _staged(out) as folder:
        model.save_pretrained(folder)
        _save_tokenizer(source, folder)
        _save_sentence_modules(source, folder)
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def load_model(name: str) -> Any:
    """The model in the class that its config names, in eval mode.

    A pooler or head that its files lack starts anew, and a line on stderr says so.

    Raises:
        UsageError: there is no such model.
        RuntimeError: its files are damaged or do not fit its config.
    """
    path = Path(name).expanduser()
    local = path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if local and not (path / "config.json").is_file():
        got = name if path.exists() else f"{name}, which does not exist"
        raise UsageError(f"MODEL: expected a folder with a config.json. Got {got}.")
    import transformers

    import bertkern  # noqa: F401 - registers the quantizer, so that int8 models load too

    source = str(path) if local else name
    with _silent_transformers():
        try:
            config = transformers.AutoConfig.from_pretrained(source)
        except Exception as error:  # whatever its values make transformers raise
            if local:
                raise UsageError(f"MODEL: {path / 'config.json'} names no known model: {_line(error)}") from error
            raise UsageError(f"MODEL: expected a folder or a name on the hub. Got {name!r} ({_line(error)})") from error
        wanted = (getattr(config, "architectures", None) or ["AutoModel"])[0]
        cls = getattr(transformers, wanted, transformers.AutoModel)
        try:
            # Mismatches are told below; transformers would tell them in a table of its own.
            model, found = cls.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # of the reader of the files, or of what the config asks for
            raise RuntimeError(f"MODEL: {source}: {_reason(error)}") from error
    _check_fit(source, model, found)
    return model.eval()


def _reason(error: Exception) -> str:
    from bertkern.hf import damage

    known = isinstance(error, (OSError, ValueError, RuntimeError))
    return _line(error) if known else f"its weights are {damage(error)}"


def _check_fit(source: str, model: Any, found: dict[str, Any]) -> None:
    """Raises RuntimeError where the files do not hold the body of the model; tells where they lack or exceed the rest.

    Args:
        found: the loading info of transformers.
    """
    from bertkern.hf import of_body

    missing, extra = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    problems = [
        f"expected {name} of shape {list(wanted)}. Got {list(got)}." for name, got, wanted in found["mismatched_keys"]
    ]
    problems += [f"expected {name}. Got none." for name in missing if of_body(model, name)]
    problems += [f"expected no {name}. Got it." for name in extra if of_body(model, name)]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise RuntimeError(f"MODEL: {source}: the files do not fit the config: {' '.join(problems[:5])}{more}")
    if missing:
        _news(f"{source} lacks {_few(missing)}: they start anew, untrained")
    if extra:
        _news(f"{source} holds {_few(extra)}, which {type(model).__name__} has no place for")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """What transformers would print while it loads a model stands in one line of ours, or in none."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder to write into; its files move to `out` when all are there, and after a failure `out` is as it was."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.parent / f".{out.name}-{os.getpid()}"
    staging.mkdir()
    try:
        with _silent_transformers():
            yield staging
        out.mkdir(exist_ok=True)
        for file in staging.iterdir():
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _save_tokenizer(source: str, out: Path) -> None:
    from transformers import AutoTokenizer

    try:
        # Where there is none, transformers makes an empty one up.
        if not _has_one_of(source, TOKENIZER_FILES):
            raise OSError
        AutoTokenizer.from_pretrained(source).save_pretrained(out)
    except (OSError, ValueError, ImportError):
        _news("no tokenizer beside the model: only the weights are saved")


def _save_sentence_modules(source: str, out: Path) -> None:
    """Copies what makes a SentenceTransformer of a transformer: the list of its modules, and the others among them."""
    if not _has_one_of(source, ("modules.json",)):
        return
    import huggingface_hub

    files = ["modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"]
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=[*files, "*/*.json", "*/*.safetensors"]))
    for module in json.loads((folder / "modules.json").read_text("utf-8")):
        name = str(module.get("path", ""))
        # A name only: a path in a file from elsewhere must not lead out of the folder.
        if name and Path(name).name == name != ".." and (folder / name).is_dir():
            shutil.copytree(folder / name, out / name)
    for name in files:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)


def _has_one_of(source: str, names: Iterable[str]) -> bool:
    """Whether the folder, or the repository on the hub, holds one of the files."""
    from transformers.utils import has_file

    return any(has_file(source, name) for name in names)


def bench(arguments: argparse.Namespace) -> None:
    """Runs a benchmark and shows, saves and draws its rows."""
    module = _benchmarks(arguments.what)
    options: dict[str, Any] = {"rounds": arguments.rounds or module.ROUNDS, "report": _news}
    for name in BENCH_OPTIONS:
        if getattr(arguments, name) and name not in module.OPTIONS:
            raise UsageError(f"bench {arguments.what}: --{name} belongs to another benchmark.")
    if arguments.what == "encoder":
        options |= {"model": arguments.model, "threads": arguments.threads}
    try:
        options["python"] = _benchmarks("harness").parse_python(arguments.python)
        for name, (argument, read) in module.OPTIONS.items():
            if getattr(arguments, name):
                options[argument] = read(getattr(arguments, name))
        with _progress() as tick:
            run = module.run(**options, tick=tick)
    except ValueError as error:
        raise UsageError(error) from error
    if arguments.name:
        run.name += f"-{arguments.name}"
    if arguments.json == "-":
        print(json.dumps(run.as_dict(), indent=1))
    else:
        _benchmarks("tables").show(run)
    if arguments.json and arguments.json != "-":
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
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
