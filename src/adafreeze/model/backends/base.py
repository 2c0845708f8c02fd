"""Backend: what is asked of an adapter library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from ...errors import ModelError

__all__ = ["Backend"]


class Backend(Protocol):
    """The adapters that one library put into a model."""

    def sites(self, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The outermost adapted modules in ``block`` with their names in it; each one's output is adapted."""

    def adapters_off(self, within: nn.Module | None = None) -> AbstractContextManager[None]:
        """Run ``within`` (default: the model) as pre-trained, and leave no flag otherwise than it was."""

    def any_merged(self) -> bool:
        """Whether an adapter is merged into its base weight now (its forward would unmerge it: rounding)."""

    def settings(self, site: nn.Module) -> tuple[Any, ...]:
        """What decides what ``site`` computes, but for its weights: adapters on, their scaling, merged or not."""

    def described(self) -> list[str]:
        """The settings of all adapters as text, the same in every process."""

    def why_frozen(self) -> ModelError:
        """What to raise where adapters stand in the blocks and none of them trains."""

    def remedy(self, name: str) -> str:
        """What to change so that the parameter ``name``, which belongs to no unit, does not train."""

    def merges(self, block: nn.Module, notice: Callable[[], None]) -> Iterator[AbstractContextManager[None]]:
        """Contexts in which ``notice`` is called before an adapter of ``block`` is merged into its base weight."""

    def hold(self, site: nn.Module, live: set[int]) -> None:
        """Tell the library to keep all of ``site`` frozen, if it can, but for parameters whose id is in ``live``."""

    def holds(self, site: nn.Module) -> bool:
        """Whether the library itself keeps what ``hold`` told it to."""

    def release(self, sites: Iterable[nn.Module]) -> None:
        """Undo ``hold``."""

    def active(self, site: nn.Module) -> tuple[str, ...]:
        """Names of the adapters that are active at ``site``."""

    def dropouts(self, site: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        """The adapter dropouts of ``site``: (parent, name), each a child module that may become Identity."""

    @property
    def moves_ranks(self) -> bool:
        """Whether there is something to stop."""

    def stop_rank_allocation(self) -> None:
        """End whatever rewrites adapters across layers in mid-run."""

    def resume_rank_allocation(self) -> None:
        """Undo ``stop_rank_allocation``."""
