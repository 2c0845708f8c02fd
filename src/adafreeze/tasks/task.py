"""Task: what a kind of task must answer, so that train and compare need not know which one it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

    from .data import Split
    from .pretrained import Source

__all__ = ["Task"]


class Task(Protocol):
    """Rows in, batches and metrics out.

    The order of use is ``columns`` → ``faults(train)`` → ``fit(train)`` → ``faults(validation)`` →
    ``load_model`` → ``prepare`` → ``collator``; see :func:`adafreeze.tasks.data.load_splits`, which does the
    first four. Attributes:

    * ``name``: as typed after ``--task``;
    * ``peft_task_type``: PEFT's word for it (``"SEQ_CLS"``, ``"CAUSAL_LM"``);
    * ``max_length``: tokens of a row, at most;
    * ``num_labels``: outputs of the head; None where the model brings its own head.
    """

    name: ClassVar[str]
    peft_task_type: ClassVar[str]
    max_length: int

    @property
    def num_labels(self) -> int | None:
        """Outputs of the head, known after :meth:`fit`."""

    def columns(self, found: list[str]) -> dict[str, list[str]]:
        """The columns that must exist, by the flag that names them; ``found`` helps to guess a default."""

    def faults(self, split: Split) -> dict[int, str]:
        """Rows that cannot be used, each with the reason: ``{row index: reason}``."""

    def fit(self, train: Split) -> None:
        """Learn what only the training data tells (the set of labels)."""

    def load_model(self, source: Source) -> PreTrainedModel:
        """The pre-trained model with the head of this task."""

    def prepare(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Tokenized rows: ``input_ids``, ``attention_mask``, ``labels`` and nothing from the file."""

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """What turns prepared rows into a batch."""

    def preprocess_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """What to keep of the logits for :meth:`compute_metrics`, so that a vocabulary is never gathered."""

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The task's scores, as :class:`transformers.Trainer` asks for them."""
