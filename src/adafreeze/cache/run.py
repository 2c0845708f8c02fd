"""Opens the prefix cache of a run and predicts its benefit."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from ..config import SafeConfig
from ..costs.theory import expected_ratios
from ..decide.run_length import RunLength
from ..errors import ConfigError, ProbeError, RunError, note, warn
from ..freeze import Prefix
from ..journal import Journal
from ..measure.draw import varies
from ..model.backends import Backend
from ..model.blocks import users_class
from . import DiskTier, Identity, PrefixCache, RamTier, Tier
from .fill import fill
from .kept import KeptFolder, default_folder

__all__ = ["RunCache", "expected_savings"]

ONE_EPOCH = "no sample comes twice in one epoch"
VARIES = "samples come with other inputs each time (random masking, augmentation)"
# Delete stores that killed runs left behind after this many days without a write.
STALE_DAYS = 7


class RunCache:
    """The prefix cache of a run, opened when the prefix first has a block.

    Args:
        config: cache, cache_budget, cache_dir, cache_dtype.
        prefix: its output is cached.
        backend: hashes the adapters' state.
        journal: of the run.
        length: where the run stands.
        source: of the probe; a train dataloader shows whether its samples repeat.
        processes: that may share the memory of this machine.

    Attributes:
        prefix_cache: None before it is opened.

    Raises:
        ConfigError: ``cache="disk"`` without LMDB.
    """

    def __init__(
        self,
        config: SafeConfig,
        prefix: Prefix,
        backend: Backend,
        journal: Journal,
        length: RunLength,
        source: Any,
        processes: int = 1,
    ) -> None:
        self.config, self.prefix, self.backend = config, prefix, backend
        self.journal, self.length = journal, length
        self.prefix_cache: PrefixCache | None = None
        self._source, self._processes = source, processes
        self._folder: str | None = None
        self._resumed: Mapping[str, Any] | None = None
        self._announced = self._was_announced = False
        self._outlook: str | None = None
        self._counts_flops = False
        self._reason: str | None = "cache='off'" if config.cache == "off" else None
        if self._reason is None and config.prefix_dropout:
            self._reason = "prefix_dropout=True makes the prefix's output random"
        if (config.cache == "disk" or config.keep_cache) and self._reason is None:
            DiskTier.check_installed()

    def announce(self, blocks: int, at_start: int = 0) -> None:
        """Decide whether the run is long enough for the cache, and log once why it is off. See ``say_expected``.

        Args:
            blocks: of all stacks.
            at_start: blocks in the prefix from the first step on.
        """
        if self._announced:
            return
        self._announced = True
        if self.prefix_cache is not None and self.prefix_cache.off is not None:
            return  # logged when it was switched off
        epoch, total = self.length.epoch_steps, self.length.total_steps
        if self._reason is None and self._serves_nothing:
            self._reason = ONE_EPOCH
        if self._reason is None and varies(self._source):
            self._reason = VARIES
        if self._reason is not None and self.prefix_cache is not None:
            self.prefix_cache.switch_off(self._reason)
            return
        if self._was_announced:
            return
        if self._reason is None:
            frozen_at = (self.config.warmup + self.config.ramp_end) / 2
            self._outlook = expected_savings(blocks, epoch, total, frozen_at, at_start=at_start)
            return
        line = f"Prefix cache off: {self._reason}."
        self.journal.write("cache_outlook", step=self.length.steps, off=self._reason, text=line)
        if self.config.cache != "off":
            note(line)

    @property
    def _serves_nothing(self) -> bool:
        """Whether no sample comes twice, and neither later runs nor weights that leave the device need the states.

        States that are filled ahead cost no more than in the run, and let the weights below leave before step 0.
        """
        epoch = self.length.epoch_steps
        leaves = self.config.fill == "before" and self.config.offload in ("cpu", "disk")
        return epoch is not None and self.length.total_steps <= epoch and not (self.config.keep_cache or leaves)

    def say_expected(self) -> None:
        """Log once what the cache is expected to save; call it after each step.

        Not before a training pass has shown that the rows can be told apart, and where the length of an epoch is not
        known (generated samples), not before one came a second time: a promise is not taken back in the next line.
        """
        cache = self.prefix_cache
        if self._outlook is None or cache is None or cache.off is not None:
            return
        if self.length.epoch_steps is None and not cache.stats.hits:
            return
        self.journal.write("cache_outlook", step=self.length.steps, off=None, text=self._outlook)
        note(self._outlook)
        self._outlook = None

    def update(self, room: int | None) -> None:
        """Follow a changed prefix.

        Args:
            room: bytes that the memory budget leaves beside the training step and the cache as it is; None if the
                cache does not count against it.
        """
        if self.prefix_cache is None and self._reason is None and any(self.prefix.depths.values()):
            self._open(room)
        if self.prefix_cache is not None:
            for tier in self._in_memory if room is not None else ():
                if (budget := self._memory_budget(room)) > tier.budget:  # a deeper prefix leaves more
                    tier.budget, tier.full = budget, False
            self.prefix_cache.grown()

    def fill(self, rank: int = 0, ranks: int = 1, *, strict: bool = False) -> None:
        """Store the states of all samples of the train dataloader before the run needs them.

        Args:
            rank: of this process.
            ranks: processes; each takes its share.
            strict: raise if that is not possible, instead of a note.

        Raises:
            RunError: ``strict``, and it is not possible.
        """
        reason = self.off_because
        if reason is None and self.length.samples_per_step and self._serves_nothing:
            reason = ONE_EPOCH
        if reason is None and varies(self._source):
            reason = VARIES
        if reason is None and self.prefix_cache is None:
            reason = "no block is frozen from step 0"
        try:
            if reason is None and self.prefix_cache is not None:
                fill(self.prefix_cache, self._source, rank=rank, ranks=ranks, strict=strict)
        except ProbeError as error:
            reason = f"the train dataloader has no samples by index ({error.fact.rstrip('.')})"
            if isinstance(self._source, list):  # recorded, where the host makes the inputs in each step
                reason = "what the model is called with is known only from the first step on"
        if reason is not None and strict:
            raise RunError(f"The states of this model cannot be stored: {reason}.", fix="Train without filling.")
        if reason is not None:
            note(f"fill='before' stores nothing: {reason}.")

    def _open(self, room: int | None) -> None:
        identity = Identity(self.prefix.model, self.prefix.stacks, self.backend)
        tiers: list[Tier] = []
        if self.config.cache != "disk":
            tiers.append(RamTier(self._memory_budget(room)))
        keeps = self.config.keep_cache
        if self.config.cache == "disk" or (self.config.cache_dir is not None and not keeps):
            self._folder = self._folder or identity.of(tuple(self.prefix.depths.values())).hex()
            tiers += self._disk(self._folder)
        if not tiers:
            tiers.append(RamTier(self._memory_budget(room)))
        if not any(tier.budget for tier in tiers) and not keeps:
            return  # the training step leaves no memory; with a deeper prefix it may
        dtype = self.config.cache_dtype
        kept = self._kept() if keeps else None
        self.prefix_cache = PrefixCache(
            self.prefix, self.backend, identity, tiers, self.journal, self.length, dtype, kept
        )
        self.prefix_cache.counts_flops = self._counts_flops
        if self._resumed is not None:
            self.prefix_cache.load_state_dict(self._resumed)

    def _memory_budget(self, room: int | None) -> int:
        """Half of what is free: the other half is for measuring at a deeper prefix, and for longer batches."""
        free = psutil.virtual_memory().available // 2 // self._processes
        if room is not None:
            free = min(free, (self.memory + room) // 2)
        return min(self.config.cache_bytes, free)

    def _disk(self, folder: str) -> list[Tier]:
        home = self.home
        try:
            _delete_stale(home)
            return [DiskTier(home / f"prefix-{folder}", self.config.cache_bytes)]
        except OSError as error:
            reason = "its disk is full" if error.errno == errno.ENOSPC else error.strerror or error
            warn(
                f"The prefix cache cannot use the folder {home} ({reason}) and stays in memory.",
                fix="SafeConfig(cache_dir=...) with a folder that you can write to, not open in this process already.",
            )
        except ConfigError as error:  # auto, with a folder, without LMDB
            warn(error.fact, fix=error.fix + " The cache stays in memory.")
        return []

    def _kept(self) -> KeptFolder | None:
        try:
            config: Any = getattr(self.prefix.model, "config", None)
            name = getattr(config, "_name_or_path", "") or users_class(self.prefix.model)
            return KeptFolder(self.home, self.config.cache_bytes, str(name))
        except OSError as error:
            warn(f"States cannot be kept in {self.home}: {error}.", fix="Give a folder on a local disk.")
        return None

    @property
    def home(self) -> Path:
        """Folder of everything on disk."""
        given = self.config.cache_dir
        return Path(given).expanduser() if given is not None else default_folder()

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
        """Why the cache is off for good; None while it is or may be on."""
        off = self.prefix_cache.off if self.prefix_cache is not None else None
        return self._reason if off is None else off

    @property
    def state_key(self) -> tuple[Any, ...]:
        """Changes whenever the cache changes what a training pass costs."""
        return self.prefix_cache.state_key if self.prefix_cache is not None else ()

    @property
    def flops(self) -> int:
        """FLOPs spent in nested passes, counted from the first access on."""
        self._counts_flops = True
        if self.prefix_cache is None:
            return 0
        self.prefix_cache.counts_flops = True
        return self.prefix_cache.flops

    def logs(self) -> dict[str, float]:
        """Scalars of the cache; none before it is opened."""
        return self.prefix_cache.logs() if self.prefix_cache is not None else {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain JSON values."""
        return {
            "announced": self._announced and self._outlook is None,
            "folder": self._folder,
            "cache": self.prefix_cache.state_dict() if self.prefix_cache is not None else self._resumed,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, other_length: bool = False) -> None:
        """Continue where ``state_dict`` was written; call it before the prefix changes.

        Args:
            state: of the checkpoint.
            other_length: the run has another number of epochs now, so its expected savings are announced again.
        """
        self._folder, self._resumed = state["folder"], state["cache"]
        self._was_announced = state["announced"] and not other_length
        if other_length and self._resumed is not None and self._resumed["off"] == ONE_EPOCH:
            self._resumed = {**self._resumed, "off": None}
        if self.prefix_cache is not None and self._resumed is not None:  # opened by units frozen at the start
            self.prefix_cache.load_state_dict(self._resumed)

    def close(self) -> None:
        """Delete the stored states and restore the prefix."""
        if self.prefix_cache is not None:
            self.prefix_cache.close()


def expected_savings(
    blocks: int, steps_per_epoch: float | None, total_steps: int, frozen_at: float, *, at_start: int = 0
) -> str:
    """One line: the FLOPs with the cache if half, or two thirds, of the blocks freeze in the middle of the ramp.

    Args:
        blocks: of all stacks.
        steps_per_epoch: optimizer steps of one pass over the data; None if unknown.
        total_steps: of the run.
        frozen_at: when they freeze, as a share of the run.
        at_start: blocks that are frozen from the first step on.
    """
    if steps_per_epoch is None:
        return "Prefix cache on: a sample seen before starts above the frozen prefix."
    scale = max(1.0, total_steps / 1000)  # a thousand steps give the same ratios as a million
    total, per_epoch, costs = round(total_steps / scale), steps_per_epoch / scale, []
    for depth in sorted({max(round(share * blocks), at_start) for share in (1 / 2, 2 / 3)}):
        depths = [depth if step >= frozen_at * total else at_start for step in range(total)]
        cached, without = (expected_ratios(blocks, depths, per)[1] for per in (per_epoch, None))
        costs.append(f"{cached:.0%} ({without:.0%} without cache) with {depth} of {blocks} blocks frozen")
    frozen = f" by {frozen_at:.0%} of the run" + (f" and {at_start} from the start" if at_start else "")
    return (
        f"Prefix cache on: {total_steps / steps_per_epoch:.3g} epochs. Expected FLOPs vs. plain training: "
        f"{', '.join(costs)}{frozen}."
    )


def _delete_stale(home: Path) -> None:
    for folder in home.glob("prefix-*") if home.is_dir() else ():
        data = folder / "data.mdb"
        if data.is_file() and time.time() - data.stat().st_mtime > STALE_DAYS * 86400:
            shutil.rmtree(folder, ignore_errors=True)
