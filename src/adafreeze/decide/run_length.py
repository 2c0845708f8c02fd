"""RunLength: where a run stands, in optimizer steps and samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["Progress", "RunLength"]


class Progress(NamedTuple):
    """Optimizer steps done, rows still to come on this rank, and rows of one epoch (None: unknown)."""

    step: int
    remaining: int
    epoch: int | None


class RunLength:
    """Counts the steps and rows of a run; estimates from them what the host does not state.

    A row is one entry of a batch. A sample may be several rows (DPO compares two), or a part of one (packing).

    Args:
        total_steps: optimizer steps of the whole run.
        samples_per_step: samples of one optimizer step on one rank; None: the average so far.
        samples_per_epoch: samples of one pass over the data, all ranks together; None if unknown.
        ranks: number of processes.

    Attributes:
        steps: optimizer steps done.
        rows: rows that the model got on this rank in training passes.
    """

    def __init__(
        self, total_steps: int, samples_per_step: int | None, samples_per_epoch: int | None, ranks: int
    ) -> None:
        self.total_steps, self.samples_per_step = total_steps, samples_per_step
        self.samples_per_epoch, self.ranks = samples_per_epoch, ranks
        self.steps = 0
        self.rows = 0
        # A resumed run may have another batch size. An average over all steps would be wrong for both parts.
        self._since = 0, 0  # steps and rows at the start of the present part
        self._before: int | None = None  # samples per step, until it is observed again

    @property
    def step_samples(self) -> int:
        """Samples of one optimizer step on this rank."""
        steps, rows = self._since
        return self.samples_per_step or (self.rows - rows) // max(1, self.steps - steps) or self._before or 1

    @property
    def rows_per_sample(self) -> float:
        """Rows that the model gets for one sample of the data; less than one if a sampler packs samples into a row."""
        steps, rows = self._since
        ratio = (self.rows - rows) / (max(1, self.steps - steps) * self.step_samples)
        # Between the two: batches that were not full.
        return ratio if 0 < ratio < 0.75 else max(1, round(ratio))

    @property
    def epoch_steps(self) -> int | None:
        """Optimizer steps of one pass over the data."""
        return None if self._rank_epoch is None else math.ceil(self._rank_epoch / self.step_samples)

    @property
    def progress(self) -> Progress:
        """Where the run stands, in rows on this rank."""
        rows = self.rows_per_sample
        remaining = round(max(0, self.total_steps - self.steps) * self.step_samples * rows)
        return Progress(self.steps, remaining, self._rank_epoch and round(self._rank_epoch * rows))

    @property
    def _rank_epoch(self) -> int | None:
        """Samples of one pass over the data on this rank."""
        return None if self.samples_per_epoch is None else -(-self.samples_per_epoch // self.ranks)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run compares itself with, as plain JSON values."""
        known = self.samples_per_step is not None or self.steps > self._since[0]
        return {
            "steps": self.steps,
            "rows": self.rows,
            "total_steps": self.total_steps,
            "samples_per_step": self.step_samples if known else self._before,
            "samples_per_epoch": self.samples_per_epoch,
            "ranks": self.ranks,
            "since": list(self._since),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Continue where ``state_dict`` was written. Returns, in words, what differs from the run that wrote it."""
        self.steps, self.rows = state["steps"], state["rows"]
        self._since, self._before = tuple(state["since"]), state["samples_per_step"]
        compared = [("steps", self.total_steps, state["total_steps"])]
        if self.samples_per_step is not None and self._before is not None:
            compared.append(("samples per step and process", self.samples_per_step, self._before))
        compared.append(("processes", self.ranks, state["ranks"]))
        changes = [f"{now} {what} now, {before} planned then" for what, now, before in compared if now != before]
        if changes:
            self._since = self.steps, self.rows
        return changes
