"""transformers knows bertkern's quantized and ragged models: save_pretrained, from_pretrained, Trainer, dequantize.

Importing this registers the quantizer; `import bertkern` sees to it as soon as transformers' own registry exists.

record.py    what stands in config.json
blocks.py    float models whose files hold blocks
files.py     what a checkpoint's files hold
skeleton.py  the model that its tensors are loaded into; which tensors these are stands in bertkern/schemes/
"""

import functools
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from .. import mapped, plan
from ..ragged import RaggedConfig
from ..record import record_of
from ..schemes import scheme_under
from .blocks import await_blocks
from .blocks import take_blocks as take_float_blocks
from .files import damage, of_body
from .record import METHOD, BertkernConfig, describe, write_blocks
from .skeleton import (
    build_skeleton,
    check_shapes,
    check_values,
    drop_ties,
    fill_stand_ins,
    shape_as,
    take_blocks,
    tie_loaded,
)

__all__ = ["BertkernConfig", "BertkernQuantizer", "attach", "damage", "detach", "of_body"]


@register_quantizer(METHOD)
class BertkernQuantizer(HfQuantizer):
    """Makes the skeleton, ragged or quantized, before transformers loads the tensors; fuses the latter afterwards."""

    # Training runs the plain path on dequantized weights; without these, Trainer refuses even to evaluate.
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if not isinstance(quantization_config, BertkernConfig):
            quantization_config = BertkernConfig(**quantization_config.to_dict())
        super().__init__(quantization_config, **kwargs)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What `save_pretrained` writes; the config that it writes afterwards then tells of weights in blocks."""
        state = model.state_dict()
        self.quantization_config.layers = write_blocks(model, state, self.quantization_config.layers)
        return state, {}

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        config = self.quantization_config.config
        ragged = shape_as(model, self.quantization_config)
        if self.pre_quantized and scheme_under(config):
            self._ties = build_skeleton(model, self.quantization_config, checkpoint_files)
        else:
            blocks = config.blocks if isinstance(config, RaggedConfig) else {}
            await_blocks(model, blocks, checkpoint_files)
            if ragged or blocks:
                check_shapes(model, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from ..quantizing import quantize_
        from ..swap import accelerate

        config = self.quantization_config.config
        # Codes are among them, which the packed copies will take the place of.
        from_file = [*model.parameters(), *model.buffers()]
        take_blocks(model)
        take_float_blocks(model)
        fill_stand_ins(model)
        if isinstance(config, RaggedConfig):
            # A float model like any other, but for what its config records.
            detach(model)
            return model
        progress = logging.is_progress_bar_enabled()
        if not self.pre_quantized:
            model.is_quantized = False
            return quantize_(model, config, progress=progress)
        tie_loaded(model, self.__dict__.pop("_ties", {}))
        check_values(model)
        accelerate(model, progress=progress)
        attach(model, config)
        choices = plan.choose(model, config)
        record_of(model).kept.update({choice.name: choice.reason for choice in choices if choice.action == "packed"})
        mapped.release(*from_file)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        from ..swap import dequantize

        return dequantize(model)


def attach(model: nn.Module, config: Any = None) -> None:
    """Marks a transformers model that holds quantized modules as quantized, so that it saves and loads as such.

    Args:
        config: what it was made with; None: read from the modules. What stayed float against it goes into `skip`.
    """
    from .. import heads

    widths = heads.base_widths(model)
    config, told = describe(model, config)
    quantizer = BertkernQuantizer(BertkernConfig(**config.to_dict(), widths=widths, layers=told))
    for module in heads.pretrained(model):
        module.hf_quantizer = quantizer
        module.is_quantized = True
        module.quantization_method = METHOD
        module.config.quantization_config = quantizer.quantization_config
        module.config._is_quantized = True
        # transformers refuses these two on quantized models; here scales and codes stay as they are in every cast.
        module.half = functools.partial(nn.Module.half, module)
        module.float = functools.partial(nn.Module.float, module)
        module.resize_token_embeddings = refuse_resize
        drop_ties(module)


def detach(model: nn.Module) -> None:
    """Takes the marks of `attach` away from a model that is float again."""
    from .. import heads

    for module in heads.pretrained(model):
        for name in (
            "hf_quantizer",
            "is_quantized",
            "quantization_method",
            "half",
            "float",
            "resize_token_embeddings",
            "_tied_weights_keys",
        ):
            module.__dict__.pop(name, None)
        for name in ("quantization_config", "_is_quantized"):
            module.config.__dict__.pop(name, None)
        module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=False)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    heads.record(model)


def refuse_resize(*args: Any, **kwargs: Any) -> None:
    """What `resize_token_embeddings` of a quantized model does."""
    raise ValueError(
        "resize_token_embeddings: expected a float model. Got quantized embeddings: resize first, then quantize; "
        "bertkern.dequantize gives the nearest float model."
    )
