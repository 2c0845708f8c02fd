"""The freezer: freezes units for good, frees what they used, and can undo it all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..model.backends import Backend
from ..model.patches import replaced_child, trainable_in_copies
from ..model.units import Unit, frozen_parameters
from .optimizer import LoraFAPairs

__all__ = ["Freezer"]


class Freezer:
    """Freezes units of a model, for good, until ``restore``.

    A frozen parameter has ``requires_grad=False``, no gradient (AdamW moves a parameter whose gradient is zero, by
    momentum and decay, but not one whose gradient is None) and no optimizer state. It stays in its param group:
    removing it breaks schedulers and checkpoints. The adapter dropout of a frozen unit becomes Identity, because it
    would keep a dropped copy of the input per target for the backward pass.

    Args:
        units: by name.
        backend: keeps a freeze through the adapter library's own switches.
        optimizer: whose state for frozen parameters is freed.
    """

    def __init__(
        self, units: Mapping[str, Unit], backend: Backend, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.units = units
        self.backend = backend
        self.optimizer: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the real one
        self.frozen: frozenset[str] = frozenset()
        self._dropouts = ExitStack()
        self._slots: list[tuple[nn.Module, str]] = []
        self._pairs = LoraFAPairs.of(self.optimizer, self.parameters)

    def freeze(self, names: Iterable[str]) -> None:
        """Freeze the units ``names``; a shared parameter freezes with the last unit that uses it."""
        self.frozen = self.frozen | frozenset(names)
        sites = [site for name in self.frozen for site in self.units[name].sites]
        self.backend.keep_frozen(sites, self._live())
        for site in sites:
            for parent, key in self.backend.dropouts(site):
                if not isinstance(parent.get_submodule(key), nn.Identity):
                    self._dropouts.enter_context(replaced_child(parent, key, nn.Identity()))
        for parameter in self.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
            if self.optimizer is not None:
                self.optimizer.state.pop(parameter, None)
        self._mark_slots()
        if self._pairs is not None:
            self._pairs.freeze()

    def parameters(self) -> list[nn.Parameter]:
        """All frozen parameters, each once."""
        return frozen_parameters(self.units, self.frozen)

    def loose(self) -> list[nn.Parameter]:
        """Frozen parameters that other code made trainable again, or gave a gradient."""
        return [p for p in self.parameters() if p.requires_grad or p.grad is not None]

    def audit(self) -> list[str]:
        """Freeze ``loose`` parameters again, and return the names of their units."""
        loose = {id(parameter): parameter for parameter in self.loose()}
        for parameter in loose.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        units = ((name, self.units[name]) for name in sorted(self.frozen if loose else ()))
        return [name for name, unit in units if any(id(p) in loose for p in unit.all_parameters())]

    def with_gradient(self, names: Iterable[str]) -> list[str]:
        """Those of these units that have a gradient; call it between the backward pass and the optimizer step."""
        return [name for name in names if any(p.grad is not None for p in self.units[name].all_parameters())]

    def restore(self) -> None:
        """Make every frozen parameter trainable again and put every replaced module back."""
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        self.backend.release()
        if self._pairs is not None:
            self._pairs.restore()
        self._dropouts.close()
        self.frozen = frozenset()
        self._mark_slots()

    def _mark_slots(self) -> None:
        """Make frozen adapters trainable in copies of the model."""
        live = self._live()
        frozen = [slot for name in sorted(self.frozen) for slot in self.units[name].slots + self.units[name].shared]
        marked = [slot for slot in frozen if id(slot[0]._parameters.get(slot[1])) not in live]
        for slots, on in ((self._slots, False), (marked, True)):
            for module, name in slots:
                trainable_in_copies(module, name, on)
        self._slots = marked

    def _live(self) -> set[int]:
        """Ids of the parameters of live units."""
        return {id(p) for name, unit in self.units.items() if name not in self.frozen for p in unit.all_parameters()}
