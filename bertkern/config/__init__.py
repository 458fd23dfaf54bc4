"""What a user asks `quantize_` for: frozen, versioned, JSON both ways; a file for each scheme."""

from .groupwise import GroupwiseConfig
from .int8 import Int8Config

__all__ = ["GroupwiseConfig", "Int8Config"]
