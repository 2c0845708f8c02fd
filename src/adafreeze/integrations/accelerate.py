"""AcceleratedSafe: Safe in a training loop with Accelerate."""

from __future__ import annotations

import os
from typing import Any

from accelerate import Accelerator
from torch import nn

from ..config import SafeConfig
from ..journal import Journal
from ..loop.safe import Safe
from ..measure.draw import batch_size_of, samples_of, train_samples

__all__ = ["AcceleratedSafe"]


class AcceleratedSafe(Safe):
    """Safe for loops with Accelerate:

        model, optimizer, train_dataloader = accelerator.prepare(model, optimizer, train_dataloader)
        safe = AcceleratedSafe(accelerator, model, optimizer, train_dataloader, total_steps=max_train_steps)
        for batch in train_dataloader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
                safe.step()
        safe.close()

    ``step`` counts only when the optimizer steps. ``accelerator.save_state()`` and ``load_state()`` include its state.
    ``accelerator.log(safe.logs(), step=safe.steps)`` sends its scalars to the trackers.

    Args:
        accelerator: of the run.
        model: returned by ``accelerator.prepare``, as are the next two.
        optimizer: prepared.
        train_dataloader: prepared.
        config: settings; the defaults need no tuning.
        total_steps: optimizer steps of the whole run:
            ``ceil(len(train_dataloader) / accelerator.gradient_accumulation_steps) * epochs``.
        probe: batches to measure scores on; default: drawn from the train dataloader.
        journal: a path or a Journal; None keeps events in memory. Only rank 0 writes.

    Raises:
        AdafreezeError: as Safe.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        train_dataloader: Any,
        config: SafeConfig | None = None,
        *,
        total_steps: int,
        probe: Any = None,
        journal: Journal | str | os.PathLike[str] | None = None,
    ) -> None:
        self._accelerator = accelerator
        batch_size = batch_size_of(train_dataloader)
        super().__init__(
            model,
            config,
            optimizer=optimizer,
            probe=train_samples(train_dataloader) if probe is None else probe,
            total_steps=total_steps,
            batch_size=batch_size // accelerator.num_processes if accelerator.split_batches else batch_size,
            samples_per_epoch=samples_of(train_dataloader),
            journal=journal,
        )
        accelerator.register_for_checkpointing(self)

    def step(self) -> list[str]:
        """Call after the optimizer's step; returns the units frozen now.

        Raises:
            RunError: the ranks disagree on what is frozen.
        """
        return super().step() if self._accelerator.sync_gradients else []

    def state_dict(self, *, random_state: bool = False) -> dict[str, Any]:
        """The state as JSON values; Accelerate saves the random state of every rank itself."""
        return super().state_dict(random_state=random_state)
