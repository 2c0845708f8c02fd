"""The entries of one run's prefix: in memory, on disk, and kept for other runs."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

import xxhash

from ..errors import RunError, note, warn
from ..freeze.prefix import Slot
from ..journal import Journal
from ..sizes import readable
from .identity import Identity
from .kept import KeptFolder, KeptStore
from .tiers import Entry, RamTier, Tier

__all__ = ["Store"]


class Store:
    """Reads entries of the current prefix, or of its lowest blocks, and stores new ones while there is room.

    Args:
        tiers: in the order in which they are filled.
        identity: of the prefix; entries of another one are never read.
        journal: of the run, told when a tier is full.
        kept: takes what other runs can use.

    Attributes:
        not_kept: why nothing outlives the run, although the user asked for it.
    """

    def __init__(
        self, tiers: Sequence[Tier], identity: Identity, journal: Journal, kept: KeptFolder | None = None
    ) -> None:
        self.tiers = list(tiers)
        self.identity = identity
        self.journal = journal
        self.kept = kept
        self.not_kept = "the folder cannot be used"

    def read(self, keys: Sequence[bytes], depths: Sequence[int], slots: Sequence[Slot]) -> list[Entry | None]:
        """The entry of each key, if a prefix of these depths (by slot) can use it."""
        entries: list[Entry | None] = [None] * len(keys)
        for tier in self._all:
            wanted = [row for row, entry in enumerate(entries) if entry is None]
            if not wanted:
                break
            for row, entry in zip(wanted, tier.get([keys[row] for row in wanted]), strict=True):
                if entry is not None and self._is_usable(entry, depths, slots):
                    entries[row] = entry
        return entries

    @property
    def _all(self) -> list[Tier]:
        return [*self.tiers, *(store.tier for store in self.kept.stores)] if self.kept is not None else self.tiers

    @property
    def keeps(self) -> bool:
        """Whether entries of the current prefix outlive the run."""
        return self._exact is not None

    @property
    def _exact(self) -> KeptStore | None:
        return self.kept.exact if self.kept is not None else None

    @property
    def has_room(self) -> bool:
        """Whether any new entry can be stored."""
        return any(not tier.full for tier in self._all)

    @property
    def budget(self) -> int:
        """Bytes that entries of the current prefix may take."""
        if self._exact is not None:
            return self._exact.budget
        return sum(tier.budget for tier in self.tiers)

    @property
    def lower(self) -> Mapping[str, int]:
        """Smaller depths at which entries are stored for other runs, by stack."""
        return self.kept.lower if self.kept is not None else {}

    def check_size(self, samples: int, nbytes: int, *, strict: bool = False) -> None:
        """Say what the states of all samples will take; warn if that is more than the budget.

        Raises:
            RunError: ``strict``, instead of the warning.
        """
        if nbytes <= self.budget:
            note(f"The states of {samples:,} samples take about {readable(nbytes)}.")
            return
        fact = (
            f"The states of {samples:,} samples take about {readable(nbytes)}; cache_budget is {readable(self.budget)}."
        )
        fix = (
            f'Set cache_budget="{readable(1.1 * nbytes).replace(" ", "")}", or cache_dtype="bfloat16" for half of that.'
        )
        if strict:
            raise RunError(fact, fix=fix)
        warn(fact, fix=fix)

    def _is_usable(self, entry: Entry, depths: Sequence[int], slots: Sequence[Slot]) -> bool:
        if len(entry.depths) != len(depths) or any(a > b for a, b in zip(entry.depths, depths, strict=True)):
            return False
        return entry.identity == self.identity_of(entry.depths, slots)

    def identity_of(self, depths: Sequence[int], slots: Sequence[Slot]) -> bytes:
        """Of entries of these depths by slot. Stacks that such passes do not call (a vision tower) do not count."""
        return self.identity.of_stacks({path: depth for (path, _), depth in zip(slots, depths, strict=True)})

    def put_lower(self, items: Sequence[tuple[bytes, Entry]]) -> None:
        """Store entries of the smaller prefix that other runs can use."""
        if self.kept is not None and self.kept.below is not None:
            self.kept.below.put(items)

    def put(self, items: Sequence[tuple[bytes, Entry]], step: int) -> str | None:
        """Store these while there is room. Returns a reason if no entry can ever be stored."""
        smallest = min(entry.nbytes for _, entry in items)
        if self._exact is not None:
            items = self._exact.put(items)
            if not items:
                return None
        for tier in self.tiers:
            was_full = tier.full
            items = tier.put(items)
            if tier.full and not was_full:
                # The keys themselves would be a line of megabytes.
                keys = sorted(tier.stored_keys())
                digest = xxhash.xxh3_128_hexdigest(b"".join(keys))
                full = {"tier": tier.name, "nbytes": tier.nbytes, "samples": len(keys), "digest": digest}
                self.journal.write("cache_full", step=step, **full)
            if not items:
                return None
        if all(tier.full and not any(True for _ in tier.stored_keys()) for tier in self.tiers):
            room = max((tier.budget for tier in self.tiers), default=0)
            return f"its budget is {room:,} bytes, and one sample takes {smallest:,}"
        return None

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes stored, by tier."""
        found: dict[str, int] = {}
        for tier in self._all:
            found[tier.name] = found.get(tier.name, 0) + tier.nbytes
        return found

    @property
    def damaged(self) -> int:
        """Values with a wrong checksum."""
        return sum(tier.damaged for tier in self._all)

    def keys_in_memory(self) -> str | None:
        """The first eight bytes of each key in a full memory, as text; None while it still takes more."""
        full = [tier for tier in self.tiers if isinstance(tier, RamTier) and tier.full]
        return base64.b64encode(b"".join(sorted(key[:8] for key in full[0].stored_keys()))).decode() if full else None

    def restrict_memory(self, keys: str | None) -> None:
        """Let memory take only the keys that ``keys_in_memory`` returned."""
        for tier in self.tiers:
            if isinstance(tier, RamTier) and keys is not None:
                packed = base64.b64decode(keys)
                tier.only = frozenset(packed[start : start + 8] for start in range(0, len(packed), 8))

    def close(self) -> None:
        """Free memory and delete the files that no other run can use."""
        for tier in self.tiers:
            tier.close()
        self.tiers = []
        if self.kept is not None:
            self.kept.close()
            self.kept = None
