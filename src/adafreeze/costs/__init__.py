"""What a step costs, counted and not timed: activation bytes and FLOPs."""

from .flops import CountFlops
from .memory import SavedBytes, StorageTracker
from .meter import Meter
from .rehearse import Rehearsal, rehearse
from .theory import expected_ratios

__all__ = ["CountFlops", "Meter", "Rehearsal", "SavedBytes", "StorageTracker", "expected_ratios", "rehearse"]
