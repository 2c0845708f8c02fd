"""Watch: sees every training step from hooks; keeps frozen units frozen and checks that live ones learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..costs.memory import SavedBytes
from ..decide.schedule import Losses
from ..errors import WarnOnce
from ..freeze.optimizer import before_step
from ..measure import Scorer
from ..model.batch import arguments, loss_in, rows_of
from ..model.patches import forward_hook, forward_pre_hook
from .freezing import Freezing

__all__ = ["Watch"]

# With layer drop, this many steps in a row may skip every live block by chance.
MOST_SILENT = 16


class Watch:
    """Hooks on the model and its optimizer that see every training step.

    Before each forward pass: re-freezes what other code unfroze, and counts rows and tokens. After it: adds up the
    loss, and counts saved bytes once after each freeze. Before each optimizer step: checks live gradients, because they
    are already freed when step hooks run.

    Args:
        freezing: what is frozen, in which model, and its optimizer.

    Attributes:
        scorer: told of each backward pass; None where another rank measures.
        learning: units that have had a gradient. The others may never get one: blocks above the layer that a head
            reads, a vision tower in a run on texts. Freezing all of ``learning`` would end the training.
    """

    def __init__(self, freezing: Freezing) -> None:
        self.freezing = freezing
        self.model, self.length, self.journal = freezing.model, freezing.length, freezing.journal
        self.scorer: Scorer | None = None
        self.learning: set[str] = set()
        self._check_gradients = False
        self._silent = 0
        self._warn_once = WarnOnce()
        self._site = next(iter(freezing.freezer.units.values())).sites[0]
        self._active = freezing.freezer.backend.active(self._site)
        self._forwards = self._tokens = self._last_tokens = 0
        self._in_evaluation = False  # a pass with gradients was in evaluation mode
        self._losses = Losses()
        self._saved_per_token: float | None = None
        self._count_next = True
        self._counting: SavedBytes | None = None
        self._handles: list[Any] = [
            forward_pre_hook(self.model, self._enter),
            forward_hook(self.model, self._leave, always=True),
        ]
        if isinstance(freezing.freezer.optimizer, torch.optim.Optimizer):
            self._handles.append(before_step(freezing.freezer.optimizer, self._before_optimizer_step))

    @property
    def saved_bytes(self) -> float | None:
        """Bytes that autograd saves of an average micro-batch, by the last count; None before the first."""
        if self._saved_per_token is None or not self._forwards:
            return None
        return self._saved_per_token * self._tokens / self._forwards

    def take_losses(self) -> Losses:
        """The losses of training passes since the last call; none if the host computes them from the outputs."""
        losses, self._losses = self._losses, Losses()
        return _on_the_host(losses)

    def after_freeze(self, *, check_gradients: bool = True) -> None:
        """Count the saved bytes of the next training pass, and check its gradients."""
        self._count_next = True
        self._check_gradients = check_gradients and not self.freezing.parallel.clears_gradients

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain JSON values."""
        return {"losses": list(_on_the_host(self._losses)), "learning": sorted(self.learning)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was written."""
        self._losses = Losses(*state["losses"])
        self.learning = self.freezing.freezer.units.keys() & set(state["learning"])

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # Not compiled: torch.compile traces hooks along with the model, and counting has no place in a graph.
    @torch.compiler.disable
    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or not torch.is_grad_enabled():
            self._in_evaluation |= torch.is_grad_enabled()
            return
        self.freezing.training_begins()
        self.look()
        inputs = arguments(model, args, kwargs)
        ids = inputs.get("input_ids")
        rows = rows_of(inputs)
        self._last_tokens = ids.numel() if isinstance(ids, Tensor) else rows
        self.length.rows += rows
        self._tokens += self._last_tokens
        self._forwards += 1
        if self._count_next and self._last_tokens:
            self._count_next = False
            self._counting = SavedBytes(model)
            self._counting.__enter__()

    def look(self) -> None:
        """Re-freeze what other code unfroze, and follow what that changed."""
        if self._freeze_again() | self._adapters_switched():
            self.freezing.prefix.update()
            self.freezing.follow_prefix()

    @torch.compiler.disable
    def _leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if model.training and torch.is_grad_enabled() and (loss := loss_in(output)) is not None:
            value = loss.detach().float()
            number, total, squares = self._losses
            self._losses = Losses(number + 1, total + value, squares + value * value)
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self._saved_per_token = self._counting.total / self._last_tokens
            self._counting = None

    def _before_optimizer_step(self) -> None:
        if self.scorer is not None:
            self.scorer.listen()
        self._freeze_again()
        if self._in_evaluation and not self._forwards:
            self._warn_once(
                "evaluation mode",
                "The model trains in evaluation mode, in which nothing is skipped: no frozen prefix, and no cache.",
                fix="Call model.train() before training.",
            )
        if not self._learns():
            self.freezing.undo_all()

    def _learns(self) -> bool:
        """Record which units have gradients. False if none has after a freeze."""
        freezer, live = self.freezing.freezer, self.freezing.live
        before = len(self.learning)
        self.learning.update(freezer.with_gradient(live - self.learning))
        if not self._check_gradients:
            return True
        self._check_gradients = False
        some = len(self.learning) > before or freezer.with_gradient(live)
        if some or not live or self.freezing.something_else_trains():
            self._silent = 0
            return True
        self._silent += 1
        self._check_gradients = self.freezing.prefix.drops_layers and self._silent < MOST_SILENT
        return self._check_gradients

    def _freeze_again(self) -> bool:
        """Freeze again what other code made trainable; True if there was any."""
        freezer = self.freezing.freezer
        loose = freezer.loose()
        if not loose:
            return False
        kind, cause, fix = self._undone_by(loose)
        units = freezer.audit()
        some = f"{units[0]}{', ...' if units[1:] else ''}"
        # Once a kind: it may happen at each step of a long run.
        if self._warn_once(kind, f"{len(units)} frozen units ({some}) were frozen again after {cause}.", fix=fix):
            self.journal.write("refreeze", step=self.length.steps, units=units, by=kind)
        return True

    def _undone_by(self, loose: list[nn.Parameter]) -> tuple[str, str, str]:
        """What was called, as far as the flags show: a key for it, its description, and the fix."""
        freezer = self.freezing.freezer
        found = {id(parameter) for parameter in loose}
        names = [name for name, p in self.model.named_parameters() if id(p) in found]
        some = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if names[2:] else "")
        if not any(p.requires_grad for p in loose):
            return "grad", f".grad was assigned by hand ({some})", "Skip parameters that do not require gradients."
        if all(p.requires_grad for p in self.model.parameters()):
            return (
                "whole model",
                "requires_grad_(True) on the whole model, which also trains the base weights and ends the prefix",
                "for name, p in model.named_parameters(): p.requires_grad_('lora_' in name)  # your adapter's own name",
            )
        fix = "Ignore this if the call was meant for other parameters; safe.close() ends the freezing."
        sites = [site for name in freezer.frozen for site in freezer.units[name].sites]
        if len(loose) < sum(1 for _ in freezer.parameters()):
            return "parameters", f"requires_grad_(True) on {some}", fix
        if all(map(freezer.backend.keeps_frozen, sites)):  # PEFT's own switches would have kept the freeze
            return "adapters", f"requires_grad_(True) on all adapter parameters ({some})", fix
        return "peft", "set_adapter, enable_adapter_layers, or the end of a disable_adapter() on the model", fix

    def _adapters_switched(self) -> bool:
        """Whether other adapters are active than in the pass before."""
        active = self.freezing.freezer.backend.active(self._site)
        if active == self._active:
            return False
        before, self._active = self._active, active
        step = self.length.steps
        if self._warn_once(
            "adapters switched",
            f"The active adapters changed from {', '.join(before)} to {', '.join(active) or 'none'} at step {step}: "
            "units belong to the first ones, and blocks in which others train have their full backward pass.",
            fix="model.set_adapter(...) with the first ones restores the prefix.",
        ):
            self.journal.write("adapters", step=step, before=before, active=active)
        return True


def _on_the_host(losses: Losses) -> Losses:
    return Losses(losses.number, float(losses.total), float(losses.squares))
