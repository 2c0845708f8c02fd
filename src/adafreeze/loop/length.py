"""RunLength: how many steps a run has, and how many samples one of them takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..cache import Progress

__all__ = ["RunLength"]


class RunLength:
    """The length of a run as its host tells it; what it does not tell is observed.

    Wherever ``steps`` and ``samples`` are asked for, they are the optimizer steps done and the rows that the model got
    in them on this rank.

    Args:
        total_steps: optimizer steps of the whole run.
        samples_per_step: samples of one optimizer step on one rank; None: the average so far.
        samples_per_epoch: samples of one pass over the data, all ranks together; None where it is not known.
        ranks: processes of the run.
    """

    def __init__(
        self, total_steps: int, samples_per_step: int | None, samples_per_epoch: int | None, ranks: int
    ) -> None:
        self.total_steps, self.samples_per_step = total_steps, samples_per_step
        self.samples_per_epoch, self.ranks = samples_per_epoch, ranks
        # A resumed run may have another batch size, and then the average over all steps is of neither.
        self._since = 0, 0  # steps and samples when the present one began
        self._before: int | None = None  # samples of a step until it is observed again

    def step_samples(self, steps: int, samples: int) -> int:
        """Samples of one optimizer step on this rank."""
        first, seen = self._since
        return self.samples_per_step or (samples - seen) // max(1, steps - first) or self._before or 1

    def rows_per_sample(self, steps: int, samples: int) -> int:
        """Rows that the model gets for one sample of the data: two for a pair that DPO compares."""
        first, seen = self._since
        return max(1, round((samples - seen) / (max(1, steps - first) * self.step_samples(steps, samples))))

    def epoch_steps(self, steps: int, samples: int) -> int | None:
        """Optimizer steps of one pass over the data."""
        return None if self._rank_epoch is None else math.ceil(self._rank_epoch / self.step_samples(steps, samples))

    def progress(self, steps: int, samples: int) -> Progress:
        """Where the run stands, in rows on this rank."""
        rows = self.rows_per_sample(steps, samples)
        remaining = max(0, self.total_steps - steps) * self.step_samples(steps, samples) * rows
        return Progress(steps, remaining, self._rank_epoch and self._rank_epoch * rows)

    @property
    def _rank_epoch(self) -> int | None:
        """Samples of one pass over the data on this rank."""
        return None if self.samples_per_epoch is None else -(-self.samples_per_epoch // self.ranks)

    def state_dict(self, steps: int, samples: int) -> dict[str, Any]:
        """What a resumed run compares itself with, as plain JSON values."""
        known = self.samples_per_step is not None or steps > self._since[0]
        return {
            "total_steps": self.total_steps,
            "samples_per_step": self.step_samples(steps, samples) if known else self._before,
            "samples_per_epoch": self.samples_per_epoch,
            "ranks": self.ranks,
            "since": list(self._since),
        }

    def load_state_dict(self, state: Mapping[str, Any], steps: int, samples: int) -> list[str]:
        """Take up what ``state_dict`` wrote, and say in words what is not as it was planned then."""
        self._since, self._before = tuple(state["since"]), state["samples_per_step"]
        told = self.samples_per_step is not None and self._before is not None
        found = [
            f"{now} {what} now, {before} planned then"
            for what, now, before, counts in (
                ("steps", self.total_steps, state["total_steps"], True),
                ("samples a step and process", self.samples_per_step, self._before, told),
                ("processes", self.ranks, state["ranks"], True),
            )
            if counts and now != before
        ]
        if found:
            self._since = steps, samples
        return found
