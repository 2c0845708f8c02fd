"""``Safe`` and its parts: the loop that measures, decides and freezes while a model trains."""

from .safe import Safe

__all__ = ["Safe"]
