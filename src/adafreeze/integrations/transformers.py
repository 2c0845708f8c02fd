"""SafeCallback: one line in a script that uses transformers' Trainer or TRL."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState

from ..config import SafeConfig
from ..decide.policy import POLICIES
from ..decide.scores import SCORES
from ..errors import AdafreezeError, ConfigError, ProbeError, RunError, note, warn
from ..journal import Journal
from ..loop.safe import Safe
from ..measure.draw import samples_of, train_samples
from ..model.packing import packed, unpacked
from ._batches import BatchRecorder

__all__ = ["SafeCallback"]


class SafeCallback(TrainerCallback, ExportableState):
    """Selective adapter freezing in a Trainer:

        trainer = Trainer(model=peft_model, ..., callbacks=[SafeCallback()])

    The probe is drawn from the train dataloader's dataset; where that can only be gone through, or holds something else
    than the model gets (TRL's GRPO generates it, sentence-transformers' loss takes it apart), from what the model gets
    in the first step. ``safe/...`` scalars appear in the Trainer's
    logs and in every tracker of ``report_to``. The adapter is saved by the Trainer, in PEFT's own format. At the end of
    training the model is as it was, but for the trained weights. Checkpoints carry the state of the freezing;
    ``resume_from_checkpoint`` takes it up again. With ``restore_callback_states_from_checkpoint=True`` Trainer drops
    the callback that it was given, and makes one with the config, probe and journal of the checkpoint.

    Args:
        config: settings; the defaults need no tuning. Or a mapping of those that are given, as a checkpoint keeps it.
        probe: batches to measure scores on, if not drawn from the train dataloader; or as a checkpoint keeps them.
        journal: path of the run journal (JSON Lines); None keeps it in ``callback.safe.journal.events``.

    Raises:
        ConfigError: ``config`` is a mapping with unknown names or values, or with a function that a checkpoint cannot
            hold.
    """

    def __init__(
        self,
        config: SafeConfig | Mapping[str, Any] | None = None,
        probe: Any = None,
        journal: Journal | str | os.PathLike[str] | None = None,
    ) -> None:
        self.config = _config_from_json(config) if isinstance(config, Mapping) else config
        self.probe = unpacked(probe) if isinstance(probe, Mapping) and probe.keys() == {"tensors", "rest"} else probe
        self.journal = journal
        self.safe: Safe | None = None
        self._seen: BatchRecorder | None = None
        self._start: Callable[..., Safe]

    def state(self) -> dict[str, Any]:
        """What the Trainer keeps in ``trainer_state.json``: what makes the same callback, and the state of its run.

        The Trainer may set the attributes on a new callback, so none of them has the name of one that is used.
        """
        journal = self.journal.path if isinstance(self.journal, Journal) else self.journal
        chunks = self.safe.decider.probe.chunks if self.safe is not None else None
        return {
            "args": {
                "config": _config_to_json(self.config) if self.config is not None else None,
                "probe": _packed(chunks) if chunks is not None and self.probe is not None else None,
                "journal": os.fspath(journal) if journal is not None else None,
            },
            "attributes": {
                "saved": self.safe.state_dict(random_state=False) if self.safe is not None else None,
                # Nobody can draw it a second time.
                "seen": packed(chunks) if chunks is not None and self._seen else None,
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
        self._release()  # of a train() that was interrupted
        self.safe = self._seen = None
        self._start = partial(
            Safe,
            kwargs["model"],
            optimizer=kwargs["optimizer"],
            total_steps=state.max_steps,
            batch_size=args.train_batch_size,
            samples_per_step=args.train_batch_size * args.gradient_accumulation_steps,
            journal=self.journal,
        )
        known: Any = state.stateful_callbacks
        name = type(self).__name__
        # Of a run that starts anew, what an earlier train() left there is nothing to go on from.
        resumes = state.global_step > 0 and name in known
        kept = _attributes(known[name]) if resumes else {}
        seen = kept.get("seen", kept.get("probe"))  # "probe" up to 0.1
        if seen is not None:
            self._seen = BatchRecorder(kwargs["model"], unpacked(seen))
            self._start_with_seen()
        else:
            self._draw(kwargs["model"], kwargs["train_dataloader"])
        # A checkpoint of a run without this callback knows nothing of it, and the next save would fail on that.
        known.setdefault(name, self.state())
        if self.safe is None or state.global_step == 0:
            return
        if not resumes:
            self.safe.steps = state.global_step
            note("The checkpoint is of a run without adafreeze: scores are measured from here on.")
            return
        try:
            self.safe.load_state_dict(kept.get("saved", {}))
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
                warn(error.fact, fix=error.fix + " Training goes on, without freezing.")
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
        self._release()

    def _release(self) -> None:
        if self._seen is not None:
            self._seen.remove()
        if self.safe is not None:
            self.safe.close()

    def _go_first(self) -> None:
        """Before the trackers, so that they get what is added to the logs.

        Callbacks are called in the order in which they were given, those of ``report_to`` before a script's own, and
        no event is given the list: it is read off the caller.

        Raises:
            RunError: there is another one; a checkpoint of one would not show it.
        """
        frame = inspect.currentframe()
        while frame is not None:
            caller = frame.f_locals.get("self")
            if isinstance(caller, CallbackHandler):
                count = sum(isinstance(callback, SafeCallback) for callback in caller.callbacks)
                if count > 1:
                    raise RunError(
                        f"This Trainer has {count} {type(self).__name__}s.",
                        cause="Each would freeze the same adapters by scores of its own.",
                        fix="Pass one: callbacks=[SafeCallback()]",
                    )
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
                    cause="A memory budget is checked before the first step, on samples as the model gets them.",
                    fix='SafeCallback(..., probe=[tokenizer(texts, padding=True, return_tensors="pt")])',
                ) from error
            self._seen = BatchRecorder(model)
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


def _config_to_json(config: SafeConfig) -> dict[str, Any]:
    """The fields that were given; functions that are none of adafreeze's own as ``{"function": name}``."""
    values = config.to_dict()
    given = {name: values[name] for name in values if name in config.given}
    for name, own in (("policy", POLICIES), ("score", SCORES)):
        function = getattr(config, name)
        if name in given and callable(function) and own.get(given[name]) is not function:
            given[name] = {"function": given[name]}
    return given


def _config_from_json(given: Mapping[str, Any]) -> SafeConfig:
    """What ``_config_to_json`` was given, as far as that can be.

    Raises:
        ConfigError: a function was given that adafreeze has not.
    """
    values = dict(given)
    for name, own in (("policy", POLICIES), ("score", SCORES)):
        function = values[name].get("function") if isinstance(values.get(name), Mapping) else None
        if function is None:
            continue
        fix = (
            "TrainingArguments(restore_callback_states_from_checkpoint=False), and "
            f"callbacks=[SafeCallback(SafeConfig({name}=...))] with the function."
        )
        if function not in own:
            raise ConfigError(
                f"SafeConfig.{name} was the function {function!r} in the run that wrote the checkpoint.",
                cause="restore_callback_states_from_checkpoint=True makes the callback from what the checkpoint holds, "
                "which is a function's name, not its code.",
                fix=fix,
            )
        warn(
            f"SafeConfig.{name} was a function named {function!r} in the run that wrote the checkpoint; now it is "
            "adafreeze's own of that name.",
            cause="A checkpoint holds a function's name, not its code.",
            fix=fix,
        )
        values[name] = function
    return SafeConfig.from_dict(values)


def _packed(batches: Any) -> dict[str, Any] | None:
    """Batches as JSON values; None of what cannot be: saving must not fail on it."""
    # Copies: one batch may be there twice, and safetensors refuses tensors that share their memory.
    copies = [{name: v.clone() if isinstance(v, Tensor) else v for name, v in batch.items()} for batch in batches]
    try:
        text = packed(copies)
        json.dumps(text)
    except (TypeError, ValueError, RuntimeError):
        return None
    return text
