"""The Trainer of the commands: what it costs is counted, and what it logs goes into the journal."""

from __future__ import annotations

import time
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
        meter: an ``adafreeze.costs.meter.Meter``; None counts nothing.
        score: ``score(model, batch_size)``, more metrics of an evaluation; None: no more.
        args, kwargs: for ``transformers.Trainer``.
    """

    def __init__(self, *args: Any, meter: Any = None, score: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.meter = meter
        self.score = score

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, and the CPU seconds of this process: other load on the machine does not lengthen those."""
        begun = time.process_time()
        output = super().train(*args, **kwargs)
        output.metrics["train_cpu_seconds"] = time.process_time() - begun
        return output

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
        meter: of the run. A log of training, which says how long a step took, then also says what it cost.
    """

    def __init__(
        self,
        journal: Journal,
        resumed: Mapping[str, Any] | None = None,
        *,
        rewinds: bool = True,
        meter: Meter | None = None,
    ) -> None:
        self.journal = journal
        self.resumed = resumed
        self.rewinds = rewinds
        self.meter = meter
        self._steps = self._seconds = self._begun = 0.0
        self._metered = 0

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

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The clock of a step, which loading data and evaluating are no part of."""
        self._begun = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What it took."""
        self._seconds += time.perf_counter() - self._begun
        self._steps += 1

    def _costs(self) -> dict[str, float]:
        """Of the steps since the last log, on average: seconds and FLOPs of a step, saved bytes of a micro-step."""
        if not self._steps:
            return {}
        found = {"seconds_per_step": self._seconds / self._steps}
        if self.meter is not None:
            series = self.meter.series(self._metered)
            self._metered += len(series)
            found["flops_per_step"] = sum(cost.flops for cost in series) / self._steps
            found["saved_bytes"] = sum(cost.saved_bytes for cost in series) / max(1, len(series))
        self._steps = self._seconds = 0.0
        return found

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
            costs = self._costs() if "loss" in (logs or {}) else {}
            self.journal.write("log", **{"step": state.global_step, **(logs or {}), **costs})


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
