"""What all tasks on text share: which columns hold it, and which rows lack it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

    from .data import Split

__all__ = ["as_text", "faults_of_text", "guess_columns", "number"]

# The names GLUE and most datasets use; a guess beyond them would train on the wrong column in silence.
_USUAL = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
)


def guess_columns(found: list[str]) -> tuple[str, ...]:
    """The usual text columns among ``found``; ``("text",)`` where there are none, for the error to name.

    >>> guess_columns(["idx", "sentence1", "sentence2", "label"])
    ('sentence1', 'sentence2')
    """
    return next((names for names in _USUAL if all(name in found for name in names)), ("text",))


def faults_of_text(split: Split, columns: tuple[str, ...]) -> dict[int, str]:
    """Rows without text in one of ``columns``, each with the reason."""
    faults: dict[int, str] = {}
    for column in columns:
        for index, value in enumerate(split.rows[column]):
            if value is None or (isinstance(value, str) and not value.strip()):
                faults.setdefault(index, f"empty text in column {column!r}")
            elif not isinstance(value, (str, int, float)):
                faults.setdefault(index, f"column {column!r} holds a {type(value).__name__}, not text")
    return faults


def as_text(rows: Dataset | dict[str, list[Any]], column: str) -> list[str]:
    """A column as text: a CSV column of bare numbers is read as numbers."""
    return [value if isinstance(value, str) else str(value) for value in rows[column]]


def number(value: Any) -> float | None:
    """``value`` as a finite number, or None.

    >>> number("3.5"), number("good"), number(float("nan"))
    (3.5, None, None)
    """
    try:
        result = float(value)
    except (TypeError, ValueError):
        return None
    return result if abs(result) < float("inf") else None
