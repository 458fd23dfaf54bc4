"""Reading files that came from elsewhere: nothing in them is run, and damage is told as what it is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

# The files of weights that transformers writes; of large models, a file named "<name>.index.json" and several others.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def find_weights(path: Path) -> list[Path]:
    """The files of weights that a path leads to: itself, what is in the folder, or the parts that an index names.

    Raises FileNotFoundError or ValueError.
    """
    if path.is_file() and not path.name.endswith(".index.json"):
        return [path]
    if path.is_dir():
        places = [path / name for name in (*WEIGHTS, *(f"{name}.index.json" for name in WEIGHTS))]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise FileNotFoundError(f"load_checkpoint: expected {' or '.join(WEIGHTS)} in {str(path)!r}. Got neither.")
        if found.name in WEIGHTS:
            return [found]
        path = found
    names = read_json(path).get("weight_map")
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    # They come from a file, and are to lead nowhere else.
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"load_checkpoint: expected {str(path)!r} to name files beside it. Got {names}.")
    return [path.parent / name for name in names]


def read_weights(path: Path) -> tuple[dict[str, Tensor], Path]:
    """All tensors of a checkpoint, and its folder. Raises FileNotFoundError or ValueError."""
    tensors: dict[str, Tensor] = {}
    for file in find_weights(path):
        for name, tensor in read_tensors(file).items():
            if name in tensors:
                raise ValueError(f"load_checkpoint: expected {name} once. Got it in several files.")
            tensors[name] = tensor
    return tensors, path if path.is_dir() else path.parent


def names_of(path: Path) -> list[str]:
    """The names of a checkpoint's tensors, without reading them; none where the files are no right ones."""
    try:
        names: list[str] = []
        for file in find_weights(path):
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as tensors:
                    names += tensors.keys()
            else:
                names += map(str, torch.load(file, map_location="meta", weights_only=True))
        return names
    # Whatever is wrong is told by whoever reads them.
    except Exception:
        return []


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch or safetensors file, on the CPU.

    A torch file is read with `weights_only=True`: a pickle that holds anything but tensors and plain containers is
    refused, not run.

    Raises FileNotFoundError or ValueError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"load_checkpoint: expected a file of weights. Got {str(path)!r}, which is none.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        values = torch.load(path, map_location="cpu", weights_only=True)
    # RuntimeError, EOFError, UnpicklingError, SafetensorError, ...: which one depends on where the damage lies.
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"load_checkpoint: expected {str(path)!r} to be a file of tensors. Got one that is truncated, damaged or "
            f"holds other objects: {reason[0] if reason else type(error).__name__}"
        ) from None
    if not isinstance(values, Mapping):
        raise ValueError(
            f"load_checkpoint: expected {str(path)!r} to hold tensors by name. Got {type(values).__name__}."
        )
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"load_checkpoint: expected {name!r} to be a tensor. Got {type(value).__name__}.")
    return dict(values)


def read_config(folder: Path) -> dict[str, Any]:
    """The values of config.json in `folder`. Raises FileNotFoundError or ValueError."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"load_checkpoint: expected config.json beside the weights. Got none in {str(folder)!r}."
        )
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The values of a JSON object. Raises ValueError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"load_checkpoint: expected {str(path)!r} to be JSON. Got: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"load_checkpoint: expected {str(path)!r} to be an object. Got {type(values).__name__}.")
    return values
