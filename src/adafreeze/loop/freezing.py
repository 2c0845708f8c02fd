"""Freezing: applies a freeze to everything that depends on it, and takes it back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..cache.run import RunCache
from ..config import SafeConfig
from ..decide.run_length import RunLength
from ..errors import ConfigError, RunError, note, warn
from ..freeze import Freezer, Prefix
from ..freeze.optimizer import LRScaler
from ..journal import Journal
from ..measure import Probe
from ..memory.budget import Budget
from ..memory.offload import Offload
from ..model.batch import loss_in
from ..model.blocks import device_of
from ..model.flow import tensors_in
from ..model.traces import traceless
from ..model.units import something_else_trains
from ..parallel import Parallel, Ranks

__all__ = ["Freezing"]


@dataclass(kw_only=True, eq=False)
class Freezing:
    """The units of a run that are frozen or may freeze, and what a freeze changes.

    The order matters: flags and optimizer state first (``freezer``), then what is derived from them: learning rates,
    the prefix, the processes' gradient exchange, and the memory that budget and cache may use.

    Args:
        config: settings of the run.
        freezer: changes flags.
        prefix: follows the flags.
        lr_scaler: follows the number of live units.
        parallel: what spreads the model over processes.
        ranks: of the run.
        cache: of the prefix's output.
        budget: of a training step; None for none.
        offload: of the prefix's weights; None if they stay.
        length: where the run stands.
        journal: of the run.
        paying: units that may freeze under prefix policies: the others cannot join a prefix.
        at_start: units to freeze before step 0.

    Attributes:
        measuring_bytes: host memory of the scorer.
    """

    config: SafeConfig
    freezer: Freezer
    prefix: Prefix
    lr_scaler: LRScaler
    parallel: Parallel
    ranks: Ranks
    cache: RunCache
    budget: Budget | None
    offload: Offload | None
    length: RunLength
    journal: Journal
    paying: frozenset[str]
    at_start: list[str]
    measuring_bytes: int = 0

    def __post_init__(self) -> None:
        self.model, self.stacks = self.prefix.model, self.prefix.stacks
        self._shares_memory = device_of(self.model).type == "cpu"  # the step, the scorer and the cache in one memory
        # A checkpoint loaded before the first training pass may not have frozen these.
        self._moments: dict[Any, Any] = {}
        self._asked: tuple[Any, ...] = ()
        self._recomputes = False
        self.prefix.on_end, self.prefix.on_change = self._prefix_ended, self._prefix_shrank

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the frozen units."""
        return self.freezer.frozen

    @property
    def live(self) -> set[str]:
        """Names of the others."""
        return self.freezer.units.keys() - self.freezer.frozen

    def something_else_trains(self) -> bool:
        """Whether a parameter outside the units is trainable."""
        return something_else_trains(self.model, self.freezer.units)

    def start(self, probe: Probe) -> None:
        """Freeze what is to be frozen before step 0, and check that the rest still learns.

        Raises:
            ConfigError: units that were frozen by hand are all that the loss depends on.
        """
        state = getattr(self.freezer.optimizer, "state", {})
        before = dict(state)
        if self.at_start:  # also where no adapter is at the bottom of the stack: without a freeze nothing changes
            self.freeze(self.at_start, by="start")
            self._check_learning(probe)
        self._moments = {parameter: before[parameter] for parameter in before if parameter not in state}

    def freeze(
        self, names: list[str], by: str, *, ramp: float = 0.0, scores: Mapping[str, float] | None = None
    ) -> None:
        """Freeze these units, too.

        Args:
            names: of units.
            by: the policy, ``"start"`` or ``"resume"``.
            ramp: for the journal.
            scores: for the journal.
        """
        if not names:
            return
        self.freezer.freeze(names)
        self._follow()
        self.journal.write(
            "resume" if by == "resume" else "freeze",
            step=self.length.steps,
            units=names,
            by=by,
            ramp=ramp,
            scores={name: (scores or {}).get(name) for name in names},
            frozen=len(self.frozen),
            prefixes=self.prefix.depths,
            lr_scale=self.lr_scaler.scale,
        )
        if by != "resume":
            scale = self.lr_scaler.scale
            note(
                f"Step {self.length.steps} of {self.length.total_steps}: {len(self.frozen)} of "
                f"{len(self.freezer.units)} units are frozen"
                f"{' (freeze_at_start)' if by == 'start' and self.config.share_at_start else ''}, "
                f"{sum(self.prefix.depths.values())} of {sum(map(len, self.stacks))} blocks are in the prefix"
                + (f", learning rates × {scale:.3g}." if scale != 1 else ".")
            )

    def thaw(self, names: Collection[str]) -> None:
        """Let these units train again."""
        others = [name for name in self.frozen if name not in names]
        self.freezer.restore()
        if others:
            self.freezer.freeze(others)
        self._follow()
        self.journal.write(
            "thaw",
            step=self.length.steps,
            units=[name for name in self.freezer.units if name in names],
            frozen=len(self.frozen),
            prefixes=self.prefix.depths,
        )

    def _follow(self) -> None:
        self.lr_scaler.after_freeze(self.frozen)
        self.prefix.update()
        self.parallel.after_freeze(self.frozen)
        self.follow_prefix()

    def follow_prefix(self) -> None:
        """Let the weights that left, budget and cache follow the prefix as it is."""
        self._move_weights()
        self.share_memory()
        # The room takes a rehearsal, so it is not asked for a cache that is off.
        budget = self.budget if self._shares_memory and self.cache.off_because is None else None
        self.cache.update(None if budget is None else budget.room())
        self.share_memory()

    def share_memory(self) -> None:
        """Hand the budget what is on the device beside a training step."""
        if self.budget is not None:
            host = self.measuring_bytes + self.cache.memory if self._shares_memory else 0
            streamed = self.offload.largest if self.offload is not None else 0
            self.budget.beside = self.parallel.extra_bytes + host + streamed

    def weights_may_move(self) -> None:
        """Between two steps: the prefix's weights leave once all states are held, and return if that was not so."""
        offload, cache = self.offload, self.cache.prefix_cache
        if offload is None or offload.ended is not None:
            return
        waits, offload.fills = offload.fills, False
        leaves = cache is not None and cache.complete and offload.has_more and self._wants_room()
        misses = cache is not None and offload.misses_too_often(cache.stats.misses, cache.stats.looked_up)
        if not (waits or leaves or misses or offload.has_returned or self.cache.off_because is not None):
            return
        before = offload.nbytes
        self._move_weights(misses=misses, leaves=leaves)
        if offload.nbytes != before:
            self.share_memory()

    def _move_weights(self, *, misses: bool = False, leaves: bool = False) -> None:
        offload, cache = self.offload, self.cache.prefix_cache
        if offload is None:
            return
        with cache.weights_move() if cache is not None else nullcontext():
            offload.follow()
            if cache is not None and (reason := self.cache.off_because) is not None:
                offload.end(f"the prefix cache is off ({reason})", self.length.steps)
            if misses:
                offload.end("more than a few of the last samples were not stored", self.length.steps)
            if leaves and offload.ended is None:
                offload.leave(self.length.steps)

    def _wants_room(self) -> bool:
        """With ``offload="auto"`` weights leave where the budget would recompute something otherwise."""
        if self.config.offload != "auto" or (self.offload is not None and self.offload.nbytes):
            return True
        if self.budget is None:
            return False
        asked = (*self.prefix.depths.values(), *self.budget.state_key)
        if asked != self._asked:  # in each step it would rehearse anew, or at least make a batch
            self._asked, self._recomputes = asked, self.budget.recomputes
        return self._recomputes

    def training_begins(self) -> None:
        """The first training pass has begun: moments of units that were frozen at the start are of no more use."""
        self._moments = {}

    def close(self) -> None:
        """Undo everything, in the opposite order."""
        self.lr_scaler.remove()
        if self.config.offload in ("cpu", "disk"):
            self._say_that_nothing_left()
        if self.offload is not None:
            self.offload.close()
        self.cache.close()
        self.prefix.restore()
        if self.budget is not None:
            self.budget.close()
        self.freezer.restore()
        self.parallel.release()

    def _say_that_nothing_left(self) -> None:
        if self.length.steps < self.length.total_steps or (self.offload is not None and self.offload.has_left):
            return
        if self.config.dry_run or not any(self.prefix.depths.values()):
            reason = "nothing froze"
        else:
            reason = self.cache.off_because or "the states of all samples were never held"
        note(f"offload={self.config.offload!r} moved no weights: {reason}.")

    def restore_moments(self) -> None:
        """Put back the optimizer state of the units that were frozen at the start, after ``close``."""
        if self.freezer.optimizer is not None:
            self.freezer.optimizer.state.update(self._moments)

    # A freeze that turns out wrong.

    def _check_learning(self, probe: Probe) -> None:
        """Before step 0: the units at the start may be all that the loss depends on."""
        cut = [one for one in probe.kinds(device_of(self.model)) if not self._has_graph(one)]
        if not cut:
            return
        names, by_hand = self.at_start, list(self.config.freeze)
        self.thaw(names)
        if not any(map(self._has_graph, cut)):  # nor has the model without a freeze
            self.freeze(names, by="start")
            return
        if by_hand:
            raise ConfigError(
                f"With the {len(by_hand)} units of SafeConfig.freeze frozen, the loss has no gradient: it depends on "
                "none of the other blocks.",
                fix="SafeConfig(freeze=[...]) with fewer of the lowest blocks.",
            )
        self.at_start = []
        note(
            f"The {len(names)} units that would be frozen from the start train: the loss depends on none of the blocks "
            "above them (a head that reads lower ones)."
        )

    def _has_graph(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a training pass on these inputs can be followed by a backward pass.

        True if it fails: BatchNorm refuses one sample in training mode, which proves nothing about a batch.
        """
        try:
            with traceless(self.model.modules()), torch.enable_grad():
                output = self.prefix.rehearse(**inputs)
        except Exception:
            return True
        loss = loss_in(output)
        return any(tensor.requires_grad for tensor in tensors_in(output if loss is None else loss))

    def undo_all(self) -> None:
        """After a freeze no live unit has a gradient: thaw all, and freeze nothing more.

        Raises:
            RunError: the units were frozen by hand, or other ranks would have to thaw theirs in the same step.
        """
        names = [name for name in self.freezer.units if name in self.frozen and name not in self.config.freeze]
        fact = (
            f"After the freeze at step {self.length.steps} no live unit has a gradient: the loss depends on none of "
            "the live blocks, or the graph was cut above the prefix by reentrant checkpointing or a detach"
        )
        fix = 'Use gradient_checkpointing_kwargs={"use_reentrant": False}, or freeze fewer blocks.'
        if not names or self.ranks.size > 1:
            raise RunError(f"{fact}.", fix=fix)
        self.paying, self.at_start = frozenset(), []
        self.prefix.ended.update(stack.path for stack in self.stacks)
        self.thaw(names)
        warn(f"{fact}. All units train again, and no more freeze; this step trained nothing.", fix=fix, stacklevel=4)

    # Called by the prefix, in a training pass.

    def _prefix_ended(self, path: str) -> None:
        """Something that trains feeds the blocks of this stack."""
        names = [name for name, unit in self.freezer.units.items() if unit.stack == path]
        self.paying -= frozenset(names)
        # With several ranks, another one may not have seen it. After step 0, units have missed steps already.
        first = self.length.steps == 0 and self.ranks.size == 1
        thawed = [name for name in names if name in self.at_start] if first else []
        if thawed:
            self.at_start = [name for name in self.at_start if name not in thawed]
            self.thaw(thawed)
        self.follow_prefix()
        self.journal.write("prefix_ended", step=self.length.steps, stack=path)
        note(
            f"Step {self.length.steps}: something that trains feeds the blocks of {path} (a projector, a vision tower, "
            "inputs that require grad). Its gradient passes through them, so they have no frozen prefix, and no cache; "
            + (f"the {len(thawed)} units frozen there train again." if thawed else "nothing more freezes there.")
        )

    def _prefix_shrank(self, paths: list[str]) -> None:
        """A parameter in the prefix that belongs to no unit was made trainable."""
        self.follow_prefix()
        self.journal.write("prefix_shrank", step=self.length.steps, prefixes=self.prefix.depths)
        left = ", ".join(f"{self.prefix.depths[path]} blocks of {path}" for path in paths)
        note(f"Step {self.length.steps}: a parameter in the frozen prefix was made trainable, which leaves {left}.")

    def take_the_strictest(self) -> None:
        """Across ranks: what one of them cannot serve or keep frozen, none does."""
        cache, paths = self.cache.prefix_cache, [stack.path for stack in self.stacks]
        wrong = [cache is not None and cache.distrusted, *(path in self.prefix.ended for path in paths)]
        distrusted, *ended = self.ranks.any_of(wrong)
        if distrusted and cache is not None:
            cache.switch_off("another rank found that its passes cannot be served")
        for path, is_so in zip(paths, ended, strict=True):
            if is_so and path not in self.prefix.ended:
                self.prefix.ended.add(path)
                self.prefix.update()
                self._prefix_ended(path)
