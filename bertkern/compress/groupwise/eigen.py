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
        errors: |Hv - value v| as a share of |value|, 1 at most: an eigenvalue is as near, and as a rule much nearer,
            since the value is off by the square of the vector's error.
        products: how many products it took.
    """

    values: list[float]
    vectors: list[Tensor]
    errors: list[float]
    products: int


def power(product: Product, start: Tensor, iterations: int, tolerance: float) -> Eigenpairs:
    """Power iteration: v <- Hv / |Hv|, the value is v'Hv; ends when its error is within `tolerance`.

    Args:
        start: [n], not zero.
    """
    v = start / start.norm()
    for step in range(1, iterations + 1):
        image = product(v)
        value = float(torch.dot(v, image))
        error = _share(float((image - value * v).norm()), value)
        length = image.norm()
        if error <= tolerance or step == iterations or not float(length):
            break
        v = image / length
    return Eigenpairs([value], [v], [error], step)


def lanczos(
    product: Product, start: Tensor, iterations: int, tolerance: float, count: int = 1, least: int = 1
) -> Eigenpairs:
    """The best values in the span of start, H start, H^2 start ...: no step of power iteration is ahead of it.

    Ends when the errors of `count` values are within `tolerance`.

    Args:
        start: [n], not zero. What it has nothing of cannot be found.
        least: products that are made at least.

    Source: C. Lanczos 1950, with full reorthogonalization.
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
        errors = [_share(rest * abs(float(weights[-1, i])), values[i]) for i in range(found)]
        enough = step > count and step >= least and all(error <= tolerance for error in errors)
        if rest <= _SPANNED * length or enough or step == size:
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


def _share(residual: float, value: float) -> float:
    return residual / max(abs(value), residual) if residual else 0.0
