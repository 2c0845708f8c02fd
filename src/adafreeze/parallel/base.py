"""Parallel: what a freeze changes for the library that distributes the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..model import Unit

__all__ = ["Parallel"]


class Parallel:
    """One process, or several without a library between them that a freeze affects.

    To support another library, add one file with a subclass, and one line in ``find.py``.

    Attributes:
        name: for messages and the journal.
        collective: a forward pass communicates, so all ranks must run the same passes, to the end.
        no_cache: why the prefix cache is not possible; None if it is.
        no_budget: why a memory budget is not possible; None if it is.
        no_offload: why weights cannot leave the device; None if they can.
        clears_gradients: gradients are gone before the optimizer step, where adafreeze would check them.
        hidden: what cannot be read from the model's parameters (``"weights"``, ``"gradients"``), and why.
    """

    name = "none"
    collective = False
    no_cache: str | None = None
    no_budget: str | None = None
    no_offload: str | None = None
    hidden: Mapping[str, str] = {}
    clears_gradients = False

    @classmethod
    def find(cls, model: nn.Module, optimizer: Any, units: Mapping[str, Unit]) -> Parallel | None:
        """An instance if this library distributes ``model``; see ``find_parallel``."""
        return cls()

    @property
    def extra_bytes(self) -> int:
        """Bytes on the device besides those of a step in one process."""
        return 0

    def after_freeze(self, frozen: Iterable[str]) -> None:
        """Call this between two optimizer steps with all frozen units, after a freeze and after a thaw."""

    def release(self) -> None:
        """Remove everything that adafreeze added; what is frozen stays frozen."""
