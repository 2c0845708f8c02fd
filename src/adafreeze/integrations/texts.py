"""What a sentence-transformers model is called with in training: one column of texts at a time."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..measure.draw import Calls
from ..model.batch import as_mapping, columns_of, forward_names

__all__ = ["TextColumns"]


class TextColumns:
    """A train dataloader whose batches are taken apart into the calls of the model; to draw samples from, not to train.

    The collator of sentence-transformers prefixes the inputs of all columns with their names
    (``anchor_input_ids``, ``positive_input_ids``), and the loss passes those of one column as one dictionary.

    Args:
        loader: the Trainer's dataloader.
        model: that the loss calls.

    Attributes:
        rows_repeat: the same text may be in many rows, so rows do not tell how often a text is seen.
    """

    rows_repeat = True

    def __init__(self, loader: Any, model: nn.Module) -> None:
        self.dataset, self.collate_fn = loader.dataset, _ByColumn(loader.collate_fn, forward_names(model)[0])
        self.batch_sampler, self.batch_size = loader.batch_sampler, loader.batch_size


class _ByColumn:
    def __init__(self, collate: Any, argument: str) -> None:
        self.collate, self.argument = collate, argument

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        columns = columns_of(as_mapping(batch) or {})
        # A cross-encoder's loss gets texts, and makes the pairs from them.
        return Calls({self.argument: column} for column in columns) if columns else batch
