"""Canonical forms of compressed weights: plain tensors, the same on every machine."""
