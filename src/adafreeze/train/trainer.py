"""The Trainer of the commands: counts costs and writes its logs into the journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from ..costs.meter import Meter
from ..journal import Journal

__all__ = ["JournalCallback", "MeteredTrainer", "RankAllocationCallback", "meter_of"]


class MeteredTrainer(Trainer):
    """A Trainer that runs every micro-step inside ``meter.step(inputs)``.

    Args:
        meter: None counts nothing.
        score: ``score(model, batch_size)`` returns further metrics of an evaluation.
        args, kwargs: for ``transformers.Trainer``.
    """

    def __init__(self, *args: Any, meter: Meter | None = None, score: Callable | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.meter = meter
        self.score = score

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, and the CPU seconds of this process, which other load on the machine does not change."""
        start = time.process_time()
        output = super().train(*args, **kwargs)
        output.metrics["train_cpu_seconds"] = time.process_time() - start
        return output

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with the metrics of ``score``."""
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
    """A Meter that counts again when freezing or one of ``kinds`` changes the cost of a step."""

    def now(name: str, default: Any) -> Any:
        safe = getattr(safe_callback, "safe", None)
        return default if safe is None else getattr(safe, name)

    return Meter(model, lambda: (now("state_key", ()), *(kind() for kind in kinds)), lambda: now("nested_flops", 0))


@dataclass(eq=False)
class JournalCallback(TrainerCallback, ExportableState):
    """Write the Trainer's logs (loss, learning rate, evaluations) into the journal as ``log`` events.

    A resumed run first cuts off the events after its checkpoint, because it repeats those steps.

    Args:
        journal: of the run.
        resumed: fields of the ``resume`` event; None for a run from step 0.
        rewinds: False if a SafeCallback in front of this one cuts the journal.
        meter: adds the costs of a step to each training log.
    """

    journal: Journal
    resumed: Mapping[str, Any] | None = None
    rewinds: bool = True
    meter: Meter | None = None
    _start: float = field(default=0.0, init=False)
    _seconds: float = field(default=0.0, init=False)  # since the last log
    _steps: int = field(default=0, init=False)  # since the last log
    _metered: int = field(default=0, init=False)  # micro-steps of the meter that are logged

    def state(self) -> dict[str, Any]:
        """For the Trainer's ``trainer_state.json``."""
        return {"args": {}, "attributes": {"mark": self.journal.mark()}}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Continue the journal at the checkpoint."""
        known: Any = state.stateful_callbacks
        entry = known.setdefault(type(self).__name__, self.state())
        if self.resumed is not None:
            if self.rewinds:
                self.journal.rewind(entry["attributes"]["mark"])
            self.journal.write("resume", step=state.global_step, **self.resumed)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock; loading data and evaluation are outside."""
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self._seconds += time.perf_counter() - self._start
        self._steps += 1

    def _costs(self) -> dict[str, float]:
        """Means since the last log: seconds and FLOPs of a step, saved bytes of a micro-step."""
        if not self._steps:
            return {}
        found = {"seconds_per_step": self._seconds / self._steps}
        if self.meter is not None:
            series = self.meter.costs[self._metered :]
            self._metered += len(series)
            found["flops_per_step"] = sum(cost.flops for cost in series) / self._steps
            found["saved_bytes"] = sum(cost.saved_bytes for cost in series) / max(1, len(series))
        self._steps, self._seconds = 0, 0.0
        return found

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write one event per log."""
        if state.is_world_process_zero:
            costs = self._costs() if "loss" in (logs or {}) else {}
            self.journal.write("log", **{"step": state.global_step, **(logs or {}), **costs})


class RankAllocationCallback(TrainerCallback):
    """Call ``update_and_allocate`` after each optimizer step, which AdaLoRA and AdaMSS need to move their ranks.

    The Trainer does not call it.
    """

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Gradients still exist here; in ``on_step_end`` they are gone."""
        allocate = getattr(getattr(kwargs["model"], "base_model", None), "update_and_allocate", None)
        if callable(allocate):
            allocate(state.global_step + 1)
