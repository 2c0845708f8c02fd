"""Outcome: what one run of a method on one task with one seed came to."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..costs import expected_ratios
from ..journal import read_journal

__all__ = ["Outcome", "outcome_of"]


@dataclass(frozen=True)
class Outcome:
    """Numbers of one run.

    Attributes:
        task, method, seed: which run.
        reason: why the method does not fit; None where it ran. All that follows is then empty.
        metrics: of the evaluation at the end, without ``eval_``.
        seconds: of training, measuring and evaluations during it included.
        cpu_seconds: of the process in that time; 0 where that was not written down.
        flops: counted, those of measuring included.
        peak_saved_bytes: the most that autograd kept of a micro-step.
        mean_saved_bytes: on average over micro-steps.
        steps: optimizer steps.
        epochs: passes over the data.
        blocks: of all stacks; 0 where nobody asked.
        units: names of what can freeze, bottom to top.
        freezes: (step, units frozen by then, blocks in the prefixes by then), one entry a freeze.
        cached: whether the prefix cache was used.
        settings: flags of the run, but for its folder.
        made_by: digest of the method's code and of what it took over from others; None where it was not written down.
    """

    task: str
    method: str
    seed: int
    reason: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    flops: float = 0.0
    peak_saved_bytes: float = 0.0
    mean_saved_bytes: float = 0.0
    steps: int = 0
    epochs: float = 0.0
    blocks: int = 0
    units: tuple[str, ...] = ()
    freezes: tuple[tuple[int, int, int], ...] = ()
    cached: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    made_by: str | None = None

    @property
    def frozen(self) -> int:
        """Units frozen at the end."""
        return self.freezes[-1][1] if self.freezes else 0

    def theory(self) -> tuple[float, float] | None:
        """Saved bytes and FLOPs against plain by arithmetic, for the freezes as they happened; None without blocks."""
        if not self.blocks or not self.steps:
            return None
        depths = [max((depth for at, _, depth in self.freezes if at <= step), default=0) for step in range(self.steps)]
        return expected_ratios(self.blocks, depths, self.steps / self.epochs if self.cached and self.epochs else None)

    def save(self, path: Path) -> None:
        """As JSON; whole or not at all."""
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")
        os.replace(draft, path)

    @classmethod
    def load(cls, path: Path) -> Outcome:
        """What ``save`` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**found, "units": tuple(found["units"]), "freezes": tuple(map(tuple, found["freezes"]))})
        except (TypeError, KeyError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no result of `adafreeze compare`: {error}") from error


def outcome_of(
    journal: Path, metrics: Mapping[str, Any], *, task: str, method: str, seed: int, settings: Mapping[str, Any]
) -> Outcome:
    """The outcome of a run that ended, from its journal and from what ``adafreeze train`` returned."""
    events = list(read_journal(journal))
    start: dict[str, Any] = next((event for event in events if event["event"] == "start"), {})
    frozen = [(e["step"], e["frozen"], sum(e["prefixes"].values())) for e in events if e["event"] in ("freeze", "thaw")]
    return Outcome(
        task=task,
        method=method,
        seed=seed,
        metrics={
            name.removeprefix("eval_"): float(value)
            for name, value in metrics.items()
            if name.startswith("eval_") and isinstance(value, (int, float)) and not _is_speed(name)
        },
        seconds=metrics["train_runtime"],
        cpu_seconds=metrics.get("train_cpu_seconds", 0.0),
        flops=metrics.get("train_flops", 0) + metrics.get("score_flops", 0),
        peak_saved_bytes=metrics.get("train_peak_saved_bytes", 0),
        mean_saved_bytes=metrics.get("train_mean_saved_bytes", 0),
        steps=next((event["step"] for event in reversed(events) if event["event"] == "done"), 0),
        epochs=metrics.get("epoch", 0),
        blocks=sum(start.get("stacks", {}).values()),
        units=tuple(start.get("units", ())),
        freezes=tuple(frozen),
        cached=any(event["event"] == "cache" for event in events),
        settings=settings,
    )


def _is_speed(name: str) -> bool:
    return name.endswith(("_runtime", "_per_second"))
