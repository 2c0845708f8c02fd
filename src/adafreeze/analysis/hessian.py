"""The Hessian of a loss: its products as a linear operator, its outermost eigenvalues, its trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from ..errors import warn
from .loss import Loss

__all__ = ["Hessian", "eigenvalues", "trace"]


class Hessian(LinearOperator):
    """∇²L(w) as a SciPy operator, float64, shape (size, size); never stored as a matrix.

    Attributes:
        used: products computed so far.
    """

    def __init__(self, loss: Loss) -> None:
        super().__init__(np.dtype(np.float64), (loss.size, loss.size))
        self.loss = loss
        self.used = 0

    def _matmat(self, matrix: Any) -> Any:
        self.used += matrix.shape[1]
        return self.loss.products(torch.from_numpy(np.ascontiguousarray(matrix.T))).numpy().T

    def _adjoint(self) -> Hessian:
        return self


def eigenvalues(hessian: Hessian, count: int = 5, *, seed: int = 0, tolerance: float = 1e-2) -> list[float]:
    """The ``count`` eigenvalues of largest magnitude in descending order, always with the largest of all.

    Lanczos with restarts (ARPACK). The residual is at most ``tolerance`` times the eigenvalue, the error about its
    square, because Lanczos on a symmetric matrix converges quadratically. A tolerance of 0 is machine precision.
    """
    size = hessian.shape[0]
    count = min(count, size)
    if size <= 2 * count + 1:  # the Krylov space would be the whole space
        return sorted(sorted(np.linalg.eigvalsh(hessian @ np.eye(size)), key=abs)[-count:], reverse=True)
    start = np.random.default_rng(seed).standard_normal(size)
    found = _lanczos(hessian, count, "LM", start, tolerance)
    if found and max(found) < 0:
        found = [*sorted(found)[: count - 1], *_lanczos(hessian, 1, "LA", start, tolerance)]
    return sorted(found, reverse=True)


def _lanczos(hessian: Hessian, count: int, which: str, start: Any, tolerance: float) -> list[float]:
    vectors = min(hessian.shape[0], max(2 * count + 1, 20))
    options: dict[str, Any] = {"v0": start, "ncv": vectors, "tol": tolerance, "maxiter": 50}
    try:
        found = eigsh(hessian, count, which=which, return_eigenvectors=False, **options)
    except ArpackNoConvergence as error:
        found = error.eigenvalues
        warn(
            f"Only {len(found)} of {count} eigenvalues converged in {hessian.used} products with the Hessian; the rest "
            "are too close together.",
            fix=f"--eigenvalues {max(1, len(found))}",
        )
    return [float(value) for value in found]


def trace(hessian: Hessian, samples: int = 20, *, seed: int = 0) -> tuple[float, float | None]:
    """Hutchinson's estimate of the trace, the mean of zᵀHz over random signs z, and its standard error.

    Exact if H is diagonal; in general one sample has the variance 2·Σ_{i≠j} H_ij². The error of one sample is None.
    """
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(hessian.shape[0], samples))
    found = np.einsum("is,is->s", signs, hessian @ signs)
    return float(found.mean()), float(found.std(ddof=1) / np.sqrt(samples)) if samples > 1 else None
