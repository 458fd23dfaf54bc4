"""`prune`: the smallest weights of a model become zero."""

from __future__ import annotations

import argparse
from typing import Any

from .common import UsageError, add_command, model_argument, out_arguments
from .models import check_out, load_model, save_model


def add(commands: Any) -> None:
    """Adds the command."""
    sub = add_command(
        commands,
        "prune",
        run,
        "set the smallest weights of a model to zero and save it",
        "prune ./my-bert ./my-bert-80 --sparsity 0.8 --block 16x4",
        "prune ./my-bert ./out --sparsity 0.9 --scope global",
        "prune ./my-bert ./out --nm 2:4 --no-pooler",
        "prune ./my-bert ./out --sparsity 0.7 --block 32x32 --set 'layer.0.*=0.3' --skip layer.11.output",
        more="\nThe result is an ordinary dense checkpoint. Pruning at once costs accuracy: fine-tune it with\n"
        "bertkern.Masks.of_zeros(model).hold(optimizer), or prune while training with bertkern.PruneCallback.\n",
    )
    model_argument(sub)
    out_arguments(sub)
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
    skip = "modules to leave; PATTERN must name one with a matrix; may be repeated"
    sub.add_argument("--skip", action="append", default=[], metavar="PATTERN", help=skip)
    sub.add_argument(
        "--embeddings",
        action=argparse.BooleanOptionalAction,
        help="prune the word table; default: only with single weights",
    )
    sub.add_argument("--no-pooler", action="store_true", help="leave the pooler")
    sub.add_argument("--head", action="store_true", help="prune the task head, too")
    sub.add_argument("--random", type=int, metavar="SEED", help="random ones instead of the smallest")


def run(arguments: argparse.Namespace) -> None:
    """Prunes a model at once and saves it with its tokenizer."""
    check_out(arguments)
    config = _config(arguments)
    import bertkern

    model = load_model(arguments.model)
    masks = bertkern.prune_(model, config)
    size = save_model(model, arguments.model, arguments.out)
    print(masks.report())
    print(f"{arguments.out}: {size / 1e6:.1f} MB of weights, zeros among them: bertkern.accelerate skips these")


def _config(arguments: argparse.Namespace) -> Any:
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


def _block(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected ROWSxCOLUMNS, such as 16x4. Got {text!r}.")
    return int(rows), int(columns)


def _n_of_m(text: str) -> tuple[int, int]:
    n, _, m = text.partition(":")
    if not (n.isdecimal() and m.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected N:M, such as 2:4. Got {text!r}.")
    return int(n), int(m)


def _override(text: str) -> tuple[str, float]:
    pattern, _, sparsity = text.rpartition("=")
    try:
        return pattern, float(sparsity)
    except ValueError:
        pattern = ""
    raise argparse.ArgumentTypeError(f"expected PATTERN=SPARSITY, such as layer.0.*=0.3. Got {text!r}.")
