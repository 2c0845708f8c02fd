"""Parallel: what a freeze in mid-run means to whatever spreads a model over processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ["Parallel"]


class Parallel:
    """One process, or several with nothing between them that would notice a freeze.

    Attributes:
        name: for messages and the journal.
        collective: a forward pass sends something, so all ranks must make the same passes, from end to end.
        no_cache: why there can be no prefix cache; None if there can.
        no_budget: why there can be no memory budget; None if there can.
        clears_gradients: they are gone before the optimizer's step, where one could look at them.
        hidden: what cannot be read off the model's parameters (``"weights"``, ``"gradients"``), and why.
    """

    name = "none"
    collective = False
    no_cache: str | None = None
    no_budget: str | None = None
    hidden: Mapping[str, str] = {}
    clears_gradients = False

    @property
    def extra_bytes(self) -> int:
        """Bytes that it holds on the device beside what the step of one process holds."""
        return 0

    def after_freeze(self, frozen: Iterable[str]) -> None:
        """To be called between two optimizer steps, with all units that are frozen now; also when some thawed."""

    def release(self) -> None:
        """Leave it as it was, but for what trains."""
