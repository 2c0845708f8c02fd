"""Decider: when scores are measured and which units freeze; on rank 0, for all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
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


class Decider:
    """Measures and decides in three stages: warm-up, freezing while the ramp rises, and the rest of the run.

    Rank 0 measures and decides, and all ranks take its result; where a forward pass is a collective, all ranks run it.
    A measurement that fails gives a warning, and training continues.

    Args:
        config: policy, schedule.
        total_steps: optimizer steps of the whole run.
        chains: unit names by block by chain, as in ``PolicyInput``.
        scorer: of this model, with the drawn probe, not yet fitted to the run's length.
        journal: of the run.
        ranks: of the run.

    Attributes:
        scores: the latest of each unit.
        warmup_end: t_w in optimizer steps, from which the ramp rises; None before it is known. If the warm-up went on
            for the loss's sake, the ramp starts above 0.
        plan: steps at which scores are measured; None before the first step.
        scorer: None where another rank measures.
    """

    def __init__(
        self,
        config: SafeConfig,
        total_steps: int,
        chains: tuple[tuple[tuple[str, ...], ...], ...],
        scorer: Scorer,
        journal: Journal,
        ranks: Ranks,
    ) -> None:
        self.config, self.total_steps, self.chains = config, total_steps, chains
        self.probe, self.collective, self._new = scorer.probe, scorer.collective, scorer
        self.journal, self.ranks = journal, ranks
        self.scores: dict[str, float] = {}
        self.warmup_end: int | None = None
        self.plan: tuple[int, ...] | None = None
        self.scorer: Scorer | None = None
        self._settling = Settling(config.settle_patience, config.settle_tolerance)
        self._loss_fall = LossFall()
        self._waited = False
        self._before: tuple[int, ...] = ()  # the plan of a checkpoint that another one follows
        self._measured_at = 0
        self._warn_once = WarnOnce()
        self.begin()

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
            self.scorer = self._new.with_probe(self.probe)
            # A model that fails here fails again in prepare(), which warns.
            with suppress(Exception), traceless(self._new.model.modules()):
                self.scorer.begin()

    def prepare(self, step: int, step_samples: int) -> None:
        """Fit the probe and the number of measurements to the run's length.

        Args:
            step: optimizer steps done.
            step_samples: rows of one optimizer step on one rank.
        """
        self._take(self._of_main(lambda: self._guarded(lambda: self._prepared(step, step_samples), step)))
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

        def given(ramp: float) -> PolicyInput:
            return PolicyInput(
                step=step,
                ramp=ramp,
                scores=dict(self.scores),
                chains=self.chains,
                frozen=frozen,
                freeze_share=self.config.freeze_share,
                threshold=self.config.threshold,
                min_live_blocks=self.config.min_live_blocks,
                something_else_trains=something_else_trains,
                learning=learning or None,
            )

        names: list[str] = self._take(self._of_main(lambda: self._decided(step, prefixes, losses, given)))
        return names

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
            self.scores, self._settling = {}, Settling(self.config.settle_patience, self.config.settle_tolerance)
            kept = kept and {**kept, "references": None, "gradients": dict.fromkeys(kept["gradients"], 0.0)}
        if other_schedule and self.plan is not None:
            self._before, self.plan = self.plan, None
        elif self.plan is None and kept is None:  # written before the first step
            self.begin()
            return
        if kept is None or not self.measures_here:
            return
        if self.plan is None:
            self.scorer = scorer = self._new.with_probe(self.probe)
            self._guarded(lambda: scorer.load_unmeasurable(kept), step)
            return
        self.scorer = scorer = self._new.with_probe(self.probe.shrunk(kept["samples"]))
        measures_again = any(later > step for later in self.plan)
        self._guarded(lambda: scorer.load_state_dict(kept, measures_again=measures_again), step)

    def _of_main(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``work`` returns on rank 0; it runs on the others too where forward passes are collectives."""
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
        """Take over the state of rank 0; returns the names."""
        if not self.ranks.is_main:
            self._load_shared_state(outcome)
        return outcome["names"]

    def _guarded(self, work: Callable[[], None], step: int) -> dict[str, Any]:
        """Run ``work``; warn on failure; return the decider's state."""
        try:
            with traceless(self._new.model.modules()):
                work()
        except (RunError, ConfigError):
            raise
        except Exception as error:  # a measurement must not end the run
            self._give_up_measuring(error, step)
        return {**self._shared_state(), "plan": list(self.plan or ()), "names": []}

    def _prepared(self, step: int, step_samples: int) -> None:
        self.plan = ()
        until = max(1, self._ramp_end)
        self.scorer = self.scorer or self._new.with_probe(self.probe)
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
            self._settling = Settling(self.config.settle_patience, self.config.settle_tolerance)
            self._loss_fall = LossFall()
        if plan and plan[-1] < step and any(later >= step for later in before):
            self.plan = (*plan, step)  # the ramp has ended meanwhile: one measurement decides

    def _decided(
        self, step: int, prefixes: Mapping[str, int], losses: Losses, given: Callable[[float], PolicyInput]
    ) -> dict[str, Any]:
        measured = False

        def work() -> None:
            nonlocal measured
            self._measure(step, prefixes)
            measured = True

        outcome = self._guarded(work, step)
        if measured:
            names = self._chosen(step, losses, given)
            outcome = {**self._shared_state(), "names": names}
        return outcome

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

    def _chosen(self, step: int, losses: Losses, given: Callable[[float], PolicyInput]) -> list[str]:
        if self.warmup_end is None:
            limit = self._warmup_limit
            choice = frozenset(choose(self.config.policy, given(1.0)))
            over = self._settling.update(self.scores, choice) or step >= limit
            if self._loss_fall.update(losses) and self.config.wait_for_loss and step < self._ramp_end:
                if over:
                    self._wait(step)
                return []
            if not over:
                return []
            self.warmup_end = min(step, limit)
            self.journal.write("warmup_end", step=step, warmup_end=self.warmup_end)
        return choose(self.config.policy, given(self.ramp(step)))

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
