"""Adapter libraries, each behind the same few functions."""

from .peft import PeftBackend

__all__ = ["PeftBackend"]
