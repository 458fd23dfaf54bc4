"""Modules: each usable alone, and what `quantize_` and `accelerate` put into a model."""

from .block_sparse import BlockSparseLinear
from .int8 import Int8Embedding, Int8Linear
from .linear import PackedLinear
from .norms import NoNorm

__all__ = ["BlockSparseLinear", "Int8Embedding", "Int8Linear", "NoNorm", "PackedLinear"]
