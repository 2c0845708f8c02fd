"""The freezer: a freeze that sticks, costs nothing any more, and can be undone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..model.backends import Backend
from ..model.patches import replaced_child, trainable_in_copies
from ..model.units import Unit
from .lorafa import LoraFAPairs

__all__ = ["Freezer"]


class Freezer:
    """Freezes units of a model, for good, until ``restore``.

    A frozen parameter has ``requires_grad=False``, no gradient (AdamW moves a parameter whose gradient is zero,
    by momentum and decay, and leaves one alone whose gradient is None) and no optimizer state. It stays in its
    param group: taking it out breaks schedulers and checkpoints. The adapter dropout of a frozen unit becomes
    Identity: a dropped copy of the input per target is kept for a backward pass that never comes.

    Args:
        units: by name.
        backend: holds a freeze through the adapter library's own switches.
        optimizer: whose state for frozen parameters is freed.
    """

    def __init__(
        self, units: Mapping[str, Unit], backend: Backend, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.units = units
        self.backend = backend
        self.optimizer: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the real one
        self.frozen: frozenset[str] = frozenset()
        self._dropouts: list[Callable[[], None]] = []
        self._slots: list[tuple[nn.Module, str]] = []
        self._pairs = LoraFAPairs.of(self.optimizer, self.parameters)

    def freeze(self, names: Iterable[str]) -> None:
        """Freeze the units ``names``; a shared parameter freezes with the last of its owners."""
        self.frozen = self.frozen | frozenset(names)
        self.backend.stop_rank_allocation()
        live = self._live()
        for name in self.frozen:
            for site in self.units[name].sites:
                self.backend.hold(site, live)
                for parent, key in self.backend.dropouts(site):
                    dropout = parent.get_submodule(key)
                    if not isinstance(dropout, nn.Identity):
                        self._dropouts.append(replaced_child(parent, key, nn.Identity()))
        for parameter in self.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
            if self.optimizer is not None:
                self.optimizer.state.pop(parameter, None)
        self._mark_slots()
        if self._pairs is not None:
            self._pairs.freeze()

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters that are frozen now, each once."""
        live = self._live()
        seen = set()
        for name in self.frozen:
            unit = self.units[name]
            for parameter in (
                *unit.parameters(),
                *(p for p in unit.shared_parameters() if id(p) not in live),
            ):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter

    def loose(self) -> list[nn.Parameter]:
        """Frozen parameters that somebody made trainable again, or gave a gradient."""
        return [p for p in self.parameters() if p.requires_grad or p.grad is not None]

    def audit(self) -> list[str]:
        """Freeze again what is ``loose``, and name the units it happened to."""
        loose = self.loose()
        for parameter in loose:
            parameter.requires_grad_(False)
            parameter.grad = None
        found = {id(parameter) for parameter in loose}
        return [
            name
            for name in sorted(self.frozen if found else ())
            if any(id(p) in found for p in (*self.units[name].parameters(), *self.units[name].shared_parameters()))
        ]

    def with_gradient(self, names: Iterable[str]) -> list[str]:
        """Those of these units that have a gradient now; to be asked between backward pass and optimizer step."""
        units = ((name, self.units[name]) for name in names)
        return [name for name, u in units if any(p.grad is not None for p in (*u.parameters(), *u.shared_parameters()))]

    def restore(self) -> None:
        """Make every frozen parameter trainable again and put every replaced module back."""
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        self.backend.release(site for name in self.frozen for site in self.units[name].sites)
        self.backend.resume_rank_allocation()
        if self._pairs is not None:
            self._pairs.restore()
        for undo in reversed(self._dropouts):
            undo()
        self._dropouts.clear()
        self.frozen = frozenset()
        self._mark_slots()

    def _mark_slots(self) -> None:
        """Let copies of the model have trainable adapters, as it had them before."""
        for module, name in self._slots:
            trainable_in_copies(module, name, False)
        live = self._live()
        self._slots = [
            slot
            for unit in (self.units[name] for name in sorted(self.frozen))
            for slot in (*unit.slots, *unit.shared)
            if id(slot[0]._parameters.get(slot[1])) not in live
        ]
        for module, name in self._slots:
            trainable_in_copies(module, name, True)

    def _live(self) -> set[int]:
        """Ids of the parameters of live units."""
        live = [unit for name, unit in self.units.items() if name not in self.frozen]
        return {id(parameter) for unit in live for parameter in (*unit.parameters(), *unit.shared_parameters())}
