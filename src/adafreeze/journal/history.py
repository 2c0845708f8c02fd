"""The reader of journals: a run as the series that reports draw and the results that other commands use."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RunError
from .events import FORMAT_VERSION, JOURNAL_FILE, read_journal

__all__ = ["History", "is_score", "read_history"]

Series = list[tuple[float, float]]


@dataclass
class History:
    """The latest run in a journal."""

    name: str  # shown in reports
    path: Path  # the journal
    method: str | None = None  # ``safe``, ``plain``, ...; None if the journal does not name one
    task: str | None = None  # of ``adafreeze train``, else None
    settings: dict[str, Any] = field(default_factory=dict)  # flags of ``adafreeze train``, else empty
    config: dict[str, Any] = field(default_factory=dict)  # fields of SafeConfig
    environment: dict[str, Any] = field(default_factory=dict)  # library versions
    total_steps: int = 0  # planned optimizer steps
    steps: int = 0  # the last step in the journal
    stacks: dict[str, int] = field(default_factory=dict)  # number of blocks by stack
    units: list[str] = field(default_factory=list)  # names, bottom to top
    scores: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # (step, score by unit) per measurement
    # last finite score of each unit; 0 for units frozen before step 0
    last_scores: dict[str, float] = field(default_factory=dict)
    # (step, newly frozen units, prefix depth by stack)
    freezes: list[tuple[int, list[str], dict[str, int]]] = field(default_factory=list)
    # in a dry run, (step, all units that would be frozen)
    would_freeze: list[tuple[int, list[str]]] = field(default_factory=list)
    logs: dict[str, Series] = field(default_factory=dict)  # (step, value) by log key
    # (step, names of the blocks with activation checkpointing, of those with selective) per choice
    checkpointed: list[tuple[int, list[str], list[str]]] = field(default_factory=list)
    cache: dict[str, Any] | None = None  # counts of the prefix cache; None if it was not used
    cache_off: tuple[int, str] | None = None  # (step, reason) if the cache was switched off
    closed: bool = False  # Safe was closed
    done: dict[str, Any] = field(default_factory=dict)  # metrics at the end; empty if the run did not end

    @property
    def frozen(self) -> dict[str, int]:
        """The step at which each frozen unit froze."""
        return {name: step for step, names, _ in self.freezes for name in names}

    @property
    def depths(self) -> list[tuple[int, int]]:
        """(step, blocks in the prefixes of all stacks from then on) per freeze."""
        return [(step, sum(prefixes.values())) for step, _, prefixes in self.freezes]

    def cost(self, name: str) -> float | None:
        """``flops`` (scoring included), ``mean_saved_bytes``, ``peak_saved_bytes``, ``seconds`` or ``cpu_seconds``."""
        value = _number(self.done.get({"seconds": "train_runtime"}.get(name, f"train_{name}")))
        if value is not None and name == "flops":
            value += _number(self.done.get("score_flops")) or 0.0
        return value

    def metrics(self) -> dict[str, float]:
        """Metrics of the last evaluation, without the prefix ``eval_``."""
        found = {name: values[-1][1] for name, values in self.logs.items()} | self.done
        numbers = {name: _number(value) for name, value in found.items() if is_score(name)}
        return {name.removeprefix("eval_"): value for name, value in numbers.items() if value is not None}


def is_score(name: str) -> bool:
    """Whether a log key is an evaluation metric other than its speed."""
    return name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))


def read_history(run: str | os.PathLike[str], name: str | None = None) -> History:
    """Read the latest run from a journal, given by its output folder or file; skips incomplete lines.

    Raises:
        RunError: the journal is missing, empty, damaged, of a newer version, or another file.
    """
    path = Path(run).expanduser()
    path = path / JOURNAL_FILE if path.is_dir() else path
    fix = "Give the output folder of a run, or the file that SafeCallback(journal=...) wrote."
    if not (path.is_file() and os.access(path, os.R_OK)):
        raise RunError(f"There is no journal {path}.", fix=fix)
    history = History(name or path.absolute().parent.name, path)
    events = read_journal(path)
    first = next(events, None)
    if first is None:
        raise RunError(f"The journal {path} is empty.", fix=fix)
    if first.get("event") != "journal":
        raise RunError(f"{path} is not a journal of adafreeze: its first line is not a 'journal' event.", fix=fix)
    version = first.get("version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise RunError(
            f"The journal {path} has format {version!r}; this adafreeze reads formats up to {FORMAT_VERSION}.",
            fix="pip install --upgrade adafreeze",
        )
    for event in events:
        try:
            _add(history, event)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise RunError(
                f"The journal {path} has a damaged {event.get('event')!r} event ({type(error).__name__}: {error}).",
                fix="Remove that line.",
            ) from error
    # A resumed run may have written a step twice: the later value counts.
    history.logs = {name: sorted(dict(values).items()) for name, values in history.logs.items()}
    history.scores = sorted(dict(history.scores).items())
    history.total_steps = max(history.total_steps, history.steps)
    return history


def _add(history: History, event: Mapping[str, Any]) -> None:
    kind, step = event.get("event"), int(_number(event.get("step")) or 0)
    history.steps = max(history.steps, step)
    if kind in ("run", "resume") and "settings" in event:  # of the command; Safe writes another "resume"
        history.method, history.task, history.settings = event["method"], event.get("task"), dict(event["settings"])
        history.done = {}
    elif kind == "start":  # another run in the same file replaces the one before; a resumed run removes its own start
        history.scores, history.last_scores, history.freezes = [], {}, []
        history.would_freeze, history.checkpointed = [], []
        history.cache, history.cache_off, history.closed, history.steps = None, None, False, step
        history.total_steps, history.units = int(event["total_steps"]), list(event["units"])
        history.config, history.stacks = dict(event.get("config", {})), dict(event.get("stacks", {}))
        history.environment = dict(event.get("environment", {}))
    elif kind == "replan":
        history.total_steps, history.config = int(event["total_steps"]), dict(event["config"])
    elif kind == "measure":
        scores = _numbers(event["scores"])
        history.scores.append((step, scores))
        history.last_scores |= scores
    elif kind == "freeze" or (kind == "resume" and event.get("units")):
        if kind == "freeze" and step == 0:  # nothing has trained yet, so nothing has changed
            history.last_scores |= dict.fromkeys(event["units"], 0.0)
        history.last_scores |= _numbers(event.get("scores", {}))
        if new := [name for name in event["units"] if name not in history.frozen]:
            history.freezes.append((step, new, dict(event["prefixes"])))
    elif kind == "thaw":
        left = [(at, [n for n in names if n not in event["units"]], depths) for at, names, depths in history.freezes]
        history.freezes = [freeze for freeze in left if freeze[1]]
        if history.freezes:
            history.freezes[-1] = (*history.freezes[-1][:2], dict(event["prefixes"]))
    elif kind == "would_freeze":
        history.would_freeze.append((step, list(event["units"])))
    elif kind == "log":
        for name, value in _numbers(event).items():
            if name != "step":
                history.logs.setdefault(name, []).append((step, value))
    elif kind == "recompute":
        history.checkpointed.append((history.steps, list(event["blocks"]), list(event.get("selective", ()))))
    elif kind == "cache":
        history.cache = dict(event)
    elif kind == "cache_off":
        history.cache_off = (step, str(event["reason"]))
    elif kind == "close":
        history.closed = True
    elif kind == "done":
        history.done = dict(event)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, given in values.items() if (value := _number(given)) is not None}


def _number(value: Any) -> float | None:
    """A finite number; None for anything else (journals contain NaN and infinity as text)."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)
