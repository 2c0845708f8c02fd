"""The prefix cache: what the frozen prefix makes of a sample is a constant, so it is computed once."""

from .identity import Identity
from .lookup import PrefixCache
from .tiers import DiskTier, RamTier, Tier

__all__ = ["DiskTier", "Identity", "PrefixCache", "RamTier", "Tier"]
