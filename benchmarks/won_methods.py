"""A policy that follows the training loss alone, as a method for ``adafreeze compare``."""

from __future__ import annotations

from typing import Any, ClassVar

from peft import PeftModel
from transformers import TrainerCallback

from adafreeze.decide import prefix_only
from adafreeze.decide.policy import PolicyInput
from adafreeze.methods import Setup
from adafreeze.methods.safe import Safe


class Won(Safe):
    """A third at the start; half, two thirds and five sixths at 0.2, 0.5 and 0.6 of the run, once the loss has fallen.

    Attributes:
        least: the part of its first value that the logged training loss must have lost.
        stages: (share of the run, share of the blocks).
    """

    name = "won"
    least: ClassVar[float] = 0.15
    stages: ClassVar[tuple[tuple[float, float], ...]] = ((0.2, 1 / 2), (0.5, 2 / 3), (0.6, 5 / 6))

    def configure(self, setup: Setup) -> None:
        """Freeze by the policy."""
        self.watch = _Watch()
        rule = {"score": "random", "wait_for_loss": False, "warmup": 0.0, "ramp_end": 0.75}
        setup.freeze(**rule, policy=self._policy(), freeze_at_start=1 / 3)

    def prepare(self, model: PeftModel, setup: Setup) -> None:
        """See the losses."""
        setup.callbacks.append(self.watch)

    def _policy(self) -> Any:
        @prefix_only
        def won(given: PolicyInput) -> list[str]:
            losses = [entry["loss"] for entry in self.watch.state.log_history if "loss" in entry]
            if len(losses) < 2 or losses[-1] > (1 - self.least) * losses[0]:
                return []
            blocks = given.chains[0]
            reached = [share for at, share in self.stages if given.step >= at * self.watch.state.max_steps]
            count = int(max(reached, default=0.0) * len(blocks) + 1e-9)
            return [name for block in blocks[:count] for name in block]

        return won


class _Watch(TrainerCallback):
    state: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the trainer's state."""
        self.state = state
