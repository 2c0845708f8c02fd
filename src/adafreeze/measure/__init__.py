"""The probe, how it is drawn, and the scorer that runs it."""

from .probe import Probe
from .scorer import Scorer

__all__ = ["Probe", "Scorer"]
