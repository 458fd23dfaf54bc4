"""The eigenvalues of a symmetric operator that are largest in magnitude, from its products with vectors."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

METHODS = ("lanczos", "power")
# A vector that loses more than this against the basis is one of its span, up to rounding.
_SPANNED = 1e-5

Product = Callable[[Tensor], Tensor]


class Eigenpairs(NamedTuple):
    """What was found, largest in magnitude first.

    Attributes:
        values: with their signs.
        vectors: [n] each, of unit length.
        errors: how far each value may be off, estimated, as a share of it.
        products: how many products it took.
    """

    values: list[float]
    vectors: list[Tensor]
    errors: list[float]
    products: int


def power(product: Product, start: Tensor, iterations: int, tolerance: float) -> Eigenpairs:
    """Power iteration: v <- Hv / |Hv|, the value is v'Hv; ends when two values in a row differ by `tolerance` of it.

    Args:
        start: [n], not zero.
    """
    v, value, error = start / start.norm(), 0.0, 1.0
    for step in range(1, iterations + 1):
        image = product(v)
        now = float(torch.dot(v, image))
        error = abs(now - value) / abs(now) if now else float(value != 0.0)
        value, length = now, image.norm()
        if not float(length):
            return Eigenpairs([0.0], [v], [0.0], step)
        if step > 1 and error <= tolerance:
            break
        v = image / length
    return Eigenpairs([value], [v], [error], step)


def lanczos(
    product: Product, start: Tensor, iterations: int, tolerance: float, count: int = 1, least: int = 1
) -> Eigenpairs:
    """The best values in the span of start, H start, H^2 start ...: no step of power iteration is ahead of it.

    Ends when the error of `count` values is within `tolerance` of them. With r the length of Hv - value * v, a value is
    within r of an eigenvalue, and within r^2 / gap where no other is nearer than gap.

    Args:
        start: [n], not zero. What it has nothing of cannot be found.
        least: products that are made at least.

    Source: C. Lanczos 1950, with full reorthogonalization; B. Parlett, The Symmetric Eigenvalue Problem, 11.7.
    """
    size = min(iterations, start.numel())
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(1, size + 1):
        image = product(basis[-1])
        length = float(image.norm())
        diagonal.append(float(torch.dot(basis[-1], image)))
        # Twice, because once leaves rounding errors that grow.
        for _ in range(2):
            for q in basis:
                image -= torch.dot(q, image) * q
        rest = float(image.norm())
        values, weights = _ritz(diagonal, beside)
        found = min(count, step)
        ended = rest <= _SPANNED * length
        residuals = [rest * abs(float(weights[-1, i])) for i in range(found)]
        errors = [_error(values, i, residuals[i]) for i in range(found)]
        enough = step > count and step >= least and all(error <= tolerance for error in errors)
        if ended or enough or step == size:
            break
        beside.append(rest)
        basis.append(image / rest)
    vectors = [sum(float(w) * q for w, q in zip(weights[:, i], basis, strict=True)) for i in range(found)]
    return Eigenpairs(values[:found], [v / v.norm() for v in vectors], errors, step)


def _ritz(diagonal: list[float], beside: list[float]) -> tuple[list[float], Tensor]:
    """Eigenvalues of the tridiagonal matrix, largest in magnitude first, and their vectors as columns."""
    inner = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        off = torch.tensor(beside, dtype=torch.float64)
        inner += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(inner)
    order = values.abs().argsort(descending=True, stable=True)
    return values[order].tolist(), vectors[:, order]


def _error(values: list[float], i: int, residual: float) -> float:
    value = values[i]
    if not residual:
        return 0.0
    if not value:
        return float("inf")
    gap = min((abs(value - other) for j, other in enumerate(values) if j != i), default=0.0)
    return min(residual, residual**2 / gap if gap else residual) / abs(value)
