"""Where a row stands in its file, and which line breaks it: the standard library reads the file again.

``datasets`` reads files fast and in chunks; when it fails it names a byte, a block, or nothing. A second,
slow look costs nothing in a run that works, and gives the user the line to look at.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import DataError

__all__ = ["check_csv", "check_encoding", "find_bad_line", "line_of"]


def line_of(path: Path, index: int) -> int | None:
    """The 1-based line on which row ``index`` starts; None where a file has no lines (parquet).

    A header counts, blank lines count, and a quoted field that spans lines counts as many as it spans.
    """
    if path.suffix == ".txt":
        return index + 1
    try:
        if path.suffix == ".csv":
            records = (line for line, fields in _csv_records(path) if fields)
            next(records)  # the header
        elif path.suffix in (".json", ".jsonl"):
            records = (line for line, _ in (_json_items if _is_array(path) else _json_lines)(path))
        else:
            return None
        for number, line in enumerate(records):
            if number == index:
                return line
    except (ValueError, csv.Error, StopIteration):
        pass
    return None


def check_csv(path: Path) -> None:
    """Refuse rows with more fields than the header.

    Asked before ``datasets`` reads the file, not after: when *every* row has one field too many, pandas
    takes the first for an index and shifts all columns by one, without an error.

    Raises:
        DataError: naming the line.
    """
    header: list[str] | None = None
    try:
        for line, fields in _csv_records(path):
            if header is None:
                header = fields or None
            elif len(fields) > len(header):
                raise DataError(
                    f"{path}, line {line}: {len(fields)} fields, but the header has {len(header)} "
                    f"({', '.join(header)}).",
                    cause="Most often a comma inside a text that is not in quotes.",
                    fix='Put the text in double quotes: "like this, for example".',
                )
    except csv.Error as error:
        raise DataError(
            f"{path} is not a CSV file ({error}).",
            cause="Its quoting or its characters cannot be read as comma-separated values.",
            fix="Save it as CSV in UTF-8, or as .jsonl.",
        ) from error


def find_bad_line(path: Path) -> DataError | None:
    """The first line of a .json or .jsonl file unlike its neighbours; None if all look alike."""
    if path.suffix not in (".json", ".jsonl"):
        return None
    kinds: dict[str, tuple[str, int]] = {}
    try:
        for line, item in (_json_items if _is_array(path) else _json_lines)(path):
            if not isinstance(item, dict):
                return DataError(
                    f"{path}, line {line}: {_kind(item)}, not an object.",
                    cause='Each row must be an object, like {"text": "...", "label": 0}.',
                    fix=f"Correct or remove line {line}.",
                )
            for key, value in item.items():
                kind, first = kinds.setdefault(key, (_kind(value), line)) if value is not None else ("", 0)
                if kind and kind != _kind(value):
                    return DataError(
                        f"{path}, line {line}: column {key!r} holds {_kind(value)}, but {kind} in line {first}.",
                        cause="A column must hold the same kind of value in every row.",
                        fix=f"Correct line {line} or line {first}.",
                    )
    except json.JSONDecodeError as error:
        return DataError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}, column {error.colno}).",
            cause="The line is cut off, or lacks a quote, a comma or a brace."
            if path.suffix == ".jsonl"
            else "The file must be a list of objects, or one object a line.",
            fix=f"Correct or remove line {error.lineno}; `sed -n {error.lineno}p {path}` shows it.",
        )
    return None


def check_encoding(path: Path) -> None:
    """Refuse a text file that is not UTF-8.

    Asked before: ``datasets`` passes the bytes of a JSON file on unread, and the first look at the row fails.

    Raises:
        DataError: naming the line.
    """
    try:
        with path.open(encoding="utf-8") as file:
            while file.read(1 << 20):
                pass
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error


def _not_utf8(path: Path) -> DataError:
    """The error for a file in another encoding, with the line of its first unreadable byte."""
    data = path.read_bytes()
    try:
        data.decode("utf-8")
        line = 1
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
    return DataError(
        f"{path}, line {line}: not UTF-8 text.",
        cause="The file was saved in another encoding, often by a spreadsheet program.",
        fix=f"iconv -f WINDOWS-1252 -t UTF-8 {path} > utf8{path.suffix}",
    )


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true/false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    with _any_field_size(), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        start = 1
        for fields in reader:
            if fields:
                yield start, fields
            start = reader.line_num + 1


@contextmanager
def _any_field_size() -> Iterator[None]:
    # The module's limit of 128 KiB a field is a setting of the whole process: put it back.
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    error.lineno = number
                    raise


def _is_array(path: Path) -> bool:
    with path.open(encoding="utf-8-sig") as file:
        return next((line.lstrip()[0] for line in file if line.strip()), "") == "["


def _json_items(path: Path) -> Iterator[tuple[int, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    json.loads(text)  # raises with the line, before items are counted
    decoder, position, line, seen = json.JSONDecoder(), text.index("[") + 1, 1, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        if position >= len(text) or text[position] == "]":
            return
        line += text.count("\n", seen, position)
        seen = position
        item, position = decoder.raw_decode(text, position)
        yield line, item
