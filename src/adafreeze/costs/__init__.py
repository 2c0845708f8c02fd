"""What a step costs, counted and not timed: activation bytes and FLOPs."""

from .flops import CountFlops
from .memory import SavedBytes, StorageTracker
from .meter import Meter
from .theory import expected_ratios

__all__ = ["CountFlops", "Meter", "SavedBytes", "StorageTracker", "expected_ratios"]
