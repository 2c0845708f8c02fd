"""Measure: all that is known of one minimum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .hessian import Hessian, eigenvalues, trace
from .landscape import direction, line, plane
from .sharpness import block_norms, sharpness

if TYPE_CHECKING:
    from .loss import Loss

__all__ = ["Finding", "Settings", "measure"]

RHO, ADAPTIVE_RHO = 0.05, 0.5  # of the papers


@dataclass(frozen=True)
class Settings:
    """How closely one looks.

    Args:
        eigenvalues: of the Hessian, by magnitude.
        trace_samples: random vectors of Hutchinson's estimate.
        grid: points of the 1-D slice, odd; the 2-D slice has half as many along each side.
        radius: of the slices, in units of the weights.
        seed: of directions and vectors.
    """

    eigenvalues: int = 5
    trace_samples: int = 20
    grid: int = 21
    radius: float = 1.0
    seed: int = 0

    def steps(self) -> list[float]:
        """Where the 1-D slice is taken."""
        return np.linspace(-self.radius, self.radius, self.grid).tolist()

    def plane_steps(self) -> list[float]:
        """Along each side of the 2-D slice: an odd number, so that the weights themselves are in it."""
        return np.linspace(-self.radius, self.radius, max(3, self.grid // 2 | 1)).tolist()


@dataclass(frozen=True)
class Finding:
    """What was measured at one run's weights.

    Attributes:
        parameters: how many the loss was taken as a function of.
        loss: mean over the samples.
        gradient_norm: of it: near 0 at a minimum.
        eigenvalues: of the Hessian, the largest by magnitude, in falling order; the first is the largest of all.
        trace: of the Hessian.
        trace_error: its standard error; None of one random vector.
        sharpness: SAM's, with ρ = 0.05.
        adaptive_sharpness: in units of the weights, with ρ = 0.5.
        norms: of the weights, by block.
        line: the 1-D slice at ``Settings.steps``.
        plane: the 2-D slice at ``Settings.plane_steps``, a row for each step across.
        products: with the Hessian, that it took.
    """

    parameters: int
    loss: float
    gradient_norm: float
    eigenvalues: list[float]
    trace: float
    trace_error: float | None
    sharpness: float
    adaptive_sharpness: float
    norms: dict[str, float]
    line: list[float]
    plane: list[list[float]]
    products: int


def measure(loss: Loss, settings: Settings) -> Finding:
    """Look at ``loss`` from all sides; the same ``settings`` cut every run the same way."""
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
        sharpness=sharpness(loss, RHO),
        adaptive_sharpness=sharpness(loss, ADAPTIVE_RHO, adaptive=True),
        norms=block_norms(loss),
        line=line(loss, along, settings.steps()),
        plane=plane(loss, along, across, settings.plane_steps()),
        products=hessian.used,
    )
