"""Worth: what the cache has saved and cost so far, and whether it should go on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

__all__ = ["Repeats", "CacheStats"]

# A verdict by the clock wants this many timed passes of each kind.
LEAST_TIMED = 8
# Without knowing how long an epoch is, this share of the run without a hit is taken for "nothing repeats".
PATIENCE = 0.5
# Batches of an epoch that may not have been held.
UNHELD = 4
# Samples that come again are held when they are more than this share: two rows of a stream may be equal by chance.
REPEATED = 0.01


@dataclass
class _Clock:
    """Seconds and the work done in them."""

    seconds: float = 0.0
    work: int = 0
    passes: int = 0

    @property
    def rate(self) -> float | None:
        """Seconds for one piece of work."""
        return self.seconds / self.work if self.work and self.passes >= LEAST_TIMED else None


@dataclass
class CacheStats:
    """Counts and clocks of one cache.

    The time saved is an estimate: positions looked up × blocks skipped × the time that computing one block on one
    position took where it was computed, less the time that looking up and writing down took. On an accelerator only
    the first passes of each kind are timed, since timing waits for the device.

    Attributes:
        hits: samples that were found at the full depth.
        advanced: found at a smaller depth, and run through the new blocks.
        misses: computed from the embeddings.
        since_hit: samples looked up since the last one that was found.
        skipped_work: positions × blocks that passes did not run.
        last: samples found, found at a smaller depth, and work skipped, of the last pass.
        largest: samples of the largest batch.
    """

    device: torch.device
    hits: int = 0
    advanced: int = 0
    misses: int = 0
    since_hit: int = 0
    skipped_work: int = 0
    last: tuple[int, int, int] = (0, 0, 0)
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
        """Add this block's time to ``clock``; with no work of its own, to the last pass."""
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

    def count(self, hits: int, advanced: int, misses: int) -> None:
        """The samples of one look-up."""
        self.hits += hits
        self.advanced += advanced
        self.misses += misses
        self.since_hit = 0 if hits or advanced else self.since_hit + misses
        self.last = hits, advanced, 0
        self.largest = max(self.largest, hits + advanced + misses)

    def skip(self, work: int) -> None:
        """A pass starts above so many positions × blocks."""
        self.skipped_work += work
        self.last = *self.last[:2], work

    def take_back(self) -> None:
        """The last pass that was looked up runs its prefix after all: what was found for it was of no use."""
        hits, advanced, work = self.last
        self.hits, self.advanced, self.misses = (
            self.hits - hits,
            self.advanced - advanced,
            self.misses + hits + advanced,
        )
        self.skipped_work -= work
        self.last = (0, 0, 0)

    @property
    def seconds_saved(self) -> float | None:
        """See the class; None before enough was timed."""
        compute = self.compute.rate
        if compute is None:
            return None
        return self.skipped_work * compute - self.read.seconds - self.write.seconds

    def verdict(self, blocks: int, epoch: int | None, run: int) -> str | None:
        """Why the cache should be switched off now; None while it should not.

        Args:
            blocks: blocks that a hit skips.
            epoch: samples of one pass over the data; None if not known.
            run: samples of the whole run.
        """
        # The first batches of a kind may not be held, while it is seen how the model is called with them.
        patience = 1.25 * epoch + UNHELD * self.largest if epoch is not None else PATIENCE * run
        if self.since_hit > patience:
            return (
                f"none of the last {self.since_hit:,} samples came a second time: packed rows, random masking, "
                "augmentation, or a stream"
            )
        compute, read = self.compute.rate, self.read.rate
        if compute is not None and read is not None and self.hits and read > compute * blocks:
            return (
                f"looking a position up takes {1e6 * read:.1f} µs, and computing its {blocks} blocks "
                f"{1e6 * compute * blocks:.1f} µs"
            )
        return None


class Repeats:
    """Whether samples come again, where nobody knows how long an epoch is; 64 bits of each are all it holds.

    Attributes:
        found: they do.
    """

    def __init__(self) -> None:
        self.found = False
        self._seen: set[bytes] = set()
        self._again = 0

    def see(self, keys: Sequence[bytes]) -> bool:
        """Take note of one batch's samples.

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
