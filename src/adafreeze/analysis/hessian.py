"""The Hessian of a loss: its products as a linear operator, its outermost eigenvalues, its trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from ..errors import warn

if TYPE_CHECKING:
    from .loss import Loss

__all__ = ["Hessian", "eigenvalues", "trace"]


class Hessian(LinearOperator):
    """∇²L(w) as SciPy takes it, float64, shape (size, size); nothing of it is ever stored.

    Attributes:
        used: products made so far.
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
    """The ``count`` eigenvalues of largest magnitude, largest first; the largest of all is always among them.

    Lanczos with restarts (ARPACK). The error of an eigenvalue is of the order of the square of ``tolerance``, the
    residual in units of the eigenvalue: Lanczos on a symmetric matrix converges quadratically.

    Args:
        hessian: of the loss.
        count: how many, at most the number of parameters.
        seed: of the first vector.
        tolerance: 0: machine precision.
    """
    size = hessian.shape[0]
    count = min(count, size)
    if size <= 2 * count + 1:  # a Krylov space would be the whole space
        return sorted(sorted(np.linalg.eigvalsh(hessian @ np.eye(size)), key=abs)[-count:], reverse=True)
    start = np.random.default_rng(seed).standard_normal(size)
    found = _lanczos(hessian, count, "LM", start, tolerance)
    if found and max(found) < 0:
        found = [*sorted(found)[: count - 1], *_lanczos(hessian, 1, "LA", start, tolerance)]
    return sorted(found, reverse=True)


def _lanczos(hessian: Hessian, count: int, which: str, start: Any, tolerance: float) -> list[float]:
    vectors = min(hessian.shape[0], max(2 * count + 1, 20))
    try:
        found = eigsh(
            hessian, count, which=which, v0=start, ncv=vectors, tol=tolerance, maxiter=50, return_eigenvectors=False
        )
    except ArpackNoConvergence as error:
        found = error.eigenvalues
        warn(
            f"{len(found)} of {count} eigenvalues were found in {hessian.used} products with the Hessian.",
            cause="The others lie too close together to be told apart.",
            fix=f"Ask for fewer: --eigenvalues {max(1, len(found))}",
        )
    return [float(value) for value in found]


def trace(hessian: Hessian, samples: int = 20, *, seed: int = 0) -> tuple[float, float | None]:
    """The trace and its standard error, by Hutchinson's estimate: the mean of zᵀHz over random signs z.

    Exact where H is diagonal. In general one sample has the variance 2·Σ_{i≠j} H_ij².

    Args:
        hessian: of the loss.
        samples: z, at least 2 for a standard error (None with one).
        seed: of the signs.
    """
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(hessian.shape[0], samples))
    found = np.einsum("is,is->s", signs, hessian @ signs)
    error = float(found.std(ddof=1) / np.sqrt(samples)) if samples > 1 else None
    return float(found.mean()), error
