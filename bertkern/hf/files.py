"""The files of a checkpoint: which tensors they hold, and whether a model's body finds its own among them."""

from collections.abc import Iterable

import torch
from torch import nn

from ..schemes import Header

# The names of torch's dtypes by those of safetensors.
_DTYPES = {
    "I8": "torch.int8",
    "U8": "torch.uint8",
    "F32": "torch.float32",
    "I32": "torch.int32",
    "BF16": "torch.bfloat16",
    "F16": "torch.float16",
}


def headers(files: Iterable[str], model: nn.Module) -> dict[str, Header]:
    """Of every tensor in `files`: its name in `model`, without the prefix of the base model -> (dtype, shape)."""
    from safetensors import safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    # Some architectures keep old names in their files.
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]

    def renamed(name: str) -> str:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name.removeprefix(model.base_model_prefix + ".")

    found: dict[str, Header] = {}
    for file in files:
        try:
            if str(file).endswith(".safetensors"):
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118  (not a dict)
                        part = tensors.get_slice(name)
                        dtype = part.get_dtype()
                        found[renamed(name)] = (_DTYPES.get(dtype, dtype), part.get_shape())
            else:
                for name, tensor in torch.load(file, map_location="meta", weights_only=True).items():
                    found[renamed(name)] = (str(tensor.dtype), list(tensor.shape))
        # SafetensorError, UnpicklingError, RuntimeError, EOFError, ...: which one depends on where the damage lies.
        except Exception as error:
            raise ValueError(
                f"from_pretrained: expected {str(file)!r} to be a file of tensors. Got one {damage(error)}"
            ) from None
    return found


def of_body(model: nn.Module, name: str) -> bool:
    """Whether a checkpoint's tensor `name` must be one of `model`: it stands in the base model, the pooler aside.

    Heads and poolers may be there or not: they start anew, or stay unread, as in every transformers model.
    """
    first, *rest = name.removeprefix(model.base_model_prefix + ".").split(".")
    return model.base_model._modules.get(first) is not None and "pooler" not in (first, *rest)


def damage(error: Exception) -> str:
    """What is wrong with a file of tensors, in one line, from the error of whatever was reading it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # torch's first line recommends to run what the file holds.
    unsafe = [line.partition(". ")[0] for line in lines if "nsupported" in line]
    return f"truncated, damaged or holding other objects: {(unsafe or lines)[0]}"


def check_body(model: nn.Module, found: dict[str, Header], shared: set[str]) -> None:
    """Raises ValueError unless the checkpoint holds all tensors of the base model, in their shapes, and no others.

    Args:
        model: with its quantized modules in place.
        found: see `headers`.
        shared: names of tied parameters, of which a checkpoint holds one.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    if not all(isinstance(entry, WeightRenaming) for entry in get_model_conversion_mapping(model)):
        return  # transformers puts the tensors of this architecture together from others
    base, prefix = model.base_model, model.base_model_prefix + "."
    expected = {name.removeprefix(prefix): list(tensor.shape) for name, tensor in base.state_dict().items()}
    known = {*expected, *(name for name, _ in base.named_buffers()), *(name.removeprefix(prefix) for name in shared)}
    problems = []
    for name, shape in expected.items():
        absent = name not in found and not {name, prefix + name} & shared
        if of_body(model, name) and (absent or found.get(name, ("", shape))[1] != shape):
            problems.append(f"expected {name} of shape {shape}. Got {'none' if absent else found[name][1]}.")
    problems += [f"expected no {name}. Got it." for name in found if of_body(model, name) and name not in known]
    complain(problems)


def complain(problems: list[str]) -> None:
    """Raises ValueError with the first of `problems`, if there are any."""
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ValueError("from_pretrained: the checkpoint does not fit: " + " ".join(problems[:5]) + more)
