"""SafeCallback: one line in a script that uses transformers' Trainer or TRL."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState

from ..config import SafeConfig
from ..errors import AdafreezeError, ProbeError, RunError, note, warn
from ..journal import Journal
from ..model.draw import samples_of, train_samples
from ..model.packing import packed, unpacked
from ..safe import Safe
from ._seen import Seen

__all__ = ["SafeCallback"]


class SafeCallback(TrainerCallback, ExportableState):
    """Selective adapter freezing in a Trainer:

        trainer = Trainer(model=peft_model, ..., callbacks=[SafeCallback()])

    The probe is drawn from the train dataloader's dataset; where that can only be gone through, or holds something else
    than the model gets (TRL's GRPO generates it, sentence-transformers' loss takes it apart), from what the model gets
    in the first step. ``safe/...`` scalars appear in the Trainer's
    logs and in every tracker of ``report_to``. The adapter is saved by the Trainer, in PEFT's own format. At the end of
    training the model is as it was, but for the trained weights. Checkpoints carry the state of the freezing;
    ``resume_from_checkpoint`` takes it up again.

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
        self._seen: Seen | None = None
        self._start: Callable[..., Safe]

    def state(self) -> dict[str, Any]:
        """What the Trainer keeps in ``trainer_state.json``."""
        return {
            "args": {},
            "attributes": {
                "saved": self.safe.state_dict(random_state=False) if self.safe is not None else None,
                # Nobody can draw it a second time.
                "probe": packed(self.safe.decider.probe.chunks) if self.safe is not None and self._seen else None,
            },
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the model before step 0, and freeze what is to be frozen from the start."""
        if args.n_gpu > 1:
            raise RunError(
                f"The Trainer would spread the model over {args.n_gpu} GPUs by nn.DataParallel.",
                cause="Its replicas share Python objects with the original, which a frozen prefix changes.",
                fix="CUDA_VISIBLE_DEVICES=0 python ...",
            )
        self._go_first()
        self._start = partial(
            Safe,
            kwargs["model"],
            optimizer=kwargs["optimizer"],
            total_steps=state.max_steps,
            batch_size=args.train_batch_size,
            samples_per_step=args.train_batch_size * args.gradient_accumulation_steps,
            journal=self.journal,
        )
        if self.safe is not None:  # of a train() that was interrupted
            self.safe.close()
        self.safe = self._seen = None
        known: Any = state.stateful_callbacks
        kept = _attributes(known.get(type(self).__name__)).get("probe")
        if kept is not None:
            self._seen = Seen(kwargs["model"], unpacked(kept))
            self._start_with_seen()
        else:
            self._draw(kwargs["model"], kwargs["train_dataloader"])
        # A checkpoint of a run without this callback knows nothing of it, and the next save would fail on that.
        is_known = type(self).__name__ in known
        entry = known.setdefault(type(self).__name__, self.state())
        if isinstance(entry, list):
            self.on_train_end(args, state, control)
            raise RunError(
                f"This Trainer has {len(entry)} {type(self).__name__}s.",
                cause="Each would freeze the same adapters by scores of its own.",
                fix="Pass one: callbacks=[SafeCallback()]",
            )
        if state.global_step == 0 or self.safe is None:
            return
        if not is_known:
            self.safe.steps = state.global_step
            note("The checkpoint is of a run without adafreeze: scores are measured from here on.")
            return
        try:
            self.safe.load_state_dict(_attributes(entry).get("saved", {}))
        except AdafreezeError:
            self.safe.close()
            raise

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure and freeze, where it is time to."""
        if self.safe is None and self._seen is not None:
            try:
                self._start_with_seen().steps = state.global_step - 1
            except ProbeError as error:
                self._seen = None
                warn(error.fact, cause=error.cause, fix=error.fix + " Training goes on, without freezing.")
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
        if self._seen is not None:
            self._seen.remove()
        if self.safe is not None:
            self.safe.close()

    def _go_first(self) -> None:
        """Before the trackers, so that they get what is added to the logs.

        Callbacks are called in the order in which they were given, those of ``report_to`` before a script's own, and
        no event is given the list: it is read off the caller.
        """
        frame = inspect.currentframe()
        while frame is not None:
            caller = frame.f_locals.get("self")
            if isinstance(caller, CallbackHandler):
                caller.callbacks.sort(key=lambda callback: callback is not self)
                return
            frame = frame.f_back

    def _draw(self, model: nn.Module, dataloader: Any) -> None:
        """Start with a probe from the dataloader; where it holds something else than the model gets, later."""
        try:
            probe = train_samples(dataloader) if self.probe is None else self.probe
            self.safe = self._start(self.config, probe=probe, samples_per_epoch=samples_of(dataloader))
        except ProbeError as error:
            if self.probe is not None:
                raise
            if self.config is not None and self.config.memory_budget is not None:
                raise ProbeError(
                    error.fact,
                    cause="A memory budget is checked before the first step, on samples as the model gets them. "
                    + error.cause,
                    fix='SafeCallback(..., probe=[tokenizer(texts, padding=True, return_tensors="pt")])',
                ) from error
            self._seen = Seen(model)
            note(f"Scores are measured on what the model gets in the first step. {error.fact}")

    def _start_with_seen(self) -> Safe:
        assert self._seen is not None
        self._seen.remove()
        # No samples_per_epoch: those of the dataset may be prompts, or pairs. The cache itself sees what comes again.
        self.safe = self._start(self.config, probe=self._seen.batches)
        with self._seen.as_it_began():
            self.safe.decider.begin()
        return self.safe


def _attributes(entry: Any) -> Mapping[str, Any]:
    """What ``SafeCallback.state`` kept; nothing if somebody has changed the entry."""
    attributes = entry.get("attributes") if isinstance(entry, Mapping) else None
    return attributes if isinstance(attributes, Mapping) else {}
