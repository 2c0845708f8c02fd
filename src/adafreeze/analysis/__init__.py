"""How flat a minimum is: Hessian spectrum and trace, sharpness, weight norms, slices of the loss."""

from .figure import draw
from .hessian import Hessian, eigenvalues, trace
from .landscape import direction, line, plane
from .loss import Loss, adapter_parameters, predictions
from .measure import Finding, Settings, measure
from .sharpness import block_norms, sharpness

__all__ = [
    # what is looked at
    "Loss",
    "adapter_parameters",
    "predictions",
    # curvature
    "Hessian",
    "eigenvalues",
    "trace",
    "sharpness",
    "block_norms",
    # the loss around the weights
    "direction",
    "line",
    "plane",
    # all of it
    "Finding",
    "Settings",
    "measure",
    "draw",
]
