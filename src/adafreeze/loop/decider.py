"""Decider: when scores are measured and which units freeze; on rank 0, for all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from ..config import SafeConfig
from ..decide.policy import PolicyInput, choose
from ..decide.schedule import Losses, LossFall, Settling, cubic_ramp, measurement_steps
from ..errors import AdafreezeError, ConfigError, ProbeError, RunError, WarnOnce, note
from ..journal import Journal
from ..measure import Scorer
from ..model.traces import traceless
from ..parallel import Ranks

__all__ = ["Decider"]


@dataclass(eq=False)
class Decider:
    """Measures and decides in three stages: warm-up, freezing while the ramp rises, and the rest of the run.

    Rank 0 measures and decides, and all ranks take its result; where a forward pass is a collective, all ranks run it.
    A measurement that fails gives a warning, and training continues.

    Args:
        config: policy, schedule.
        total_steps: optimizer steps of the whole run.
        chains: unit names by block by chain, as in ``PolicyInput``.
        fresh: a scorer of this model, with the drawn probe, not yet fitted to the run's length.
        journal: of the run.
        ranks: of the run.

    Attributes:
        scores: the latest of each unit.
        warmup_end: t_w in optimizer steps, from which the ramp rises; None before it is known. If the warm-up went on
            for the loss's sake, the ramp starts above 0.
        plan: steps at which scores are measured; None before the first step.
        scorer: fitted; None where another rank measures.
    """

    config: SafeConfig
    total_steps: int
    chains: tuple[tuple[tuple[str, ...], ...], ...]
    fresh: Scorer
    journal: Journal
    ranks: Ranks

    def __post_init__(self) -> None:
        self.probe, self.collective = self.fresh.probe, self.fresh.collective
        self.scores: dict[str, float] = {}
        self.warmup_end: int | None = None
        self.plan: tuple[int, ...] | None = None
        self.scorer: Scorer | None = None
        self._settling = self._unsettled()
        self._loss_fall = LossFall()
        self._waited = False
        self._before: tuple[int, ...] = ()  # the plan of a checkpoint that another one follows
        self._measured_at = 0
        self._warn_once = WarnOnce()
        self.begin()

    def _unsettled(self) -> Settling:
        return Settling(self.config.settle_patience, self.config.settle_tolerance)

    @property
    def measures_here(self) -> bool:
        """Whether this rank runs forward passes on the probe."""
        return self.ranks.is_main or self.collective

    def ramp(self, step: int) -> float:
        """0 in the warm-up, 1 at the end of the freezing stage."""
        if self.warmup_end is None:
            return 0.0
        return cubic_ramp(step, self.warmup_end, self._ramp_end)

    @property
    def _warmup_limit(self) -> int:
        return max(1, int(self.config.warmup * self.total_steps))

    @property
    def _ramp_end(self) -> int:
        return int(self.config.ramp_end * self.total_steps)

    def begin(self) -> None:
        """Take the model as it is now as the reference of all scores."""
        if self.measures_here:
            self.scorer = self.fresh.with_probe(self.probe)
            # A model that fails here fails again in prepare(), which warns.
            with suppress(Exception), traceless(self.fresh.model.modules()):
                self.scorer.begin()

    def prepare(self, step: int, step_samples: int) -> None:
        """Fit the probe and the number of measurements to the run's length.

        Args:
            step: optimizer steps done.
            step_samples: rows of one optimizer step on one rank.
        """

        def work() -> list[str]:
            self._guarded(lambda: self._prepare(step, step_samples), step)
            return []

        self._of_main(work)
        self._before = ()

    def schedule_after(self, step: int) -> str:
        """In words, the rest of the schedule after this step."""
        if step >= self._ramp_end:
            return f"the ramp has ended (step {self._ramp_end})"
        if self.warmup_end is not None:
            return f"the warm-up has ended, the ramp rises until step {self._ramp_end}"
        return f"the warm-up ends by step {self._warmup_limit}, the ramp rises until step {self._ramp_end}"

    def due(self, step: int) -> bool:
        """Whether scores are measured after this step."""
        return self.plan is not None and step in self.plan

    def decide(
        self,
        step: int,
        *,
        frozen: frozenset[str],
        prefixes: Mapping[str, int],
        losses: Losses,
        learning: frozenset[str],
        something_else_trains: bool,
    ) -> list[str]:
        """Measure, and name the units to freeze now.

        Args:
            step: optimizer steps done.
            frozen: units frozen so far.
            prefixes: depth of the frozen prefix of each stack.
            losses: of training on this rank since the last measurement.
            learning: units that have had a gradient.
            something_else_trains: beside the units.
        """

        def work() -> list[str]:
            if not self._guarded(lambda: self._measure(step, prefixes), step):
                return []
            given = PolicyInput(
                step=step,
                ramp=1.0,
                scores=dict(self.scores),
                chains=self.chains,
                frozen=frozen,
                freeze_share=self.config.freeze_share,
                threshold=self.config.threshold,
                min_live_blocks=self.config.min_live_blocks,
                something_else_trains=something_else_trains,
                learning=learning or None,
            )
            return self._chosen(losses, given)

        return self._of_main(work)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain JSON values."""
        pending = self.plan is None and self.scorer is not None and self.scorer.resumed
        kept = self.scorer if self.plan is not None or pending else None
        again = pending or any(later > self._measured_at for later in self.plan or ())
        return {
            **self._shared_state(),
            "scorer": kept.state_dict(measures_again=again) if kept is not None else None,
        }

    def _shared_state(self) -> dict[str, Any]:
        return {
            "scores": dict(self.scores),
            "warmup_end": self.warmup_end,
            "plan": list(self.plan) if self.plan is not None else None,
            "settling": self._settling.state_dict(),
            "loss_fall": self._loss_fall.state_dict(),
        }

    def _load_shared_state(self, state: Mapping[str, Any]) -> None:
        self.scores, self.warmup_end = dict(state["scores"]), state["warmup_end"]
        self.plan = tuple(state["plan"]) if state["plan"] is not None else None
        self._settling.load_state_dict(state["settling"])
        self._loss_fall.load_state_dict(state["loss_fall"])

    def load_state_dict(
        self, state: Mapping[str, Any], step: int, *, other_schedule: bool = False, other_score: bool = False
    ) -> None:
        """Continue where ``state_dict`` was written on rank 0; takes the references again if needed.

        Args:
            state: of the checkpoint.
            step: optimizer steps done.
            other_schedule: the run has another length or other settings now, and ``prepare`` is called again. A
                warm-up that has ended stays ended; otherwise it ends by the new schedule.
            other_score: earlier scores cannot be compared with those to come.
        """
        self._load_shared_state(state)
        self.scorer, self._measured_at, kept = None, step, state["scorer"]
        if other_score:
            self.scores, self._settling = {}, self._unsettled()
            kept = kept and {**kept, "references": None, "gradients": dict.fromkeys(kept["gradients"], 0.0)}
        if other_schedule and self.plan is not None:
            self._before, self.plan = self.plan, None
        elif self.plan is None and kept is None:  # written before the first step
            self.begin()
            return
        if kept is None or not self.measures_here:
            return
        probe = self.probe if self.plan is None else self.probe.shrunk(kept["samples"])
        self.scorer = scorer = self.fresh.with_probe(probe)
        if self.plan is None:
            self._guarded(lambda: scorer.load_unmeasurable(kept), step)
        else:
            measures_again = any(later > step for later in self.plan)
            self._guarded(lambda: scorer.load_state_dict(kept, measures_again=measures_again), step)

    def _of_main(self, work: Callable[[], list[str]]) -> list[str]:
        """The names that ``work`` returns on rank 0, whose state all ranks take over.

        The others run it too where forward passes are collectives.
        """

        def outcome() -> dict[str, Any]:
            names = work()
            return {**self._shared_state(), "names": names}

        if self.collective:
            done: Future[dict[str, Any]] = Future()
            try:
                done.set_result(outcome())
            except Exception as error:
                done.set_exception(error)
            outcome = done.result
        state = self.ranks.of_main(outcome)
        if not self.ranks.is_main:
            self._load_shared_state(state)
        names: list[str] = state["names"]
        return names

    def _guarded(self, work: Callable[[], None], step: int) -> bool:
        """Run ``work``, and warn if it fails; whether it did not."""
        try:
            with traceless(self.fresh.model.modules()):
                work()
        except (RunError, ConfigError):
            raise
        except Exception as error:  # a measurement must not end the run
            self._give_up_measuring(error, step)
            return False
        return True

    def _prepare(self, step: int, step_samples: int) -> None:
        self.plan = ()
        until = max(1, self._ramp_end)
        self.scorer = self.scorer or self.fresh.with_probe(self.probe)
        count = self.scorer.prepare(self.total_steps * step_samples, until)
        self.plan = measurement_steps(until, count)
        self._join(step, until / count)
        self.journal.write(
            "probe",
            step=step,
            samples=self.scorer.probe.samples,
            tokens=self.config.probe_tokens,
            nbytes=self.scorer.nbytes,
            flops=self.scorer.flops_spent,
            flops_per_measurement=self.scorer.flops_per_measurement,
            plan=self.plan,
        )

    def _join(self, step: int, distance: float) -> None:
        """Continue from the measurements of another plan.

        Args:
            step: optimizer steps done.
            distance: steps between two measurements of ``self.plan``.
        """
        before, plan = self._before, self.plan or ()
        if before and distance > before[-1] / len(before) and self.warmup_end is None:
            # Settled scores mean less over shorter intervals, and losses fall less in them.
            self._settling = self._unsettled()
            self._loss_fall = LossFall()
        if plan and plan[-1] < step and any(later >= step for later in before):
            self.plan = (*plan, step)  # the ramp has ended meanwhile: one measurement decides

    def _measure(self, step: int, prefixes: Mapping[str, int]) -> None:
        assert self.scorer is not None
        self._measured_at = step
        if self.scorer.backend.any_merged():
            raise ProbeError(
                "The adapters are merged, and measuring would unmerge them, which rounds the base weights.",
                fix="Unmerge before safe.step(), or train without merging.",
            )
        before = self.scorer.flops_spent
        measured = self.scorer.measure(prefixes)
        finite = {name: score for name, score in measured.items() if math.isfinite(score)}
        if len(finite) < len(measured):
            self._warn_once(
                "non-finite",
                f"{len(measured) - len(finite)} of {len(measured)} scores at step {step} are NaN or infinite, as the "
                "activations are, and are left out.",
                fix="Check the loss; lower the learning rate, or use bf16 instead of fp16.",
            )
        self.scores.update(finite)
        self.journal.write(
            "measure", step=step, scores=measured, ramp=self.ramp(step), flops=self.scorer.flops_spent - before
        )

    def _chosen(self, losses: Losses, given: PolicyInput) -> list[str]:
        step = given.step
        if self.warmup_end is None:
            limit = self._warmup_limit
            choice = frozenset(choose(self.config.policy, given))
            over = self._settling.update(self.scores, choice) or step >= limit
            if self._loss_fall.update(losses) and self.config.wait_for_loss and step < self._ramp_end:
                if over:
                    self._wait(step)
                return []
            if not over:
                return []
            self.warmup_end = min(step, limit)
            self.journal.write("warmup_end", step=step, warmup_end=self.warmup_end)
        return choose(self.config.policy, replace(given, ramp=self.ramp(step)))

    def _wait(self, step: int) -> None:
        self.journal.write("warmup_goes_on", step=step)
        if not self._waited:
            self._waited = True
            note(
                f"Step {step} of {self.total_steps}: freezing postponed to step {self._ramp_end} at most: the loss is "
                "still dropping. Set wait_for_loss=False to disable this."
            )

    def _give_up_measuring(self, error: Exception, step: int) -> None:
        self.plan = tuple(later for later in self.plan or () if later > step)
        self.journal.write("measure_failed", step=step, error=str(error))
        if isinstance(error, AdafreezeError):
            fact, fix = error.fact, error.fix
        else:
            fact, fix = f"{type(error).__name__}: {error}", "Pass a probe that the model takes: probe=batch."
        self._warn_once(
            "measure",
            f"Scores could not be measured at step {step}: {fact}",
            fix=f"{fix} Training continues{'' if self.plan else ', without freezing'}.",
        )
