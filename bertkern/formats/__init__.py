"""Canonical forms of compressed weights: plain tensors, the same on every machine.

Int8Weight       int8.py       codes and scales
GroupwiseWeight  groupwise.py  codes of 2 to 8 bits, a scale and a zero point a group
BsrWeight        bsr.py        blocks that are not zero
CsrWeight        csr.py        elements that are not zero
NmWeight         two_four.py   n of every m along K
RaggedWeight     ragged.py     rows and columns that are not zero
"""

from .bsr import BsrWeight
from .csr import CsrWeight
from .groupwise import GroupwiseWeight
from .int8 import Int8Weight
from .ragged import RaggedWeight
from .two_four import NmWeight

__all__ = ["BsrWeight", "CsrWeight", "GroupwiseWeight", "Int8Weight", "NmWeight", "RaggedWeight"]
