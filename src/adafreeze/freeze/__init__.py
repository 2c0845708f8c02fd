"""What a freeze does to a model; only code here changes a module for longer than one forward pass."""

from .freezer import Freezer
from .prefix import Prefix

__all__ = ["Freezer", "Prefix"]
