"""Sharpness as SAM has it, and the norms of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..model import find_stacks

if TYPE_CHECKING:
    from .loss import Loss

__all__ = ["block_norms", "sharpness"]


def sharpness(loss: Loss, rho: float = 0.05, *, adaptive: bool = False) -> float:
    """Max over ‖e‖ ≤ ρ of L(w + e) − L(w), the maximum taken where the gradient points, as in training with SAM.

    e = ρ·g/‖g‖ (Foret et al. 2021); adaptive, so that it does not change when weights are rescaled between layers:
    ‖e/|w|‖ ≤ ρ, e = ρ·w²g/‖|w|·g‖ (Kwon et al. 2021). Where the gradient is 0 it is 0.

    Args:
        loss: L at w.
        rho: ρ; the two papers' own are 0.05 and, adaptive, 0.5.
        adaptive: in units of the weights.
    """
    ascent = loss.gradient()
    scale = loss.weights().abs() if adaptive else 1.0
    norm = (scale * ascent).norm()
    if norm == 0:
        return 0.0
    return loss.at(rho * scale * scale * ascent / norm) - loss.value()


def block_norms(loss: Loss) -> dict[str, float]:
    """‖w‖₂ of the parameters in each block that holds any, bottom to top; ``"other"``: of those outside."""
    names = [f"{stack.block_name(i)}" for stack in find_stacks(loss.model) for i in range(len(stack))]
    squares: dict[str, float] = dict.fromkeys([*names, "other"], 0.0)
    held = set()
    for name, parameter in loss.parameters.items():
        block = next((block for block in names if name.startswith(f"{block}.")), "other")
        squares[block] += float(parameter.detach().double().square().sum())
        held.add(block)
    return {block: square**0.5 for block, square in squares.items() if block in held}
