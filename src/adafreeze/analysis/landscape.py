"""Slices of the loss along random directions that are as large as the weights (Li et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .loss import Loss

__all__ = ["direction", "line", "plane"]


def direction(loss: Loss, seed: int) -> Tensor:
    """A Gaussian direction, filter-normalised: each row of a matrix gets the norm of the weights' row.

    d_i ← d_i · ‖w_i‖ / ‖d_i‖ for filters i. A filter is what makes one number of a matrix's output: a row of LoRA's A
    and of its B. A vector (DoRA's magnitude, VeRA's, a bias) is one filter. The draw depends on ``seed`` and shapes
    alone, so runs of the same adapters are cut along the same direction but for its scale.

    Returns:
        Flat, shape (size,), float64.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(loss.size, generator=generator, dtype=torch.float64)
    pieces, start = [], 0
    weights = loss.weights()
    for parameter in loss.parameters.values():
        end = start + parameter.numel()
        rows = len(parameter) if parameter.ndim > 1 else 1
        d, w = drawn[start:end].view(rows, -1), weights[start:end].view(rows, -1)
        pieces.append((d * (w.norm(dim=1) / d.norm(dim=1))[:, None]).flatten())
        start = end
    return torch.cat(pieces)


def line(loss: Loss, along: Tensor, steps: Sequence[float]) -> list[float]:
    """L(w + a·along) for each a in ``steps``."""
    return [loss.at(a * along) for a in steps]


def plane(loss: Loss, along: Tensor, across: Tensor, steps: Sequence[float]) -> list[list[float]]:
    """L(w + a·along + b·across): a row for each b in ``steps``, in it a value for each a."""
    return [line(loss, along, steps) if b == 0 else [loss.at(a * along + b * across) for a in steps] for b in steps]
