"""Store: the entries of one run's prefix, in however many tiers there are."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import xxhash

from ..journal import Journal
from .identity import Identity
from .tiers import Entry, RamTier, Tier

__all__ = ["Store"]


class Store:
    """Reads what is held of this very prefix, or of its lowest blocks; holds what there is room for.

    Args:
        tiers: in the order in which they are filled.
        identity: of the prefix; what another one gave is never read.
        journal: of the run: how many samples, and which, are held when a tier is full.
    """

    def __init__(self, tiers: Sequence[Tier], identity: Identity, journal: Journal) -> None:
        self.tiers = list(tiers)
        self.identity = identity
        self.journal = journal

    def read(self, keys: list[bytes], depths: tuple[int, ...], stacks: Sequence[int]) -> list[Entry | None]:
        """What is held under each key and is of use for a prefix of these depths.

        Args:
            keys: of samples.
            depths: of each call of a stack.
            stacks: position of the stack, for each of these calls.
        """
        entries: list[Entry | None] = [None] * len(keys)
        for tier in self.tiers:
            wanted = [row for row, entry in enumerate(entries) if entry is None]
            if not wanted:
                break
            for row, entry in zip(wanted, tier.get([keys[row] for row in wanted]), strict=True):
                if entry is not None and self._is_of_use(entry, depths, stacks):
                    entries[row] = entry
        return entries

    def _is_of_use(self, entry: Entry, depths: tuple[int, ...], stacks: Sequence[int]) -> bool:
        if len(entry.depths) != len(depths) or any(a > b for a, b in zip(entry.depths, depths, strict=True)):
            return False
        return entry.identity == self.identity.of_calls(entry.depths, stacks)

    def hold(self, items: Sequence[tuple[bytes, Entry]], step: int) -> str | None:
        """Hold these where there is room. Returns why nothing can be held, if that is so."""
        smallest = min(entry.nbytes for _, entry in items)
        for tier in self.tiers:
            was_full = tier.full
            items = tier.put(items)
            if tier.full and not was_full:
                full = {"tier": tier.name, "nbytes": tier.nbytes, **_summary(tier)}
                self.journal.write("cache_full", step=step, **full)
            if not items:
                return None
        if all(tier.full and not any(True for _ in tier.held()) for tier in self.tiers):
            room = max((tier.budget for tier in self.tiers), default=0)
            return f"its budget is {room:,} bytes, and one sample takes {smallest:,}"
        return None

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes held, by tier."""
        return {tier.name: tier.nbytes for tier in self.tiers}

    @property
    def damaged(self) -> int:
        """Values whose checksum did not fit."""
        return sum(tier.damaged for tier in self.tiers)

    def held_in_memory(self) -> str | None:
        """Which samples a full memory holds, as text; None while it still takes more."""
        return next((_packed(tier) for tier in self.tiers if isinstance(tier, RamTier) and tier.full), None)

    def hold_in_memory_only(self, held: str | None) -> None:
        """Let memory take no others than those."""
        for tier in self.tiers:
            if isinstance(tier, RamTier) and held is not None:
                tier.only = _unpacked(held)

    def close(self) -> None:
        """Give everything back; files too, since no run can need them again."""
        for tier in self.tiers:
            tier.close()
        self.tiers = []


def _summary(tier: Tier) -> dict[str, Any]:
    """How many keys it holds, and a digest of them; the keys themselves would be a line of megabytes."""
    keys = sorted(tier.held())
    return {"samples": len(keys), "digest": xxhash.xxh3_128_hexdigest(b"".join(keys))}


def _packed(tier: Tier) -> str:
    """The first eight bytes of each key held."""
    return base64.b64encode(b"".join(sorted(key[:8] for key in tier.held()))).decode()


def _unpacked(text: str) -> frozenset[bytes]:
    packed = base64.b64decode(text)
    return frozenset(packed[start : start + 8] for start in range(0, len(packed), 8))
