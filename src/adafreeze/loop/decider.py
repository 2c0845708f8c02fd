"""Deciding: when scores are measured, and which units freeze by them; on rank 0, for all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ..config import SafeConfig
from ..decide.policy import PolicyInput, choose
from ..decide.schedule import Losses, LossFall, Settling, cubic_ramp, measurement_steps
from ..errors import AdafreezeError, ConfigError, ProbeError, RunError, note
from ..journal import Journal
from ..measure import Probe
from ..measure.scorer import Scorer
from ..model.traces import traceless
from ..parallel import Ranks
from .guard import Guard

__all__ = ["Decider"]


class Decider:
    """Three stages: warm-up until the scores have settled, freezing while the ramp rises, and the rest of the run.

    Scores are measured, and decisions taken, on rank 0, and all ranks take them over; where a forward pass is a
    collective all ranks measure along. A measurement that fails is told of, and training goes on.

    Args:
        config: policy, schedule.
        total_steps: optimizer steps of the whole run.
        chains: unit names by block by chain, as policies see them.
        probe: drawn, not yet fitted to the run's length.
        new_scorer: makes a scorer for a probe.
        guard: warns, and knows what else trains.
        journal: of the run.
        ranks: of the run.
        collective: all ranks must make the same forward passes.

    Attributes:
        scores: the latest of each unit.
        warmup_end: t_w in optimizer steps, from which the ramp rises; None before it is known. Where the warm-up went
            on for the loss's sake, the ramp has risen meanwhile.
        plan: steps at which scores are measured; None before the first step.
        scorer: None where another rank measures.
    """

    def __init__(
        self,
        config: SafeConfig,
        total_steps: int,
        chains: tuple[tuple[tuple[str, ...], ...], ...],
        probe: Probe,
        new_scorer: Callable[[Probe], Scorer],
        guard: Guard,
        journal: Journal,
        ranks: Ranks,
        *,
        collective: bool = False,
    ) -> None:
        self.config, self.total_steps, self.chains = config, total_steps, chains
        self.probe, self.new_scorer, self.guard = probe, new_scorer, guard
        self.journal, self.ranks, self.collective = journal, ranks, collective
        self.scores: dict[str, float] = {}
        self.warmup_end: int | None = None
        self.plan: tuple[int, ...] | None = None
        self.scorer: Scorer | None = None
        self._settling = Settling(config.settle_patience, config.settle_tolerance)
        self._loss_fall = LossFall()
        self._went_on = False
        self._before: tuple[int, ...] = ()  # the plan of a checkpoint that another one follows
        self._measured_at = 0
        self.begin()

    @property
    def measures_here(self) -> bool:
        """Whether this rank makes forward passes on the probe."""
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
        """Take the model as it is now for the one with which the run begins."""
        if self.measures_here:
            self.scorer = self.new_scorer(self.probe)
            # A model that cannot be run fails in the first step as well, and that is told of.
            with suppress(Exception), traceless(self.guard.model.modules()):
                self.scorer.begin()

    def prepare(self, step: int, step_samples: int) -> None:
        """Fit the probe and the number of measurements to the run's length.

        Args:
            step: optimizer steps done.
            step_samples: samples of one optimizer step on one rank.
        """
        self._take(self._of_main(lambda: self._told(lambda: self._prepared(step, step_samples), step)))
        self._before = ()

    def outlook(self, step: int) -> str:
        """In words, what is still to come of the schedule after this step."""
        if step >= self._ramp_end:
            return f"the ramp has ended (step {self._ramp_end})"
        if self.warmup_end is not None:
            return f"the warm-up has ended, the ramp rises until step {self._ramp_end}"
        return f"the warm-up ends by step {self._warmup_limit}, the ramp rises until step {self._ramp_end}"

    def due(self, step: int) -> bool:
        """Whether scores are measured after this step."""
        return self.plan is not None and step in self.plan

    def decide(self, step: int, frozen: frozenset[str], prefixes: Mapping[str, int], losses: Losses) -> list[str]:
        """Measure, and name the units to freeze now.

        Args:
            step: optimizer steps done.
            frozen: units frozen so far.
            prefixes: depth of the frozen prefix of each stack.
            losses: of training on this rank since the last measurement.
        """
        names: list[str] = self._take(self._of_main(lambda: self._decided(step, frozen, prefixes, losses)))
        return names

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain JSON values."""
        pending = self.plan is None and self.scorer is not None and self.scorer.goes_on
        kept = self.scorer if self.plan is not None or pending else None
        again = pending or any(later > self._measured_at for later in self.plan or ())
        return {
            **self._decided_so_far(),
            "scorer": kept.state_dict(measures_again=again) if kept is not None else None,
        }

    def _decided_so_far(self) -> dict[str, Any]:
        return {
            "scores": dict(self.scores),
            "warmup_end": self.warmup_end,
            "plan": list(self.plan) if self.plan is not None else None,
            "settling": self._settling.state_dict(),
            "loss_fall": self._loss_fall.state_dict(),
        }

    def _take_up(self, state: Mapping[str, Any]) -> None:
        self.scores, self.warmup_end = dict(state["scores"]), state["warmup_end"]
        self.plan = tuple(state["plan"]) if state["plan"] is not None else None
        self._settling.load_state_dict(state["settling"])
        self._loss_fall.load_state_dict(state.get("loss_fall") or LossFall().state_dict())

    def load_state_dict(
        self, state: Mapping[str, Any], step: int, *, other_schedule: bool = False, other_score: bool = False
    ) -> None:
        """Take up what ``state_dict`` wrote on rank 0; takes the representations of the beginning again, if need be.

        Args:
            state: of the checkpoint.
            step: optimizer steps done.
            other_schedule: the run has another length or other settings now: ``prepare`` is to be called again. A
                warm-up that has ended has ended; one that has not ends by the new schedule.
            other_score: scores of before are of another kind than those to come.
        """
        self._take_up(state)
        self.scorer, self._measured_at, kept = None, step, state["scorer"]
        if other_score:
            self.scores, self._settling = {}, Settling(self.config.settle_patience, self.config.settle_tolerance)
            kept = kept and {**kept, "references": None, "gradients": dict.fromkeys(kept["gradients"], 0.0)}
        if other_schedule and self.plan is not None:
            self._before, self.plan = self.plan, None
        elif self.plan is None and kept is None:  # it was written before anything was known of the run
            self.begin()
            return
        if kept is None or not self.measures_here:
            return
        if self.plan is None:
            self.scorer = scorer = self.new_scorer(self.probe)
            self._told(lambda: scorer.go_on_from(kept), step)
            return
        self.scorer = scorer = self.new_scorer(self.probe.shrunk(kept["samples"]))
        measures_again = any(later > step for later in self.plan)
        self._told(lambda: scorer.load_state_dict(kept, measures_again=measures_again), step)

    # On rank 0, and on the others where forward passes are collectives.

    def _of_main(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if not self.collective:
            return self.ranks.of_main(work)  # type: ignore[no-any-return]
        failed: Exception | None = None
        try:
            done = work()
        except Exception as error:
            failed = error

        def outcome() -> dict[str, Any]:
            if failed is not None:
                raise failed
            return done

        return self.ranks.of_main(outcome)  # type: ignore[no-any-return]

    def _take(self, outcome: dict[str, Any]) -> Any:
        """Take over what rank 0 has come to; returns the names."""
        if not self.ranks.is_main:
            self._take_up(outcome)
        return outcome["names"]

    def _told(self, work: Callable[[], None], step: int) -> dict[str, Any]:
        """Do ``work``, whose failure must not end somebody's run, and say how things stand."""
        try:
            with traceless(self.guard.model.modules()):
                work()
        except (RunError, ConfigError):
            raise
        except Exception as error:  # whatever it is
            self._give_up_measuring(error, step)
        return {**self._decided_so_far(), "plan": list(self.plan or ()), "names": []}

    def _prepared(self, step: int, step_samples: int) -> None:
        self.plan = ()
        until = max(1, self._ramp_end)
        self.scorer = self.scorer or self.new_scorer(self.probe)
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
        """Let a plan whose first part lies behind follow on the measurements of another one.

        Args:
            step: optimizer steps done.
            distance: steps between two measurements of ``self.plan``.
        """
        before, plan = self._before, self.plan or ()
        if before and distance > before[-1] / len(before) and self.warmup_end is None:
            # Calm scores say less the closer they were taken, and losses of shorter stretches fall less.
            self._settling = Settling(self.config.settle_patience, self.config.settle_tolerance)
            self._loss_fall = LossFall()
        if plan and plan[-1] < step and any(later >= step for later in before):
            self.plan = (*plan, step)  # where the ramp has risen to its end meanwhile, one look decides

    def _decided(
        self, step: int, frozen: frozenset[str], prefixes: Mapping[str, int], losses: Losses
    ) -> dict[str, Any]:
        measured = False

        def work() -> None:
            nonlocal measured
            self._measure(step, prefixes)
            measured = True

        outcome = self._told(work, step)
        if measured:
            names = self._chosen(step, frozen, losses)
            outcome = {**self._decided_so_far(), "names": names}
        return outcome

    def _measure(self, step: int, prefixes: Mapping[str, int]) -> None:
        assert self.scorer is not None
        self._measured_at = step
        if self.scorer.backend.any_merged():
            raise ProbeError(
                "Adapters are merged into the base weights at the moment of a measurement.",
                cause="Measuring would unmerge them, which rounds the base weights.",
                fix="Unmerge before safe.step(), or train without merging.",
            )
        before = self.scorer.flops_spent
        measured = self.scorer.measure(prefixes)
        finite = {name: score for name, score in measured.items() if math.isfinite(score)}
        if len(finite) < len(measured):
            self.guard.warn_once(
                "non-finite",
                f"{len(measured) - len(finite)} of {len(measured)} scores are not finite at step {step}.",
                cause="Activations on the probe are NaN or infinite; these scores are left out.",
                fix="Look at the loss; lower the learning rate, or use bf16 in place of fp16.",
            )
        self.scores.update(finite)
        self.journal.write(
            "measure", step=step, scores=measured, ramp=self.ramp(step), flops=self.scorer.flops_spent - before
        )

    def _chosen(self, step: int, frozen: frozenset[str], losses: Losses) -> list[str]:
        if self.warmup_end is None:
            limit = self._warmup_limit
            choice = frozenset(choose(self.config.policy, self._situation(step, 1.0, frozen)))
            settled = self._settling.update(self.scores, choice)
            falls = self._loss_fall.update(losses)
            if falls and self.config.wait_for_loss and step < self._ramp_end:
                if settled or step >= limit:
                    self._go_on(step)
            elif settled or step >= limit:
                self.warmup_end = min(step, limit)
            if self.warmup_end is not None:
                self.journal.write("warmup_end", step=step, warmup_end=self.warmup_end)
        if self.warmup_end is None:
            return []
        return choose(self.config.policy, self._situation(step, self.ramp(step), frozen))

    def _go_on(self, step: int) -> None:
        self.journal.write("warmup_goes_on", step=step)
        if not self._went_on:
            self._went_on = True
            note(
                f"Step {step} of {self.total_steps}: no further block freezes yet, at the latest at step "
                f"{self._ramp_end}: the training loss falls faster than it has on average (wait_for_loss=False does "
                "not wait)."
            )

    def _situation(self, step: int, ramp: float, frozen: frozenset[str]) -> PolicyInput:
        return PolicyInput(
            step=step,
            ramp=ramp,
            scores=dict(self.scores),
            chains=self.chains,
            frozen=frozen,
            freeze_share=self.config.freeze_share,
            threshold=self.config.threshold,
            min_live_blocks=self.config.min_live_blocks,
            something_else_trains=self.guard.something_else_trains(),
            learning=frozenset(self.guard.learning) or None,
        )

    def _give_up_measuring(self, error: Exception, step: int) -> None:
        self.plan = tuple(later for later in self.plan or () if later > step)
        ours = isinstance(error, AdafreezeError)
        fact = error.fact if ours else f"{type(error).__name__}: {error}"  # type: ignore[attr-defined]
        self.journal.write("measure_failed", step=step, error=str(error))
        self.guard.warn_once(
            "measure",
            f"Scores could not be measured at step {step}: {fact}",
            fix=(error.fix if ours else "Pass a probe that the model takes: probe=batch")  # type: ignore[attr-defined]
            + " Training goes on"
            + (", without freezing." if not self.plan else "."),
        )
