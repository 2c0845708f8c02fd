"""Task: what a kind of task must answer, so that train and compare need not know which one it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from .data import Split, load_file
from .pretrained import Source, load_tokenizer

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel

__all__ = ["Task"]


class Task:
    """Rows in, batches and metrics out.

    The order of use is ``read`` → ``columns`` → ``faults(train)`` → ``fit(train)`` → ``faults(validation)`` →
    ``load_processor`` → ``load_model`` → ``prepare``, ``prepare_evaluation`` → ``collator``; see
    ``adafreeze.tasks.data.load_splits``, which does the first five. A processor is what turns raw input into
    the model's: a tokenizer, for images an image processor.

    Attributes:
        name: as typed after ``--task``.
        peft_task_type: PEFT's word for it (``"SEQ_CLS"``, ``"CAUSAL_LM"``); None where it has none, and the head
            that trains beside the adapters must be named to it.
        label_names: the keys of a batch that hold what is to be predicted.
        scored_in_order: whether ``compute_metrics`` needs the predictions in the order of the prepared rows.
        max_length: tokens of a row, at most; None where there are no tokens.
        num_labels: outputs of the head, known after ``fit``; None where the model brings its own head.
    """

    name: ClassVar[str]
    peft_task_type: ClassVar[str | None]
    label_names: ClassVar[tuple[str, ...]] = ("labels",)
    scored_in_order: ClassVar[bool] = False
    max_length: int | None = None

    @property
    def num_labels(self) -> int | None:
        """Outputs of the head, known after ``fit``."""
        return None

    def read(self, path: str, cache_dir: str | None = None) -> Split:
        """The rows of a local file."""
        return load_file(path, cache_dir)

    def columns(self, found: list[str]) -> dict[str, list[str]]:
        """The columns that must exist, by the flag that names them; ``found`` helps to guess a default."""
        raise NotImplementedError

    def faults(self, split: Split) -> dict[int, str]:
        """Rows that cannot be used, each with the reason: ``{row index: reason}``."""
        raise NotImplementedError

    def fit(self, train: Split) -> None:
        """Learn what only the training data tells (the set of labels)."""

    def load_processor(self, source: Source) -> Any:
        """The tokenizer that belongs to the model."""
        return load_tokenizer(source)

    def load_model(self, source: Source) -> PreTrainedModel:
        """The pre-trained model with the head of this task."""
        raise NotImplementedError

    def prepare(self, rows: Dataset, processor: Any) -> Any:
        """A dataset of what the model takes, labels included, and nothing else from the file."""
        raise NotImplementedError

    def prepare_evaluation(self, rows: Dataset, processor: Any) -> Any:
        """The same for the rows that are evaluated on, in their order."""
        return self.prepare(rows, processor)

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """What turns prepared rows into a batch."""
        raise NotImplementedError

    def preprocess_logits(self, logits: Any, labels: torch.Tensor) -> Any:
        """What to keep of the logits for ``compute_metrics``, so that a vocabulary is never gathered."""
        raise NotImplementedError

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The task's scores, as ``transformers.Trainer`` asks for them."""
        raise NotImplementedError

    def score(self, model: PreTrainedModel, batch_size: int) -> dict[str, float]:
        """Scores that need more than predictions, such as those of what the model writes; at each evaluation."""
        return {}
