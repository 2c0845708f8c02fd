"""The run journal: one JSON object a line, all that reports and analyses read of a run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import RunError

__all__ = ["FORMAT_VERSION", "Journal", "read_journal"]

FORMAT_VERSION = 1


class Journal:
    """Append events to ``path`` (JSON Lines), or keep them in memory when ``path`` is None.

    Every line has ``event`` (str) and, where the event belongs to one, ``step`` (int, optimizer steps done).
    The first line of a file is ``{"event": "journal", "version": 1}``. Numbers that JSON cannot hold (NaN, inf)
    are written as strings, so that every line is valid JSON. Each line is flushed when written: after a crash
    at most the last line is incomplete.

    Raises:
        RunError: the file cannot be written.

    >>> journal = Journal()
    >>> journal.write("freeze", step=12, units=["encoder.layer.0"])
    >>> journal.events[-1]["units"]
    ['encoder.layer.0']
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path) if path is not None else None
        self.events: list[dict[str, Any]] = []
        self._file = None
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8")
            except OSError as error:
                raise RunError(
                    f"The journal {self.path} cannot be written ({error.strerror}).",
                    cause="The folder is missing or read-only, or the disk is full.",
                    fix="Give a path in a folder that you can write to.",
                ) from error
        if self._file is None or self._file.tell() == 0:
            self.write("journal", version=FORMAT_VERSION)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event."""
        line = {"event": event, **{key: _plain(value) for key, value in fields.items()}}
        self.events.append(line)
        if self._file is not None:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file; later writes stay in memory."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_journal(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the events of a journal file; an incomplete last line (a killed run) is left out."""
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            yield json.loads(line)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return [_plain(item) for item in sorted(value)]
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return str(value)
