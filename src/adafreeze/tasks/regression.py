"""Regression: one text or a pair of texts, one number."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ._text import faults_of_text, guess_columns, number
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

    The loss is the mean squared error; metrics are ``mse``, ``pearson`` and ``spearmanr``.

    Args:
        text_columns: one name, or two for pairs; empty: the usual names are looked for.
        label_column: where the number stands.
        max_length: tokens of a row, at most; longer rows are cut.
        pad_to_max_length: pad every row to ``max_length`` (default: to the longest of its batch).
    """

    text_columns: tuple[str, ...] = ()
    label_column: str = "label"
    max_length: int = 128
    pad_to_max_length: bool = False

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
        return tokenize(rows, tokenizer, self, float)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pads to the longest row of the batch, or to ``max_length``."""
        return pad(tokenizer, self)

    def preprocess_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """One number a row."""
        return (logits[0] if isinstance(logits, tuple) else logits).squeeze(-1)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Mean squared error and both correlations.

        Where a correlation is undefined (all predictions equal) it is 0: they explain nothing, and NaN is
        not JSON.
        """
        from scipy.stats import pearsonr, spearmanr
        from sklearn.metrics import mean_squared_error

        guess, truth = prediction.predictions, prediction.label_ids
        metrics = {"mse": float(mean_squared_error(truth, guess))}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy's, for constant input: answered below
            for key, correlation in (("pearson", pearsonr), ("spearmanr", spearmanr)):
                value = number(correlation(guess, truth)[0]) if len(truth) > 1 else None
                metrics[key] = value if value is not None else 0.0
        return metrics
