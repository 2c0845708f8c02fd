"""The Trainer of the commands: what it costs is counted, and what it logs goes into the journal."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..costs.meter import Meter
from ..journal import Journal

__all__ = ["JournalCallback", "MeteredTrainer", "RankAllocationCallback", "meter_of"]


class MeteredTrainer(Trainer):
    """A Trainer whose every micro-step runs inside ``meter.step(inputs)``.

    Args:
        meter: a :class:`adafreeze.costs.meter.Meter`; None counts nothing.
        score: ``score(model, batch_size)``, more metrics of an evaluation; None: no more.
        args, kwargs: for :class:`transformers.Trainer`.
    """

    def __init__(self, *args: Any, meter: Any = None, score: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.meter = meter
        self.score = score

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, and what ``score`` finds."""
        output = super().evaluation_loop(*args, **kwargs)
        if self.score is not None and output.metrics is not None:
            prefix = kwargs.get("metric_key_prefix", "eval")
            found = self.score(self.model, self.args.eval_batch_size)
            output.metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        return output

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward pass of one micro-step, counted."""
        if self.meter is None:
            return super().training_step(model, inputs, *args, **kwargs)
        with self.meter.step(inputs):
            return super().training_step(model, inputs, *args, **kwargs)


def meter_of(model: Any, safe_callback: Any, kinds: Sequence[Callable[[], Hashable]] = ()) -> Meter:
    """A Meter that knows when freezing, or one of ``kinds``, changes what a step costs; the callback may be None."""

    def now(name: str, without: Any) -> Any:
        safe = getattr(safe_callback, "safe", None)
        return without if safe is None else getattr(safe, name)

    return Meter(model, lambda: (now("state_key", ()), *(kind() for kind in kinds)), lambda: now("nested_flops", 0))


class JournalCallback(TrainerCallback, ExportableState):
    """Writes what the Trainer logs (loss, learning rate, evaluations) into the journal: ``log`` events.

    In a resumed run what the journal holds of steps after the checkpoint is cut off: they come again.

    Args:
        journal: of the run.
        resumed: fields of the ``resume`` event; None for a run that starts anew.
        rewinds: whether to cut it here; SafeCallback does it where there is one, in front of this one.
    """

    def __init__(self, journal: Journal, resumed: Mapping[str, Any] | None = None, *, rewinds: bool = True) -> None:
        self.journal = journal
        self.resumed = resumed
        self.rewinds = rewinds

    def state(self) -> dict[str, Any]:
        """What the Trainer keeps in ``trainer_state.json``."""
        return {"args": {}, "attributes": {"mark": self.journal.mark()}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on where the checkpoint was written."""
        known: Any = state.stateful_callbacks
        entry = known.setdefault(type(self).__name__, self.state())
        if self.resumed is not None:
            if self.rewinds:
                self.journal.rewind(entry["attributes"]["mark"])
            self.journal.write("resume", step=state.global_step, **self.resumed)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """One event a log."""
        if state.is_world_process_zero:
            self.journal.write("log", **{"step": state.global_step, **(logs or {})})


class RankAllocationCallback(TrainerCallback):
    """Calls ``update_and_allocate`` after each optimizer step: AdaLoRA and AdaMSS ask it of the loop.

    Without it they never move a rank, and the Trainer does not call it.
    """

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Here gradients still exist; ``on_step_end`` would be too late."""
        allocate = getattr(getattr(kwargs["model"], "base_model", None), "update_and_allocate", None)
        if callable(allocate):
            allocate(state.global_step + 1)
