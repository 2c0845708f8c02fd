"""Opens the prefix cache of a run and predicts its benefit."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from ..config import SafeConfig
from ..costs.theory import expected_ratios
from ..errors import ConfigError, note, warn
from ..freeze import Prefix
from ..journal import Journal
from ..measure.draw import varies
from ..model.backends import Backend
from . import DiskTier, Identity, PrefixCache, Progress, RamTier, Tier

__all__ = ["RunCache", "outlook"]

ONE_EPOCH = "no sample comes twice in one epoch"
# A store that a killed run left is deleted when nobody has written to it for so long.
STALE_DAYS = 7


class RunCache:
    """The prefix cache of a run: opened when the prefix first has a block, or not at all.

    Args:
        config: cache, cache_budget, cache_dir, cache_dtype.
        prefix: whose output is held.
        backend: knows the adapters' state.
        journal: of the run.
        progress: where the run stands.
        source: of the probe; if it is the train dataloader, its samples show whether they repeat.
        processes: that may share the memory of this machine.
        room: bytes that the memory budget of the training step leaves; None where it does not count a cache.

    Raises:
        ConfigError: ``cache="disk"`` without LMDB.
    """

    def __init__(
        self,
        config: SafeConfig,
        prefix: Prefix,
        backend: Backend,
        journal: Journal,
        progress: Callable[[], Progress],
        source: Any,
        processes: int = 1,
        room: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.config = config
        self._processes = processes
        self._room = room
        self.prefix = prefix
        self.backend = backend
        self.journal = journal
        self.progress = progress
        self.prefix_cache: PrefixCache | None = None
        self._source = source
        self._folder: str | None = None
        self._resumed: Mapping[str, Any] | None = None
        self._announced = self._said = False
        self._counts_flops = False
        self._reason: str | None = "cache='off'" if config.cache == "off" else None
        if self._reason is None and config.prefix_dropout:
            self._reason = "prefix_dropout=True makes the prefix's output random"
        if config.cache == "disk" and self._reason is None:
            DiskTier.check_installed()

    def announce(self, blocks: int, steps_per_epoch: float | None, total_steps: int, at_start: int = 0) -> None:
        """Say in one line, once, what the cache is going to save; or that it will not, and why.

        Args:
            blocks: of all stacks.
            steps_per_epoch: optimizer steps of one pass over the data; None if not known.
            total_steps: of the run.
            at_start: blocks in the prefix from the first step on.
        """
        if self._announced:
            return
        self._announced = True
        if self.prefix_cache is not None and self.prefix_cache.off is not None:
            return  # that was said, and why
        if self._reason is None and steps_per_epoch is not None and total_steps <= steps_per_epoch:
            self._reason = ONE_EPOCH
        if self._reason is None and varies(self._source):
            self._reason = "samples come with other inputs each time (random masking, augmentation)"
        if self._reason is not None and self.prefix_cache is not None:
            self.prefix_cache.switch_off(self._reason)
            return
        if self._said:
            return
        frozen_at = (self.config.warmup + self.config.ramp_end) / 2
        line = outlook(blocks, steps_per_epoch, total_steps, frozen_at, self._reason, at_start=at_start)
        self.journal.write("cache_outlook", step=self.progress().step, off=self._reason, text=line)
        if self.config.cache != "off":
            note(line)

    def prefix_changed(self) -> None:
        """To be called whenever the prefix may have other depths."""
        if self.prefix_cache is None and self._reason is None and any(self.prefix.depths.values()):
            self._open()
        if self.prefix_cache is not None:
            self._enlarge()
            self.prefix_cache.grown()

    def _open(self) -> None:
        identity = Identity(self.prefix.model, self.prefix.stacks, self.backend)
        tiers: list[Tier] = []
        if self.config.cache != "disk":
            tiers.append(RamTier(self._memory_budget()))
        if self.config.cache == "disk" or self.config.cache_dir is not None:
            self._folder = self._folder or identity.of(tuple(self.prefix.depths.values())).hex()
            tiers += self._disk(self._folder)
        dtype = torch.bfloat16 if self.config.cache_dtype == "bfloat16" else None
        if not tiers:
            tiers.append(RamTier(self._memory_budget()))
        if not any(tier.budget for tier in tiers):
            return  # a step leaves nothing to it; with a deeper prefix it may
        self.prefix_cache = PrefixCache(self.prefix, self.backend, identity, tiers, self.journal, self.progress, dtype)
        self.prefix_cache.counts_flops = self._counts_flops
        if self._resumed is not None:
            self.prefix_cache.load_state_dict(self._resumed)

    def _memory_budget(self) -> int:
        free, room = psutil.virtual_memory().available // 2 // self._processes, self._room()
        # The other half is for what measuring comes to hold when the prefix is deeper, and for longer batches.
        return min(self.config.cache_bytes, free if room is None else min(free, self.memory + room // 2))

    def _enlarge(self) -> None:
        """What a deeper prefix saves in each step is room for more samples."""
        for tier in self._in_memory:
            if self._room() is not None and (budget := self._memory_budget()) > tier.budget:
                tier.budget, tier.full = budget, False

    def _disk(self, folder: str) -> list[Tier]:
        home = Path(self.config.cache_dir or _default_folder())
        try:
            _delete_stale(home)
            return [DiskTier(home / f"prefix-{folder}", self.config.cache_bytes)]
        except OSError as error:
            other = "It is read-only, below something that is no folder, or open in this process already."
            warn(
                f"The prefix cache cannot use the folder {home} ({error.strerror or error}).",
                cause="Its disk is full." if error.errno == errno.ENOSPC else other,
                fix="SafeConfig(cache_dir=...) with a folder that you can write to. Memory alone is used now.",
            )
        except ConfigError as error:  # auto, with a folder, without LMDB
            warn(error.fact, fix=error.fix + " Memory alone is used now.")
        return []

    @property
    def _in_memory(self) -> list[RamTier]:
        tiers = self.prefix_cache.store.tiers if self.prefix_cache is not None else []
        return [tier for tier in tiers if isinstance(tier, RamTier)]

    @property
    def memory(self) -> int:
        """Bytes that it may take in memory."""
        return sum(tier.budget for tier in self._in_memory)

    @property
    def off_because(self) -> str | None:
        """Why there is no cache, and will be none; None while there is or may be one."""
        return (
            self.prefix_cache.off
            if self.prefix_cache is not None and self.prefix_cache.off is not None
            else self._reason
        )

    @property
    def state_key(self) -> tuple[Any, ...]:
        """Changes whenever the cache changes what a training pass costs."""
        return self.prefix_cache.state_key if self.prefix_cache is not None else ()

    @property
    def flops(self) -> int:
        """FLOPs spent in nested passes, counted from the first time that this is asked for."""
        self._counts_flops = True
        if self.prefix_cache is None:
            return 0
        self.prefix_cache.counts_flops = True
        return self.prefix_cache.flops

    def logs(self) -> dict[str, float]:
        """Scalars of the cache; none while there is no cache."""
        return self.prefix_cache.logs() if self.prefix_cache is not None else {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of it."""
        return {
            "announced": self._announced,
            "folder": self._folder,
            "cache": self.prefix_cache.state_dict() if self.prefix_cache is not None else self._resumed,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, other_length: bool = False) -> None:
        """Take up what ``state_dict`` wrote, before the prefix changes.

        Args:
            state: of the checkpoint.
            other_length: the run has other epochs now, for which the outlook is another.
        """
        self._folder, self._resumed = state["folder"], state["cache"]
        self._said = state.get("announced", True) and not other_length
        if other_length and self._resumed is not None and self._resumed["off"] == ONE_EPOCH:
            self._resumed = {**self._resumed, "off": None}
        if self.prefix_cache is not None and self._resumed is not None:  # units that were frozen by hand have opened it
            self.prefix_cache.load_state_dict(self._resumed)

    def close(self) -> None:
        """Give everything back."""
        if self.prefix_cache is not None:
            self.prefix_cache.close()


def outlook(
    blocks: int,
    steps_per_epoch: float | None,
    total_steps: int,
    frozen_at: float,
    reason: str | None = None,
    *,
    at_start: int = 0,
) -> str:
    """One line: what the cache saves if a half, or two thirds, of the blocks freeze in the middle of the ramp.

    Args:
        blocks: of all stacks.
        steps_per_epoch: optimizer steps of one pass over the data; None if not known.
        total_steps: of the run.
        frozen_at: share of the run.
        reason: why there is no cache.
        at_start: blocks that are frozen from the first step on.
    """
    if reason is not None:
        return f"Prefix cache off: {reason}."
    if steps_per_epoch is None:
        return "Prefix cache on: a sample that comes again starts above the frozen prefix."
    scale = max(1.0, total_steps / 1000)  # a thousand steps tell as much as a million
    total, per_epoch, costs = round(total_steps / scale), steps_per_epoch / scale, []
    for depth in sorted({max(round(share * blocks), at_start) for share in (1 / 2, 2 / 3)}):
        depths = [depth if step >= frozen_at * total else at_start for step in range(total)]
        cached, without = (expected_ratios(blocks, depths, per)[1] for per in (per_epoch, None))
        costs.append(f"{depth} of {blocks} blocks {cached:.0%} ({without:.0%} without the cache)")
    by = f"by {frozen_at:.0%} of the run"
    when = f"{at_start} blocks are frozen from the start and {by}" if at_start else f"{by} there freeze"
    return (
        f"Prefix cache on: {total_steps / steps_per_epoch:.3g} epochs; FLOPs, and time nearly so, against plain "
        f"training if {when} {', '.join(costs)}."
    )


def _default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adafreeze"


def _delete_stale(home: Path) -> None:
    for folder in home.glob("prefix-*") if home.is_dir() else ():
        data = folder / "data.mdb"
        if data.is_file() and time.time() - data.stat().st_mtime > STALE_DAYS * 86400:
            shutil.rmtree(folder, ignore_errors=True)
