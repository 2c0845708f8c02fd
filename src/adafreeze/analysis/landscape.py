"""The loss around the weights: slices along random directions (Li et al. 2018), and sharpness (SAM)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .loss import Loss

__all__ = ["direction", "line", "plane", "sharpness"]


def direction(loss: Loss, seed: int) -> Tensor:
    """A Gaussian direction, filter-normalized: d_i ← d_i · ‖w_i‖ / ‖d_i‖ for each filter i.

    A filter is a row of a matrix (LoRA's A and B), or a whole vector (DoRA's magnitude, VeRA's vectors, a bias). The
    draw depends only on ``seed`` and shapes, so it is the same up to scale for all runs with the same adapters.

    Returns:
        Shape (size,), float64.
    """
    drawn = loss.split(torch.randn(loss.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    pieces = []
    for d, w in zip(drawn, loss.split(loss.weights()), strict=True):
        rows = (len(w) if w.ndim > 1 else 1, -1)
        d, w = d.reshape(rows), w.reshape(rows)
        pieces.append((d * (w.norm(dim=1) / d.norm(dim=1))[:, None]).flatten())
    return torch.cat(pieces)


def line(loss: Loss, along: Tensor, steps: Sequence[float]) -> list[float]:
    """L(w + a·along) for each a in ``steps``."""
    return [loss.at(a * along) for a in steps]


def plane(loss: Loss, along: Tensor, across: Tensor, steps: Sequence[float]) -> list[list[float]]:
    """L(w + a·along + b·across): a row for each b in ``steps``, with a value for each a."""
    return [line(loss, along, steps) if b == 0 else [loss.at(a * along + b * across) for a in steps] for b in steps]


def sharpness(loss: Loss, rho: float = 0.05, *, adaptive: bool = False) -> float:
    """L(w + e) − L(w) for the e with ‖e‖ ≤ ρ in the direction of the gradient g, as in training with SAM; 0 if g = 0.

    e = ρ·g/‖g‖ (Foret et al. 2021, ρ = 0.05). Adaptive, which makes it invariant to rescaling weights between layers:
    ‖e/|w|‖ ≤ ρ, e = ρ·w²g/‖|w|·g‖ (Kwon et al. 2021, ρ = 0.5).
    """
    gradient = loss.gradient()
    scale = loss.weights().abs() if adaptive else 1.0
    norm = (scale * gradient).norm()
    if norm == 0:
        return 0.0
    return loss.at(rho * scale * scale * gradient / norm) - loss.value()
