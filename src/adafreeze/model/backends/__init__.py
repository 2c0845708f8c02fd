"""Adapter libraries, each behind the same few functions."""

from .base import Backend
from .find import find_backend
from .peft import PeftBackend

__all__ = ["Backend", "PeftBackend", "find_backend"]
