"""Which library put adapters into a model."""

from __future__ import annotations

from torch import nn

from .adapters import AdapterHubBackend
from .base import Backend
from .peft import PeftBackend

__all__ = ["find_backend"]


def find_backend(model: nn.Module) -> Backend:
    """The backend of AdapterHub's ``adapters`` where that library initialised ``model``, else PEFT's.

    Raises:
        ModelError: there are no adapters, or they are of a kind that has no part in each block.
    """
    return AdapterHubBackend(model) if hasattr(model, "adapters_config") else PeftBackend(model)
