"""Text classification and regression: predict a label or a number from one text or a pair of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import ConfigError
from ._text import as_text, faults_of_text, guess_columns
from .classification import Classification
from .metrics import measure
from .task import Task

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedTokenizerBase

    from .data import Split

__all__ = ["Regression", "TextClassification"]


@dataclass
class _TextPair(Task):
    """Base of both tasks.

    Args:
        text_column: one column, or two for pairs; empty: the first of the usual names that exists.
        max_length: longer rows are cut.
        pad_to_max_length: pad to ``max_length``, not to the longest row of the batch.
    """

    text_column: Sequence[str] = ()
    label_column: str = "label"
    max_length: int = 128
    pad_to_max_length: bool = False

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task_type: ClassVar[str] = "SEQ_CLS"

    def __post_init__(self) -> None:
        if len(self.text_column) > 2:
            raise ConfigError(
                f"--text_column names {len(self.text_column)} columns, and --task {self.name} reads one or two.",
                fix="--text_column sentence1 sentence2",
            )

    def columns(self, found: list[str]) -> tuple[str, str]:
        """The text columns and the label column."""
        self.text_column = self.text_column or guess_columns(found)
        return "text_column", "label_column"

    def label_ids(self, rows: Dataset) -> Sequence[int | float]:
        """The label of each row, as the loss needs it."""
        raise NotImplementedError

    def prepare(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Token ids and labels."""
        labels = self.label_ids(rows)

        def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, Any]:
            texts = [as_text(batch, column) for column in self.text_column]
            encoded = dict(tokenizer(*texts, truncation=True, max_length=self.max_length))
            encoded["labels"] = [labels[index] for index in indices]
            return encoded

        # load_from_cache_file=False: the cache key is a hash of this closure, and tokenizing is cheap.
        return rows.map(
            encode, batched=True, with_indices=True, remove_columns=rows.column_names, load_from_cache_file=False
        )


@dataclass
class TextClassification(Classification, _TextPair):
    """Predict the label in ``label_column``."""

    name: ClassVar[str] = "text-classification"

    def faults(self, split: Split) -> dict[int, str]:
        """Rows without text or without a usable label."""
        return self.label_faults(split) | faults_of_text(split, self.text_column)


@dataclass
class Regression(_TextPair):
    """Predict the number in ``label_column``; the loss is the mean squared error."""

    metrics: Sequence[str] = ("mse", "pearson", "spearmanr")

    name: ClassVar[str] = "regression"

    def faults(self, split: Split) -> dict[int, str]:
        """Rows without text, or with a label that is not a finite number."""
        faults = faults_of_text(split, self.text_column)
        for index, value in enumerate(split.rows[self.label_column]):
            if value is None:
                faults.setdefault(index, f"no label in column {self.label_column!r}")
            elif not _is_finite(value):
                faults.setdefault(index, f"the label {value!r} is not a finite number")
        return faults

    def config_fields(self) -> dict[str, Any]:
        """A head with one output."""
        return {"num_labels": 1, "problem_type": "regression"}

    def label_ids(self, rows: Dataset) -> list[float]:
        """The number of each row."""
        return [float(value) for value in rows[self.label_column]]

    def preprocess_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """One number per row."""
        return (logits[0] if isinstance(logits, tuple) else logits).squeeze(-1)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The ``metrics`` of the task."""
        return measure(self.metrics, prediction.predictions, prediction.label_ids)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
