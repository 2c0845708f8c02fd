"""What the cache has saved and cost so far, and whether it is worth keeping."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

__all__ = ["CacheStats", "Repeats"]

# Timed passes of each kind before the clock may decide.
LEAST_TIMED = 8
# If the length of an epoch is not known, give up after this share of the run without a hit.
PATIENCE = 0.5
# Batches of an epoch that may not have been stored.
UNSTORED = 4
# Store samples once more than this share of them came again: two rows of a stream may be equal by chance.
REPEATED = 0.01


@dataclass
class _Clock:
    """Seconds, the work done in them, and the number of timed passes."""

    seconds: float = 0.0
    work: int = 0
    passes: int = 0

    @property
    def rate(self) -> float | None:
        """Seconds per unit of work; None until enough was timed."""
        return self.seconds / self.work if self.work and self.passes >= LEAST_TIMED else None


@dataclass
class CacheStats:
    """Counts and clocks of one cache.

    The time saved is an estimate: positions looked up × blocks skipped × the time of one block for one position where
    it was computed, minus the time for reading and writing. On an accelerator only the first passes of each kind are
    timed, because timing waits for the device.

    Attributes:
        hits: samples found at the full depth.
        advanced: found at a smaller depth, and run through the new blocks.
        misses: computed from the embeddings.
        since_hit: samples looked up since the last one that was found.
        asked: samples looked up since the prefix changed, or rows if they are packed.
        learned: of these, samples that were not found at the full depth.
        found_in_a_row: samples found at the full depth since the last pass in which one was not.
        skipped_work: positions × blocks that passes did not run.
        largest: samples of the largest batch.
    """

    device: torch.device
    hits: int = 0
    advanced: int = 0
    misses: int = 0
    since_hit: int = 0
    asked: int = 0
    learned: int = 0
    found_in_a_row: int = 0
    skipped_work: int = 0
    largest: int = 0
    compute: _Clock = field(default_factory=_Clock)
    read: _Clock = field(default_factory=_Clock)
    write: _Clock = field(default_factory=_Clock)

    @property
    def looked_up(self) -> int:
        """Samples of all training passes that asked."""
        return self.hits + self.advanced + self.misses

    @contextmanager
    def timed(self, clock: _Clock, work: int) -> Iterator[None]:
        """Add the time of this context to ``clock``; with ``work`` 0 to that of the last pass."""
        waits = self.device.type == "cuda"
        if waits and clock.passes >= 2 * LEAST_TIMED:
            yield
            return
        if waits:
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        yield
        if waits:
            torch.cuda.synchronize(self.device)
        clock.seconds += time.perf_counter() - start
        clock.work += work
        clock.passes += work > 0

    def count(self, hits: int, advanced: int, misses: int, work: int = 0, *, packed: bool = False) -> None:
        """Add the samples of one pass, and the positions × blocks that it skipped; ``packed``: they were one row."""
        self.hits += hits
        self.advanced += advanced
        self.misses += misses
        self.asked += 1 if packed else hits + advanced + misses
        self.learned += advanced + misses
        self.found_in_a_row = 0 if advanced or misses else self.found_in_a_row + hits
        # The length of an epoch is that of the dataset, in rows.
        self.since_hit = 0 if hits or advanced else self.since_hit + (1 if packed else misses)
        self.skipped_work += work
        self.largest = max(self.largest, hits + advanced + misses)

    def grown(self) -> None:
        """The prefix has changed."""
        self.asked = self.learned = self.found_in_a_row = 0

    def repeats(self, epoch: int | None) -> bool:
        """Whether every sample has come at this prefix, and now they are all found.

        Args:
            epoch: samples of one pass over the data; None if not known: as many were found in a row as were new.
        """
        if not self.found_in_a_row:
            return False
        return self.asked > epoch if epoch is not None else self.found_in_a_row >= self.learned

    @property
    def seconds_saved(self) -> float | None:
        """The estimated time saved; None until enough was timed."""
        compute = self.compute.rate
        return None if compute is None else self.skipped_work * compute - self.read.seconds - self.write.seconds

    def verdict(self, blocks: int, epoch: int | None, run: int) -> str | None:
        """Why the cache should be switched off now; None if it should not.

        Args:
            blocks: blocks that a hit skips.
            epoch: samples of one pass over the data; None if not known.
            run: samples of the whole run.
        """
        # The first batches of a kind may not be stored, while it is examined.
        patience = 1.25 * epoch + UNSTORED * self.largest if epoch is not None else PATIENCE * run
        if self.since_hit > patience:
            return (
                f"none of the last {self.since_hit:,} samples came a second time: random masking, "
                "augmentation, or a stream"
            )
        compute, read = self.compute.rate, self.read.rate
        if compute is not None and read is not None and self.hits and read > compute * blocks:
            return (
                f"looking up a position takes {1e6 * read:.1f} µs, and computing its {blocks} blocks "
                f"{1e6 * compute * blocks:.1f} µs"
            )
        return None


class Repeats:
    """Whether samples come again, if the length of an epoch is not known. Keeps 64 bits of each sample.

    Attributes:
        found: they do.
    """

    def __init__(self) -> None:
        self.found = False
        self._seen: set[bytes] = set()
        self._again = 0

    def see(self, keys: Sequence[bytes]) -> bool:
        """Add one batch's samples; returns ``found``.

        >>> repeats = Repeats()
        >>> [repeats.see([b"first", b"second"]), repeats.see([b"third"]), repeats.see([b"second"])]
        [False, False, True]
        """
        short = {key[:8] for key in keys}
        self._again += len(short & self._seen)
        self._seen |= short
        if self._again > REPEATED * len(self._seen):
            self.found = True
            self._seen.clear()
        return self.found
