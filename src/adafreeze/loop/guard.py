"""Guard: sees to it that what is frozen stays frozen, and that what is live still learns."""

from __future__ import annotations

from torch import nn

from ..errors import warn
from ..freeze import Freezer
from ..journal import Journal

__all__ = ["Guard"]

# With layer drop, so many steps in a row may leave out every live block by chance.
MOST_SILENT = 16


class Guard:
    """Looks at the flags before each training pass, and at the gradients after a freeze.

    Args:
        model: the module that the host calls.
        freezer: knows what is frozen.
        journal: of the run.
        drops_layers: the model leaves out blocks by chance in training.

    Attributes:
        check_gradients: look at the gradients before the next optimizer step.
        learning: units that have had a gradient in some step. The others may never get one: blocks above what a head
            reads, a vision tower in a run on texts. Freezing all that learn would end the training.
    """

    def __init__(self, model: nn.Module, freezer: Freezer, journal: Journal, *, drops_layers: bool = False) -> None:
        self.model = model
        self.freezer = freezer
        self.journal = journal
        self.drops_layers = drops_layers
        self.check_gradients = False
        self.learning: set[str] = set()
        self._silent = 0
        self._warned: set[str] = set()
        self._site = next(iter(freezer.units.values())).sites[0]
        self._active = freezer.backend.active(self._site)

    def audit(self, step: int) -> bool:
        """Before a training pass: freeze again what somebody made trainable; True if what trains may have changed."""
        return bool(self._freeze_again(step)) | self._adapters_switched(step)

    def _freeze_again(self, step: int) -> list[str]:
        """The units that were frozen again."""
        loose = self.freezer.loose()
        if not loose:
            return []
        kind, cause, fix = self._undone_by(loose)
        units = self.freezer.audit()
        if kind not in self._warned:  # it may go on at each step of a long run
            self.journal.write("refreeze", step=step, units=units, by=kind)
        what = "had been given gradients" if kind == "grad" else "had been made trainable again"
        self.warn_once(
            kind,
            f"{len(units)} frozen units {what} ({units[0]}{', ...' if units[1:] else ''}) and were frozen again.",
            cause=cause,
            fix=fix,
        )
        return units

    def _undone_by(self, loose: list[nn.Parameter]) -> tuple[str, str, str]:
        """What was called, as far as the flags that it left behind tell: a word for it, cause and fix."""
        found = {id(parameter) for parameter in loose}
        names = [name for name, p in self.model.named_parameters() if id(p) in found]
        some = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if names[2:] else "")
        if not any(p.requires_grad for p in loose):
            return "grad", f".grad was assigned by hand: {some}.", "Skip the parameters that do not require gradients."
        if all(p.requires_grad for p in self.model.parameters()):
            return (
                "whole model",
                "requires_grad_(True) on the whole model. Its base weights are trainable now too: nothing is left of "
                "the frozen prefix.",
                "for name, p in model.named_parameters(): p.requires_grad_('lora_' in name)  # your adapter's own name",
            )
        fix = "Nothing to do if that was meant for something else; call safe.close() to end the freezing."
        held = all(self.freezer.backend.holds(s) for n in self.freezer.frozen for s in self.freezer.units[n].sites)
        if len(loose) < sum(1 for _ in self.freezer.parameters()):
            return "parameters", f"requires_grad_(True) on {some}.", fix
        if held:  # whatever PEFT itself switches on keeps the freeze
            return "adapters", f"requires_grad_(True) on all adapter parameters: {some}.", fix
        return "peft", "set_adapter, enable_adapter_layers, or the end of a disable_adapter() on the model.", fix

    def _adapters_switched(self, step: int) -> bool:
        active = self.freezer.backend.active(self._site)
        if active == self._active:
            return False
        before, self._active = self._active, active
        if "adapters switched" not in self._warned:
            self.journal.write("adapters", step=step, before=before, active=active)
        self.warn_once(
            "adapters switched",
            f"The active adapters changed from {', '.join(before)} to {', '.join(active) or 'none'} at step {step}.",
            cause="set_adapter was called on the model. Units are of the adapters that were active at the start; while "
            "others train in the frozen blocks, these have their full backward pass.",
            fix="Nothing to do if that was meant; model.set_adapter(...) with the first ones brings the prefix back.",
        )
        return True

    def look_at_gradients(self, step: int) -> bool:
        """Between backward pass and optimizer step: freeze again what came loose, and see which units learn.

        Returns:
            False where nothing learns any more after a freeze.
        """
        self._freeze_again(step)
        live = self.freezer.units.keys() - self.freezer.frozen
        before = len(self.learning)
        self.learning.update(self.freezer.with_gradient(live - self.learning))
        if not self.check_gradients:
            return True
        self.check_gradients = False
        some = len(self.learning) > before or self.freezer.with_gradient(live)
        if some or not live or self.something_else_trains():
            self._silent = 0
            return True
        self._silent += 1
        self.check_gradients = self.drops_layers and self._silent < MOST_SILENT
        return self.check_gradients

    def something_else_trains(self) -> bool:
        """Whether any parameter outside the units is trainable."""
        units = self.freezer.units.values()
        owned = {id(p) for unit in units for p in (*unit.parameters(), *unit.shared_parameters())}
        return any(p.requires_grad and id(p) not in owned for p in self.model.parameters())

    def warn_once(self, key: str, fact: str, *, fix: str, cause: str | None = None) -> None:
        """Warn, unless the same was warned of before."""
        if key not in self._warned:
            self._warned.add(key)
            warn(fact, cause=cause, fix=fix, stacklevel=4)
