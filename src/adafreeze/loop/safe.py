"""Safe: the loop that measures, decides, freezes, and writes down what it did."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from ..cache import Progress
from ..cache.run import RunCache
from ..config import SafeConfig
from ..decide.policy import freezes_prefixes
from ..errors import ConfigError, ProbeError, RunError, note, warn
from ..freeze import Freezer, Prefix
from ..freeze.lr_scale import LRScaler
from ..journal import Journal
from ..measure import Probe
from ..measure.draw import batch_size_of, samples_of
from ..measure.scorer import Scorer
from ..memory.budget import open_budget
from ..model import find_stacks, find_units
from ..model.backends import find_backend
from ..model.blocks import device_of, unwrap
from ..model.calls import loss_in
from ..model.flow import chains_of, tensors_in
from ..model.patches import claim, forwarders, release
from ..model.traces import traceless
from ..model.units import blocks_below, units_along
from ..parallel import Ranks, find_parallel
from .decider import Decider
from .guard import Guard
from .length import RunLength
from .observer import Observer
from .preflight import (
    MOST_KINDS,
    check_parallel,
    check_run,
    check_units,
    close_earlier,
    drawn_by_main,
    flows_of,
    frozen_at_start,
    paying_units,
)
from .resume import kept, take_up

__all__ = ["Safe"]


class Safe:
    """Selective adapter freezing of a model that trains:

        safe = Safe(model, optimizer=optimizer, probe=train_dataloader, total_steps=len(train_dataloader) * epochs)
        for batch in train_dataloader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            safe.step()
        safe.close()

    Nothing changes but what freezing does: no random state advances, no batch is taken, and with ``freeze_at_start=0``
    losses are the same to the last bit until the first freeze. Of several processes every rank makes a Safe and calls
    ``step``; rank 0 decides for all.

    Args:
        model: with PEFT adapters in its blocks; the module itself, or wrapped by DistributedDataParallel, torch.compile
            or DeepSpeed.
        config: settings; the defaults need no tuning.
        optimizer: whose state for frozen adapters is freed.
        probe: where scores are measured: the train dataloader (its dataset and collator are used, it is not
            iterated), a batch, or an iterable of batches.
        total_steps: optimizer steps of the whole run.
        batch_size: samples of one micro-batch, for the check of a memory budget; if not given, the probe's.
        samples_per_step: samples of one optimizer step on one rank; observed in the first step if not given.
        samples_per_epoch: samples of one pass over the data, all ranks together; if not given, the probe's dataset's.
        journal: a path or a Journal; None keeps the events in memory. Only rank 0 writes.

    Raises:
        ModelError: the model has no adapters by block.
        ProbeError: the probe holds nothing that the model takes.
        ConfigError: total_steps is not positive, or a unit to freeze by hand does not exist.
        RunError: freezing would not be right for the run (nn.DataParallel, FSDP1, an unknown DeepSpeed), or the memory
            budget is too small.
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
        check_run(total_steps)
        self.ranks = Ranks()
        self.model = unwrap(model)
        close_earlier(self.model)
        self.total_steps = total_steps
        self.samples_per_epoch = samples_per_epoch or samples_of(probe)
        self.length = RunLength(total_steps, samples_per_step, self.samples_per_epoch, self.ranks.size)
        self.steps = 0
        self._given = model, optimizer, probe, batch_size or batch_size_of(probe), journal
        self._batches: Any = probe  # what the probe is drawn from
        self._owns_journal = not isinstance(journal, Journal)
        self._at_close: tuple[frozenset[str], dict[str, int]] | None = None
        self._build(config or SafeConfig())

    def _build(self, config: SafeConfig, journal: Journal | None = None) -> None:
        """Make all parts, by these settings, and freeze what is to be frozen from the start."""
        self._asked = config  # what a checkpoint keeps: in another environment there may be a cache
        model, optimizer, probe, batch_size, given = self._given
        self.stacks = find_stacks(self.model)
        self.backend = find_backend(self.model)
        self.units = find_units(self.model, self.stacks, self.backend, config.granularity)
        drawn = drawn_by_main(self._batches, self.model, config, self.ranks)
        if samples_of(probe) is None:  # it may be gone through once only
            self._batches = drawn.chunks
        self.parallel = find_parallel(model, optimizer, self.units)
        self.config = check_parallel(config, self.parallel)
        check_units(self.config.freeze, self.units, optimizer, self.parallel)
        self.freezer = Freezer(self.units, self.backend, optimizer)
        try:
            flows = flows_of(self.model, self.stacks, drawn, collective=self.parallel.collective)
        except ProbeError:
            self.parallel.release()
            raise
        claim(self, self._claimed)
        self.prefix = Prefix(self.model, self.stacks, flows, keep_dropout=self.config.prefix_dropout)
        self.prefix.on_end = self._prefix_ended
        self.prefix.on_change = self._prefix_shrank
        given = given if self.ranks.is_main else None
        self.journal = journal or (given if isinstance(given, Journal) else Journal(given))
        self._write_start()
        drops = self.prefix.drops_layers
        self._guard = Guard(self.model, self.freezer, self.journal, drops_layers=drops)
        chains = units_along(chains_of(flows), self.stacks, self.units)
        parts = self._new_scorer, self._guard, self.journal, self.ranks
        collective = self.parallel.collective
        self.decider = Decider(self.config, self.total_steps, chains, drawn, *parts, collective=collective)
        rest = probe, self.ranks.size, self._cache_room
        self.cache = RunCache(self.config, self.prefix, self.backend, self.journal, self._progress, *rest)
        held = self.model, self.stacks, self.prefix, optimizer, self.journal, self._bytes_beside
        self.budget = open_budget(self.config.memory_limit, drawn, batch_size, *held)
        self._observer = Observer(self.model, optimizer, self._audit, self._look_at_gradients)
        head, ranks_move = self._guard.something_else_trains(), self.backend.moves_ranks
        self._pay = paying_units(self.config, self.model, self.stacks, self.units, flows, self.backend)
        self._at_start = frozen_at_start(self.config, chains, self.journal, self._pay, head=head, ranks_move=ranks_move)
        by_choice = [unit for name, unit in self.units.items() if name not in self._at_start]
        self._lr_scaler = LRScaler(optimizer, self.config.lr_scale, by_choice)
        if self.length.samples_per_step is not None:
            self._announce()
        moments = getattr(self.freezer.optimizer, "state", {})
        before = dict(moments)
        try:
            # Even where no adapter stands at the bottom of the stack: until something freezes, the run is as it was.
            self._freeze(self._at_start, by="start")
            self._see_that_it_learns(drawn)
            # Until the first training pass: a checkpoint that is loaded before may not have frozen them.
            self._moments = {parameter: before[parameter] for parameter in before if parameter not in moments}
            if self.budget is not None:
                self.budget.check()
        except BaseException:
            self.close()
            raise

    # What a host reads.

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
        """Optimizer steps from which the ramp rises; None before units may freeze."""
        return self.decider.warmup_end

    @property
    def state_key(self) -> tuple[Any, ...]:
        """Changes whenever the cost of a step changes."""
        budget = self.budget.state_key if self.budget is not None else ()
        return (*sorted(self.frozen), *self.prefixes.items(), *self.cache.state_key, *budget)

    @property
    def flops_spent(self) -> int:
        """FLOPs spent on measuring so far, on this rank."""
        return self.decider.scorer.flops_spent if self.decider.scorer is not None else 0

    @property
    def nested_flops(self) -> int:
        """FLOPs spent inside training steps to compute what the prefix cache does not hold yet.

        Counted from the first time that this is asked for: counting takes time, and most runs need none.
        """
        return self.cache.flops

    def logs(self) -> dict[str, float]:
        """Scalars for the host's own logs.

        ``safe/saved_mib`` is what autograd keeps of one average micro-batch: counted once after each freeze and
        scaled by the mean number of tokens.
        """
        logs: dict[str, float] = {
            "safe/live_units": len(self.units) - len(self.frozen),
            "safe/frozen_units": len(self.frozen),
            "safe/frozen_prefix": sum(self.prefixes.values()),
            "safe/ramp": round(self.decider.ramp(self.steps), 4),
            "safe/lr_scale": round(self._lr_scaler.scale, 4),
        }
        if (saved := self._observer.saved_bytes) is not None:
            logs["safe/saved_mib"] = round(saved / 2**20, 3)
        if (total := sum(self.scores.values())) > 0:
            logs["safe/frozen_score_share"] = round(sum(self.scores.get(n, 0.0) for n in self.frozen) / total, 6)
        return logs | self.cache.logs() | (self.budget.logs() if self.budget is not None else {})

    # What a host calls.

    def step(self) -> list[str]:
        """To be called after each optimizer step, on every rank, gradients cleared. Returns the units frozen now.

        Raises:
            RunError: the ranks do not agree on what is frozen.
        """
        self.steps += 1
        if self.decider.plan is None:
            self._announce()
            step_samples = self.length.step_samples(*self._seen) * self.length.rows_per_sample(*self._seen)
            self.decider.prepare(self.steps, step_samples)
        if not self.decider.due(self.steps):
            return []
        self.ranks.check_alike("frozen", self.frozen, self.steps)
        self._take_the_strictest()
        names = self.decider.decide(self.steps, self.frozen, self.prefixes, self._observer.take_losses())
        names = [name for name in names if name in self._pay or not freezes_prefixes(self.config.policy)]
        if self.config.dry_run:
            if names:
                self.journal.write("would_freeze", step=self.steps, units=names)
                note(f"Step {self.steps} of {self.total_steps}: {len(names)} of {len(self.units)} units would freeze.")
            return []
        self._freeze(names, by=self.config.to_dict()["policy"])
        self.ranks.check_alike("frozen", self.frozen, self.steps)
        return names

    def close(self) -> None:
        """Leave the model as it was: flags, modules, hooks, forwards. Trained weights stay."""
        if self._at_close is None:
            self._at_close = self.frozen, self.prefixes
            self._take_down()
            self.journal.write("close", step=self.steps, frozen=self.frozen, flops_spent=self.flops_spent)
            if self._owns_journal:
                self.journal.close()

    def _take_down(self) -> None:
        self._observer.remove()
        self._lr_scaler.remove()
        self.cache.close()
        self.prefix.restore()
        if self.budget is not None:
            self.budget.close()
        self.freezer.restore()
        self.parallel.release()
        release(self, self._claimed)

    def state_dict(self, *, random_state: bool = True) -> dict[str, Any]:
        """What a resumed run needs, as plain JSON values; that of rank 0 will do for all, but for the random state.

        Args:
            random_state: with that of Python, NumPy and torch on this rank; False where the host keeps it.
        """
        return kept(self, random_state=random_state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a run where ``state_dict`` was written; freezes its units at once.

        To be called last, when model, optimizer and scheduler have theirs: a random state that was kept is put back
        here. What the journal holds of later steps is cut off: they come again.

        Settings that were not given are the checkpoint's, from the start of the run on. If the run has another length
        than was planned, the schedule is laid out anew from the step reached.

        Raises:
            RunError: cut off, edited, written by another version, or for a model with other units.
        """
        take_up(self, state)

    # What holds it together.

    def _build_anew(self, config: SafeConfig) -> None:
        """Make all parts again, as if these settings had been given before step 0."""
        self._take_down()
        if self.freezer.optimizer is not None:
            self.freezer.optimizer.state.update(self._moments)
        try:
            self._build(config, self.journal)
        except BaseException:
            self._at_close = self._at_close or (frozenset(), {})
            raise

    @property
    def _claimed(self) -> list[nn.Module]:
        blocks = [block for stack in self.stacks for block in stack.blocks]
        return [self.model, *blocks, *forwarders(self.model)]

    def _prefix_ended(self, path: str) -> None:
        """Something that trains feeds the blocks of this stack, as a training pass has just shown."""
        names = [name for name, unit in self.units.items() if unit.stack == path]
        self._pay -= set(names)
        # Of several ranks another one may not have seen it; and a unit that was frozen for some steps has no way back.
        thawed = [name for name in names if name in self._at_start] if self.steps == 0 and self.ranks.size == 1 else []
        if thawed:
            self._at_start = [name for name in self._at_start if name not in thawed]
            self._thaw(thawed)
        self.cache.prefix_changed()
        self.journal.write("prefix_ended", step=self.steps, stack=path)
        note(
            f"Step {self.steps}: something that trains feeds the blocks of {path} (a projector, a vision tower, inputs "
            "that require grad). Its gradient passes through them, so they have no frozen prefix, and no cache; "
            + (f"the {len(thawed)} units frozen there train again." if thawed else "nothing more freezes there.")
        )

    def _thaw(self, names: Collection[str]) -> None:
        """Let these units train again."""
        others = [name for name in self.frozen if name not in names]
        self.freezer.restore()
        if others:
            self.freezer.freeze(others)
        self._lr_scaler.after_freeze(self.frozen)
        self.prefix.update()
        self.parallel.after_freeze(self.frozen)
        self.cache.prefix_changed()
        units, frozen = [name for name in self.units if name in names], len(self.frozen)
        self.journal.write("thaw", step=self.steps, units=units, frozen=frozen, prefixes=self.prefixes)

    def _see_that_it_learns(self, probe: Probe) -> None:
        """Before step 0: what is frozen at the start may be all that the loss depends on.

        Raises:
            ConfigError: the units were frozen by hand.
        """
        kinds = probe.kinds(device_of(self.model))[:MOST_KINDS] if self._at_start else []
        cut = [one for one in kinds if not self._has_graph(one)]
        if not cut:
            return
        names, by_hand = self._at_start, list(self.config.freeze)
        self._thaw(names)
        if not any(map(self._has_graph, cut)):  # nor has the model without a freeze
            self._freeze(names, by="start")
            return
        if by_hand:
            raise ConfigError(
                f"With the {len(by_hand)} units of SafeConfig.freeze frozen, the loss has no gradient.",
                cause="It does not depend on any of the blocks that are left: a head that reads lower ones.",
                fix="SafeConfig(freeze=[...]) with fewer of the lowest blocks.",
            )
        self._at_start = []
        note(
            f"The {len(names)} units that would be frozen from the start train: the loss does not depend on any of the "
            "blocks above them (a head that reads lower ones)."
        )

    def _has_graph(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a training pass on these inputs could be followed by a backward pass; True where it fails.

        BatchNorm does not take one sample in training mode, and that says nothing of a batch.
        """
        try:
            with traceless(self.model.modules()), torch.enable_grad():
                output = self.prefix.rehearse(**inputs)
        except Exception:
            return True
        loss = loss_in(output)
        return any(tensor.requires_grad for tensor in tensors_in(output if loss is None else loss))

    def _nothing_learns(self) -> None:
        """After a freeze no live unit has a gradient: whatever the cause, training goes on as if nothing had frozen.

        Raises:
            RunError: the units were frozen by hand, or other ranks would have to thaw theirs in the same step.
        """
        names = [name for name in self.units if name in self.frozen and name not in self.config.freeze]
        fact = f"After the freeze at step {self.steps} no live unit has a gradient."
        cause = (
            "The loss does not depend on the blocks that are left (a head that reads lower ones), or the graph was cut "
            "above the frozen prefix, by reentrant checkpointing or a detach."
        )
        fix = 'Use gradient_checkpointing_kwargs={"use_reentrant": False}, or freeze fewer blocks.'
        if not names or self.ranks.size > 1:
            raise RunError(fact, cause=cause, fix=fix)
        self._pay, self._at_start = frozenset(), []
        self.prefix.ended.update(stack.path for stack in self.stacks)
        self._thaw(names)
        warn(
            fact,
            cause=f"{cause} All units train again, and no more freeze; this step trained nothing.",
            fix=fix,
            stacklevel=4,
        )

    def _prefix_shrank(self, paths: list[str]) -> None:
        """Somebody has made a parameter in the prefix trainable that belongs to no unit."""
        self.cache.prefix_changed()
        self.journal.write("prefix_shrank", step=self.steps, prefixes=self.prefixes)
        left = ", ".join(f"{self.prefix.depths[path]} blocks of {path}" for path in paths)
        note(f"Step {self.steps}: a parameter in the frozen prefix was made trainable; what is left of it is {left}.")

    def _take_the_strictest(self) -> None:
        """What one rank has found wrong, no rank does."""
        cache, paths = self.cache.prefix_cache, [stack.path for stack in self.stacks]
        wrong = [cache is not None and cache.distrusted, *(path in self.prefix.ended for path in paths)]
        distrusted, *ended = self.ranks.any_of(wrong)
        if distrusted and cache is not None:
            cache.switch_off("another rank has found that its passes cannot be served")
        for path, is_so in zip(paths, ended, strict=True):
            if is_so and path not in self.prefix.ended:
                self.prefix.ended.add(path)
                self.prefix.update()
                self._prefix_ended(path)

    @property
    def _seen(self) -> tuple[int, int]:
        """Optimizer steps, and the rows that the model got in them on this rank."""
        return self.steps, self._observer.samples

    def _bytes_beside(self) -> int:
        """Bytes on the device beside what a training step holds: of measuring and cache only where that is the host."""
        if device_of(self.model).type != "cpu":
            return self.parallel.extra_bytes
        scorer = self.decider.scorer
        return self.parallel.extra_bytes + (scorer.nbytes if scorer is not None else 0) + self.cache.memory

    def _cache_room(self) -> int | None:
        """Bytes that the memory budget leaves to a cache in memory; None where it does not count that."""
        if self.budget is None or device_of(self.model).type != "cpu":
            return None
        return self.budget.room()

    def _progress(self) -> Progress:
        return self.length.progress(*self._seen)

    def _announce(self) -> None:
        at_start = blocks_below(self.decider.chains, self._at_start)
        epoch = self.length.epoch_steps(*self._seen)
        self.cache.announce(sum(map(len, self.stacks)), epoch, self.total_steps, at_start)

    def _new_scorer(self, probe: Probe) -> Scorer:
        parts = self.model, self.stacks, self.units, self.backend, self.config
        return Scorer(*parts, probe, collective=self.parallel.collective)

    def _write_start(self) -> None:
        from ..env import environment  # here, or `python -m adafreeze.env` finds itself imported already

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

    def _freeze(self, names: list[str], by: str) -> None:
        if not names:
            return
        self.freezer.freeze(names)
        self._lr_scaler.after_freeze(self.frozen)
        self.prefix.update()
        self.parallel.after_freeze(self.frozen)
        self.cache.prefix_changed()
        self._observer.count_again()
        self._guard.check_gradients = by != "resume" and not self.parallel.clears_gradients
        self.journal.write(
            "resume" if by == "resume" else "freeze",
            step=self.steps,
            units=names,
            by=by,
            ramp=self.decider.ramp(self.steps),
            scores={name: self.scores.get(name) for name in names},
            frozen=len(self.frozen),
            prefixes=self.prefixes,
            lr_scale=self._lr_scaler.scale,
        )
        if by != "resume":
            scale = self._lr_scaler.scale
            note(
                f"Step {self.steps} of {self.total_steps}: {len(self.frozen)} of {len(self.units)} units are frozen"
                f"{' (freeze_at_start)' if by == 'start' and self.config.share_at_start else ''}, "
                f"{sum(self.prefixes.values())} of {sum(map(len, self.stacks))} blocks are in the prefix"
                + (f", learning rates × {scale:.3g}." if scale != 1 else ".")
            )

    # What the observer calls.

    def _audit(self) -> None:
        self._moments = {}
        if self._guard.audit(self.steps):
            self.prefix.update()
            self.cache.prefix_changed()

    def _look_at_gradients(self) -> None:
        if self.decider.scorer is not None:
            self.decider.scorer.listen()
        if not self._guard.look_at_gradients(self.steps):
            self._nothing_learns()
