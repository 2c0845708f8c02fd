"""The run journal: one JSON object a line, all that reports and analyses read of a run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from ..errors import RunError, warn

__all__ = ["FORMAT_VERSION", "JOURNAL_FILE", "Journal", "find_journal", "read_journal"]

FORMAT_VERSION = 1
JOURNAL_FILE = "journal.jsonl"


class Journal:
    """Append events to ``path`` (JSON Lines), or keep them in memory when ``path`` is None.

    Every line has ``event`` (str) and, where the event belongs to one, ``step`` (int, optimizer steps done).
    The first line of a file is ``{"event": "journal", "version": 1, "run": "..."}``. Numbers that JSON cannot hold
    (NaN, inf) are written as strings, so that every line is valid JSON. Each line is flushed when written: after a
    crash at most the last line is incomplete, and whoever continues the file ends that line first.

    A disk that fills up while the run goes on gives a warning, and later events stay in memory.

    Raises:
        RunError: the file cannot be written when it is opened.

    >>> journal = Journal()
    >>> journal.write("freeze", step=12, units=["encoder.layer.0"])
    >>> journal.events[-1]["units"]
    ['encoder.layer.0']
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path) if path is not None else None
        self.events: list[dict[str, Any]] = []
        self._run: str | None = secrets.token_hex(8)  # of the operating system: no random state advances
        self._file: FileIO | None = None
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # Unbuffered, so that what a full disk refused is not tried again when the file is closed.
                self._file = self.path.open("ab", buffering=0)
                if _is_cut_off(self.path):
                    self._file.write(b"\n")
                if self._file.tell() == 0:
                    self._append({"event": "journal", "version": FORMAT_VERSION, "run": self._run})
                else:
                    self._run = next((event.get("run") for event in read_journal(self.path)), None)
            except OSError as error:
                self.close()
                raise RunError(
                    f"The journal {self.path} cannot be written ({error.strerror}).",
                    cause="The folder is missing or read-only, or the disk is full.",
                    fix="Give a path in a folder that you can write to.",
                ) from error
        else:
            self._append({"event": "journal", "version": FORMAT_VERSION, "run": self._run})

    def write(self, event: str, **fields: Any) -> None:
        """Append one event."""
        try:
            self._append({"event": event, **{key: _plain(value) for key, value in fields.items()}})
        except OSError as error:  # must not end somebody's run
            self.close()
            warn(
                f"The journal {self.path} ends before the event {event!r} ({error.strerror}).",
                cause="The disk is full, or the folder is gone.",
                fix="Free some space before the next run. Training goes on; later events are not written down.",
            )

    def mark(self) -> dict[str, Any] | None:
        """Where the file ends now, for ``rewind`` of whoever resumes from here; None in memory."""
        if self._file is None:
            return None
        return {"run": self._run, "bytes": self._file.seek(0, os.SEEK_END)}

    def rewind(self, mark: Mapping[str, Any] | None) -> bool:
        """Cut off what was written after ``mark``: a resumed run writes it again. True if it was this file's.

        A mark of another file, or behind the end of this one, cuts nothing.
        """
        if mark is None or self._file is None or self._run != mark["run"]:
            return False
        if not 0 < mark["bytes"] <= self._file.seek(0, os.SEEK_END):
            return False
        try:
            self._file.truncate(mark["bytes"])
        except OSError:  # it stays longer than it need be
            return False
        self.events.clear()
        return True

    def close(self) -> None:
        """Close the file; later writes stay in memory."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # of network file systems, which find out only now
                file.close()

    def _append(self, line: dict[str, Any]) -> None:
        self.events.append(line)
        if self._file is not None:
            text = (json.dumps(line, allow_nan=False) + "\n").encode()
            while text:  # an unbuffered write may take a part
                text = text[self._file.write(text) :]


def _is_cut_off(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def find_journal(run: str | os.PathLike[str], *, fix: str) -> Path:
    """The journal of a run, which is named by its output folder or by the file itself.

    Raises:
        RunError: there is none that can be read.
    """
    path = Path(run).expanduser()
    found = path / JOURNAL_FILE if path.is_dir() else path
    if not (found.is_file() and os.access(found, os.R_OK)):
        raise RunError(
            f"There is no journal {found}.",
            cause="A run is the output folder of `adafreeze train`, or what SafeCallback(journal=...) wrote.",
            fix=fix,
        )
    return found


def read_journal(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the events of a journal file; lines that a killed run left incomplete are left out."""
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                event = json.loads(line)
                if isinstance(event, dict):
                    yield event


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
