"""Reading files that came from elsewhere: nothing in them is run, and damage is told as what it is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


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
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"load_checkpoint: expected {str(path)!r} to be JSON. Got: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"load_checkpoint: expected {str(path)!r} to be an object. Got {type(values).__name__}.")
    return values
