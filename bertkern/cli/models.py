"""Models on the command line: read with every mistake explained, saved with what stands beside them."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .common import UsageError, check_folder, first_line, news

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer_config.json",
)


def check_out(arguments: argparse.Namespace) -> None:
    """Raises UsageError where the model cannot be written to OUT."""
    out: Path = arguments.out
    for folder in (out, out.parent):  # files come together beside OUT
        check_folder("OUT", folder)
    if out.is_dir() and any(out.iterdir()) and not arguments.force:
        raise UsageError(f"OUT: {out} holds files; --force writes into it all the same.")
    if out.is_dir() and Path(arguments.model).is_dir() and out.samefile(arguments.model):
        raise UsageError("OUT: expected another folder than MODEL.")


def save_model(model: Any, source: str, out: Path) -> int:
    """Writes the model with what stands beside it in `source`; returns the bytes of its weights."""
    with _staged(out) as folder:
        model.save_pretrained(folder)
        _save_tokenizer(source, folder)
        _save_sentence_modules(source, folder)
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def load_model(name: str) -> Any:
    """The model in the class that its config names, in eval mode; of a folder also what `load_checkpoint` reads.

    A pooler or head that its files lack starts anew, and a line on stderr says so.

    Raises:
        UsageError: there is no such model.
        RuntimeError: its files are damaged or do not fit its config.
    """
    path = Path(name).expanduser()
    local = path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if local and not (path / "config.json").is_file():
        got = f"{name}, which {'has none' if path.is_dir() else 'is a file' if path.exists() else 'does not exist'}"
        raise UsageError(f"MODEL: expected a folder with a config.json. Got {got}.")
    import transformers

    import bertkern

    source = str(path) if local else name
    if local and _of_a_paper(path):
        try:
            with _silent_transformers():
                return bertkern.load_checkpoint(path)
        except ValueError as error:
            raise RuntimeError(f"MODEL: {source}: {first_line(error)}") from error
    with _silent_transformers():
        try:
            config = transformers.AutoConfig.from_pretrained(source)
        except Exception as error:  # whatever its values make transformers raise
            if local:
                raise UsageError(f"MODEL: {path / 'config.json'} names no known model: {first_line(error)}") from error
            raise UsageError(
                f"MODEL: expected a folder or a name on the hub. Got {name!r} ({first_line(error)})"
            ) from error
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


def _of_a_paper(path: Path) -> bool:
    """Whether a folder is a checkpoint that only `load_checkpoint` reads, such as one of nn_pruning."""
    from bertkern.checkpoints import FORMATS
    from bertkern.checkpoints.dense import DENSE

    return any(row.detect(path) for row in FORMATS if row is not DENSE)


def _reason(error: Exception) -> str:
    from bertkern.hf import damage

    known = isinstance(error, (OSError, ValueError, RuntimeError))
    return first_line(error) if known else f"its weights are {damage(error)}"


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
        news(f"{source} lacks {_few(missing)}: they start anew, untrained")
    if extra:
        news(f"{source} holds {_few(extra)}, which {type(model).__name__} has no place for")


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
        news("no tokenizer beside the model: only the weights are saved")


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
