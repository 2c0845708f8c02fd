"""Text classification: one text or a pair of texts, one label of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ._text import as_text, faults_of_text, guess_columns
from .classification import Classification
from .pretrained import Source

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .data import Split

__all__ = ["TextClassification", "pad", "tokenize"]


@dataclass
class TextClassification(Classification):
    """Predict ``label_column`` from one or two text columns.

    Args:
        text_columns: one name, or two for pairs; empty: the usual names are looked for.
        max_length: tokens of a row, at most; longer rows are cut.
        pad_to_max_length: pad every row to ``max_length`` (default: to the longest of its batch).
    """

    text_columns: tuple[str, ...] = ()
    max_length: int = 128
    pad_to_max_length: bool = False

    name: ClassVar[str] = "text-classification"
    peft_task_type: ClassVar[str] = "SEQ_CLS"

    def columns(self, found: list[str]) -> dict[str, list[str]]:
        """The text columns and the label column."""
        self.text_columns = tuple(self.text_columns) or guess_columns(found)
        return {"--text_column": list(self.text_columns), "--label_column": [self.label_column]}

    def faults(self, split: Split) -> dict[int, str]:
        """Rows without text or without a label that can be used."""
        return self.label_faults(split) | faults_of_text(split, self.text_columns)

    def load_model(self, source: Source) -> PreTrainedModel:
        """The model with a classification head."""
        from transformers import AutoModelForSequenceClassification

        return self.load_head(AutoModelForSequenceClassification, source)

    def prepare(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Token ids and label ids."""
        return tokenize(rows, tokenizer, self, self.label_ids(rows))

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pads to the longest row of the batch, or to ``max_length``."""
        return pad(tokenizer, self)


def tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: Any, labels: Sequence[int | float]) -> Dataset:
    """Token ids of one or two text columns of ``task``, and ``labels``; used by regression too."""

    def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, Any]:
        texts = [as_text(batch, column) for column in task.text_columns]
        encoded = dict(tokenizer(*texts, truncation=True, max_length=task.max_length))
        encoded["labels"] = [labels[index] for index in indices]
        return encoded

    # Not from the cache of an earlier run: its key is a hash of this closure, and tokenizing is cheap beside
    # training.
    return rows.map(
        encode, batched=True, with_indices=True, remove_columns=rows.column_names, load_from_cache_file=False
    )


def pad(tokenizer: PreTrainedTokenizerBase, task: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """A collator that pads token ids; used by regression too."""
    from transformers import DataCollatorWithPadding

    if task.pad_to_max_length:
        return DataCollatorWithPadding(tokenizer, padding="max_length", max_length=task.max_length)
    return DataCollatorWithPadding(tokenizer)
