"""The part that classifiers of text and of images share: the label column, its classes, and the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .metrics import measure
from .task import Task

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import EvalPrediction

    from .data import Split

__all__ = ["Classification"]


@dataclass
class Classification(Task):
    """Predict ``label_column``.

    Labels are integers, strings, booleans, or a ``ClassLabel`` of ``datasets``. ``fit`` gives them ids 0 … n−1 in
    sorted order (``ClassLabel``: in its own order). Default metrics are accuracy, ``f1_macro`` and, with two labels,
    ``f1`` of label 1.

    Args:
        classes: label names by id if the task fixes them; a row may then contain the name or the id.
        metrics: names that ``adafreeze.tasks.metrics.measure`` accepts; empty: the default.
        names: label names by id; set by ``fit``.
        ids: the id of each label value; set by ``fit``.
    """

    label_column: str = "label"
    classes: Sequence[str] = ()
    metrics: Sequence[str] = ()
    names: list[str] = field(default_factory=list, init=False)
    ids: dict[Any, int] = field(default_factory=dict, init=False)

    def label_faults(self, split: Split) -> dict[int, str]:
        """Rows without a label or, after ``fit``, with a label that is not in the training data."""
        faults: dict[int, str] = {}
        for index, label in enumerate(_labels(split.rows, self.label_column)):
            if label is None:
                faults[index] = f"no label in column {self.label_column!r}"
            elif isinstance(label, float) or not isinstance(label, (int, str)):
                faults[index] = f"the label {label!r} is neither an integer nor a string"
            elif self.classes and label not in _by_name_or_id(self.classes):
                faults[index] = f"the label {label!r} is not one of {', '.join(self.classes)} (or 0, 1, ...)"
            elif self.ids and label not in self.ids:
                known = ", ".join(map(repr, list(self.ids)[: len(self.names)][:10]))
                known += ", ..." if len(self.names) > 10 else ""
                faults[index] = f"the label {label!r} is not in the training data (known: {known})"
        return faults

    def fit(self, train: Split) -> None:
        """Learn the set of labels.

        Raises:
            DataError: all rows have the same label, or numbers and strings are mixed.
        """
        found = _labels(train.rows, self.label_column)
        seen = set(found)
        other = next((i for i, label in enumerate(found) if isinstance(label, str) != isinstance(found[0], str)), 0)
        if other:
            raise DataError(
                f"{train.where(other)}: the label is {found[other]!r}, but {found[0]!r} in {train.locate(0)}.",
                fix="Use only numbers or only strings as labels.",
            )
        if len(seen) < 2:
            raise DataError(
                f"{train.name} has only one class: each {self.label_column!r} is {next(iter(seen))!r}.",
                fix="Add rows of another class, or name the right column: --label_column NAME",
            )
        names = self.classes or _class_names(train.rows, self.label_column)
        if names:
            self.names, self.ids = list(names), _by_name_or_id(names)
        else:
            labels = sorted(seen, key=lambda label: (isinstance(label, str), label))
            self.names, self.ids = [str(label) for label in labels], {label: i for i, label in enumerate(labels)}

    def label_ids(self, rows: Dataset) -> list[int]:
        """The label id of each row."""
        return [self.ids[label] for label in _labels(rows, self.label_column)]

    def config_fields(self) -> dict[str, Any]:
        """A classification head with one output per label."""
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: index for index, name in enumerate(self.names)},
            "problem_type": "single_label_classification",
        }

    def preprocess_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """The predicted ids. Encoder-decoders return a tuple with the logits first."""
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The ``metrics`` of the task."""
        usual = ("accuracy", "f1_macro", *(("f1",) if len(self.names) == 2 else ()))
        return measure(self.metrics or usual, prediction.predictions, prediction.label_ids)


def _class_names(rows: Dataset, column: str) -> list[str]:
    return list(getattr(rows.features[column], "names", None) or ())


def _by_name_or_id(names: Sequence[str]) -> dict[Any, int]:
    return {name: i for i, name in enumerate(names)} | {i: i for i in range(len(names))}


def _labels(rows: Dataset, column: str) -> list[Any]:
    """The labels in one form. Those of a ``ClassLabel`` by name: two files may number them differently."""
    names = _class_names(rows, column)
    return [_label(value, names) for value in rows[column]]


def _label(value: Any, names: list[str]) -> Any:
    """One form for the same label: 1.0 is 1 (a CSV column with a gap is read as float), true is a string."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if value != value:
            return None
        return int(value) if value.is_integer() else value
    if isinstance(value, str):
        return value.strip() or None
    if names and isinstance(value, int):
        return names[value] if value >= 0 else None  # the Hub marks hidden labels with -1
    return value
