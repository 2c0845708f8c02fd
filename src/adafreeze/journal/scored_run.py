"""History: what a run found out about its blocks, read off its journal."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, RunError
from . import find_journal, read_journal

__all__ = ["History"]


class History:
    """What a journal says of the latest run in it, by block.

    Attributes:
        units: names of the blocks with adapters, in the model's order.
        scores: the last of each.
        frozen: optimizer steps after which each of those that are frozen froze.
        total_steps: that the run was to take.
        end: the step of the last event.
        closed: the run came to its end.
        task: that ``adafreeze train`` was given, or that of GLUE came to; None if the run was made by another script.
        settings: the flags of ``adafreeze train``; None if the run was made by another script.

    Raises:
        RunError: there are no scores, or not of all blocks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        events = list(read_journal(path))
        command: dict[str, Any] = next((event for event in reversed(events) if event.get("event") == "run"), {})
        self.task: str | None = command.get("task")
        self.settings: dict[str, Any] | None = command.get("settings")
        starts = [i for i, event in enumerate(events) if event.get("event") == "start" and "units" in event]
        if not starts:
            raise RunError(
                f"{path} holds no scores.",
                cause="The run measured none: --method none."
                if command.get("method") == "none"
                else "It is no journal of Safe, or ends before the run began.",
                fix="Train with --method safe, or SafeCallback(journal=...), and export that run.",
            )
        start, later = events[starts[-1]], events[starts[-1] + 1 :]
        # A resumed run may go on with other settings, or for longer.
        planned = next((event for event in reversed(later) if event.get("event") == "replan"), start)
        self.config: dict[str, Any] = planned["config"]
        self.total_steps: int = planned["total_steps"]
        self.units: list[str] = start["units"]
        self.frozen: dict[str, int] = {}
        measured: dict[str, float] = {}
        for event in later:
            if event.get("event") == "freeze" and event["step"] == 0:  # what nobody has trained has moved nothing
                measured.update(dict.fromkeys(event["units"], 0.0))
            if event.get("event") in ("measure", "freeze", "resume"):
                # Of a score that is not finite, or a unit frozen unmeasured, the one before stands.
                measured.update({n: s for n, s in event["scores"].items() if isinstance(s, (int, float))})
                self.frozen.update(dict.fromkeys(event.get("units", ()), event["step"]))
            if event.get("event") == "thaw":
                self.frozen = {name: step for name, step in self.frozen.items() if name not in event["units"]}
        self.end = max((event.get("step") or 0 for event in later), default=0)
        self.closed = any(event.get("event") == "close" for event in later)
        self._check(measured)
        self.scores = {name: measured[name] for name in self.units}

    @classmethod
    def of(cls, run: str | os.PathLike[str]) -> History:
        """Of the output folder of ``adafreeze train``, or of a journal."""
        return cls(find_journal(run, fix="adafreeze export-config path/to/journal.jsonl"))

    def _check(self, measured: Mapping[str, float]) -> None:
        if self.config.get("granularity") == "site":
            raise RunError(
                f'{self.path} is of a run with granularity="site".',
                cause="Its scores are of single layers, and what is exported picks whole blocks.",
                fix='SafeConfig(granularity="block"), which is the default, and export that run.',
            )
        missing = [name for name in self.units if name not in measured]
        if missing:
            raise RunError(
                f"{self.path} has no score for {len(missing)} of {len(self.units)} blocks, such as {missing[0]}.",
                cause=f"It ends at step {self.end} of {self.total_steps}, before they were measured, or "
                "measuring failed (then it holds events named measure_failed).",
                fix="Export a run that went on for longer.",
            )

    def share(self, name: str) -> float:
        """Of the total score."""
        return self.scores[name] / (sum(self.scores.values()) or 1.0)

    def kept(self, min_share: float | None) -> list[str]:
        """Blocks for the next run."""
        if min_share is None and self.config.get("dry_run"):
            raise RunError(
                f"{self.path} is of a dry run, in which nothing froze.",
                cause="Which blocks stay is read off what froze.",
                fix="--min_share 0.05, to pick them by their share of the score",
            )
        if min_share is None:
            found = [name for name in self.units if name not in self.frozen]
        else:
            found = [name for name in self.units if self.share(name) >= min_share]
        if not found:
            most = max(map(self.share, self.units))
            raise ConfigError(
                "All blocks froze." if min_share is None else f"No block has {min_share:.3g} of the score.",
                cause=f"None is left for the next run. The most of the score that one has is {most:.3g}.",
                fix=f"--min_share {most / 2:.2g}",
            )
        return found

    def notes(self) -> Iterator[str]:
        """What a reader of the table should know."""
        if not self.closed:
            yield f"The run ends at step {self.end} of {self.total_steps}: its scores and blocks are of then."
        if not self.frozen:
            yield "Nothing froze in this run."
        if unmeasured := sum(step == 0 for step in self.frozen.values()):
            yield f"{unmeasured} blocks were frozen before step 0 and never scored; freeze_at_start=0 scores all."
