"""The table of adapter libraries."""

from __future__ import annotations

from torch import nn

from .adapters import AdapterHubBackend
from .base import Backend
from .peft import PeftBackend

__all__ = ["find_backend"]

BACKENDS: tuple[type[Backend], ...] = (
    AdapterHubBackend,
    PeftBackend,  # the last: its error is the one for a model without adapters
)


def find_backend(model: nn.Module) -> Backend:
    """The backend for the library that adapted ``model``.

    Raises:
        ModelError: there are no adapters, or their weights are not in the blocks.
    """
    return next((backend for backend in BACKENDS if backend.matches(model)), BACKENDS[-1])(model)
