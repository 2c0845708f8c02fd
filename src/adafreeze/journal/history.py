"""History: a run as its journal tells it, in the series that a page draws."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RunError
from . import find_journal, read_journal
from .events import FORMAT_VERSION

__all__ = ["History", "is_score", "read_history"]

Series = list[tuple[float, float]]


@dataclass
class History:
    """One run.

    Attributes:
        name: to tell it from others on the same page.
        path: of the journal.
        method: ``safe``, ``plain``, ...; None where nobody wrote it down.
        settings: flags of the run.
        config: fields of SafeConfig.
        environment: versions.
        total_steps: optimizer steps that were planned.
        steps: the last step that the journal knows.
        stacks: blocks by stack.
        units: names of what can freeze, bottom to top.
        scores: (step, score by unit), one entry a measurement.
        freezes: (step, units that froze, prefix by stack).
        would_freeze: of a dry run, (step, units that would be frozen).
        logs: (step, value) by name, of the training and its evaluations.
        recomputed: (step, names of the blocks that recompute), one entry a choice.
        cache: counts of the prefix cache; None where it was not used.
        cache_off: (step, reason), where it was switched off.
        done: metrics at the end; empty where the run did not end.
    """

    name: str
    path: Path
    method: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    total_steps: int = 0
    steps: int = 0
    stacks: dict[str, int] = field(default_factory=dict)
    units: list[str] = field(default_factory=list)
    scores: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    freezes: list[tuple[int, list[str], dict[str, int]]] = field(default_factory=list)
    would_freeze: list[tuple[int, list[str]]] = field(default_factory=list)
    logs: dict[str, Series] = field(default_factory=dict)
    recomputed: list[tuple[int, list[str]]] = field(default_factory=list)
    cache: dict[str, Any] | None = None
    cache_off: tuple[int, str] | None = None
    done: dict[str, Any] = field(default_factory=dict)

    def cost(self, name: str) -> float | None:
        """``flops`` (measuring included), ``mean_saved_bytes``, ``peak_saved_bytes``, ``seconds``, ``cpu_seconds``."""
        key = {"seconds": "train_runtime"}.get(name, f"train_{name}")
        value = _number(self.done.get(key))
        if value is not None and name == "flops":
            value += _number(self.done.get("score_flops")) or 0.0
        return value

    def metrics(self) -> dict[str, float]:
        """Of the last evaluation, without ``eval_`` and without its speed."""
        found = {name: values[-1][1] for name, values in self.logs.items()} | self.done
        return {
            name.removeprefix("eval_"): value
            for name, given in found.items()
            if is_score(name) and (value := _number(given)) is not None
        }


def is_score(name: str) -> bool:
    """Whether a logged name is of an evaluation, and not of its speed."""
    return name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))


def read_history(run: str | os.PathLike[str], name: str | None = None) -> History:
    """The history of a run.

    A line that was cut off is left out; what a resumed run wrote again counts once, as it was written last.

    Args:
        run: the output folder, or its ``journal.jsonl``.
        name: default: the folder's.

    Raises:
        RunError: there is no journal, it is empty, of a newer version, or no journal at all.
    """
    path = find_journal(run, fix="Name the folder of a run, or use SafeCallback(journal=...) in a script of your own.")
    history = History(name or path.absolute().parent.name, path)
    known = False
    for event in read_journal(path):
        kind = event.get("event")
        if not known and kind != "journal":
            raise RunError(
                f"{path} is no journal of adafreeze.",
                cause="Its first line does not say so.",
                fix="Give the output folder of a run, or the journal.jsonl in it.",
            )
        if kind == "journal":
            known = True
            _check_version(path, event.get("version"))
        try:
            _take(history, kind, event)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise RunError(
                f"The journal {path} has a damaged {kind!r} event ({type(error).__name__}: {error}).",
                cause="It was edited, or something else writes into it.",
                fix="Remove that line; a page is made of what is left.",
            ) from error
    if not known:
        raise RunError(
            f"The journal {path} is empty.",
            cause="The run ended before it wrote a line, or the file was cut off.",
            fix="Run it again, or give the folder of another run.",
        )
    _tidy(history)
    return history


def _check_version(path: Path, version: Any) -> None:
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise RunError(
            f"The journal {path} has format {version!r}, and this adafreeze reads up to {FORMAT_VERSION}.",
            cause="A newer version wrote it, or the line was changed.",
            fix="pip install --upgrade adafreeze",
        )


def _take(history: History, kind: Any, event: Mapping[str, Any]) -> None:
    step = int(_number(event.get("step")) or 0)
    history.steps = max(history.steps, step)
    if kind in ("run", "resume") and "settings" in event:
        history.method, history.settings = event.get("method"), dict(event["settings"])
    elif kind == "start":
        history.total_steps = int(_number(event.get("total_steps")) or 0)
        for name in ("config", "environment", "stacks"):
            setattr(history, name, dict(event.get(name) or {}))
        history.units = list(event.get("units") or [])
    elif kind == "replan":
        history.total_steps = int(_number(event.get("total_steps")) or 0)
        history.config = dict(event.get("config") or {})
    elif kind == "measure":
        scores = {name: value for name, given in event["scores"].items() if (value := _number(given)) is not None}
        history.scores.append((step, scores))
    elif kind == "freeze" or (kind == "resume" and event.get("units")):
        history.freezes.append((step, list(event["units"]), dict(event.get("prefixes") or {})))
    elif kind == "thaw":
        back = set(event["units"])
        left = [(at, [n for n in names if n not in back], depths) for at, names, depths in history.freezes]
        history.freezes = [freeze for freeze in left if freeze[1]]
        if history.freezes:
            history.freezes[-1] = (*history.freezes[-1][:2], dict(event.get("prefixes") or {}))
    elif kind == "would_freeze":
        history.would_freeze.append((step, list(event["units"])))
    elif kind == "log":
        for name, given in event.items():
            value = _number(given)
            if value is not None and name not in ("event", "step"):
                history.logs.setdefault(name, []).append((step, value))
    elif kind == "recompute":
        history.recomputed.append((history.steps, list(event.get("blocks") or [])))
    elif kind == "cache":
        history.cache = dict(event)
    elif kind == "cache_off":
        history.cache_off = (step, str(event.get("reason")))
    elif kind == "done":
        history.done = dict(event)


def _tidy(history: History) -> None:
    """What a resumed run wrote again counts once; of a prefix that came back at a resume, only what is new."""
    history.logs = {name: sorted(dict(values).items()) for name, values in history.logs.items()}
    history.scores = sorted(dict(history.scores).items())
    seen: set[str] = set()
    freezes = []
    for step, names, prefixes in history.freezes:
        new = [name for name in names if name not in seen]
        seen.update(new)
        if new:
            freezes.append((step, new, prefixes))
    history.freezes = freezes
    history.total_steps = max(history.total_steps, history.steps)


def _number(value: Any) -> float | None:
    """NaN and infinities, which a journal holds as texts, are no numbers to draw."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)
