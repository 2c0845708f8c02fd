"""Kinds of training passes: what the result of serving a pass may depend on, except its samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash
from torch import nn

from ..freeze.prefix import Prefix, Slot
from ..model.blocks import Stack, modules_outside
from ..model.rows import Rows
from ..model.traces import users_code
from .compare import Refused
from .identity import HOSTS_SET
from .layout import Layout

__all__ = ["NARROWED", "WIDENED", "PassKind", "PassKinds"]

# Of sources of states: they were stored in batches of another width.
WIDENED, NARROWED = "widened to", "narrowed to"

# Give up if the model is called in more ways than this, or a stack's number of calls changes more often than that.
MOST_KINDS, MOST_COUNTS = 32, 3


@dataclass
class PassKind:
    """One kind of training pass at one depth of the prefix.

    Attributes:
        calls: of each stack in such a pass.
        layouts: of each call at the boundary. Empty until the prefix was examined.
        entry_layouts: of what enters block 0, where samples can be told apart there.
        verified: sources of states from which passes may start (``OnePass.sources``).
        writes: the prefix, or something below it, writes to its modules, which nested passes must undo.
        interval: passes between two shadow checks; 0 before the first.
        passes: served since the last check.
        recounted: how often ``calls`` was wrong.
        shallower: the same kind in the prefix as it was before it grew.
    """

    calls: dict[str, int]
    layouts: dict[Slot, Layout] = field(default_factory=dict)
    entry_layouts: dict[Slot, Layout] = field(default_factory=dict)
    verified: set[str] = field(default_factory=set)
    writes: bool = False
    interval: int = 0
    passes: int = 0
    recounted: int = 0
    shallower: PassKind | None = None

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

    @property
    def several_calls(self) -> bool:
        """Whether a stack is called more than once in a pass."""
        return any(count > 1 for count in self.calls.values())

    def has_calls(self, seen: Mapping[str, int]) -> bool:
        """Whether stacks were called as expected. If not, the prefix must be examined again."""
        if all(self.calls[path] == count for path, count in seen.items()):
            return True
        self.calls.update(seen)
        self.layouts, self.entry_layouts, self.verified = {}, {}, set()
        self.recounted += 1
        if self.recounted > MOST_COUNTS:
            raise Refused("the number of calls of a stack varies from pass to pass")
        return False


class PassKinds:
    """All kinds of training passes that a run has had.

    Attributes:
        known: by key: names, ranks and dtypes of the inputs, autocast, training flags, flags and hooks of the modules
            outside the blocks, whether padding counts, and the depths of the prefix.
        restored: ``verified`` and ``calls`` of kinds that were known before the run was resumed.
    """

    def __init__(self, prefix: Prefix) -> None:
        self.prefix = prefix
        self.known: dict[str, PassKind] = {}
        self.restored: dict[str, tuple[Sequence[str], dict[str, int]]] = {}
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
        kind = xxhash.xxh3_64_hexdigest(repr((rows.signature(), str(autocast), self._outside.state())).encode())
        kind = f"{kind} {whole_rows}"
        # Blocks that join the prefix change to evaluation mode, so their flags are in the key of the depth only.
        training = hash(tuple(module.training for module in self._modules))
        key = f"{kind} {tuple(self.prefix.depths.values())} {training}"
        if key not in self.known:
            if len(self.known) >= MOST_KINDS:
                raise Refused(f"the model was called in {MOST_KINDS} different ways")
            verified, calls = self.restored.get(key, ((), {}))
            made = PassKind({stack.path: 1 for stack in self.prefix.stacks}, verified=set(verified))
            if (before := self._latest.get(kind)) is not None:
                made.calls |= before.calls
                made.shallower, before.shallower = before, None
                if users_code(module for block in self.prefix.blocks for module in block.modules()) is None:
                    # In libraries, what depends on the width of a batch does so in the lowest block already.
                    made.verified |= {one for one in before.verified if one.startswith((WIDENED, NARROWED))}
            made.calls |= calls
            self.known[key] = self._latest[kind] = made
        return self.known[key]

    def state_dict(self) -> dict[str, Any]:
        """Verified sources and calls by key."""
        return self.restored | {key: [sorted(k.verified), k.calls] for key, k in self.known.items() if k.verified}


class _Outside:
    """Flags, words, scales and the number of hooks of the modules outside the blocks.

    A user's code may build another mask from some step on, or a hook may change what enters the blocks beside the
    hidden states. Integers count passes, and users' code may anneal scales, so these are ignored.
    """

    def __init__(self, modules: Iterable[nn.Module], stacks: Sequence[Stack]) -> None:
        self._modules = modules_outside(modules, stacks)
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
        return training, hooks, [own.get(name) for own, name in self._flags]
