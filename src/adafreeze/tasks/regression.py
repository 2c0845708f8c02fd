"""Regression: one text or a pair of texts, one number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ._text import faults_of_text, guess_columns, number
from .metrics import measure
from .pretrained import Source, load_model
from .task import Task
from .text_classification import pad, tokenize

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

    from .data import Split

__all__ = ["Regression"]


@dataclass
class Regression(Task):
    """Predict the number in ``label_column`` from one or two text columns.

    The loss is the mean squared error.

    Args:
        text_columns: one name, or two for pairs; empty: the usual names are looked for.
        label_column: where the number stands.
        max_length: tokens of a row, at most; longer rows are cut.
        pad_to_max_length: pad every row to ``max_length`` (default: to the longest of its batch).
        metrics: names of ``adafreeze.tasks.metrics.METRICS``.
    """

    text_columns: tuple[str, ...] = ()
    label_column: str = "label"
    max_length: int = 128
    pad_to_max_length: bool = False
    metrics: tuple[str, ...] = ("mse", "pearson", "spearmanr")

    name: ClassVar[str] = "regression"
    peft_task_type: ClassVar[str] = "SEQ_CLS"
    num_labels: ClassVar[int] = 1

    def columns(self, found: list[str]) -> dict[str, list[str]]:
        """The text columns and the label column."""
        self.text_columns = tuple(self.text_columns) or guess_columns(found)
        return {"--text_column": list(self.text_columns), "--label_column": [self.label_column]}

    def faults(self, split: Split) -> dict[int, str]:
        """Rows without text, or whose label is not a finite number."""
        faults = faults_of_text(split, self.text_columns)
        for index, value in enumerate(split.rows[self.label_column]):
            if value is None:
                faults.setdefault(index, f"no label in column {self.label_column!r}")
            elif number(value) is None:
                faults.setdefault(index, f"the label {value!r} is not a finite number")
        return faults

    def load_model(self, source: Source) -> PreTrainedModel:
        """The model with a head of one output."""
        from transformers import AutoModelForSequenceClassification

        return load_model(AutoModelForSequenceClassification, source, num_labels=1, problem_type="regression")

    def prepare(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Token ids and numbers."""
        return tokenize(rows, tokenizer, self, [float(value) for value in rows[self.label_column]])

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pads to the longest row of the batch, or to ``max_length``."""
        return pad(tokenizer, self)

    def preprocess_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """One number a row."""
        return (logits[0] if isinstance(logits, tuple) else logits).squeeze(-1)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Mean squared error and both correlations, or the metrics asked for."""
        return measure(self.metrics, prediction.predictions, prediction.label_ids)
