"""Safe: measures, decides and freezes while a model trains, and records what it did."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import nn

from ..cache.run import RunCache
from ..config import SafeConfig
from ..costs import CountFlops
from ..decide.policy import is_prefix_only
from ..decide.run_length import RunLength
from ..errors import ProbeError, note, warn
from ..freeze import Freezer, Prefix
from ..freeze.optimizer import LRScaler
from ..journal import Journal
from ..measure import Probe, Scorer
from ..measure.draw import batch_size_of, samples_of
from ..memory.budget import Budget
from ..memory.checkpointing import Checkpointing
from ..memory.lean import lean_forward, lean_layers
from ..memory.offload import Offload
from ..model import find_stacks, find_units
from ..model.backends import find_backend
from ..model.blocks import device_of, unwrap
from ..model.flow import chains_of
from ..model.modes import as_in_training
from ..model.offloaded import any_away
from ..model.patches import claim, forwarders, release
from ..model.units import blocks_below, something_else_trains, units_along
from ..parallel import Ranks, find_parallel
from .decider import Decider
from .freezing import Freezing
from .preflight import (
    by_mode_of,
    check_names,
    check_parallel,
    check_run,
    close_earlier,
    drawn_by_main,
    flows_of,
    frozen_at_start,
    offload_kind,
    paying_units,
    warn_of_units_left_out,
)
from .state import check_frozen, opened, packed_random_state, restore_random_state, sealed, settings_after
from .watch import Watch

__all__ = ["Safe"]

# After a change of these settings, scores before and after cannot be compared.
OF_THE_SCORE = {"score", "granularity", "normalize_rows"}
# After a change of these, scores are measured at other steps.
OF_THE_SCHEDULE = {*OF_THE_SCORE, "warmup", "ramp_end", "probe_tokens", "min_measurements", "overhead", "seed"}


class Safe:
    """Selective adapter freezing of a model that trains:

        safe = Safe(model, optimizer=optimizer, probe=train_dataloader, total_steps=len(train_dataloader) * epochs)
        for batch in train_dataloader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            safe.step()
        safe.close()

    Only freezing changes the run: no random state advances, no batch is taken, and with ``freeze_at_start=0`` losses
    are bit-identical until the first freeze. With several processes every rank makes a Safe and calls ``step``; rank 0
    decides for all.

    Args:
        model: with PEFT adapters in its blocks; the module itself, or wrapped by DistributedDataParallel, torch.compile
            or DeepSpeed.
        config: settings; the defaults need no tuning.
        optimizer: the state of frozen adapters is freed in it.
        probe: where scores are measured: the train dataloader (its dataset and collator are used, it is not
            iterated), a batch, or an iterable of batches.
        total_steps: optimizer steps of the whole run.
        batch_size: samples of one micro-batch, to check a memory budget; default: the probe's.
        samples_per_step: samples of one optimizer step on one rank; default: observed in the first step.
        samples_per_epoch: samples of one pass over the data, all ranks together; default: of the probe's dataset.
        journal: a path or a Journal; None keeps the events in memory. Only rank 0 writes.

    Raises:
        ModelError: the model has no adapters in its blocks.
        ProbeError: the probe contains nothing that the model takes.
        ConfigError: an argument is of another type or not positive, or a unit to freeze by hand does not exist.
        RunError: freezing is not supported for this run (nn.DataParallel, FSDP1, an unknown DeepSpeed), or the memory
            budget is too small.
    """

    # Called as look(safe, model) with each new Safe: `adafreeze doctor` examines a user's script here and ends it.
    on_made: ClassVar[list[Callable[[Safe, nn.Module], None]]] = []

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
        check_run(
            config,
            optimizer,
            total_steps,
            batch_size=batch_size,
            samples_per_step=samples_per_step,
            samples_per_epoch=samples_per_epoch,
        )
        self.ranks = Ranks()
        self.model = unwrap(model)
        close_earlier(self.model)
        self.total_steps = total_steps
        samples_per_epoch = samples_per_epoch or samples_of(probe)
        self.length = RunLength(total_steps, samples_per_step, samples_per_epoch, self.ranks.size)
        self._wrapped, self._optimizer, self._source = model, optimizer, probe
        self._batches: Any = probe  # what the probe is drawn from
        self._batch_size = batch_size or batch_size_of(probe)
        self._journal, self._owns_journal = journal, not isinstance(journal, Journal)
        self._at_close: tuple[frozenset[str], dict[str, int]] | None = None
        self._build(config or SafeConfig())
        for look in self.on_made:
            look(self, model)

    def _build(self, config: SafeConfig, journal: Journal | None = None) -> None:
        """Make all parts with these settings, and freeze what is frozen before step 0."""
        self._asked = config  # for checkpoints: on another host the cache may be possible
        self.stacks = find_stacks(self.model)
        self.backend = find_backend(self.model)
        self.units = find_units(self.model, self.stacks, self.backend, config.granularity)
        probe = drawn_by_main(self._batches, self.model, config, self.ranks)
        if samples_of(self._source) is None:  # an iterable can be consumed only once
            self._batches = probe.chunks
        self.parallel = find_parallel(self._wrapped, self._optimizer, self.units)
        self.config = check_parallel(config, self.parallel)
        check_names(self.config.freeze, self.units)
        self.freezer = Freezer(self.units, self.backend, self._optimizer)
        warn_of_units_left_out(self.freezer.optimizer, self.units, self.parallel)
        collective = self.parallel.collective
        try:
            flows = flows_of(self.model, self.stacks, self.units, probe, collective=collective)
        except ProbeError:
            self.parallel.release()
            raise
        claim(self, self._claimed)
        self._lighter = ExitStack()
        blocks = [block for stack in self.stacks for block in stack.blocks]
        self._lighter.enter_context(as_in_training(self.model, blocks))
        keep_dropout = self.config.prefix_dropout
        with CountFlops() as check:
            by_mode = () if keep_dropout else by_mode_of(self.model, self.stacks, probe, collective=collective)
        self._flops_of_check = check.total
        self.prefix = Prefix(self.model, self.stacks, flows, keep_dropout=keep_dropout, by_mode=by_mode)
        given = self._journal if self.ranks.is_main else None
        self.journal = journal or (given if isinstance(given, Journal) else Journal(given))
        self._write_start()
        chains = units_along(chains_of(flows), self.stacks, self.units)
        scorer = Scorer(self.model, self.stacks, self.units, self.backend, self.config, probe, self.parallel.collective)
        self.decider = Decider(self.config, self.total_steps, chains, scorer, self.journal, self.ranks)
        self.cache = RunCache(
            self.config, self.prefix, self.backend, self.journal, self.length, self._source, self.ranks.size
        )
        self.budget: Budget | None = None
        if (limit := self.config.memory_limit) is None:
            note("The first steps have the peak of the run: a larger freeze_at_start or a memory_budget lowers it.")
        else:
            self.budget = Budget(limit, probe, self._batch_size, self.prefix, self.freezer.optimizer, self.journal)
        paying = paying_units(self.config, self.model, self.stacks, self.units, flows, self.backend)
        head = something_else_trains(self.model, self.units)
        at_start = frozen_at_start(
            self.config, chains, self.journal, paying, head=head, ranks_move=self.backend.moves_ranks
        )
        scaled = [unit for name, unit in self.units.items() if name not in at_start]
        self.freezing = Freezing(
            config=self.config,
            freezer=self.freezer,
            prefix=self.prefix,
            lr_scaler=LRScaler(self._optimizer, self.config.lr_scale, scaled),
            parallel=self.parallel,
            ranks=self.ranks,
            cache=self.cache,
            budget=self.budget,
            offload=self._offload(),
            length=self.length,
            journal=self.journal,
            paying=paying,
            at_start=at_start,
        )
        self._watch = Watch(self.freezing)
        self._measured()
        if self.length.samples_per_step is not None:
            self._announce()
        try:
            self._lighten(probe)
            self.freezing.start(probe)
            if self.frozen:
                self._watch.after_freeze()
            if self.budget is not None:
                self.budget.check()
            if self.config.fill == "before":
                self.cache.fill(self.ranks.rank, self.ranks.size)
            self.freezing.weights_may_move()
        except BaseException:
            self.close()
            raise

    # What a host reads.

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return self.length.steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self.length.steps = steps

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the frozen units; after ``close``, of those that were frozen then."""
        return self.freezer.frozen if self._at_close is None else self._at_close[0]

    @property
    def prefixes(self) -> dict[str, int]:
        """Blocks in the frozen prefix of each stack, by its path."""
        return dict(self.prefix.depths if self._at_close is None else self._at_close[1])

    @property
    def scores(self) -> dict[str, float]:
        """The latest score of each unit; empty before the first measurement."""
        return self.decider.scores

    @property
    def warmup_end(self) -> int | None:
        """Optimizer step from which the ramp rises; None while units may not freeze by score yet."""
        return self.decider.warmup_end

    @property
    def state_key(self) -> tuple[Any, ...]:
        """Changes whenever the cost of a step changes."""
        budget = self.budget.state_key if self.budget is not None else ()
        return (*sorted(self.frozen), *self.prefixes.items(), *self.cache.state_key, *budget)

    @property
    def flops_spent(self) -> int:
        """FLOPs spent so far, on this rank, on measuring and on the check of what evaluation mode changes."""
        measured = self.decider.scorer.flops_spent if self.decider.scorer is not None else 0
        return self._flops_of_check + measured

    @property
    def nested_flops(self) -> int:
        """FLOPs spent inside training steps to compute states for the prefix cache.

        Counted from the first access on, since counting takes time and most runs do not need it.
        """
        return self.cache.flops

    def logs(self) -> dict[str, float]:
        """Scalars for the host's own logs.

        ``safe/saved_mib`` is what autograd saves of an average micro-batch: counted once after each freeze and scaled
        by the mean number of tokens.
        """
        logs: dict[str, float] = {
            "safe/live_units": len(self.units) - len(self.frozen),
            "safe/frozen_units": len(self.frozen),
            "safe/frozen_prefix": sum(self.prefixes.values()),
            "safe/ramp": round(self.decider.ramp(self.steps), 4),
            "safe/lr_scale": round(self.freezing.lr_scaler.scale, 4),
        }
        if (saved := self._watch.saved_bytes) is not None:
            logs["safe/saved_mib"] = round(saved / 2**20, 3)
        if (total := sum(self.scores.values())) > 0:
            logs["safe/frozen_score_share"] = round(sum(self.scores.get(n, 0.0) for n in self.frozen) / total, 6)
        if (offload := self.freezing.offload) is not None:
            logs["safe/offloaded_mib"] = round(offload.nbytes / 2**20, 3)
            logs["safe/streamed_mib"] = round(offload.streamed / 2**20, 3)
        return logs | self.cache.logs() | (self.budget.logs() if self.budget is not None else {})

    # What a host calls.

    def step(self) -> list[str]:
        """Call this after each optimizer step, on every rank, gradients cleared. Returns the units frozen now.

        Raises:
            RunError: the ranks disagree on what is frozen.
        """
        self.steps += 1
        if self.decider.plan is None:
            self._announce()
            self.decider.prepare(self.steps, round(self.length.step_samples * self.length.rows_per_sample))
            self._measured()
        self.cache.say_expected()
        self.freezing.weights_may_move()
        if not self.decider.due(self.steps):
            return []
        self.ranks.check_alike("frozen", self.frozen, self.steps)
        self.freezing.take_the_strictest()
        names = self.decider.decide(
            self.steps,
            frozen=self.frozen,
            prefixes=self.prefixes,
            losses=self._watch.take_losses(),
            learning=frozenset(self._watch.learning),
            something_else_trains=self.freezing.something_else_trains(),
        )
        self._measured()
        if is_prefix_only(self.config.policy):
            names = [name for name in names if name in self.freezing.paying]
        if self.config.dry_run:
            if names:
                self.journal.write("would_freeze", step=self.steps, units=names)
                note(f"Step {self.steps} of {self.total_steps}: {len(names)} of {len(self.units)} units would freeze.")
            return []
        self.freeze(names, by=self.config.to_dict()["policy"])
        self.ranks.check_alike("frozen", self.frozen, self.steps)
        return names

    def freeze(self, names: list[str], *, by: str = "hand") -> None:
        """Freeze units now, on every rank, between two optimizer steps.

        Args:
            names: of units, as in ``units``.
            by: for the journal.

        Raises:
            ConfigError: a name is no unit.
        """
        check_names(names, self.units)
        if names:
            self.freezing.freeze(names, by=by, ramp=self.decider.ramp(self.steps), scores=self.scores)
            self._watch.after_freeze()

    def close(self) -> None:
        """Restore the model: flags, modules, hooks, forwards. Trained weights stay."""
        if self._at_close is None:
            self._at_close = self.frozen, self.prefixes
            self._take_down()
            self.journal.write("close", step=self.steps, frozen=self.frozen, flops_spent=self.flops_spent)
            if self._owns_journal:
                self.journal.close()

    def state_dict(self, *, random_state: bool = True) -> dict[str, Any]:
        """What a resumed run needs, as plain JSON values; that of rank 0 is enough, except for the random state.

        Args:
            random_state: include that of Python, NumPy and torch on this rank; False where the host saves it.
        """
        return sealed(
            {
                "settings": self._asked.to_dict(),
                "length": self.length.state_dict(),
                "watch": self._watch.state_dict(),
                "frozen": sorted(self.frozen),
                "probe": self.decider.probe.digest(),
                "deciding": self.decider.state_dict(),
                "cache": self.cache.state_dict(),
                "budget": self.budget.state_dict() if self.budget is not None else None,
                "journal": self.journal.mark(),
                "random": packed_random_state(self.ranks.rank) if random_state else None,
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a run where ``state_dict`` was written; freezes its units at once.

        Call it last, when model, optimizer and scheduler have their states: a saved random state is restored here. The
        journal is cut off at the step of the checkpoint.

        Settings that were not given are the checkpoint's, from the start of the run on. If the run has another length
        than planned, its schedule is planned again from the step reached.

        Raises:
            RunError: the state is truncated, edited, written by another version, or for a model with other units.
        """
        content = opened(state)
        config, differing = settings_after(self._asked, content["settings"])
        taken = config is not self._asked
        if config.granularity == self.config.granularity:  # before anything changes
            check_frozen(content["frozen"], self.units)
        if taken:
            self._build_anew(config)
            check_frozen(content["frozen"], self.units)
        if content["probe"] != self.decider.probe.digest():
            warn(
                "The probe differs from that of the checkpoint, so scores before and after are of two probes: the "
                "train data, their order or SafeConfig(seed=, probe_tokens=) changed.",
                fix="Resume with the same data, or pass probe= explicitly.",
            )
        self._watch.load_state_dict(content["watch"])
        self.journal.rewind(content["journal"])
        changes = self.length.load_state_dict(content["length"])
        frozen = dict.fromkeys([*content["frozen"], *self.freezing.at_start])
        if not self.frozen <= frozen.keys():
            self.freezing.thaw(self.frozen)  # back to before a freeze
        self.decider.load_state_dict(
            content["deciding"],
            self.steps,
            other_schedule=bool(changes) or not differing.isdisjoint(OF_THE_SCHEDULE),
            other_score=not differing.isdisjoint(OF_THE_SCORE),
        )
        self._measured()
        if changes:
            note(
                f"Resumed at step {self.steps} with {', '.join(changes)}. The schedule is planned again from here: "
                f"{self.decider.schedule_after(self.steps)}."
            )
        if changes or differing or taken:
            settings = self.config.to_dict()
            self.journal.write("replan", step=self.steps, total_steps=self.total_steps, config=settings, length=changes)
        self.cache.load_state_dict(content["cache"], other_length=bool(changes))
        if self.decider.plan is not None:
            self._announce()
        if self.budget is not None and content["budget"] is not None:
            self.budget.load_state_dict(content["budget"])
        again = [name for name in frozen if name not in self.frozen]
        if again:
            self.freezing.freeze(again, by="resume", ramp=self.decider.ramp(self.steps), scores=self.scores)
            self._watch.after_freeze(check_gradients=False)
        restore_random_state(content["random"], self.ranks.rank)

    def _build_anew(self, config: SafeConfig) -> None:
        """Make all parts again, as if these settings had been given before step 0."""
        self._take_down()
        self.freezing.restore_moments()
        try:
            self._build(config, self.journal)
        except BaseException:
            self._at_close = self._at_close or (frozenset(), {})
            raise

    def _lighten(self, probe: Probe) -> None:
        """Let live blocks save less.

        Raises:
            ConfigError: the model does not allow selective checkpointing.
        """
        layers = lean_layers(self.model.modules()) if self.config.lean else []
        for layer in layers:
            self._lighter.enter_context(lean_forward(layer))
        if self.config.lean and "lean" in self.config.given and all(layer.lora_variant for layer in layers):
            note("lean=True changes nothing: no layer is plain LoRA with PEFT's own forward.")
        if self.config.checkpointing is not None:
            checkpointing = Checkpointing(self.model, self.stacks)
            checkpointing.recomputed = checkpointing.all_selective
            checkpointing.install()
            self._lighter.callback(checkpointing.restore)
            checkpointing.check(self.prefix.rehearse, probe.micro_batch(1, device_of(self.model)))

    def _offload(self) -> Offload | None:
        kind = offload_kind(self.config, self.model, self._wrapped, self.parallel)
        if kind is None and not any_away(self.model):
            return None
        adapters = (id(parameter) for unit in self.units.values() for parameter in unit.all_parameters())
        made = Offload(kind, self.prefix, adapters, self.journal, self.cache.home)
        made.fills = self.config.fill == "before"
        return made

    def _take_down(self) -> None:
        self._watch.remove()
        self.freezing.close()
        self._lighter.close()
        release(self, self._claimed)

    @property
    def _claimed(self) -> list[nn.Module]:
        blocks = [block for stack in self.stacks for block in stack.blocks]
        return [self.model, *blocks, *forwarders(self.model)]

    def _measured(self) -> None:
        """Pass on what the decider's scorer is and holds now."""
        scorer = self._watch.scorer = self.decider.scorer
        self.freezing.measuring_bytes = scorer.nbytes if scorer is not None else 0
        self.freezing.share_memory()

    def _announce(self) -> None:
        at_start = blocks_below(self.decider.chains, self.freezing.at_start)
        self.cache.announce(sum(map(len, self.stacks)), at_start)

    def _write_start(self) -> None:
        from ..env import environment  # here, or `python -m adafreeze.env` would import itself twice

        self.journal.write(
            "start",
            step=0,
            total_steps=self.total_steps,
            config=self.config.to_dict(),
            model=type(self.model).__name__,
            ranks=self.ranks.size,
            parallel=self.parallel.name,
            stacks={stack.path: len(stack) for stack in self.stacks},
            units=list(self.units),
            environment=environment(),
        )
