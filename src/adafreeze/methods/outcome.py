"""Outcome: the result of one method on one task with one seed."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..costs import expected_ratios
from ..journal import is_score, read_history

__all__ = ["Outcome", "outcome_of"]


@dataclass(frozen=True)
class Outcome:
    """Numbers of one run.

    Attributes:
        task, method, seed: which run.
        reason: why the method could not run; the numbers are then empty.
        metrics: of the final evaluation, without the prefix ``eval_``.
        seconds: of training, with scoring and the evaluations during training.
        cpu_seconds: CPU time of the process meanwhile.
        flops: counted, with scoring.
        peak_saved_bytes, mean_saved_bytes: saved by autograd in a micro-step.
        steps: optimizer steps.
        epochs: passes over the data.
        blocks: of all stacks; 0 for runs without SAFE.
        units: names, bottom to top.
        freezes: (step, units frozen from then on, blocks in the prefixes from then on) per freeze.
        cached: whether the prefix cache was used.
        settings: flags of the run without its folder.
        made_by: digest of the method's code and of the results that it builds on.
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
    made_by: str = ""

    @property
    def frozen(self) -> int:
        """Units frozen at the end."""
        return self.freezes[-1][1] if self.freezes else 0

    def theory(self) -> tuple[float, float] | None:
        """Expected saved bytes and FLOPs relative to plain, for the freezes as they happened; None without blocks."""
        if not self.blocks or not self.steps:
            return None
        depths = [max((depth for at, _, depth in self.freezes if at <= step), default=0) for step in range(self.steps)]
        return expected_ratios(self.blocks, depths, self.steps / self.epochs if self.cached and self.epochs else None)

    def save(self, path: Path) -> None:
        """Write JSON; a crash leaves no partial file."""
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")
        os.replace(draft, path)

    @classmethod
    def load(cls, path: Path) -> Outcome:
        """Read what ``save`` wrote.

        Raises:
            ValueError: the file contains something else.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if missing := [f.name for f in dataclasses.fields(cls) if f.name not in found]:
                raise ValueError(f"it has no {', '.join(missing)}")
            return cls(**{**found, "units": tuple(found["units"]), "freezes": tuple(map(tuple, found["freezes"]))})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a result of `adafreeze compare`: {error}") from error


def outcome_of(
    journal: Path, metrics: Mapping[str, Any], *, task: str, method: str, seed: int, settings: Mapping[str, Any]
) -> Outcome:
    """The outcome of a finished run, from its journal and the metrics that ``adafreeze train`` returned."""
    history = read_history(journal)
    counts = [sum(len(names) for at, names, _ in history.freezes if at <= step) for step, _, _ in history.freezes]
    return Outcome(
        task=task,
        method=method,
        seed=seed,
        metrics={
            name.removeprefix("eval_"): float(value)
            for name, value in metrics.items()
            if is_score(name) and isinstance(value, (int, float))
        },
        seconds=metrics["train_runtime"],
        cpu_seconds=metrics["train_cpu_seconds"],
        flops=metrics.get("train_flops", 0) + metrics.get("score_flops", 0),
        peak_saved_bytes=metrics.get("train_peak_saved_bytes", 0),
        mean_saved_bytes=metrics.get("train_mean_saved_bytes", 0),
        steps=history.steps,
        epochs=metrics.get("epoch", 0),
        blocks=sum(history.stacks.values()),
        units=tuple(history.units),
        freezes=tuple((step, count, depth) for (step, depth), count in zip(history.depths, counts, strict=True)),
        cached=history.cache is not None,
        settings=settings,
    )
