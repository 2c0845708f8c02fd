"""Training shared by all arms."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from transformers import Trainer, TrainingArguments

BATCH, EPOCHS, RATE = 4, 3, 1e-3


def recording(kind: type[Trainer], losses: list[float]) -> type[Trainer]:
    """A Trainer that also records the loss of each micro-batch."""

    class Recording(kind):  # type: ignore[misc, valid-type]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(*args, **kwargs)
            losses.append(float(result[0] if isinstance(result, tuple) else result))
            return result

    return Recording


def arguments(kind: type[TrainingArguments] = TrainingArguments, **more: Any) -> TrainingArguments:
    """The arguments of every arm."""
    return kind(
        os.path.join(tempfile.gettempdir(), "families-unused"),
        per_device_train_batch_size=BATCH,
        num_train_epochs=EPOCHS,
        learning_rate=RATE,
        seed=0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        log_level="error",
        **more,
    )
