"""`bench`: bertkern beside other engines."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import UsageError, add_command, news
from .measuring import benchmarks, check_targets, cores, progress, save, timing_arguments

if TYPE_CHECKING:
    from types import ModuleType

BENCHMARKS = (
    "encoder",
    "gemm",
    "sparse",
    "groupwise",
    "attention",
    "padding",
    "heads",
    "sentences",
    "importance",
    "hessian",
    "memory",
    "qbert",
)

ENGINES_HELP = """\
Each of them has its own: python -m bertkern bench attention --help.

engines (columns of the table; one that is not installed is reported as absent):
  bertkern-int8  bertkern-groupwise  bertkern-fp32  torch-fp32  torch-bf16  torch-int8  torchao-int8  onnxruntime-fp32
  onnxruntime-int8  ctranslate2-int8  openvino-bf16  openvino-int8  deepsparse-fp32  deepsparse-int8;
  for padding also bertkern-int8-padded  bertkern-fp32-padded;
  for heads also bertkern-int8-masked  bertkern-fp32-masked;
  for gemm: bertkern-kernel  bertkern-int8  bertkern-linear  torch-int8  torch-bf16  torch-fp32;
  for sparse: bertkern-sparse-int8  bertkern-int8  onnxruntime-int8  bertkern-sparse-fp32  bertkern-fp32
  torch-fp32  torch-csr-fp32  torch-bsr-fp32  scipy-csr-fp32  bertkern-sparse-bf16  bertkern-bf16  torch-bf16;
  for groupwise: bertkern-groupwise-int8  bertkern-int8  bertkern-groupwise-fp32  bertkern-groupwise-bf16  torch-fp32
  torch-int4  onnxruntime-int4;
  for attention: bertkern-fp32  bertkern-bf16  torch-fp32  torch-bf16  torch-eager-fp32  torch-eager-bf16;
  for sentences: bertkern-int8  bertkern-fp32  torch-fp32  onnxruntime-int8  openvino-int8;
  importance has bertkern-importance beside torch-backward; hessian has bertkern-hessian and
  hessian-reference that checks it. A float64 reference checks attention and importance.
NAME@avx2 caps an engine's instruction set; NAME:16x4@0.8 gives it a pruned model, NAME:dense the whole one.
"""

# What one benchmark or another takes; their modules say which, and how it is read.
OPTIONS = {
    "engines": "comma-separated; default: bertkern and torch",
    "model": "bert-base (random weights), minilm, or a folder; encoder also bert-base-d26; default: bert-base, "
    "sentences minilm",
    "pattern": "encoder: zeros of the weights that every engine gets: 16x4@0.8, 1x1@0.9, heads@0.5, d26, dense "
    "(default); NAME:PATTERN sets that of one engine",
    "shapes": "encoder, heads, attention: BATCHxTOKENS, with :SHARE for padding; default 1x16 ... 3x77; heads "
    "8x128,1x16; attention 1x16 ... 1x4096",
    "rows": "gemm, sparse, groupwise: rows M; default 1,7,16,32,128,1024; sparse 1,128; groupwise 1,4,16,128",
    "layers": "gemm, sparse, groupwise: OUTxIN; default BERT-base's, gemm also odd ones; sparse the feed-forward's",
    "groupings": "groupwise: BITSnGROUPS along N or BITSkLENGTH along K, 2+4n128 mixes bits; default 8n128,4n128,3n128,"
    "2n128,2+4n128,4k64,2k64",
    "epilogues": "gemm: of fp32,bf16,gelu+q8; default all",
    "blocks": "sparse: ROWSxCOLUMNS, 1x1 is unstructured; default 1x1,1x4,16x4,32x32",
    "zeros": "sparse: shares from 0 to 1; default 0,0.1,0.5,0.75,0.8,0.9",
    "dtypes": "sparse: of int8,fp32,bf16; default int8,fp32; attention: of fp32,bf16; default both",
    "heads": "attention: how many; default 12",
    "head_dim": "attention: features of a head; default 64",
    "kept": "attention: heads left, maskN by a mask at run time; default 9,6,3,1,mask6",
    "share": "heads: of each layer's heads that go; default 0.5",
    "texts": "padding: of stsb,rotten-tomatoes; default both",
    "batch": "padding, sentences, importance: sentences in a batch; default 32; importance 8",
    "batches": "padding: of each of the texts; default 4",
    "sentences": "sentences: of the test set, for the speed; default all; importance, hessian: random ones; "
    "default 64, 128",
    "tokens": "importance, hessian: of a sentence; default 128, 64",
    "only": "qbert: rows TASK FORM METHOD that hold one of these, such as 'STS-B 4n128,2k64 qat'; default all",
    "quick": "qbert: few rows and little data, to see that all of it runs",
    "finished": "qbert: only the rows that earlier runs have made, stopped ones too",
    "kept_rows": "qbert: file in which rows are kept as they are made; default: in the user's cache",
}
FLAGS = ("quick", "finished")


def add(commands: Any) -> None:
    """Adds the command."""
    sub = add_command(
        commands,
        "bench",
        run,
        "time bertkern beside other engines, verified and interleaved",
        "bench",
        "bench encoder --engines bertkern-int8,torch-int8,onnxruntime-int8 --shapes 1x32,8x128",
        "bench encoder --model minilm --shapes 1x16 --threads 1 --plot latency.png",
        "bench gemm --rows 1,128 --layers 3072x768 --json gemm.json",
        "bench sparse --rows 128 --blocks 1x1,16x4,32x32 --zeros 0,0.5,0.8,0.9 --dtypes int8 --out results",
        "bench groupwise --rows 1,128 --layers 3072x768 --groupings 4n128,4k64 --threads 2",
        "bench attention --shapes 8x128,1x384 --kept 6,3 --dtypes fp32",
        "bench padding --texts stsb --batches 8",
        "bench heads --share 0.5 --shapes 8x128,1x16",
        "bench sentences --python onnxruntime=PATH --python openvino=PATH --out results",
        "bench importance --sentences 1000 --rounds 1",
        "bench hessian --out results",
        "bench memory",
        "bench qbert --only 'STS-B 4n128'",
        more=f"\n\n{ENGINES_HELP}",
        add_help=False,
    )
    sub.add_argument("what", nargs="?", choices=BENCHMARKS, help="default: encoder")
    # Of a benchmark that was named, only what it takes is shown.
    sub.add_argument("-h", "--help", action=_Help, nargs=0, help="show this, or what the benchmark named before takes")
    _add_options(sub, OPTIONS, None, f"the cores at hand, {cores()}; gemm, sparse, groupwise 1")


class _Help(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        if namespace.what is not None:
            module = benchmarks(namespace.what)
            parser = argparse.ArgumentParser(
                f"python -m bertkern bench {namespace.what}",
                description=module.__doc__,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            threads = _threads(module)
            _add_options(parser, module.OPTIONS, module.ROUNDS, None if threads is None else str(threads))
        parser.print_help()
        parser.exit()


def _add_options(sub: argparse.ArgumentParser, wanted: Container[str], rounds: int | None, threads: str | None) -> None:
    for name, about in OPTIONS.items():
        if name in wanted:
            action = "store_true" if name in FLAGS else "store"
            sub.add_argument(f"--{name.replace('_', '-')}", action=action, help=about)
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
    timing_arguments(sub, rounds, threads)


def _threads(module: ModuleType) -> int | None:
    """How many threads a benchmark takes where the user says nothing; None where it takes no number of them."""
    takes = "threads" in inspect.signature(module.run).parameters
    return getattr(module, "THREADS", cores()) if takes else None


def run(arguments: argparse.Namespace) -> None:
    """Runs a benchmark and shows, saves and draws its rows."""
    what = arguments.what or "encoder"
    module = benchmarks(what)
    options: dict[str, Any] = {"rounds": arguments.rounds or module.ROUNDS, "report": news}
    for name in OPTIONS:
        if getattr(arguments, name) and name not in module.OPTIONS:
            raise UsageError(f"bench {what}: --{name.replace('_', '-')} belongs to another benchmark.")
    rows = Path(arguments.json) if arguments.json and arguments.json != "-" else None
    check_targets(arguments.out, arguments.plot, rows, arguments.name or "")
    if (default := _threads(module)) is not None:
        options["threads"] = arguments.threads or default
    elif arguments.threads:
        raise UsageError(f"bench {what}: --threads belongs to another benchmark.")
    try:
        options["python"] = benchmarks("harness").parse_python(arguments.python)
        for name, (argument, read) in module.OPTIONS.items():
            if getattr(arguments, name):
                options[argument] = read(getattr(arguments, name))
        with progress() as tick:
            measured = module.run(**options, tick=tick)
    except ValueError as error:
        raise UsageError(error) from error
    if arguments.name:
        measured.name += f"-{arguments.name}"
    if arguments.json == "-":
        print(json.dumps(measured.as_dict(), indent=1))
    else:
        benchmarks("tables").show(measured)
    if rows is not None:
        rows.parent.mkdir(parents=True, exist_ok=True)
        rows.write_text(json.dumps(measured.as_dict(), indent=1) + "\n")
    save(measured, arguments.out, arguments.plot)
