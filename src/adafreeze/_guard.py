"""Guard: sees to it that what is frozen stays frozen, and that what is live still learns."""

from __future__ import annotations

from torch import nn

from .errors import RunError, warn
from .freeze import Freezer
from .journal import Journal

__all__ = ["Guard"]


class Guard:
    """Looks at the flags before each training pass, and at the gradients after a freeze.

    Args:
        model: the module that the host calls.
        freezer: knows what is frozen.
        journal: of the run.

    Attributes:
        check_gradients: look at the gradients before the next optimizer step.
    """

    def __init__(self, model: nn.Module, freezer: Freezer, journal: Journal) -> None:
        self.model = model
        self.freezer = freezer
        self.journal = journal
        self.check_gradients = False
        self._warned: set[str] = set()

    def audit(self, step: int) -> list[str]:
        """Freeze again what somebody made trainable; returns the units it happened to."""
        loose = self.freezer.audit()
        if loose:
            self.journal.write("refreeze", step=step, units=loose)
            self.warn_once(
                "loose",
                f"{len(loose)} frozen units had been made trainable again ({loose[0]}, ...) and were frozen again.",
                cause="Something called set_adapter, enable_adapter_layers or requires_grad_ on the model.",
                fix="Nothing to do if that was meant for another adapter; call safe.close() to end the freezing.",
            )
        return loose

    def look_at_gradients(self, step: int) -> None:
        """Between backward pass and optimizer step, once after each freeze.

        Raises:
            RunError: nothing learns any more.
        """
        if not self.check_gradients:
            return
        self.check_gradients = False
        missing = self.freezer.live_without_gradient()
        live = len(self.freezer.units) - len(self.freezer.frozen)
        if missing and len(missing) == live and not self.something_else_trains():
            raise RunError(
                f"After the freeze at step {step} no live unit has a gradient.",
                cause="The graph was cut above the frozen prefix, by reentrant checkpointing or a detach.",
                fix='Use gradient_checkpointing_kwargs={"use_reentrant": False}.',
            )
        if missing:
            self.warn_once(
                "gradient",
                f"{len(missing)} of {live} live units have no gradient after a freeze: {missing[0]}, ...",
                cause="Their block was skipped in this step (layer drop, unused experts), or the graph was cut.",
                fix="If it is not layer drop, please report it with the output of python -m adafreeze.env.",
            )

    def something_else_trains(self) -> bool:
        """Whether any parameter outside the units is trainable."""
        units = self.freezer.units.values()
        owned = {id(p) for unit in units for p in (*unit.parameters(), *unit.shared_parameters())}
        return any(p.requires_grad and id(p) not in owned for p in self.model.parameters())

    def warn_once(self, key: str, fact: str, *, cause: str, fix: str) -> None:
        """Warn, unless the same was warned of before."""
        if key not in self._warned:
            self._warned.add(key)
            warn(fact, cause=cause, fix=fix, stacklevel=4)
