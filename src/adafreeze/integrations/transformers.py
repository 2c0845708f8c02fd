"""SafeCallback: one line in a script that uses transformers' Trainer or TRL."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.trainer_utils import has_length

from ..config import SafeConfig
from ..decide.policy import POLICIES
from ..decide.scores import SCORES
from ..errors import AdafreezeError, ConfigError, ProbeError, RunError, note, warn
from ..journal import Journal
from ..loop.preflight import warn_compiled
from ..loop.safe import Safe
from ..measure.draw import MOST_SAMPLES, samples_of, train_samples
from ..model.batch import arguments, called_by_column, packed, rows_of, unpacked
from ..model.patches import forward_pre_hook
from .texts import TextColumns

if TYPE_CHECKING:
    from transformers import Trainer  # which imports datasets

__all__ = ["SafeCallback", "has_callback", "output_folder"]


class SafeCallback(TrainerCallback, ExportableState):
    """Selective adapter freezing in a Trainer:

        trainer = Trainer(model=peft_model, ..., callbacks=[SafeCallback()])

    The probe is drawn from the train dataloader's dataset. If that is a stream, or differs from what the model gets
    (TRL's GRPO generates it, the loss of a cross-encoder makes pairs), the probe is what the model gets in the first
    step. ``safe/...`` scalars appear in the Trainer's logs and in all trackers. The Trainer saves the adapter in PEFT's
    own format. After training only the weights of the model differ. Checkpoints contain the state of the freezing;
    ``resume_from_checkpoint`` restores it. With ``restore_callback_states_from_checkpoint=True`` the Trainer replaces
    this callback by one with the config, probe and journal of the checkpoint.

    Args:
        config: settings; the defaults need no tuning. A mapping of fields is accepted too.
        probe: batches to measure scores on; default: see above.
        journal: a path or a Journal; None keeps events in ``callback.safe.journal.events``.

    Raises:
        ConfigError: ``config`` is a mapping with unknown names or values, or with a function that a checkpoint cannot
            contain.
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
        self._recorder: _BatchRecorder | None = None
        self._start: Callable[..., Safe]

    def state(self) -> dict[str, Any]:
        """The entry in ``trainer_state.json``: arguments for the same callback, and the state of its run.

        The Trainer may set the "attributes" on a new callback, so their names differ from all names used here.
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
                # Recorded batches cannot be drawn again.
                "seen": packed(chunks) if chunks is not None and self._recorder else None,
            },
        }

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start Safe before step 0, or restore it."""
        if args.n_gpu > 1:
            raise RunError(
                f"The Trainer would spread the model over {args.n_gpu} GPUs by nn.DataParallel, whose replicas do not "
                "work with a frozen prefix.",
                fix="CUDA_VISIBLE_DEVICES=0 python ..., or torchrun for all GPUs",
            )
        name = type(self).__name__
        callbacks = _running_callbacks()
        if (count := sum(isinstance(callback, SafeCallback) for callback in callbacks)) > 1:
            raise RunError(f"This Trainer has {count} {name}s.", fix="Pass one: callbacks=[SafeCallback()]")
        callbacks.sort(key=lambda callback: callback is not self)  # before the trackers, which then get our scalars
        self._release()  # after an interrupted train()
        self.safe = self._recorder = None
        model = kwargs.get("st_model") or kwargs["model"]  # SetFit passes an object around it as "model"
        if args.torch_compile and self.config is not None and self.config.offload in ("cpu", "disk"):
            warn_compiled(self.config)
            self.config = self.config.changed(offload="off")
        self._start = partial(
            Safe,
            model,
            optimizer=kwargs["optimizer"],
            total_steps=state.max_steps,
            batch_size=args.train_batch_size,
            samples_per_step=_batch_samples(args, kwargs["train_dataloader"]) * args.gradient_accumulation_steps,
            journal=self.journal,
        )
        known: Any = state.stateful_callbacks
        resumes = state.global_step > 0 and name in known  # at step 0 an entry is of an earlier train()
        kept = _attributes(known[name]) if resumes else {}
        if kept.get("seen") is not None:
            self._recorder = _BatchRecorder(model, unpacked(kept["seen"]))
            self._start_recorded()
        else:
            self._draw(model, kwargs["train_dataloader"])
        known.setdefault(name, self.state())  # saving fails without an entry
        if self.safe is None or state.global_step == 0:
            return
        if not resumes:
            self.safe.steps = state.global_step
            note("The checkpoint is from a run without adafreeze: scores are measured from now on.")
            return
        try:
            self.safe.load_state_dict(kept.get("saved", {}))
        except AdafreezeError:
            self.safe.close()
            raise

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Measure and freeze when due."""
        if self.safe is None and self._recorder is not None:
            try:
                self._start_recorded().steps = state.global_step - 1
            except ProbeError as error:
                self._recorder = None
                warn(f"{error.fact} Training continues without freezing.", fix=error.fix)
        if self.safe is not None:
            self.safe.step()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add ``safe/...`` to training logs, and to the history that the Trainer has just written."""
        if self.safe is None or logs is None or not logs.keys() & {"loss", "embedding_loss"}:  # the latter: SetFit
            return
        scalars = self.safe.logs()
        logs.update(scalars)
        if state.log_history:
            state.log_history[-1].update(scalars)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Restore the model except for its weights."""
        self._release()

    def _release(self) -> None:
        if self._recorder is not None:
            self._recorder.remove()
        if self.safe is not None:
            self.safe.close()

    def _draw(self, model: nn.Module, dataloader: Any) -> None:
        """Start with a probe from the dataloader, or record the first step."""
        budget = None if self.config is None else self.config.memory_budget
        columns = called_by_column(model)
        if columns and budget is not None:
            raise ConfigError(
                f"SafeConfig.memory_budget is {budget!r}, but a budget counts one call of the model in a step, and "
                "losses of sentence-transformers make several.",
                fix="SafeConfig(freeze_at_start=0.5), which lowers the peak from the first step on.",
            )
        try:
            source = TextColumns(dataloader, model) if columns else dataloader
            probe = train_samples(source) if self.probe is None else self.probe
            self.safe = self._start(self.config, probe=probe, samples_per_epoch=samples_of(source))
        except ProbeError as error:
            if self.probe is not None:
                raise
            if budget is not None:
                raise ProbeError(
                    f"{error.fact} A memory budget needs samples before the first step, as the model gets them.",
                    fix='SafeCallback(..., probe=[tokenizer(texts, padding=True, return_tensors="pt")])',
                ) from error
            self._recorder = _BatchRecorder(model)
            note(f"Scores are measured on what the model gets in the first step. {error.fact}")

    def _start_recorded(self) -> Safe:
        assert self._recorder is not None
        self._recorder.remove()
        # Without samples_per_epoch, since dataset rows may be prompts or pairs: the cache itself detects repetition.
        self.safe = self._start(self.config, probe=self._recorder.batches)
        with self._recorder.initial_weights():
            self.safe.decider.begin()
        return self.safe


def has_callback(trainer: Trainer) -> bool:
    """Whether a SafeCallback was given to ``trainer`` already."""
    return any(isinstance(callback, SafeCallback) for callback in trainer.callback_handler.callbacks)


def output_folder(trainer: Trainer) -> Path:
    """Where ``trainer`` writes, and so the journal of a callback that is added to it."""
    return Path(str(trainer.args.output_dir)).expanduser()


class _BatchRecorder:
    """Copies the inputs of training passes to the host, for as many samples as a probe has at most.

    Args:
        model: that the host library calls.
        batches: recorded in an earlier process.

    Attributes:
        batches: inputs by the names of forward's parameters; a dictionary of features stays one under its name.
    """

    def __init__(self, model: nn.Module, batches: Sequence[dict[str, Any]] = ()) -> None:
        self.batches = list(batches)
        self._samples = 0
        self._model = model
        # The inputs of the first step are available only after it, when the adapters have changed.
        self._initial = {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and type(parameter.detach()) is Tensor
        }
        self._handle = forward_pre_hook(model, self._record)

    def remove(self) -> None:
        """Stop recording."""
        self._handle.remove()

    @contextmanager
    def initial_weights(self) -> Iterator[None]:
        """Restore the weights from before recording within the ``with`` block."""
        parameters = dict(self._model.named_parameters())
        now = {name: parameters[name].detach().clone() for name in self._initial}
        try:
            for name, before in self._initial.items():
                parameters[name].data.copy_(before)
            yield
        finally:
            for name, value in now.items():
                parameters[name].data.copy_(value)

    def _record(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or not torch.is_grad_enabled() or self._samples >= MOST_SAMPLES:
            return
        inputs = _on_host(arguments(model, args, kwargs))
        self._samples += rows_of(inputs)
        self.batches.append(inputs)


def _on_host(value: Any) -> Any:
    """Tensors, plain values, and dictionaries and lists of them; drops all else."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: _on_host(item) for name, item in value.items() if _is_plain(item)}
    if isinstance(value, (list, tuple)):
        return [_on_host(item) for item in value]
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (Tensor, Mapping, bool, int, float, str))


def _batch_samples(args: TrainingArguments, dataloader: Any) -> int:
    """Samples of one batch on one rank: the batch size, unless the dataloader's own sampler packs more into a batch.

    Axolotl's does: a batch has as many samples as fit into ``train_batch_size`` times the sequence length.
    """
    samples = samples_of(dataloader)
    batches = len(dataloader) * args.world_size if samples and has_length(dataloader) else 0
    average = samples / batches if samples and batches else 0
    return round(average) if average > args.train_batch_size else args.train_batch_size


def _running_callbacks() -> list[TrainerCallback]:
    """The callback list of the Trainer that is calling us, to be modified in place; empty if there is none.

    A hack: it reads the CallbackHandler from the frames of the callers. No event passes it (transformers 4.57 to 5.23),
    callbacks run in the order given with those of ``report_to`` first, and a user passes only SafeCallback().
    """
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(handler := frame.f_locals.get("self"), CallbackHandler):
            return handler.callbacks
        frame = frame.f_back
    return []


def _attributes(entry: Any) -> Mapping[str, Any]:
    """What ``SafeCallback.state`` saved; empty, which ``Safe`` rejects, if the checkpoint was edited."""
    attributes = entry.get("attributes") if isinstance(entry, Mapping) else None
    return attributes if isinstance(attributes, Mapping) else {}


def _config_to_json(config: SafeConfig) -> dict[str, Any]:
    """The fields that were set; a user's function as ``{"function": name}``."""
    given = {name: value for name, value in config.to_dict().items() if name in config.given}
    for name, own in (("policy", POLICIES), ("score", SCORES)):
        function = getattr(config, name)
        if name in given and callable(function) and own.get(given[name]) is not function:
            given[name] = {"function": given[name]}
    return given


def _config_from_json(given: Mapping[str, Any]) -> SafeConfig:
    """The config of ``_config_to_json``.

    Raises:
        ConfigError: it had a function.
    """
    for name in ("policy", "score"):
        if isinstance(given.get(name), Mapping):
            raise ConfigError(
                f"SafeConfig.{name} was the function {given[name]['function']!r} in the run that wrote the checkpoint, "
                "and a checkpoint contains only its name.",
                fix="TrainingArguments(restore_callback_states_from_checkpoint=False), and "
                f"callbacks=[SafeCallback(SafeConfig({name}=...))] with the function.",
            )
    return SafeConfig.from_dict(given)


def _packed(batches: Any) -> dict[str, Any] | None:
    """Batches as JSON values; None if impossible, because saving must not fail."""
    try:
        found = packed(batches)
        json.dumps(found)
    except (TypeError, ValueError, RuntimeError):
        return None
    return found
