"""What ``datasets`` does not check in a local file, and the line of a row."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

from ..errors import DataError

__all__ = ["check_csv", "check_encoding", "check_json", "place_of"]


def place_of(path: Path, index: int) -> str:
    """Where row ``index`` starts, such as ``"line 7"``; ``"row 7"`` for parquet and for a JSON list.

    The header, blank lines, and all lines of a quoted field count.
    """
    lines: Iterator[int] = iter(())
    if path.suffix == ".txt":
        lines = count(1)
    elif path.suffix == ".csv":
        lines = islice((line for line, _ in _csv_rows(path)), 1, None)  # without the header
    elif path.suffix in (".json", ".jsonl"):
        text = path.read_text(encoding="utf-8-sig")
        if not text.lstrip().startswith("["):
            lines = (line for line, row in enumerate(text.split("\n"), 1) if row.strip())
    line = next(islice(lines, index, None), None)
    return f"row {index + 1}" if line is None else f"line {line}"


def check_encoding(path: Path) -> None:
    """Raise ``DataError`` for a file that is not UTF-8; for JSON, ``datasets`` fails only when a row is used."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not UTF-8 text.",
                    fix=f"iconv -f WINDOWS-1252 -t UTF-8 {path} > utf8{path.suffix}",
                ) from error


def check_csv(path: Path) -> None:
    """Raise ``DataError`` for a row with more fields than the header.

    If *every* row has one field too many, pandas silently takes the first for an index and shifts all columns.
    """
    header: list[str] = []
    for line, fields in _csv_rows(path):
        header = header or fields
        if len(fields) > len(header):
            raise DataError(
                f"{path}, line {line}: {len(fields)} fields, but the header has {len(header)} ({', '.join(header)}).",
                fix='Put texts with a comma in double quotes: "like this, for example".',
            )


def check_json(path: Path) -> None:
    """Raise ``DataError`` for the first line that is not JSON; pyarrow names a row of a block, or a byte."""
    text = path.read_text(encoding="utf-8-sig")
    parts = [text] if text.lstrip().startswith("[") else text.split("\n")
    for number, part in enumerate(parts):
        try:
            json.loads(part if part.strip() else "{}")
        except json.JSONDecodeError as error:
            line = number + error.lineno
            raise DataError(
                f"{path}, line {line}: not valid JSON ({error.msg}, column {error.colno}).",
                fix=f"Correct or remove the line; `sed -n {line}p {path}` shows it.",
            ) from error


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    limit = csv.field_size_limit(2**31 - 1)  # a setting of the whole process, 128 KiB by default: restored below
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            start = 1
            for fields in reader:
                if fields:
                    yield start, fields
                start = reader.line_num + 1
    finally:
        csv.field_size_limit(limit)
