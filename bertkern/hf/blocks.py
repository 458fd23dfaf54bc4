"""Float models whose files hold the nonzero blocks of their weights and nothing of the zeros.

Of a linear layer <name>, N x K, there are then, in the place of <name>.weight, the tensors of
`bertkern.formats.BsrWeight` (<name>.crow, <name>.col, <name>.values), and in config.json, in `quantization_config`
under "blocks", {"<name>": [br, bc]}. Which block that is depends on the zeros alone.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .. import plan
from ..formats.bsr import LARGEST, BsrWeight
from ..nn.block_sparse import BlockSparseLinear
from ..ragged import RaggedConfig, is_record
from ..schemes import Header
from ..surgery import put
from .files import complain, headers


def save_blocks(model: nn.Module, folder: str | os.PathLike[str], **options: Any) -> None:
    """Saves a pruned float model as `save_pretrained` does, but with linear weights as their nonzero blocks.

    Weights whose blocks would not make the file smaller stay dense. What was removed by `accelerate` is in the files,
    as everything that `save_pretrained` writes. With `import bertkern`, `from_pretrained` loads them as the plain dense
    model, values bit for bit, zeros without a sign; `accelerate` then makes it fast again.

    Args:
        model: of transformers; accelerated or not, it is left as it is.
        folder: where it is saved.
        options: of `save_pretrained`.

    Raises:
        TypeError: no model of transformers.
        FileExistsError: there is a file where the folder is to be.
        ValueError: a quantized one, whose own `save_pretrained` writes blocks, or one under torch.nn.utils.prune that
            is not accelerated.

    Example::

        bk.save_blocks(bk.accelerate(model), "sst2-pruned")
        AutoModelForSequenceClassification.from_pretrained("sst2-pruned")
    """
    from transformers import PreTrainedModel  # which may be about to import this

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"save_blocks: expected a model of transformers. Got {type(model).__name__}.")
    if kind := plan.quantized_as(model):
        raise ValueError(
            f"save_blocks: expected a float model. Got one that is {kind}: its save_pretrained writes what is smallest."
        )
    for name, module in model.named_modules():
        if plan.pruned_by_hook(module):
            raise ValueError(
                f"save_blocks: expected plain weights. Got {name} under torch.nn.utils.prune: accelerate the model, or "
                "call torch.nn.utils.prune.remove."
            )
    # transformers would only log it.
    if os.path.isfile(folder):
        raise FileExistsError(f"save_blocks: expected a folder. Got the file {os.fspath(folder)}.")
    state = model.state_dict()
    blocks = _take(model, state)
    if not blocks:
        model.save_pretrained(folder, **options)
        return
    # Its state is that of the whole model, whatever accelerate has removed: the widths are those that it had before.
    own = model.config.__dict__.get("quantization_config")
    widths = (own if isinstance(own, Mapping) else own.to_dict())["widths"] if is_record(own) else {}
    record = {"quant_method": RaggedConfig.quant_method, **RaggedConfig(widths, blocks).to_dict()}
    model.config.quantization_config = record
    try:
        model.save_pretrained(folder, state_dict=state, **options)
    finally:
        del model.config.quantization_config
        if own is not None:
            model.config.quantization_config = own


def _take(model: nn.Module, state: dict[str, Tensor]) -> dict[str, list[int]]:
    """Puts weights with many zeros into `state` as their blocks, in place; the blocks by name in the base model."""
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    holders = Counter(tensor.data_ptr() for tensor in state.values() if tensor.numel())
    blocks = {}
    for name, module in model.named_modules():
        if places[id(module)] > 1:
            continue  # in the file under the name of one place
        inner = name.removeprefix(f"{model.base_model_prefix}.")
        if isinstance(module, BlockSparseLinear):
            blocks[inner] = list(module.block)
        weight = state.get(f"{name}.weight") if isinstance(module, nn.Linear) else None
        if weight is None or holders[weight.data_ptr()] > 1 or not weight.is_floating_point():
            continue
        found = BsrWeight.smallest(weight)
        if found is not None:
            del state[f"{name}.weight"]
            state |= found.tensors(f"{name}.")
            blocks[inner] = list(found.block)
    return blocks


def await_blocks(model: nn.Module, blocks: Mapping[str, Sequence[int]], files: Sequence[str] | None) -> None:
    """Has linear layers without values wait for the blocks that `files` hold of them; `take_blocks` takes these.

    Raises:
        ValueError: tensors of another shape or dtype than blocks of these layers have.
    """
    found = headers(files, model) if files is not None else {}
    problems: list[str] = []
    for name, linear in list(model.named_modules()):
        inner = name.removeprefix(f"{model.base_model_prefix}.")
        held = {part: found[f"{inner}.{part}"] for part in BsrWeight.TENSORS if f"{inner}.{part}" in found}
        # A state dict saved beside the record of such a file has dense weights all the same.
        if inner not in blocks or not isinstance(linear, nn.Linear) or not held:
            continue
        block, shape = tuple(blocks[inner]), tuple(linear.weight.shape)
        wrong = _misfits(inner, held, shape, block)
        problems += wrong
        if not wrong:
            count, bias = held["values"][1][0], linear.bias is not None
            put(model, name, BlockSparseLinear.awaiting(count, block, shape, bias, linear.weight.dtype))
    complain(problems)


def _misfits(name: str, held: Mapping[str, Header], shape: tuple[int, int], block: tuple[int, int]) -> list[str]:
    (n, k), (br, bc) = shape, block
    rows = -(-n // br)
    if rows * br * -(-k // bc) * bc > LARGEST:
        return [f"expected blocks of {name} that fit {[n, k]}. Got {[br, bc]}."]
    count = held["values"][1][0] if "values" in held and held["values"][1] else 0
    wanted = {"crow": [rows + 1], "col": [count], "values": [count, br, bc]}
    problems = []
    for part, want in wanted.items():
        dtype, got = held.get(part, ("", None))
        if got != want or (part != "values" and dtype != "torch.int32"):
            kind = "" if part == "values" else "torch.int32 "
            told = "none" if got is None else f"{dtype} of shape {got}"
            problems.append(f"expected {name}.{part} {kind}of shape {want}. Got {told}.")
    return problems


def take_blocks(model: nn.Module) -> None:
    """Makes dense weights of the blocks that a file brought; raises ValueError where they are wrong."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BlockSparseLinear):
            try:
                module.to_weight().check()
            except ValueError as error:
                raise ValueError(f"from_pretrained: {name}: {error}") from None
            put(model, name, module.to_linear())
