"""What people type: ``adafreeze COMMAND ...``."""

from .main import main

__all__ = ["main"]
