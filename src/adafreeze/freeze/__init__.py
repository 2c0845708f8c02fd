"""What a freeze does to a model; the only code that touches a module for longer than one forward pass."""

from .freezer import Freezer
from .prefix import Prefix

__all__ = ["Freezer", "Prefix"]
