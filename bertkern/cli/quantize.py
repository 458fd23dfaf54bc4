"""`quantize`: a model becomes int8, or its weights fewer bits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import UsageError, add_command, model_argument
from .models import check_out, load_model, save_model

SCALES = "int8: a scale for each output (per_channel, the default) or for each layer (per_tensor)"
# The options that one scheme alone has.
OWN = {
    "int8": ("weight",),
    "groupwise": (
        "bits",
        "groups",
        "group_size",
        "axis",
        "method",
        "symmetric",
        "whole_zero",
        "shared",
        "activation",
        "embedding_bits",
        "layer_bits",
    ),
}


def add(commands: Any) -> None:
    """Adds the command."""
    sub = add_command(
        commands,
        "quantize",
        run,
        "turn a model into int8, or its weights into fewer bits, and save it",
        "quantize ./my-bert ./my-bert-int8",
        "quantize ./my-bert ./out --skip classifier --no-embeddings",
        "quantize ./my-bert ./my-bert-int4 --scheme groupwise --bits 4 --groups 128 --method mse",
        "quantize ./my-bert ./out --scheme groupwise --group-size 64 --axis k --layer-bits 'layer.11.*=2'",
        more="\nThe result loads with: import bertkern; AutoModel.from_pretrained(OUT)\n",
    )
    model_argument(sub)
    sub.add_argument("out", metavar="OUT", type=Path, help="folder to write, with the tokenizer beside the weights")
    sub.add_argument("--scheme", choices=tuple(OWN), default="int8", help="default: int8")
    sub.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="modules to leave; may be repeated")
    sub.add_argument("--no-embeddings", action="store_true", help="leave the embedding tables")
    for part in ("pooler", "head"):
        text = f"quantize the {'task head' if part == 'head' else part}; default: with int8, not with groupwise"
        sub.add_argument(f"--{part}", action=argparse.BooleanOptionalAction, help=text)
    sub.add_argument("--force", action="store_true", help="write into OUT even if it holds files")
    sub.add_argument("--weight", choices=("per_channel", "per_tensor"), help=SCALES)
    low = sub.add_argument_group("groupwise", "weights of 2 to 8 bits, a scale and a zero point a group")
    low.add_argument("--bits", type=int, help="of linear layers; default: 4")
    cut = low.add_mutually_exclusive_group()
    cut.add_argument("--groups", type=int, help="into how many groups each matrix is cut; default: 128")
    cut.add_argument("--group-size", type=int, metavar="SIZE", help="neighbours in a group, instead")
    low.add_argument("--axis", choices=("n", "k"), help="groups of output (n, the default) or input features (k)")
    low.add_argument("--method", choices=("minmax", "percentile", "mse"), help="how ranges are found; default: minmax")
    low.add_argument("--symmetric", action="store_true", default=None, help="grids without zero points")
    low.add_argument(
        "--whole-zero", action=argparse.BooleanOptionalAction, help="whole zero points, so that 0 stays 0; the default"
    )
    low.add_argument("--shared", action="store_true", default=None, help="with axis k: all outputs share their ranges")
    low.add_argument(
        "--activation", choices=("dynamic", "float"), help="int8 by each token's range (default), or float"
    )
    low.add_argument("--embedding-bits", type=int, metavar="BITS", help="of embedding tables; default: 8")
    low.add_argument(
        "--layer-bits",
        action="append",
        type=_layer_bits,
        metavar="PATTERN=BITS",
        help="other bits, or bits of each group (2,4,4), of the modules that PATTERN names; may be repeated, the "
        "longest that fits counts",
    )


def run(arguments: argparse.Namespace) -> None:
    """Quantizes a model and saves it with its tokenizer."""
    out: Path = arguments.out
    check_out(arguments)
    config = config_of(arguments)
    import bertkern

    model = load_model(arguments.model)
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    bertkern.quantize_(model, config)
    after = save_model(model, arguments.model, out)
    print(bertkern.report(model))
    print(f"{out}: {after / 1e6:.1f} MB of weights, from {before / 1e6:.1f} MB")


def config_of(arguments: argparse.Namespace) -> Any:
    """The config that the options ask for; raises UsageError where they do not go together."""
    from bertkern.config import GroupwiseConfig, Int8Config

    for scheme, names in OWN.items():
        for name in names:
            if scheme != arguments.scheme and getattr(arguments, name) is not None:
                raise UsageError(f"quantize: --{name.replace('_', '-')} belongs to --scheme {scheme}.")
    names = ("pooler", "head", *OWN[arguments.scheme])
    options = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.no_embeddings:
        if "embedding_bits" in options:
            raise UsageError("quantize: --embedding-bits does not go together with --no-embeddings.")
        options |= {"embeddings": False} if arguments.scheme == "int8" else {"embedding_bits": None}
    kind = Int8Config if arguments.scheme == "int8" else GroupwiseConfig
    try:
        return kind(**options, skip=tuple(arguments.skip))
    except ValueError as error:
        raise UsageError(error) from error


def _layer_bits(text: str) -> tuple[str, int | tuple[int, ...]]:
    pattern, _, bits = text.rpartition("=")
    widths = tuple(int(width) for width in bits.split(",") if width.isdigit())
    if not pattern or len(widths) != bits.count(",") + 1:
        raise argparse.ArgumentTypeError(f"expected PATTERN=BITS, such as layer.0.*=3. Got {text!r}.")
    return pattern, widths if "," in bits else widths[0]
