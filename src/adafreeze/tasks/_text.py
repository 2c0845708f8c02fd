"""Helpers of all tasks on text: which columns to use, and which rows lack text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

    from .data import Split

__all__ = ["as_text", "faults_of_text", "guess_columns"]

# The names of GLUE and most datasets. Guessing more would silently train on the wrong column.
_USUAL = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
)


def guess_columns(found: list[str]) -> tuple[str, ...]:
    """The usual text columns among ``found``; ``("text",)`` if there are none, so that the error names it.

    >>> guess_columns(["idx", "sentence1", "sentence2", "label"])
    ('sentence1', 'sentence2')
    """
    return next((names for names in _USUAL if set(names) <= set(found)), ("text",))


def faults_of_text(split: Split, columns: Sequence[str]) -> dict[int, str]:
    """Rows without text in one of ``columns``: ``{row index: reason}``."""
    faults: dict[int, str] = {}
    for column in columns:
        for index, value in enumerate(split.rows[column]):
            if value is None or (isinstance(value, str) and not value.strip()):
                faults.setdefault(index, f"empty text in column {column!r}")
            elif not isinstance(value, (str, int, float)):
                faults.setdefault(index, f"column {column!r} contains a {type(value).__name__}, not text")
    return faults


def as_text(rows: Dataset | dict[str, list[Any]], column: str) -> list[str]:
    """The strings of a column; numbers, as read from a CSV file, become strings."""
    return [str(value) for value in rows[column]]
