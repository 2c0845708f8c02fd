"""Start deep, and thaw if little is learned, as a method for ``adafreeze compare``."""

from __future__ import annotations

from typing import Any, ClassVar

from peft import PeftModel
from transformers import TrainerCallback

from adafreeze import Safe as Run
from adafreeze.methods import Setup
from adafreeze.methods.safe import Safe


class Thaw(Safe):
    """Half of the blocks at the start; a third from 0.2 of the run on if the training loss has not fallen by a fifth.

    Attributes:
        least: the part of its first value that the logged training loss must have lost.
        at: the share of the run after which it must have.
        kept: the share of the blocks that stays frozen otherwise.
    """

    name = "thaw"
    fields: ClassVar[dict[str, Any]] = {"freeze_at_start": 0.5}
    least: ClassVar[float] = 0.2
    at: ClassVar[float] = 0.2
    kept: ClassVar[float] = 1 / 3

    def prepare(self, model: PeftModel, setup: Setup) -> None:
        """See the losses, and the run that freezes."""
        thaw = _Thaw(self)
        Run.on_made.append(thaw.found)
        setup.callbacks.append(thaw)


class _Thaw(TrainerCallback):
    def __init__(self, method: Thaw) -> None:
        self.method, self.run = method, None

    def found(self, run: Run, _: Any) -> None:
        self.run = run
        Run.on_made.remove(self.found)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide once."""
        if self.run is None or state.global_step < self.method.at * state.max_steps:
            return
        run, self.run = self.run, None
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        if losses[-1] > (1 - self.method.least) * losses[0]:
            blocks = run.decider.chains[0]
            names = {name for block in blocks[int(self.method.kept * len(blocks) + 1e-9) :] for name in block}
            run.freezing.thaw(run.frozen & names)
