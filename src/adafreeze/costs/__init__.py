"""The counted (not timed) cost of a step: activation bytes and FLOPs."""

from .flops import CountFlops
from .memory import SavedBytes, StorageTracker
from .meter import Meter
from .theory import expected_ratios

__all__ = ["CountFlops", "Meter", "SavedBytes", "StorageTracker", "expected_ratios"]
