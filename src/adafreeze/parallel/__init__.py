"""Freezing during a run under DDP, FSDP2 and DeepSpeed, and agreement between the processes."""

from .base import Parallel
from .find import find_parallel
from .ranks import Ranks

__all__ = ["Parallel", "Ranks", "find_parallel"]
