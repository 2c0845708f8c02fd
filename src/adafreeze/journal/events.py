"""The writer of run journals (one JSON object per line), and the iterator over their lines."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from ..errors import RunError, warn

__all__ = ["FORMAT_VERSION", "JOURNAL_FILE", "Journal", "read_journal"]

FORMAT_VERSION = 1
JOURNAL_FILE = "journal.jsonl"


class Journal:
    """Appends events to ``path`` (JSON Lines), or keeps them in memory if ``path`` is None.

    Every line has ``event`` (str) and, where it applies, ``step`` (int, optimizer steps done). The first line of a file
    is ``{"event": "journal", "version": 1, "run": "..."}``. NaN and infinity are written as strings, so that every line
    is valid JSON. Lines are flushed at once: a crash leaves at most the last line incomplete, and the next Journal on
    the file ends that line first. If the disk fills up, one warning is issued and later events stay in memory.

    Raises:
        RunError: the file cannot be opened for writing.

    >>> journal = Journal()
    >>> journal.write("freeze", step=12, units=["encoder.layer.0"])
    >>> journal.events[-1]["units"]
    ['encoder.layer.0']
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path) if path is not None else None
        self.events: list[dict[str, Any]] = []
        self._run: str | None = secrets.token_hex(8)  # from the operating system: advances no random state
        self._file: FileIO | None = None
        try:
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # Unbuffered: after a failed write to a full disk, closing the file must not try again.
                self._file = self.path.open("ab", buffering=0)
            if self.path is None or self._file is None or self._file.tell() == 0:
                self._append({"event": "journal", "version": FORMAT_VERSION, "run": self._run})
            else:
                if not self.path.read_bytes().endswith(b"\n"):
                    self._file.write(b"\n")
                self._run = next((event.get("run") for event in read_journal(self.path)), None)
        except OSError as error:
            self.close()
            raise RunError(
                f"The journal {self.path} cannot be written ({error.strerror}).",
                fix="Free some disk space, or give a path in a folder that you can write to.",
            ) from error

    def write(self, event: str, **fields: Any) -> None:
        """Append one event."""
        try:
            self._append({"event": event, **_plain(fields)})
        except OSError as error:  # must not stop the training run
            self.close()
            warn(
                f"The journal {self.path} ends before the event {event!r} ({error.strerror}); training continues.",
                fix="Free some disk space before the next run.",
            )

    def mark(self) -> dict[str, Any] | None:
        """The current end of the file, to be saved in a checkpoint and passed to ``rewind``; None in memory."""
        if self._file is None:
            return None
        return {"run": self._run, "bytes": self._file.seek(0, os.SEEK_END)}

    def rewind(self, mark: Mapping[str, Any] | None) -> None:
        """Remove the events after ``mark``, which a resumed run writes again; ignores marks of other files."""
        if mark is None or self._file is None or self._run != mark["run"]:
            return
        if 0 < mark["bytes"] <= self._file.seek(0, os.SEEK_END):
            with contextlib.suppress(OSError):  # the events are then in the file twice
                self._file.truncate(mark["bytes"])
                self.events.clear()

    def close(self) -> None:
        """Close the file; later writes stay in memory."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # network file systems may report a failed write only here
                file.close()

    def _append(self, line: dict[str, Any]) -> None:
        self.events.append(line)
        if self._file is not None:
            text = (json.dumps(line) + "\n").encode()
            while text:  # an unbuffered write may be partial
                text = text[self._file.write(text) :]


def read_journal(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the events of a journal file; skips incomplete lines."""
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                event = json.loads(line)
                if isinstance(event, dict):
                    yield event


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields as JSON values; NaN and infinity as text."""

    def other(value: Any) -> Any:
        return sorted(value) if isinstance(value, (set, frozenset)) else str(value)

    return json.loads(json.dumps(fields, default=other), parse_constant=lambda text: str(float(text)))
