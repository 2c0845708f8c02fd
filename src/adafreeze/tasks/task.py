"""Task: the protocol between a kind of task and the commands train and compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from .data import Split, load_file
from .offloaded import load_offloaded
from .pretrained import Source, load, load_tokenizer

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel

__all__ = ["Task"]


class Task:
    """Turns rows into batches, and predictions into metrics.

    Subclasses are dataclasses. A field with the name of a flag of ``adafreeze train`` gets the flag's value; other
    tasks reject that flag. To add a task, write a subclass in a new file and add it to ``adafreeze.tasks.table``.

    The order of calls is ``read``, ``columns``, ``faults(train)``, ``fit(train)``, ``faults(validation)`` (all five by
    ``load_splits``), ``load_processor``, ``load_model``, ``prepare``, ``prepare_evaluation``, ``collator``. The
    processor is the model's tokenizer or image processor.

    Attributes:
        name: the value of ``--task``.
        auto_class: the class of transformers that loads the model with the head of this task.
        peft_task_type: PEFT's name for the task (``"SEQ_CLS"``, ``"CAUSAL_LM"``); None where it has none, and the
            head must go into ``modules_to_save``.
        label_names: the keys of a batch that are labels.
        scored_in_order: whether ``compute_metrics`` needs the predictions in the order of the prepared rows.
        max_length: maximum tokens per row (``--max_seq_length``); None for inputs without tokens.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    peft_task_type: ClassVar[str | None]
    label_names: ClassVar[tuple[str, ...]] = ("labels",)
    scored_in_order: ClassVar[bool] = False
    max_length: int | None = None

    def read(self, path: str, cache_dir: str | None = None) -> Split:
        """Read the rows of a local file."""
        return load_file(path, cache_dir)

    def columns(self, found: list[str]) -> Sequence[str]:
        """The fields that name required columns; may set them to defaults among the ``found`` columns."""
        raise NotImplementedError

    def faults(self, split: Split) -> dict[int, str]:
        """Unusable rows: ``{row index: reason}``."""
        raise NotImplementedError

    def fit(self, train: Split) -> None:
        """Learn what depends on the training data, such as the set of labels."""

    def load_processor(self, source: Source) -> Any:
        """Load the tokenizer or image processor of the model."""
        return load_tokenizer(source)

    def config_fields(self) -> dict[str, Any]:
        """Fields that the task sets in the model's configuration, such as ``num_labels``."""
        return {}

    def load_model(self, source: Source) -> PreTrainedModel:
        """Load the pre-trained model with the head of this task."""
        sizes = source.ignore_mismatched_sizes
        options = self.config_fields()
        loads = load_offloaded if source.offload is not None else load
        return loads(self.auto_class, source, dtype=source.dtype, ignore_mismatched_sizes=sizes, **options)

    def prepare(self, rows: Dataset, processor: Any) -> Any:
        """A dataset with the model's inputs and labels, and no other column."""
        raise NotImplementedError

    def prepare_evaluation(self, rows: Dataset, processor: Any) -> Any:
        """The same for the rows to evaluate on, in their order."""
        return self.prepare(rows, processor)

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """A function that makes a batch: pads to its longest row, or to ``max_length`` with ``pad_to_max_length``."""
        from transformers import DataCollatorWithPadding

        if getattr(self, "pad_to_max_length", False):
            return DataCollatorWithPadding(processor, padding="max_length", max_length=self.max_length)
        return DataCollatorWithPadding(processor)

    def preprocess_logits(self, logits: Any, labels: torch.Tensor) -> Any:
        """Reduce the logits to what ``compute_metrics`` needs, so that Trainer never gathers a whole vocabulary."""
        raise NotImplementedError

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics, in the form that ``transformers.Trainer`` expects."""
        raise NotImplementedError

    def score(self, model: PreTrainedModel, batch_size: int) -> dict[str, float]:
        """Metrics that need more than predictions, such as those of generated text; called at each evaluation."""
        return {}
