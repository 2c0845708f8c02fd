"""SafeCallback: one line in a script that uses transformers' Trainer or TRL."""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..config import SafeConfig
from ..errors import RunError
from ..journal import Journal
from ..model.draw import samples_of
from ..safe import Safe

__all__ = ["SafeCallback"]


class SafeCallback(TrainerCallback, ExportableState):
    """Selective adapter freezing in a Trainer::

        trainer = Trainer(model=peft_model, ..., callbacks=[SafeCallback()])

    The probe is drawn from the train dataloader's dataset. ``safe/...`` scalars appear in the Trainer's logs.
    The adapter is saved by the Trainer, in PEFT's own format. At the end of training the model is as it was,
    but for the trained weights. Checkpoints carry the state of the freezing; ``resume_from_checkpoint`` takes it
    up again.

    Args:
        config: settings; the defaults need no tuning.
        probe: batches to measure scores on, if not drawn from the train dataloader.
        journal: path of the run journal (JSON Lines); None keeps it in ``callback.safe.journal.events``.
    """

    def __init__(
        self,
        config: SafeConfig | None = None,
        probe: Any = None,
        journal: Journal | str | os.PathLike[str] | None = None,
    ) -> None:
        self.config = config
        self.probe = probe
        self.journal = journal
        self.safe: Safe | None = None

    def state(self) -> dict[str, Any]:
        """What the Trainer keeps in ``trainer_state.json``."""
        return {
            "args": {},
            "attributes": {"saved": self.safe.state_dict() if self.safe is not None else None},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the model before step 0; nothing of the run changes yet."""
        if args.n_gpu > 1:
            raise RunError(
                f"The Trainer would spread the model over {args.n_gpu} GPUs by nn.DataParallel.",
                cause="Its replicas share Python objects with the original, which a frozen prefix changes.",
                fix="CUDA_VISIBLE_DEVICES=0 python ...",
            )
        self.safe = Safe(
            kwargs["model"],
            self.config,
            optimizer=kwargs["optimizer"],
            probe=kwargs["train_dataloader"] if self.probe is None else self.probe,
            total_steps=state.max_steps,
            batch_size=args.train_batch_size,
            samples_per_step=args.train_batch_size * args.gradient_accumulation_steps,
            samples_per_epoch=samples_of(kwargs["train_dataloader"]),
            journal=self.journal,
        )
        # A checkpoint of a run without this callback knows nothing of it, and the next save would fail on that.
        known: Any = state.stateful_callbacks
        entry = known.setdefault(type(self).__name__, self.state())
        if isinstance(entry, list):
            self.safe.close()
            raise RunError(
                f"This Trainer has {len(entry)} {type(self).__name__}s.",
                cause="Each would freeze the same adapters by scores of its own.",
                fix="Pass one: callbacks=[SafeCallback()]",
            )
        saved = entry.get("attributes", {}).get("saved")
        if saved is not None and state.global_step > 0:
            self.safe.load_state_dict(saved)
        else:
            self.safe.steps = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure and freeze, where it is time to."""
        if self.safe is not None:
            self.safe.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add ``safe/...`` to training logs, and to the history that the Trainer has just written."""
        if self.safe is None or logs is None or "loss" not in logs:
            return
        scalars = self.safe.logs()
        logs.update(scalars)
        if state.log_history:
            state.log_history[-1].update(scalars)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was, but for the trained weights."""
        if self.safe is not None:
            self.safe.close()
