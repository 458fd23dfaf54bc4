"""Products of vectors with the Hessian of a loss with respect to the weights of one layer, by differentiating twice."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bertkern import plan
from bertkern.nn.linear import PackedLinear
from bertkern.nn.packing import plain_path

from ..observation import evaluating
from .places import Place
from .samples import Chunk

# Takes the model and a batch, returns the loss: a scalar that is the mean over the batch, or one value per example.
Loss = Callable[[nn.Module, Any], Tensor]


class Curvature:
    """The Hessian of the mean loss over some chunks, a block for each layer.

    Of one chunk, the graph of the gradients of all layers is made once and kept: a product then differentiates from
    there down to its layer's weights alone. Of several, it is made anew at every product, chunk by chunk, from the
    product's layer upwards. Within `differentiable` only.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, Place], chunks: Sequence[Chunk], loss: Loss | None, caller: str
    ) -> None:
        self._model, self._chunks, self._loss, self._caller = model, chunks, loss, caller
        self._weights = {name: place.weights(caller) for name, place in layers.items()}
        self._examples = sum(chunk.examples for chunk in chunks)
        self._graph = self._gradients(chunks[0], list(layers), True) if len(chunks) == 1 else None
        self.products = 0

    def gradients(self) -> dict[str, Tensor]:
        """The gradient with respect to the weights of each layer, [n]."""
        names = list(self._weights)
        if self._graph is not None:
            return {name: _flat(gradients) for name, gradients in self._graph.items()}
        total: dict[str, Tensor] = {}
        for chunk in self._chunks:
            for name, gradients in self._gradients(chunk, names, False).items():
                part = _flat(gradients) * (chunk.examples / self._examples)
                total[name] = total[name] + part if name in total else part
        return total

    def product(self, name: str, vector: Tensor) -> Tensor:
        """H v, [n], of the block of the layer `name`."""
        self.products += 1
        weights = self._weights[name]
        parts = [part.view_as(w) for part, w in zip(vector.split([w.numel() for w in weights]), weights, strict=True)]
        if self._graph is not None:
            total = self._differentiate(weights, self._graph[name], parts, keep=True)
        else:
            total = torch.zeros_like(vector)
            for chunk in self._chunks:
                gradients = self._gradients(chunk, [name], True)[name]
                total += self._differentiate(weights, gradients, parts, keep=False) * (chunk.examples / self._examples)
        if not bool(torch.isfinite(total).all()):
            raise ValueError(f"{self._caller}: expected finite second derivatives of the loss. Got NaN or Inf.")
        return total

    def mean(self) -> float:
        """The mean loss over all chunks, also where it is not finite."""
        losses = ((mean_loss(self._model, chunk, self._loss, self._caller, False), chunk) for chunk in self._chunks)
        return sum(float(value) * chunk.examples / self._examples for value, chunk in losses)

    def forget(self) -> None:
        """Lets go of the graph; there are no gradients or products from here on."""
        self._graph = None

    def _gradients(self, chunk: Chunk, names: list[str], twice: bool) -> dict[str, list[Tensor]]:
        wanted = [weight for name in names for weight in self._weights[name]]
        for weights in self._weights.values():
            for weight in weights:
                weight.requires_grad_(False)
        for weight in wanted:
            weight.requires_grad_(True)
        value = mean_loss(self._model, chunk, self._loss, self._caller)
        found = [None] * len(wanted)
        if value.requires_grad:
            found = torch.autograd.grad(value, wanted, create_graph=twice, allow_unused=True)
        flat = iter(found)
        made = {}
        for name in names:
            mine = [(weight, next(flat)) for weight in self._weights[name]]
            if all(gradient is None for _, gradient in mine):
                raise ValueError(
                    f"{self._caller}: expected a loss that depends on the weights of {name}. Got one that does not."
                )
            made[name] = [torch.zeros_like(w) if gradient is None else gradient for w, gradient in mine]
        return made

    @staticmethod
    def _differentiate(weights: list[Tensor], gradients: list[Tensor], parts: list[Tensor], keep: bool) -> Tensor:
        pairs = [(gradient, part) for gradient, part in zip(gradients, parts, strict=True) if gradient.requires_grad]
        if not pairs:
            # A loss that is linear in the weights.
            return torch.zeros_like(_flat(parts))
        outputs, along = zip(*pairs, strict=True)
        second = torch.autograd.grad(outputs, weights, along, retain_graph=keep, allow_unused=True)
        return _flat([torch.zeros_like(w) if s is None else s for w, s in zip(weights, second, strict=True)])


def mean_loss(model: nn.Module, chunk: Chunk, loss: Loss | None, caller: str, finite: bool = True) -> Tensor:
    """The mean loss over a chunk, a scalar.

    Args:
        finite: whether it has to be.

    Raises:
        TypeError, ValueError: no loss, or one of another shape.
    """
    batch = chunk.batch
    if loss is not None:
        value = loss(model, batch)
    elif isinstance(batch, Mapping):
        output = model(**batch)
        value = output.get("loss") if isinstance(output, Mapping) else None
    else:
        raise TypeError(f"{caller}: expected batches to be mappings, or a loss function. Got {type(batch).__name__}.")
    if value is None:
        raise ValueError(f"{caller}: expected a loss. Got none: batches need labels, or pass loss=.")
    if not isinstance(value, Tensor) or value.dim() > 1 or not value.numel():
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{caller}: expected a loss of shape [] or [B]. Got {got}.")
    if finite and not bool(torch.isfinite(value.detach()).all()):
        raise ValueError(f"{caller}: expected a finite loss. Got NaN or Inf.")
    return value.mean()


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Within it, `model` is in evaluation mode and differentiable twice, no parameter requires a gradient, and graphs
    are recorded. Afterwards it is as it was."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Their kernels can be differentiated once.
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    with evaluating(model), plain_path(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _own_attention(model):
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            for module in packed:
                module.training = True
            yield
        finally:
            for module in packed:
                module.training = False
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)


@contextmanager
def _own_attention(model: nn.Module) -> Iterator[None]:
    """Within it, attention is computed in a way of transformers' own."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items()}
    from bertkern.families._attention import NAMES

    theirs = {ours: name for name, ours in NAMES.items()}
    try:
        for key, name in before.items():
            if name is not None and name not in NAMES:
                configs[key]._attn_implementation = theirs.get(name, "sdpa")
        yield
    finally:
        for key, name in before.items():
            if name is not None and name not in NAMES:
                configs[key]._attn_implementation = name


def check_precision(model: nn.Module, caller: str) -> None:
    """Raises ValueError where second derivatives would drown in rounding."""
    for root in plan.pretrained_roots(model).values():
        for parameter in root.parameters():
            if parameter.is_floating_point() and parameter.dtype not in (torch.float32, torch.float64):
                got = str(parameter.dtype).removeprefix("torch.")
                raise ValueError(f"{caller}: expected weights of float32 or float64. Got {got}.")


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
