"""Modules: each usable alone, and what `quantize_` and `accelerate` put into a model."""

from .block_sparse import BlockSparseLinear
from .groupwise import GroupwiseEmbedding, GroupwiseLinear
from .int8 import Int8Embedding, Int8Linear
from .linear import PackedLinear
from .norms import NoNorm
from .sparse import Form, SparseLinear

__all__ = [
    "BlockSparseLinear",
    "Form",
    "GroupwiseEmbedding",
    "GroupwiseLinear",
    "Int8Embedding",
    "Int8Linear",
    "NoNorm",
    "PackedLinear",
    "SparseLinear",
]
