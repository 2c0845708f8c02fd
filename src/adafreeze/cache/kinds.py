"""Kinds of training passes: what the result of serving a pass may depend on, except its samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch import nn

from ..freeze.prefix import Computed, Prefix, Slot, Start, Starts
from ..model.blocks import Stack, configs_of, modules_outside
from ..model.rows import Rows
from ..model.traces import users_code
from .compare import Refused
from .identity import HOSTS_SET
from .layout import Layout
from .tiers import Origin

__all__ = ["BELOW", "PassKind", "PassKinds", "Sources"]

# Give up if the model is called in more ways than this, or a stack's number of calls changes more often than that.
MOST_KINDS, MOST_COUNTS = 32, 3
# Marks sources of states that were stored at a smaller depth.
BELOW = " below"


@dataclass(frozen=True)
class Sources:
    """Where the states come from that a pass is to start from.

    Attributes:
        names: ``"computed"`` in this pass; ``"stored"`` at the full depth, and ``"moved"`` from another batch;
            ``"stored below"`` and ``"moved below"``: at a smaller depth, which shows nothing about the other blocks.
            In blocks of the user's own also each width.
        widths: smallest and largest width of this batch and of those that states were stored in, by ``"stored"`` and
            ``"stored below"``.
    """

    names: frozenset[str]
    widths: Mapping[str, tuple[int, int]]


@dataclass
class PassKind:
    """One kind of training pass at one depth of the prefix.

    Attributes:
        calls: of each stack in such a pass.
        layouts: of each call at the boundary. Empty until the prefix was examined.
        entry_layouts: of what enters block 0, where samples can be told apart there.
        verified: names of the sources from which passes may start.
        widths: spans of widths between which stored states were shown to be the same, as in ``Sources``. Position
            embeddings may be others from some width on.
        writes: the prefix, or something below it, writes to its modules, which nested passes must undo.
        interval: passes between two shadow checks; 0 before the first.
        passes: served since the last check.
        recounted: how often ``calls`` was wrong.
        shallower: the same kind in the prefix as it was before it grew.
        own_code: class of a module in the prefix that is the user's; None if all are of libraries.
        inherited: an earlier run verified it, on states that were kept.
        ignores_padding: in evaluation no output depends on it.
        returned: a pass of the model's own has shown what it returns.
        continues: in evaluation it returns keys and values, from which the user may continue a text.
        flags_matter: arguments that are True or False may reach the prefix, so a sample has other keys with others.
    """

    calls: dict[str, int]
    layouts: dict[Slot, Layout] = field(default_factory=dict)
    entry_layouts: dict[Slot, Layout] = field(default_factory=dict)
    verified: set[str] = field(default_factory=set)
    widths: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    writes: bool = False
    interval: int = 0
    passes: int = 0
    recounted: int = 0
    shallower: PassKind | None = None
    own_code: str | None = None
    inherited: bool = False
    ignores_padding: bool = False
    returned: bool = False
    continues: bool = False
    flags_matter: bool = True

    @property
    def slots(self) -> list[Slot]:
        """All calls of all stacks."""
        return [(path, call) for path, count in self.calls.items() for call in range(count)]

    @property
    def shows_width(self) -> bool:
        """Whether what enters block 0 shows how wide the states are."""
        return all(slot in self.entry_layouts and self.entry_layouts[slot].by_position for slot in self.layouts)

    def depths(self, by_stack: Mapping[str, int]) -> dict[Slot, int]:
        """The depth of the prefix in each call."""
        return {slot: by_stack[slot[0]] for slot in self.slots}

    def starts(self, computed: Computed | None, by_stack: Mapping[str, int]) -> Starts:
        """Where a pass starts from what was computed of its whole batch; empty if nothing was."""
        depths = self.depths(by_stack)
        return {slot: Start(depths[slot], computed.boundary[slot]) for slot in self.layouts} if computed else {}

    @property
    def several_calls(self) -> bool:
        """Whether a stack is called more than once in a pass."""
        return any(count > 1 for count in self.calls.values())

    def new_widths(self, sources: Sources) -> list[str]:
        """The keys of ``sources.widths`` that were not verified."""
        # At equal widths nothing is to be shown.
        spans = sources.widths.items()
        return [name for name, (low, high) in spans if low < high and self.span(name, low, high) is None]

    def span(self, name: str, *widths: int) -> tuple[int, int] | None:
        """The verified span in which all of these widths lie."""
        spans = self.widths.get(name, [])
        return next((span for span in spans if span[0] <= min(widths) and max(widths) <= span[1]), None)

    def showing(self, name: str, origins: Mapping[int, Origin], width: int) -> list[int]:
        """Rows that would show whether stored states are other ones in a batch of this width."""
        extremes = {choose(origins, key=lambda row: origins[row].width) for choose in (min, max)}
        return [row for row in extremes if self.span(name, origins[row].width, width) is None] or list(extremes)[:1]

    def may_start(self, sources: Sources) -> bool:
        """Whether all of this was verified, and that a pass that starts at the boundary returns the same."""
        return self.verified >= {*sources.names, "computed"} and not self.new_widths(sources)

    def verify(self, sources: Sources) -> None:
        """Passes may start from such states."""
        self.verified |= sources.names
        for name, span in sources.widths.items():
            self.add_span(name, *span)

    def add_span(self, name: str, low: int, high: int) -> None:
        """Stored states are the same in batches of all widths between these."""
        spans = self.widths.get(name, [])
        apart = [span for span in spans if span[1] < low or high < span[0]]
        joined = [span for span in spans if span not in apart] + [(low, high)]
        if low < high:
            self.widths[name] = [*apart, (min(a for a, _ in joined), max(b for _, b in joined))]

    def follow(self, shallower: PassKind) -> None:
        """Take over from the same kind in a shallower prefix what holds in the deeper one, too."""
        self.shallower, shallower.shallower = shallower, None
        self.calls |= shallower.calls
        # What is returned and read above a boundary is the same for a higher one, in libraries.
        self.returned, self.continues = shallower.returned, shallower.continues
        self.ignores_padding = shallower.ignores_padding and self.own_code is None
        for name in shallower.verified:
            if not name.endswith(BELOW):
                self.verified.add(name + BELOW)
            elif self.own_code is None:
                self.verified.add(name)
        # In libraries, what depends on the width of a batch does so in the lowest block already. In a user's code any
        # block may, so what was shown of states from below shows nothing about the blocks that have joined since.
        spans = shallower.widths if self.own_code is None else {}
        self.widths = dict(spans) | {name + BELOW: span for name, span in shallower.widths.items() if name == "stored"}

    def to_dict(self) -> dict[str, Any]:
        """What another run with the same prefix need not verify again, as plain JSON values."""

        def plain(layouts: Mapping[Slot, Layout]) -> list[Any]:
            return [
                [*slot, {**vars(one), "dtype": str(one.dtype).removeprefix("torch.")}] for slot, one in layouts.items()
            ]

        return {
            "verified": sorted(self.verified),
            "widths": self.widths,
            "calls": self.calls,
            "layouts": plain(self.layouts),
            "entry_layouts": plain(self.entry_layouts),
            "writes": self.writes,
            "continues": self.continues,
            "ignores_padding": self.ignores_padding,
            "flags_matter": self.flags_matter,
        }

    def inherit(self, found: Mapping[str, Any]) -> None:
        """Take over what ``to_dict`` returned in another run."""

        def layouts(entries: Iterable[Any]) -> dict[Slot, Layout]:
            return {(path, call): Layout(**{**of, "dtype": getattr(torch, of["dtype"])}) for path, call, of in entries}

        try:
            of_states, of_entries = layouts(found["layouts"]), layouts(found["entry_layouts"])
            verified, widths, calls = set(found["verified"]), _spans(found["widths"]), dict(found["calls"])
            writes, continues, ignores = (bool(found[name]) for name in ("writes", "continues", "ignores_padding"))
            flags_matter = bool(found.get("flags_matter", True))
        except (AttributeError, KeyError, TypeError, ValueError):
            return  # damaged, so this run verifies everything itself
        self.verified |= verified
        self.widths |= widths
        self.calls |= calls
        self.layouts, self.entry_layouts = of_states, of_entries
        self.writes, self.continues, self.ignores_padding, self.inherited = writes, continues, ignores, True
        self.flags_matter = flags_matter

    def has_calls(self, seen: Mapping[str, int]) -> bool:
        """Whether stacks were called as expected. If not, the prefix must be examined again."""
        if all(self.calls[path] == count for path, count in seen.items()):
            return True
        self.calls.update(seen)
        self.layouts, self.entry_layouts, self.verified, self.widths = {}, {}, set(), {}
        self.inherited, self.flags_matter = False, True
        self.recounted += 1
        if self.recounted > MOST_COUNTS:
            raise Refused("the number of calls of a stack varies from pass to pass")
        return False


def _spans(widths: Mapping[str, Any]) -> dict[str, list[tuple[int, int]]]:
    """Back from JSON."""
    return {name: [(low, high) for low, high in spans] for name, spans in widths.items()}


class PassKinds:
    """All kinds of training passes that a run has had.

    Attributes:
        known: by key: names, ranks and dtypes of the inputs, autocast, training flags, flags and hooks of the modules
            outside the blocks, whether padding counts, and the depths of the prefix.
        restored: ``verified``, ``widths`` and ``calls`` of kinds that were known before the run was resumed.
        kept: by key what other runs on the same kept states have verified.
    """

    def __init__(self, prefix: Prefix) -> None:
        self.prefix = prefix
        self.known: dict[str, PassKind] = {}
        self.restored: dict[str, Sequence[Any]] = {}
        self.kept: Mapping[str, Any] = {}
        self._latest: dict[str, PassKind] = {}  # the same kinds regardless of depth
        self._outside = _Outside((), ())
        self._modules: list[nn.Module] = []

    def of(self, rows: Rows, autocast: Any, *, whole_rows: bool) -> PassKind:
        """The kind of a pass on these rows with the current prefix.

        Raises:
            Refused: there are too many kinds.
        """
        if self._modules is not self.prefix.modules:
            self._modules = self.prefix.modules
            self._outside = _Outside(self._modules, self.prefix.stacks)
        seen = repr((rows.signature(), str(autocast), self._outside.state(), whole_rows))
        kind = xxhash.xxh3_64_hexdigest(seen.encode())
        # Blocks that join the prefix change to evaluation mode, so their flags are in the key of the depth only.
        training = hash(tuple(module.training for module in self._modules))
        key = f"{kind} {tuple(self.prefix.depths.values())} {training}"
        if key not in self.known:
            if len(self.known) >= MOST_KINDS:
                raise Refused(f"the model was called in {MOST_KINDS} different ways")
            own_code = users_code(module for block in self.prefix.blocks for module in block.modules())
            made = PassKind({stack.path: 1 for stack in self.prefix.stacks}, own_code=own_code)
            if (before := self._latest.get(kind)) is not None:
                made.follow(before)
            verified, widths, calls = self.restored.get(key, ((), {}, {}))
            made.verified |= set(verified)
            made.widths |= _spans(widths)
            made.calls |= calls
            if self._of_libraries(made) and not rows.is_packed and key in self.kept:
                made.inherit(self.kept[key])
            self.known[key] = self._latest[kind] = made
        return self.known[key]

    def _of_libraries(self, kind: PassKind) -> bool:
        """Whether another run has the same code: that of a user may have changed."""
        return kind.own_code is None and self._outside.own_code is None

    def lasting(self) -> dict[str, Any]:
        """By key what other runs with the same code need not verify again, at any depth."""
        if not self.prefix.sees_entries:
            return {}
        verified = {key: kind for key, kind in self.known.items() if "computed" in kind.verified}
        return {key: kind.to_dict() for key, kind in verified.items() if kind.layouts and self._of_libraries(kind)}

    def state_dict(self) -> dict[str, Any]:
        """Verified sources and calls by key."""
        verified = {key: kind for key, kind in self.known.items() if kind.verified}
        return self.restored | {key: [sorted(kind.verified), kind.widths, kind.calls] for key, kind in verified.items()}


class _Outside:
    """Flags, words, scales and the number of hooks of the modules outside the blocks.

    A user's code may build another mask from some step on, or a hook may change what enters the blocks beside the
    hidden states. Integers count passes, and users' code may anneal scales, so these are ignored.
    """

    def __init__(self, modules: Iterable[nn.Module], stacks: Sequence[Stack]) -> None:
        self._modules = modules_outside(modules, stacks)
        self.own_code = users_code(self._modules)
        self._classes = [type(module).__name__ for module in self._modules]
        self._configs = configs_of(self._modules)
        # Hooks on embeddings show in the fingerprints of what enters block 0.
        self._hooked = [m for m in self._modules if not any(isinstance(part, nn.Embedding) for part in m.modules())]
        self._flags: list[tuple[dict[str, Any], str]] = []
        for module in self._modules:
            kinds = {bool, str} if users_code([module]) is not None else {bool, str, float}
            own = module.__dict__
            names = [n for n, v in own.items() if type(v) in kinds and not n.startswith("_") and n not in HOSTS_SET]
            self._flags += [(own, name) for name in names]

    def state(self) -> tuple[Any, ...]:
        """As of now."""
        training = [module.training for module in self._modules]
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in self._hooked]
        # With a key-value cache transformers does not look for documents in packed rows.
        caching = [getattr(config, "use_cache", None) for config in self._configs]
        caching += [getattr(module, "gradient_checkpointing", False) for module in self._modules]
        return self._classes, caching, training, hooks, [own.get(name) for own, name in self._flags]
