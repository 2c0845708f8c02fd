"""What classifiers of text and of images share: the label column, its classes, and the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .metrics import measure
from .pretrained import Source, load_model
from .task import Task

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel

    from .data import Split

__all__ = ["Classification"]


@dataclass
class Classification(Task):
    """Predict ``label_column``.

    Labels may be whole numbers, text, true/false, or a ``ClassLabel`` of ``datasets``; ``fit`` gives
    them ids 0 … n−1 in sorted order (``ClassLabel``: in its own). Metrics are accuracy, ``f1_macro`` and,
    with two labels, ``f1`` of the label with id 1.

    Args:
        label_column: where the label stands.
        classes: the names of the labels by id, where the task fixes them; a row may hold name or id.
        metrics: other metrics, names of ``adafreeze.tasks.metrics.METRICS``.
        names: the labels' names by id; set by ``fit``.
        ids: the id of every label that a row may hold; set by ``fit``.
    """

    label_column: str = "label"
    classes: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    names: list[str] = field(default_factory=list)
    ids: dict[Any, int] = field(default_factory=dict)

    @property
    def num_labels(self) -> int:
        """How many labels there are."""
        return len(self.names)

    @property
    def id2label(self) -> dict[int, str]:
        """The labels' names by id."""
        return dict(enumerate(self.names))

    def label_faults(self, split: Split) -> dict[int, str]:
        """Rows without label, or (after ``fit``) with a label not seen in training."""
        faults: dict[int, str] = {}
        for index, label in enumerate(_labels(split.rows, self.label_column)):
            if label is None:
                faults[index] = f"no label in column {self.label_column!r}"
            elif isinstance(label, float) or not isinstance(label, (int, str)):
                faults[index] = f"the label {label!r} is neither a whole number nor text"
            elif self.classes and label not in _named(self.classes):
                faults[index] = f"the label {label!r} is none of {', '.join(self.classes)} (or 0, 1, ...)"
            elif self.ids and label not in self.ids:
                known = ", ".join(map(repr, list(self.ids)[: self.num_labels][:10]))
                known += ", ..." if self.num_labels > 10 else ""
                faults[index] = f"the label {label!r} is not in the training data (known: {known})"
        return faults

    def fit(self, train: Split) -> None:
        """Learn the set of labels.

        Raises:
            DataError: all rows have the same label, or some have a number and some have text.
        """
        found = _labels(train.rows, self.label_column)
        seen = set(found)
        other = next((i for i, label in enumerate(found) if isinstance(label, str) != isinstance(found[0], str)), 0)
        if other:
            raise DataError(
                f"{train.where(other)}: the label is {found[other]!r}, but {found[0]!r} in {train.locate(0)}.",
                cause="Labels must be all numbers or all text; a mixture is most often a slip.",
                fix="Write all labels in one way.",
            )
        if len(seen) < 2:
            raise DataError(
                f"{train.name} has one class only: each {self.label_column!r} is {next(iter(seen))!r}.",
                cause="A classifier needs rows of at least two classes to learn from.",
                fix="Add rows of another class, or name the right column: --label_column NAME",
            )
        names = self.classes or _class_names(train.rows, self.label_column)
        if names:
            self.names, self.ids = list(names), _named(names)
        else:
            labels = sorted(seen, key=lambda label: (isinstance(label, str), label))
            self.names, self.ids = [str(label) for label in labels], {label: i for i, label in enumerate(labels)}

    def label_ids(self, rows: Dataset) -> list[int]:
        """The id of each row's label."""
        return [self.ids[label] for label in _labels(rows, self.label_column)]

    def load_head(self, auto_class: Any, source: Source) -> PreTrainedModel:
        """The model of ``auto_class`` with a classification head of ``num_labels`` outputs."""
        return load_model(
            auto_class,
            source,
            num_labels=self.num_labels,
            id2label=self.id2label,
            label2id={name: index for index, name in self.id2label.items()},
            problem_type="single_label_classification",
        )

    def preprocess_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """The predicted ids. Encoder-decoders return their hidden states behind the logits: not wanted."""
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Accuracy and F1, or the metrics asked for."""
        usual = ("accuracy", "f1_macro", *(("f1",) if self.num_labels == 2 else ()))
        return measure(self.metrics or usual, prediction.predictions, prediction.label_ids)


def _class_names(rows: Dataset, column: str) -> list[str]:
    return list(getattr(rows.features[column], "names", None) or ())


def _named(names: Sequence[str]) -> dict[Any, int]:
    return {name: i for i, name in enumerate(names)} | {i: i for i in range(len(names))}


def _labels(rows: Dataset, column: str) -> list[Any]:
    """The labels in one form; those of a ``ClassLabel`` by name, which two files may number differently."""
    names = _class_names(rows, column)
    return [_label(value, names) for value in rows[column]]


def _label(value: Any, names: list[str]) -> Any:
    """One form for the same label: 1.0 is 1 (a CSV column with a gap is read as float), true is text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if value != value:
            return None
        return int(value) if value.is_integer() else value
    if isinstance(value, str):
        return value.strip() or None
    if names and isinstance(value, int):
        return names[value] if value >= 0 else None  # -1: the Hub's mark for a hidden label
    return value
