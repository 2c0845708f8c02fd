"""What a freeze in mid-run means to DDP, FSDP2 and DeepSpeed, and what the processes of a run agree on."""

from .base import Parallel
from .find import find_parallel
from .ranks import Ranks

__all__ = ["Parallel", "Ranks", "find_parallel"]
