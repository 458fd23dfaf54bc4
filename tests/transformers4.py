"""Head masks as transformers 4 computed them, in float64, and models of every family to try them on."""

import copy

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tests.families import zoo

LAYERS, HEADS, BATCH = 3, 4, 3
ALBERT_ROWS = 8
FAMILIES = zoo.FAMILIES


def make(name: str, **options) -> nn.Module:
    """A model of 3 layers (ALBERT: 4 passes through two groups of 2 layers) with 4 heads of 13."""
    if not name.startswith("Albert"):
        return zoo.make(name, **{"n_heads" if name.startswith("Distil") else "num_attention_heads": HEADS}, **options)
    config = transformers.AlbertConfig(
        vocab_size=zoo.VOCAB,
        embedding_size=20,
        hidden_size=52,
        num_attention_heads=HEADS,
        intermediate_size=60,
        num_hidden_layers=4,
        num_hidden_groups=2,
        inner_group_num=2,
        max_position_embeddings=40,
        pad_token_id=1,
        initializer_range=0.15,
        **options,
    )
    torch.manual_seed(3)
    return getattr(transformers, name)(config).eval()


def rows_of(model: nn.Module) -> int:
    return ALBERT_ROWS if model.config.model_type == "albert" else LAYERS


def attentions_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__.endswith(("SelfAttention", "AlbertAttention"))]


class Transformers4:
    """A float64 copy of a model whose eager attention multiplies probabilities by `mask`, as transformers 4 did."""

    def __init__(self, model: nn.Module, mask: torch.Tensor) -> None:
        self.model = copy.deepcopy(model).double()
        self.model.config._attn_implementation_internal = "transformers-4"
        mask = mask.double()
        self.mask = (mask.expand(rows_of(model), -1) if mask.dim() == 1 else mask).unsqueeze(-1).unsqueeze(-1)
        if self.mask.dim() == 4:
            self.mask = self.mask[:, None]
        attentions = attentions_of(self.model)
        if model.config.model_type == "albert":
            # Passes 0 and 1 run the first group, 2 and 3 the second; a group runs its two layers.
            for index, attention in enumerate(attentions):
                attention.rows = [2 * (2 * (index // 2) + run) + index % 2 for run in range(2)]
        else:
            for row, attention in enumerate(attentions):
                attention.rows = [row]
        for attention in attentions:
            attention.mask, attention.runs = self.mask, 0
            if model.config.model_type == "mpnet":
                attention.forward = mpnet_attention.__get__(attention)

    def __call__(self, **call):
        for attention in attentions_of(self.model):
            attention.runs = 0
        return self.model(**call)

    def contexts(self) -> list[torch.Tensor]:
        """The contexts of the last call, [B, heads, L, d], by row."""
        found = {row: x for a in attentions_of(self.model) for row, x in zip(a.rows, a.contexts, strict=True)}
        return [found[row] for row in sorted(found)]


def probabilities_times_mask(module, scores, value, dropout):
    probabilities = nn.functional.dropout(scores.softmax(-1), dropout, module.training)
    row = module.rows[module.runs]
    module.contexts = [*module.__dict__.get("contexts", [])[: module.runs]]
    module.runs += 1
    probabilities = probabilities * module.mask[row]
    context = probabilities @ value
    if context.requires_grad:
        context.retain_grad()
    module.contexts.append(context)
    return context, probabilities


def attention_4(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores if attention_mask is None else scores + attention_mask
    context, probabilities = probabilities_times_mask(module, scores, value, dropout)
    return context.transpose(1, 2).contiguous(), probabilities


def mpnet_attention(self, x, attention_mask=None, position_bias=None, output_attentions=False, **kwargs):
    shape = (*x.shape[:-1], self.num_attention_heads, self.attention_head_size)
    q, k, v = (projection(x).view(shape).transpose(1, 2) for projection in (self.q, self.k, self.v))
    scores = q @ k.transpose(2, 3) / self.attention_head_size**0.5 + position_bias
    scores = scores if attention_mask is None else scores + attention_mask
    context, probabilities = probabilities_times_mask(self, scores, v, self.dropout.p)
    return self.o(context.transpose(1, 2).flatten(2)), probabilities


AttentionInterface.register("transformers-4", attention_4)
AttentionMaskInterface.register("transformers-4", eager_mask)
