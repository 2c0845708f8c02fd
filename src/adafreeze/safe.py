"""Safe: the loop that measures, decides, freezes, and writes down what it did."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ._guard import Guard
from ._observe import Observer
from .budget import open_budget
from .caching import Caching
from .config import SafeConfig
from .decide.policy import Situation, choose
from .decide.schedule import Settling, cubic_ramp, measurement_steps
from .errors import AdafreezeError, ConfigError, ProbeError, RunError
from .freeze import Freezer, Prefix
from .freeze.cache import Progress
from .journal import Journal
from .model import Probe, find_stacks, find_units
from .model.backends import PeftBackend
from .model.blocks import unwrap
from .model.draw import batch_size_of, keep_random_state, samples_of
from .model.flow import chains_of
from .model.units import units_along, warn_of_other_trainables
from .preflight import check_run, check_state, check_units, flows_of
from .scoring import Scorer

__all__ = ["Safe"]

STATE_VERSION = 1


class Safe:
    """Selective adapter freezing of a model that trains.

    ::

        safe = Safe(model, optimizer=optimizer, probe=train_dataloader, total_steps=len(train_dataloader) * epochs)
        for batch in train_dataloader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            safe.step()
        safe.close()

    Nothing about the run changes before the first freeze: no random state advances, no batch is taken, losses
    are the same to the last bit.

    Args:
        model: with PEFT adapters in its blocks.
        config: settings; the defaults need no tuning.
        optimizer: whose state for frozen adapters is freed.
        probe: where scores are measured: the train dataloader (its dataset and collator are used, it is not
            iterated), a batch, or an iterable of batches.
        total_steps: optimizer steps of the whole run.
        batch_size: samples of one micro-batch, by which a memory budget is checked before the run; if not given, that
            of the probe where it is a dataloader.
        samples_per_step: samples of one optimizer step; observed in the first step if not given.
        samples_per_epoch: samples of one pass over the data; if not given, those of the probe's dataset where it
            has a length.
        journal: a path or a Journal; None keeps the events in memory.

    Raises:
        ModelError: the model has no adapters by block.
        ProbeError: the probe holds nothing that the model takes.
        ConfigError: total_steps is not positive, or a unit to freeze by hand does not exist.
        RunError: freezing is not right yet for the run (several processes, DeepSpeed), or the memory budget too small.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SafeConfig | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        probe: Any,
        total_steps: int,
        batch_size: int | None = None,
        samples_per_step: int | None = None,
        samples_per_epoch: int | None = None,
        journal: Journal | str | os.PathLike[str] | None = None,
    ) -> None:
        from .env import environment  # here, or `python -m adafreeze.env` finds itself imported already

        self.config = config or SafeConfig()
        check_run(model, optimizer, total_steps)
        self.model = unwrap(model)
        self.total_steps = total_steps
        self.samples_per_step = samples_per_step
        self.samples_per_epoch = samples_per_epoch or samples_of(probe)
        self.steps = 0
        self.scores: dict[str, float] = {}
        self.warmup_end: int | None = None
        self.stacks = find_stacks(self.model)
        self.backend = PeftBackend(self.model)
        self.units = find_units(self.model, self.stacks, self.backend, self.config.granularity)
        warn_of_other_trainables(self.model, self.stacks, self.units)
        check_units(self.config.freeze, self.units)
        pad = getattr(getattr(self.model, "config", None), "pad_token_id", None)
        self._probe = Probe.draw(probe, self.config.probe_tokens, self.config.seed, pad)
        self.freezer = Freezer(self.units, self.backend, optimizer)
        flows = flows_of(self.model, self.stacks, self.units, self._probe)
        self.prefix = Prefix(self.model, self.stacks, flows, keep_dropout=self.config.prefix_dropout)
        self._chains = units_along(chains_of(flows), self.stacks, self.units)
        self._owns_journal = not isinstance(journal, Journal)
        self.journal = journal if isinstance(journal, Journal) else Journal(journal)
        self._scorer: Scorer | None = None
        self._plan: tuple[int, ...] | None = None
        self._settling = Settling(self.config.settle_patience, self.config.settle_tolerance)
        self._at_close: tuple[frozenset[str], dict[str, int]] | None = None
        self.journal.write(
            "start",
            step=0,
            total_steps=total_steps,
            config=self.config.to_dict(),
            model=type(self.model).__name__,
            stacks={stack.path: len(stack) for stack in self.stacks},
            units=list(self.units),
            environment=environment(),
        )
        budget, rows = self.config.memory_limit, batch_size or batch_size_of(probe)
        parts = self.model, self.stacks, self.prefix, optimizer, self.journal, lambda: self._scoring_bytes
        self.budget = open_budget(budget, self._probe, rows, *parts)
        self._observer = Observer(self.model, optimizer, self._audit, self._look_at_gradients)
        self._guard = Guard(self.model, self.freezer, self.journal)
        self.caching = Caching(self.config, self.prefix, self.backend, self.journal, self._progress, probe)
        if samples_per_step is not None:
            self._announce()
        # Even where no adapter stands at the bottom of the stack: until something freezes, the run is as it was.
        if self.config.freeze:
            self._freeze(list(self.config.freeze), by="hand")

    # What a host reads.

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the frozen units; after :meth:`close`, of those that were frozen then."""
        return self.freezer.frozen if self._at_close is None else self._at_close[0]

    @property
    def prefixes(self) -> dict[str, int]:
        """Blocks in the frozen prefix of each stack, by its path."""
        return dict(self.prefix.depths if self._at_close is None else self._at_close[1])

    @property
    def state_key(self) -> tuple[Any, ...]:
        """Changes whenever the cost of a step changes."""
        return (*sorted(self.frozen), *self.prefixes.items(), *self.caching.state_key)

    @property
    def flops_spent(self) -> int:
        """FLOPs spent on measuring so far."""
        return self._scorer.flops_spent if self._scorer is not None else 0

    @property
    def nested_flops(self) -> int:
        """FLOPs spent inside training steps to compute what the prefix cache does not hold yet.

        Counted from the first time that this is asked for: counting takes time, and most runs need none.
        """
        return self.caching.flops

    def logs(self) -> dict[str, float]:
        """Scalars for the host's own logs.

        ``safe/saved_mib`` is what autograd keeps of one average micro-batch: counted once after each freeze and
        scaled by the mean number of tokens.
        """
        logs: dict[str, float] = {
            "safe/live_units": len(self.units) - len(self.frozen),
            "safe/frozen_units": len(self.frozen),
            "safe/frozen_prefix": sum(self.prefixes.values()),
            "safe/ramp": round(self._ramp(), 4),
        }
        saved = self._observer.saved_bytes
        if saved is not None:
            logs["safe/saved_mib"] = round(saved / 2**20, 3)
        total = sum(self.scores.values())
        if total > 0:
            logs["safe/frozen_score_share"] = round(sum(self.scores.get(n, 0.0) for n in self.frozen) / total, 6)
        return logs | self.caching.logs() | (self.budget.logs() if self.budget is not None else {})

    # What a host calls.

    def step(self) -> list[str]:
        """To be called after each optimizer step, gradients cleared. Returns the units frozen now."""
        self.steps += 1
        try:
            if self._plan is None:
                self._prepare()
            if self._plan is None or self.steps not in self._plan:
                return []
            with keep_random_state():
                self._measure()
        except (RunError, ConfigError):
            raise
        except Exception as error:  # whatever it is: a failed measurement must not end somebody's run
            self._give_up_measuring(error)
            return []
        return self._decide()

    def close(self) -> None:
        """Leave the model as it was: flags, modules, hooks, forwards. Trained weights stay."""
        if self._at_close is None:
            self._at_close = self.frozen, self.prefixes
            self._observer.remove()
            self.caching.close()
            self.prefix.restore()
            if self.budget is not None:
                self.budget.close()
            self.freezer.restore()
            self.journal.write("close", step=self.steps, frozen=self.frozen, flops_spent=self.flops_spent)
            if self._owns_journal:
                self.journal.close()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain JSON values."""
        return {
            "version": STATE_VERSION,
            "steps": self.steps,
            "frozen": sorted(self.frozen),
            "scores": dict(self.scores),
            "warmup_end": self.warmup_end,
            "plan": list(self._plan) if self._plan is not None else None,
            "probe_samples": self._scorer.probe.samples if self._scorer is not None else None,
            "settling": self._settling.state_dict(),
            "cache": self.caching.state_dict(),
            "budget": self.budget.state_dict() if self.budget is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a run where :meth:`state_dict` was written; freezes its units at once.

        Raises:
            RunError: written by another version, or for a model with other units.
        """
        check_state(state, STATE_VERSION, self.units)
        self.steps, self.warmup_end = state["steps"], state["warmup_end"]
        self.scores = dict(state["scores"])
        self._settling.load_state_dict(state["settling"])
        if state["plan"] is not None:
            self._plan = tuple(state["plan"])
            self._scorer = self._new_scorer(self._probe.shrunk(state["probe_samples"]))
            with keep_random_state():
                self._scorer.prepare(run_samples=10**12, most=len(self._plan))
        self.caching.load_state_dict(state["cache"])
        if self.budget is not None and state.get("budget") is not None:
            self.budget.load_state_dict(state["budget"])
        self._freeze([name for name in state["frozen"] if name not in self.frozen], by="resume")

    # Measuring and deciding.

    @property
    def _scoring_bytes(self) -> int:
        return self._scorer.nbytes if self._scorer is not None else 0

    @property
    def _step_samples(self) -> int:
        return self.samples_per_step or self._observer.samples // max(1, self.steps) or 1

    def _progress(self) -> Progress:
        remaining = max(0, self.total_steps - self.steps) * self._step_samples
        return Progress(self.steps, remaining, self.samples_per_epoch)

    def _announce(self) -> None:
        epoch = None if self.samples_per_epoch is None else math.ceil(self.samples_per_epoch / self._step_samples)
        self.caching.announce(sum(map(len, self.stacks)), epoch, self.total_steps)

    def _new_scorer(self, probe: Probe) -> Scorer:
        return Scorer(self.model, self.stacks, self.units, self.backend, self.config, probe)

    def _prepare(self) -> None:
        self._plan = ()
        self._announce()
        until = max(1, int(self.config.ramp_end * self.total_steps))
        self._scorer = self._new_scorer(self._probe)
        with keep_random_state():
            count = self._scorer.prepare(self.total_steps * self._step_samples, until)
        self._plan = measurement_steps(until, count)
        self.journal.write(
            "probe",
            step=self.steps,
            samples=self._scorer.probe.samples,
            tokens=self.config.probe_tokens,
            nbytes=self._scorer.nbytes,
            flops=self._scorer.flops_spent,
            flops_per_measurement=self._scorer.flops_per_measurement,
            plan=self._plan,
        )

    def _measure(self) -> None:
        assert self._scorer is not None
        if self.backend.any_merged():
            raise ProbeError(
                "Adapters are merged into the base weights at the moment of a measurement.",
                cause="Measuring would unmerge them, which rounds the base weights.",
                fix="Unmerge before safe.step(), or train without merging.",
            )
        before = self._scorer.flops_spent
        measured = self._scorer.measure(self.prefixes)
        finite = {name: score for name, score in measured.items() if score == score and abs(score) != float("inf")}
        if len(finite) < len(measured):
            self._guard.warn_once(
                "non-finite",
                f"{len(measured) - len(finite)} of {len(measured)} scores are not finite at step {self.steps}.",
                cause="Activations on the probe are NaN or infinite; these scores are left out.",
                fix="Look at the loss; lower the learning rate, or use bf16 in place of fp16.",
            )
        self.scores.update(finite)
        self.journal.write(
            "measure",
            step=self.steps,
            scores=measured,
            ramp=self._ramp(),
            flops=self._scorer.flops_spent - before,
        )

    def _situation(self, ramp: float) -> Situation:
        return Situation(
            step=self.steps,
            ramp=ramp,
            scores=dict(self.scores),
            chains=self._chains,
            frozen=self.frozen,
            freeze_share=self.config.freeze_share,
            threshold=self.config.threshold,
            min_live_blocks=self.config.min_live_blocks,
            something_else_trains=self._guard.something_else_trains(),
        )

    def _decide(self) -> list[str]:
        if self.warmup_end is None:
            limit = max(1, int(self.config.warmup * self.total_steps))
            choice = frozenset(choose(self.config.policy, self._situation(1.0)))
            if self._settling.update(self.scores, choice):
                self.warmup_end = min(self.steps, limit)
            elif self.steps >= limit:
                self.warmup_end = limit
            if self.warmup_end is not None:
                self.journal.write("warmup_end", step=self.steps, warmup_end=self.warmup_end)
        names = choose(self.config.policy, self._situation(self._ramp())) if self.warmup_end is not None else []
        if names and not self.config.dry_run:
            self._freeze(names, by=self.config.to_dict()["policy"])
        elif names:
            self.journal.write("would_freeze", step=self.steps, units=names)
        return [] if self.config.dry_run else names

    def _freeze(self, names: list[str], by: str) -> None:
        if not names:
            return
        self.freezer.freeze(names)
        self.prefix.update()
        self.caching.prefix_changed()
        self._observer.count_again()
        self._guard.check_gradients = by != "resume"
        self.journal.write(
            "freeze",
            step=self.steps,
            units=names,
            by=by,
            ramp=self._ramp(),
            scores={name: self.scores.get(name) for name in names},
            frozen=len(self.frozen),
            prefixes=self.prefixes,
        )

    def _ramp(self) -> float:
        if self.warmup_end is None:
            return 0.0
        return cubic_ramp(self.steps, self.warmup_end, int(self.config.ramp_end * self.total_steps))

    def _give_up_measuring(self, error: Exception) -> None:
        self._plan = tuple(step for step in self._plan or () if step > self.steps)
        fact = error.fact if isinstance(error, AdafreezeError) else f"{type(error).__name__}: {error}"
        self.journal.write("measure_failed", step=self.steps, error=str(error))
        self._guard.warn_once(
            "measure",
            f"Scores could not be measured at step {self.steps}: {fact}",
            cause=error.cause if isinstance(error, AdafreezeError) else "The forward pass on the probe failed.",
            fix=(error.fix if isinstance(error, AdafreezeError) else "Pass a probe that the model takes: probe=batch")
            + " Training goes on"
            + (", without freezing." if not self._plan else "."),
        )

    # What the observer calls.

    def _audit(self) -> None:
        if self._guard.audit(self.steps):
            self.prefix.update()
            self.caching.prefix_changed()

    def _look_at_gradients(self) -> None:
        if self._scorer is not None:
            self._scorer.listen()
        self._guard.look_at_gradients(self.steps)
