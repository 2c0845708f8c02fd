"""How flat a minimum is: Hessian spectrum and trace, sharpness, weight norms, slices of the loss."""

from .figure import draw
from .hessian import Hessian, eigenvalues, trace
from .loss import Loss, adapter_parameters, predictions
from .measure import Finding, Settings, block_norms, direction, line, measure, plane, sharpness

__all__ = [
    # a loss as a function of parameters
    "Loss",
    "adapter_parameters",
    "predictions",
    # curvature
    "Hessian",
    "eigenvalues",
    "trace",
    # the loss around the weights
    "direction",
    "line",
    "plane",
    "sharpness",
    # all measurements
    "Finding",
    "Settings",
    "block_norms",
    "draw",
    "measure",
]
