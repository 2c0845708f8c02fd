"""Textbook CKA in float64, for tests: as the formulas stand, n×n Gram matrices throughout."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_cka(x: Tensor, y: Tensor) -> float:
    """‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) on column-centered X and Y (Kornblith et al. 2019, eq. 5)."""
    x, y = (m.double() - m.double().mean(0) for m in (x, y))
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def naive_debiased_cka(x: Tensor, y: Tensor) -> float:
    """HSIC₁(X, Y) / √(HSIC₁(X, X) HSIC₁(Y, Y)) with the unbiased HSIC (Song et al. 2012, eq. 5)."""

    def hsic(k: Tensor, m: Tensor) -> Tensor:
        n, one = len(k), torch.ones(len(k), dtype=torch.float64)
        k, m = k - torch.diag(k.diag()), m - torch.diag(m.diag())
        middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return (torch.trace(k @ m) + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))

    k, m = (a.double() @ a.double().T for a in (x, y))
    return float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())
