"""The training pass that is being looked up: its samples, and where the states that it starts from come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import xxhash
from torch import Tensor

from ..freeze.prefix import Computed, Slot
from ..model.rows import Rows
from .kinds import BELOW, PassKind, Sources
from .layout import fingerprints
from .tiers import Origin

__all__ = ["OnePass"]


@dataclass
class OnePass:
    """One training pass.

    Attributes:
        kind: of the pass.
        rows: its samples.
        keys: of the samples.
        hits: samples that were found.
        advanced: samples that were found at a smaller depth.
        work: positions × blocks that the pass skips.
        served: it starts above the prefix.
        expected: fingerprints that must enter block 0 if it is served.
        admitted: they did, in all calls.
        reads: what is stored may be looked up; not while it is not known whether anything reads padding.
        filling: what the pass computes itself, to be stored at its end.
        ahead: it is none of the run, and fills the cache for those that come.
    """

    kind: PassKind
    rows: Rows
    keys: list[bytes] = field(default_factory=list)
    hits: int = 0
    advanced: int = 0
    work: int = 0
    served: bool = False
    expected: dict[Slot, Tensor] = field(default_factory=dict)
    admitted: bool = True
    reads: bool = True
    filling: Computed | None = None
    ahead: bool = False

    @property
    def width(self) -> int:
        """Of the rows; with a decoder the larger one."""
        return max(self.rows.width(0), self.rows.width(1))

    @property
    def _batch(self) -> tuple[int, int]:
        """Samples and their order as 48 bits, which fit into a float, and the width of the rows."""
        return xxhash.xxh3_64_intdigest(b"".join(self.keys)) >> 16, self.width

    def origins(self, group: Sequence[int], entered: Mapping[Slot, Tensor]) -> list[Origin]:
        """The origin of each row that was computed from what ``entered`` block 0."""
        layouts, unknown = self.kind.entry_layouts, torch.full((len(group), 2), float("nan"), dtype=torch.float64)
        found = [
            fingerprints(layouts[slot], entered[slot], self.rows, group).cpu()
            if slot in layouts and slot in entered
            else unknown
            for slot in self.kind.slots
        ]
        batch, width = self._batch
        return [Origin(tuple(row), batch, width) for row in torch.cat(found, 1).tolist()]

    def sources(self, found: Mapping[int, Origin], advanced: Mapping[int, Origin]) -> Sources:
        """Where the states of the pass come from.

        A batch that comes again unchanged, as in PPO's inner epochs, shows nothing about samples that moved to another
        place or other company.

        Args:
            found: rows that are stored, by their origin. Of the others some are computed.
            advanced: rows that were stored at a smaller depth.
        """
        names = set() if len(found) == self.rows.count else {"computed"}
        batch, width = self._batch
        widths: dict[str, tuple[int, int]] = {}
        for origins, where in ((found.values(), ""), (advanced.values(), BELOW)):
            if origins:
                names.add(f"stored{where}")
                those = [width, *(origin.width for origin in origins)]
                widths[f"stored{where}"] = min(those), max(those)
                if self.kind.own_code is not None:  # libraries change at some width, users' code may at any
                    names |= {f"{one} wide{where}" for one in those}
            if any(origin.batch != batch for origin in origins):
                names.add(f"moved{where}")
        return Sources(frozenset(names), widths)

    def expect(self, origins: Mapping[int, Origin]) -> None:
        """Start above the prefix only if what enters block 0 has the fingerprints of these origins, by row."""
        all_slots = torch.tensor([origins[row].fingerprint for row in range(self.rows.count)], dtype=torch.float64)
        by_slot = zip(self.kind.slots, all_slots.split(2, 1), strict=True)
        self.expected = {slot: numbers for slot, numbers in by_slot if slot in self.kind.entry_layouts}
