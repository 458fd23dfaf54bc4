"""`quantize`: a model becomes int8."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import add_command, model_argument
from .models import check_out, load_model, save_model

SCALES = "a scale for each output (per_channel, the default) or for each layer (per_tensor)"


def add(commands: Any) -> None:
    """Adds the command."""
    sub = add_command(
        commands,
        "quantize",
        run,
        "turn a model into int8 and save it",
        "quantize ./my-bert ./my-bert-int8",
        "quantize ./my-bert ./out --skip classifier --no-embeddings",
        more="\nThe result loads with: import bertkern; AutoModel.from_pretrained(OUT)\n",
    )
    model_argument(sub)
    sub.add_argument("out", metavar="OUT", type=Path, help="folder to write, with the tokenizer beside the weights")
    sub.add_argument("--weight", choices=("per_channel", "per_tensor"), default="per_channel", help=SCALES)
    sub.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="modules to leave; may be repeated")
    sub.add_argument("--no-embeddings", action="store_true", help="leave the embedding tables")
    sub.add_argument("--no-pooler", action="store_true", help="leave the pooler")
    sub.add_argument("--no-head", action="store_true", help="leave the task head")
    sub.add_argument("--force", action="store_true", help="write into OUT even if it holds files")


def run(arguments: argparse.Namespace) -> None:
    """Quantizes a model and saves it with its tokenizer."""
    out: Path = arguments.out
    check_out(arguments)
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
    after = save_model(model, arguments.model, out)
    print(bertkern.report(model))
    print(f"{out}: {after / 1e6:.1f} MB of weights, from {before / 1e6:.1f} MB")
