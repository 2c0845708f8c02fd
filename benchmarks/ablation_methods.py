"""A policy that asks what the adapters of the lowest blocks have won so far, as methods for ``adafreeze compare``."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar

from peft import PeftModel
from scores_methods import ablated, drawn
from transformers import TrainerCallback

from adafreeze.decide import prefix_only
from adafreeze.decide.policy import PolicyInput
from adafreeze.methods import Setup
from adafreeze.methods.safe import Safe
from adafreeze.model import find_stacks, find_units
from adafreeze.model.backends import find_backend
from adafreeze.model.restore import keep_random_state


class Ablation(Safe):
    """Freezes the deepest prefix whose adapters, switched off, cost less than a part of what training has won.

    From step to step at which it measures, with r_k the rise of the loss on training samples when the adapters of the
    lowest k blocks are off, s_k its standard error over chunks, and r_B the same for all blocks, the deepest k with

        r_k + s_k  ≤  fraction · r_B

    Attributes:
        fraction: of r_B.
        at: shares of the run at which it measures.
        at_start: ``freeze_at_start``.
    """

    name = "ablation"
    fraction: ClassVar[float] = 0.1
    at: ClassVar[tuple[float, ...]] = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6)
    at_start: ClassVar[float] = 1 / 3

    def configure(self, setup: Setup) -> None:
        """Freeze by the policy."""
        self.watch = _Watch(setup.training.seed)
        rule = {"score": "random", "wait_for_loss": False, "warmup": 0.0, "ramp_end": max(self.at)}
        setup.freeze(**rule, policy=self._policy(), freeze_at_start=self.at_start)

    def prepare(self, model: PeftModel, setup: Setup) -> None:
        """See the model and its samples."""
        setup.callbacks.append(self.watch)

    def _policy(self) -> Any:
        left = list(self.at)

        @prefix_only
        def ablation(given: PolicyInput) -> list[str]:
            total = self.watch.total
            if not left or given.step < round(left[0] * total):
                return []
            while left and given.step >= round(left[0] * total):
                left.pop(0)
            names = [name for block in given.chains[0] for name in block]
            rises = self.watch.rises(names)
            won = mean(rises[-1])
            depth = 0
            for count, rise in enumerate(rises[:-1], start=1):
                if mean(rise) + stdev(rise) / sqrt(len(rise)) > self.fraction * won:
                    break
                depth = count
            self.watch.history.append(
                {"step": given.step, "won": won, "rises": [mean(rise) for rise in rises], "depth": depth}
            )
            return names[:depth]

        return ablation


class _Watch(TrainerCallback):
    def __init__(self, seed: int) -> None:
        self.seed, self.total = seed, 0
        self.history: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the samples."""
        self.model, self.total = kwargs["model"], state.max_steps
        stacks, self.backend = find_stacks(self.model), find_backend(self.model)
        self.units = find_units(self.model, stacks, self.backend)
        with keep_random_state():
            self.chunks = drawn(self.model, kwargs["train_dataloader"], self.seed)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what was measured."""
        Path(args.output_dir, "ablation.json").write_text(json.dumps(self.history) + "\n")

    def rises(self, names: list[str]) -> list[list[float]]:
        """By number of units off from the bottom, by chunk; the last is all units."""
        modules = [self.units[name].module for name in names]
        with keep_random_state():
            base, *lowest = ablated(self.model, self.backend, modules, self.chunks)
        return [[off - on for off, on in zip(losses, base, strict=True)] for losses in lowest]
