"""Text classification: one text or a pair of texts, one label of several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import DataError
from ._text import as_text, faults_of_text, guess_columns
from .pretrained import Source, load_model
from .task import Task

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

    from .data import Split

__all__ = ["TextClassification"]


@dataclass
class TextClassification(Task):
    """Predict ``label_column`` from one or two text columns.

    Labels may be whole numbers, text, true/false, or a ``ClassLabel`` of ``datasets``; :meth:`fit` gives
    them ids 0 … n−1 in sorted order (``ClassLabel``: in its own). Metrics are accuracy, ``f1_macro`` and,
    with two labels, ``f1`` of the label with id 1, through scikit-learn.

    Args:
        text_columns: one name, or two for pairs; empty: the usual names are looked for.
        label_column: where the label stands.
        max_length: tokens of a row, at most; longer rows are cut.
        pad_to_max_length: pad every row to ``max_length`` (default: to the longest of its batch).
        labels: the labels by id; set by :meth:`fit`.
    """

    text_columns: tuple[str, ...] = ()
    label_column: str = "label"
    max_length: int = 128
    pad_to_max_length: bool = False
    labels: list[Any] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    name: ClassVar[str] = "text-classification"
    peft_task_type: ClassVar[str] = "SEQ_CLS"

    @property
    def num_labels(self) -> int:
        """How many labels the training data has."""
        return len(self.labels)

    @property
    def id2label(self) -> dict[int, str]:
        """The labels' names by id."""
        return dict(enumerate(self.names))

    def columns(self, found: list[str]) -> dict[str, list[str]]:
        """The text columns and the label column."""
        self.text_columns = tuple(self.text_columns) or guess_columns(found)
        return {"--text_column": list(self.text_columns), "--label_column": [self.label_column]}

    def faults(self, split: Split) -> dict[int, str]:
        """Rows without text, without label, or (after :meth:`fit`) with a label not seen in training."""
        faults = faults_of_text(split, self.text_columns)
        class_names = _class_names(split.rows, self.label_column)
        for index, value in enumerate(split.rows[self.label_column]):
            label = _label(value, class_names is not None)
            if label is None:
                faults.setdefault(index, f"no label in column {self.label_column!r}")
            elif isinstance(label, float) or not isinstance(label, (int, str)):
                faults.setdefault(index, f"the label {label!r} is neither a whole number nor text")
            elif self.labels and label not in self.labels:
                known = ", ".join(map(repr, self.labels[:10])) + (", ..." if len(self.labels) > 10 else "")
                faults.setdefault(index, f"the label {label!r} is not in the training data (known: {known})")
        return faults

    def fit(self, train: Split) -> None:
        """Learn the set of labels.

        Raises:
            DataError: all rows have the same label, or some have a number and some have text.
        """
        class_names = _class_names(train.rows, self.label_column)
        found = [_label(value, class_names is not None) for value in train.rows[self.label_column]]
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
        if class_names is not None:
            self.labels, self.names = list(range(len(class_names))), class_names
        else:
            self.labels = sorted(seen, key=lambda label: (isinstance(label, str), label))
            self.names = [str(label) for label in self.labels]

    def load_model(self, source: Source) -> PreTrainedModel:
        """The model with a classification head of :attr:`num_labels` outputs."""
        from transformers import AutoModelForSequenceClassification

        return load_model(
            AutoModelForSequenceClassification,
            source,
            num_labels=self.num_labels,
            id2label=self.id2label,
            label2id={name: index for index, name in self.id2label.items()},
            problem_type="single_label_classification",
        )

    def prepare(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Token ids and label ids."""
        ids = {label: index for index, label in enumerate(self.labels)}
        is_class = _class_names(rows, self.label_column) is not None
        return tokenize(rows, tokenizer, self, lambda value: ids[_label(value, is_class)])

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pads to the longest row of the batch, or to ``max_length``."""
        return pad(tokenizer, self)

    def preprocess_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """The predicted ids. Encoder-decoders return their hidden states behind the logits: not wanted."""
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Accuracy and F1."""
        from sklearn.metrics import accuracy_score, f1_score

        guess, truth = prediction.predictions, prediction.label_ids
        metrics = {
            "accuracy": float(accuracy_score(truth, guess)),
            "f1_macro": float(f1_score(truth, guess, average="macro", zero_division=0)),
        }
        if self.num_labels == 2:
            metrics["f1"] = float(f1_score(truth, guess, average="binary", pos_label=1, zero_division=0))
        return metrics


def tokenize(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: Any, label_of: Callable[[Any], int | float]
) -> Dataset:
    """Token ids of one or two text columns of ``task``, and ``labels``; used by regression too."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [as_text(batch, column) for column in task.text_columns]
        encoded = dict(tokenizer(*texts, truncation=True, max_length=task.max_length))
        encoded["labels"] = [label_of(value) for value in batch[task.label_column]]
        return encoded

    # Not from the cache of an earlier run: its key is a hash of this closure, and tokenizing is cheap beside
    # training.
    return rows.map(encode, batched=True, remove_columns=rows.column_names, load_from_cache_file=False)


def pad(tokenizer: PreTrainedTokenizerBase, task: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """A collator that pads token ids; used by regression too."""
    from transformers import DataCollatorWithPadding

    if task.pad_to_max_length:
        return DataCollatorWithPadding(tokenizer, padding="max_length", max_length=task.max_length)
    return DataCollatorWithPadding(tokenizer)


def _class_names(rows: Dataset, column: str) -> list[str] | None:
    names = getattr(rows.features[column], "names", None)
    return list(names) if names else None


def _label(value: Any, is_class: bool) -> Any:
    """One form for the same label: 1.0 is 1 (a CSV column with a gap is read as float), true is text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if value != value:
            return None
        return int(value) if value.is_integer() else value
    if isinstance(value, str):
        return value.strip() or None
    return None if is_class and value == -1 else value  # -1: the Hub's mark for a hidden label
