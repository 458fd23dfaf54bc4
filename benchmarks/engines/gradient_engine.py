"""Derivatives of BERT's loss: head importance beside a plain backward pass, and the top of the Hessian."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from . import Engine


class Gradient(Engine):
    """Base: the model as transformers loads it, in eval mode, with a head of its own, and sentences with labels."""

    packages = ("torch", "transformers")

    def __init__(self, model: str, threads: int):
        super().__init__()
        torch.set_num_threads(threads)
        torch.manual_seed(0)  # of the classifier's weights
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.model = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32, num_labels=2).eval()

    def prepare(self, sentences: int, tokens: int, batch: int) -> None:
        """Random sentences of `tokens`, in batches."""
        rng = np.random.default_rng(0)
        vocab = self.model.config.vocab_size
        ids = torch.from_numpy(rng.integers(min(1000, vocab - 1), vocab, (sentences, tokens)))
        labels = torch.from_numpy(rng.integers(0, 2, sentences))
        every = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        self.batches = [_part(every, at, batch) for at in range(0, sentences, batch)]

    def turn(self, seconds: float) -> list[float]:
        """Warm is the machine after one batch; a whole untimed call would take as long as the timed one."""
        batches, self.batches = self.batches, self.batches[:1]
        self.run()
        self.batches, times = batches, []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            self.run()
            times.append((time.perf_counter() - start) * 1e3)
        return times

    def outputs(self) -> dict[str, np.ndarray]:
        return {"scores": self.scores().numpy().astype(np.float32)}

    def scores(self) -> torch.Tensor:
        """Without normalisation, [layers, heads]."""
        raise NotImplementedError


class Importance(Gradient):
    """bertkern.head_importance."""

    packages = ("torch", "transformers")

    def run(self) -> None:
        self.scores()

    def scores(self) -> torch.Tensor:
        import bertkern

        return bertkern.head_importance(self.model, self.batches, normalize=False, progress=False)

    def versions(self) -> dict[str, str]:
        import bertkern

        return {"bertkern": bertkern.__version__, **super().versions()}


class Backward(Gradient):
    """The loss and its gradient with respect to every weight, as a training step has them before the optimizer's."""

    def run(self) -> None:
        for batch in self.batches:
            self.model.zero_grad(set_to_none=True)
            self.model(**batch).loss.backward()

    def scores(self) -> torch.Tensor:
        raise NotImplementedError("has no scores")


class Reference(Gradient):
    """The definition: a factor on each head, one sentence at a time, the absolute gradients of the loss averaged.

    In float64, so that no order of summation matters. Source: arXiv 1905.10650, equation 2.
    """

    def run(self) -> None:
        self.scores()

    def scores(self) -> torch.Tensor:
        model = self.model.double()
        config = model.config
        layers = [layer.attention for layer in model.base_model.encoder.layer]
        total = torch.zeros(len(layers), config.num_attention_heads, dtype=torch.float64)
        sentences = [_part(batch, i, 1) for batch in self.batches for i in range(len(batch["labels"]))]
        for sentence in sentences:
            factors = torch.ones_like(total, requires_grad=True)
            hooks = [
                attention.output.dense.register_forward_pre_hook(_times(factor))
                for attention, factor in zip(layers, factors, strict=True)
            ]
            loss = model(**sentence).loss
            for hook in hooks:
                hook.remove()
            total += torch.autograd.grad(loss, factors)[0].abs()
        self.model.float()
        return total / len(sentences)


class Hessian(Gradient):
    """bertkern.hessian_sensitivity."""

    def prepare(self, sentences: int, tokens: int, batch: int, last: bool = False) -> None:
        """Random sentences of `tokens`, in batches; `last`: the last layer over all of them, to be checked."""
        super().prepare(sentences, tokens, batch)
        name = f"encoder.layer.{self.model.config.num_hidden_layers - 1}"
        self.options = {"layers": name, "samples": 1, "fraction": 1.0} if last else {}
        self.found: Any = None

    def run(self) -> None:
        import bertkern

        self.found = bertkern.hessian_sensitivity(self.model, self.batches, progress=False, **self.options)

    def turn(self, seconds: float) -> list[float]:
        """One call: it takes minutes, so nothing has to be warm."""
        start = time.perf_counter()
        self.run()
        return [(time.perf_counter() - start) * 1e3]

    def outputs(self) -> dict[str, np.ndarray]:
        self.run()
        return {"magnitudes": np.abs(np.array(self.found.eigenvalues, np.float32))}

    def report(self) -> str | None:
        return None if self.found is None else str(self.found)

    def versions(self) -> dict[str, str]:
        import bertkern

        return {"bertkern": bertkern.__version__, **super().versions()}


class HessianReference(Hessian):
    """Power iteration on the last layer's Hessian over all sentences at once, in float64.

    What it stretches a vector by comes near the largest magnitude also where both signs have values of about that.
    """

    STEPS = 60

    def outputs(self) -> dict[str, np.ndarray]:
        self.model.set_attn_implementation("eager")
        model = self.model.double()
        layer = model.base_model.encoder.layer[-1]
        weights = [module.weight for module in layer.modules() if isinstance(module, torch.nn.Linear)]
        whole = {name: torch.cat([batch[name] for batch in self.batches]) for name in self.batches[0]}
        gradients = torch.autograd.grad(model(**whole).loss, weights, create_graph=True)
        vector = [gradient.detach() + torch.randn_like(gradient) * gradient.std() for gradient in gradients]
        for _ in range(self.STEPS):
            length = sum(part.square().sum() for part in vector).sqrt()
            unit = [(part / length).detach() for part in vector]
            vector = torch.autograd.grad(gradients, weights, unit, retain_graph=True)
        stretched = float(sum(part.square().sum() for part in vector).sqrt())
        self.model.float()
        return {"magnitudes": np.array([[stretched]], np.float32)}


def _part(batch: dict[str, torch.Tensor], at: int, size: int) -> dict[str, torch.Tensor]:
    return {name: value[at : at + size] for name, value in batch.items()}


def _times(factors: torch.Tensor) -> Any:
    def hook(_: torch.nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        context = arguments[0].unflatten(-1, (len(factors), -1))
        return ((context * factors[:, None]).flatten(-2),)

    return hook
