"""`quantize`: a model becomes int8, or its weights fewer bits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import UsageError, add_command, first_line, model_argument, out_arguments
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
# Groupwise options that say how a config is arrived at, and are not in it.
BUDGET = ("average_bits", "target_size_mb", "choices")
COMPENSATE = "compensate"


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
        "quantize ./my-bert ./out --scheme groupwise --average-bits 3 --method compensate --calibration sentences.txt",
        more="\nThe result loads with: import bertkern; AutoModel.from_pretrained(OUT)\n",
    )
    model_argument(sub)
    out_arguments(sub)
    sub.add_argument("--scheme", choices=tuple(OWN), default="int8", help="default: int8")
    sub.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="modules to leave; may be repeated")
    sub.add_argument("--no-embeddings", action="store_true", help="leave the embedding tables")
    for part in ("pooler", "head"):
        text = f"quantize the {'task head' if part == 'head' else part}; default: with int8, not with groupwise"
        sub.add_argument(f"--{part}", action=argparse.BooleanOptionalAction, help=text)
    sub.add_argument("--weight", choices=("per_channel", "per_tensor"), help=SCALES)
    low = sub.add_argument_group("groupwise", "weights of 2 to 8 bits, a scale and a zero point a group")
    low.add_argument(
        "--bits", type=int, help="of linear layers; default: 4. With a budget, of those outside of the encoder layers"
    )
    cut = low.add_mutually_exclusive_group()
    cut.add_argument("--groups", type=int, help="into how many groups each matrix is cut; default: 128")
    cut.add_argument("--group-size", type=int, metavar="SIZE", help="neighbours in a group, instead")
    low.add_argument("--axis", choices=("n", "k"), help="groups of output (n, the default) or input features (k)")
    low.add_argument(
        "--method",
        choices=("minmax", "percentile", "mse", COMPENSATE),
        help="how ranges are found; default: minmax. compensate: codes that make up for each other's errors on the "
        "sentences of --calibration (GPTQ)",
    )
    low.add_argument("--symmetric", action="store_true", default=None, help="grids without zero points")
    low.add_argument(
        "--whole-zero",
        action=argparse.BooleanOptionalAction,
        help="whole zero points, so that 0 stays 0; the default but with --method mse",
    )
    low.add_argument("--shared", action="store_true", default=None, help="with axis k: all outputs share their ranges")
    low.add_argument(
        "--activation",
        choices=("dynamic", "static", "float"),
        help="int8 by each token's range (default), by one range a layer on the sentences of --calibration, or float",
    )
    budget = low.add_mutually_exclusive_group()
    budget.add_argument(
        "--average-bits",
        type=float,
        metavar="BITS",
        help="a budget: each encoder layer gets its own bits, so many on average; --bits, --layer-bits and --skip are "
        "then for what stands outside of these layers, such as --pooler and --head",
    )
    budget.add_argument("--target-size-mb", type=float, metavar="MB", help="a budget by the size of these layers")
    low.add_argument(
        "--choices", type=_choices, metavar="BITS,...", help="bits that a layer may get by a budget; default: 2,4"
    )
    low.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="real sentences, one a line: bits go to the layers that they are sensitive to (without: to those whose "
        "weights would lose most), for --method compensate and --activation static",
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

    data = calibration_of(arguments)
    model = load_model(arguments.model)
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    if arguments.average_bits is not None or arguments.target_size_mb is not None:
        config = _within_budget(model, config, arguments, data)
    weights = None
    if arguments.method == COMPENSATE:
        weights = bertkern.compensate(model, data["sentences"], config, tokenizer=data["tokenizer"])
    static = {"calibration": data["sentences"], "tokenizer": data["tokenizer"]} if config.activation == "static" else {}
    bertkern.quantize_(model, config, weights=weights, **static)
    after = save_model(model, arguments.model, out)
    print(bertkern.report(model))
    print(f"{out}: {after / 1e6:.1f} MB of weights, from {before / 1e6:.1f} MB")


def calibration_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sentences of --calibration and the model's tokenizer, or nothing; raises UsageError."""
    file: Path | None = arguments.calibration
    if file is None:
        for option, value in (("method", COMPENSATE), ("activation", "static")):
            if getattr(arguments, option) == value:
                raise UsageError(f"quantize: --{option} {value} needs --calibration FILE.")
        return {}
    try:
        sentences = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--calibration: expected a text file of sentences. Got {first_line(error)}") from error
    if not sentences:
        raise UsageError(f"--calibration: expected sentences, one a line. Got none in {file}.")
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    except Exception as error:  # whatever its files make transformers raise
        raise UsageError(f"--calibration: expected a tokenizer beside MODEL. Got {first_line(error)}") from error
    return {"sentences": sentences, "tokenizer": tokenizer}


def _within_budget(model: Any, config: Any, arguments: argparse.Namespace, data: dict[str, Any]) -> Any:
    """The config with the bits that `choose_bits` gives each encoder layer; prints them.

    Raises:
        UsageError: a budget that is too small, or options that are not for what stands outside of these layers.
    """
    from dataclasses import replace

    import bertkern

    try:
        outside = _outside(model, config)
    except ValueError as error:
        raise UsageError(error) from error
    if arguments.bits is not None and not outside:
        raise UsageError(
            "quantize: --bits is, with a budget, for matrices outside of the encoder layers. Got none that it would "
            "count for: leave it out, or add --pooler or --head."
        )
    options = {name: value for name in BUDGET if (value := getattr(arguments, name)) is not None}
    options |= {name: getattr(config, name) for name in ("axis", "symmetric", "shared", "whole_zero", "method")}
    cut = {"groups": config.groups} if config.group_size is None else {"group_size": config.group_size}
    try:
        chosen = bertkern.choose_bits(model, **data, **options, **cut)
    except ValueError as error:
        raise UsageError(error) from error
    print(chosen)
    if outside:
        print(f"Of {config.bits} bits (--bits): {', '.join(outside)}.")
    return replace(config, layer_bits={**chosen.layer_bits, **dict(config.layer_bits)})


def _outside(model: Any, config: Any) -> list[str]:
    """Linear layers outside of the encoder layers that get the config's bits.

    Raises:
        UsageError: the config says something of a matrix in an encoder layer, which a budget is to decide.
    """
    from bertkern import plan
    from bertkern.compress.groupwise.choosing import choose
    from bertkern.compress.groupwise.places import places
    from bertkern.names import fits

    roots = plan.pretrained_roots(model)
    layers = {linear for place in places(model, "quantize").values() for linear in place.linears.values()}
    patterns = {"--layer-bits": [pattern for pattern, _ in config.layer_bits], "--skip": config.skip}
    for name in (name for name, module in model.named_modules() if module in layers):
        for option, named in patterns.items():
            for pattern in named:
                if fits(pattern, plan.aliases(name, roots)):
                    raise UsageError(
                        f"quantize: expected {option}, with a budget, to be for what stands outside of the encoder "
                        f"layers. Got {pattern!r}, which names {name}."
                    )
    linears = choose(model, config, "quantize").linears.items()
    return [
        name
        for name, matrix in linears
        if matrix.module not in layers
        and not any(fits(pattern, plan.aliases(name, roots)) for pattern in patterns["--layer-bits"])
    ]


def config_of(arguments: argparse.Namespace) -> Any:
    """The config that the options ask for; raises UsageError where they do not go together."""
    from bertkern.config import GroupwiseConfig, Int8Config

    for scheme, names in OWN.items():
        for name in names:
            if scheme != arguments.scheme and getattr(arguments, name) is not None:
                raise UsageError(f"quantize: --{name.replace('_', '-')} belongs to --scheme {scheme}.")
    for name in (*BUDGET, "calibration"):
        if arguments.scheme != "groupwise" and getattr(arguments, name) is not None:
            raise UsageError(f"quantize: --{name.replace('_', '-')} belongs to --scheme groupwise.")
    if arguments.choices is not None and arguments.average_bits is None and arguments.target_size_mb is None:
        raise UsageError("quantize: --choices goes together with --average-bits or --target-size-mb.")
    names = ("pooler", "head", *OWN[arguments.scheme])
    options = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if options.get("method") == COMPENSATE:
        options["method"] = "mse"  # of the tables, which no inputs lead to
    if arguments.no_embeddings:
        if "embedding_bits" in options:
            raise UsageError("quantize: --embedding-bits does not go together with --no-embeddings.")
        options |= {"embeddings": False} if arguments.scheme == "int8" else {"embedding_bits": None}
    kind = Int8Config if arguments.scheme == "int8" else GroupwiseConfig
    try:
        return kind(**options, skip=tuple(arguments.skip))
    except ValueError as error:
        raise UsageError(error) from error


def _choices(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected BITS,..., such as 2,4. Got {text!r}.")
    return tuple(map(int, parts))


def _layer_bits(text: str) -> tuple[str, int | tuple[int, ...]]:
    pattern, _, bits = text.rpartition("=")
    widths = tuple(int(width) for width in bits.split(",") if width.isdecimal())
    if not pattern or len(widths) != bits.count(",") + 1:
        raise argparse.ArgumentTypeError(f"expected PATTERN=BITS, such as layer.0.*=3. Got {text!r}.")
    return pattern, widths if "," in bits else widths[0]
