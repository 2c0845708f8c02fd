"""All measurements of one minimum; slices of the loss along random directions (Li et al. 2018), sharpness (SAM)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..model import find_stacks
from .hessian import Hessian, eigenvalues, trace
from .loss import Loss

__all__ = ["Finding", "Settings", "block_norms", "direction", "line", "measure", "plane", "sharpness"]


@dataclass(frozen=True)
class Settings:
    """The effort of a measurement."""

    eigenvalues: int = 5  # number of Hessian eigenvalues, largest by magnitude
    trace_samples: int = 20  # random vectors for Hutchinson's estimate
    grid: int = 21  # points of the 1-D slice, odd; the 2-D slice has half as many along each side
    radius: float = 1.0  # of the slices, in norms of the weights
    seed: int = 0  # of directions and vectors

    def steps(self) -> list[float]:
        """The points of the 1-D slice."""
        return np.linspace(-self.radius, self.radius, self.grid).tolist()

    def plane_steps(self) -> list[float]:
        """The points along each side of the 2-D slice: an odd number, so that the weights are one of them."""
        return np.linspace(-self.radius, self.radius, max(3, self.grid // 2 | 1)).tolist()


@dataclass(frozen=True)
class Finding:
    """The measurements at one run's weights."""

    parameters: int  # number of parameters of the loss
    loss: float  # mean over the samples
    gradient_norm: float  # near 0 at a minimum
    # of the Hessian, largest by magnitude, in descending order; the first is the largest of all
    eigenvalues: list[float]
    trace: float  # of the Hessian
    trace_error: float | None  # its standard error; None for one random vector
    sharpness: float  # SAM's, ρ = 0.05
    adaptive_sharpness: float  # relative to the weights, ρ = 0.5
    norms: dict[str, float]  # of the weights, by block
    line: list[float]  # the 1-D slice at ``Settings.steps``
    plane: list[list[float]]  # the 2-D slice at ``Settings.plane_steps``, a row for each step across
    products: int  # Hessian-vector products computed


def measure(loss: Loss, settings: Settings) -> Finding:
    """Measure ``loss``; the same ``settings`` use the same directions for every run."""
    hessian = Hessian(loss)
    along, across = direction(loss, settings.seed), direction(loss, settings.seed + 1)
    mean, error = trace(hessian, settings.trace_samples, seed=settings.seed)
    return Finding(
        parameters=loss.size,
        loss=loss.value(),
        gradient_norm=float(loss.gradient().norm()),
        eigenvalues=eigenvalues(hessian, settings.eigenvalues, seed=settings.seed),
        trace=mean,
        trace_error=error,
        sharpness=sharpness(loss, 0.05),
        adaptive_sharpness=sharpness(loss, 0.5, adaptive=True),
        norms=block_norms(loss),
        line=line(loss, along, settings.steps()),
        plane=plane(loss, along, across, settings.plane_steps()),
        products=hessian.used,
    )


def block_norms(loss: Loss) -> dict[str, float]:
    """‖w‖₂ of the parameters in each block that has any, bottom to top; ``"other"``: outside the blocks."""
    names = [stack.block_name(i) for stack in find_stacks(loss.model) for i in range(len(stack))]
    squares: dict[str, list[float]] = {block: [] for block in (*names, "other")}
    for name, parameter in loss.parameters.items():
        block = next((block for block in names if name.startswith(f"{block}.")), "other")
        squares[block].append(float(parameter.detach().double().square().sum()))
    return {block: sum(found) ** 0.5 for block, found in squares.items() if found}


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
