"""Fixtures of these tests."""

from tests.reference_kernels import reference_kernels  # noqa: F401
