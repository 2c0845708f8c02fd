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

    def look_at_gradients(self, step: int) -> None:
        """Between backward pass and optimizer step: nothing frozen moves; after a freeze, what is live learns.

        Raises:
            RunError: nothing learns any more.
        """
        self._freeze_again(step)
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
