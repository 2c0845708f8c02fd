"""PrefixCache: from the second time on that a sample comes, its training step starts above the frozen prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor, nn

from ..costs.flops import CountFlops
from ..errors import AdafreezeError, note
from ..freeze.prefix import Prefix, Starts, autocast_now
from ..journal import Journal
from ..model.backends import Backend
from ..model.blocks import device_of
from ..model.calls import Call
from ..model.random_state import keep_random_state
from ..model.rows import NotBySample, Rows
from ..model.traces import captures_outputs, read_by, traceless
from .batches import Batches, Computed, Slot, marks_of
from .checks import SafetyCheck, Situation
from .identity import Identity
from .stats import CacheStats, Repeats
from .store import Store
from .tiers import Entry, Tier

__all__ = ["PrefixCache", "Progress"]

# Passes that ask for more than the last hidden states run the prefix.
_WHOLE_PASS = ("output_hidden_states", "output_attentions", "past_key_values", "use_cache")
# Weights that change more often than this are no frozen prefix.
MOST_CHANGES = 3
# Batches wider or narrower than all before, by this, show once more that what was held at other widths is right there.
WIDER = 1.25


class Progress(NamedTuple):
    """Where the run stands: optimizer steps done, samples still to come, samples of an epoch (None: not known)."""

    step: int
    remaining: int
    epoch: int | None


class _Pass(NamedTuple):
    """What is known of the training pass that was looked up, until it ends."""

    situation: Situation
    rows: Rows
    keys: list[bytes]
    missing: list[int]


class PrefixCache:
    """Looks up what the frozen prefix makes of a sample, and computes it where it is not held.

    Before each training pass the batch is taken apart into samples. Key of a sample: 128 bits of all that the model is
    called with for it, unpadded, and of the autocast state. Value: its unpadded hidden states at the boundary, one for
    each call of a stack in the pass, with the identity of the prefix that gave them (``Identity``). What is not held is
    computed by a nested pass over those rows alone, which ends at the boundary; what is held at a smaller depth goes
    through the new blocks alone. Then the training pass starts at the boundary, with the hidden states that running the
    prefix would give: to the bit at fixed padding, up to rounding where a sample comes at another width. Where a stack
    is called several times in a pass, a batch that is not held whole runs its prefix, and what that gives is held.

    Nothing is served before it was shown on the real batch that serving changes nothing (``SafetyCheck``). Passes
    without gradients, in evaluation mode, with other adapters on than the trained ones, that ask for all hidden
    states, or in which somebody's hook reads a block of the prefix, run the model as if there were no cache. Where
    the length of an epoch is not known, no states are held before samples are seen to come again (``Repeats``). A
    failure of the cache ends the cache, and never the run.

    Args:
        prefix: whose output is held; the cache sets its ``look_up``.
        backend: knows the adapters' state.
        identity: of the prefix.
        tiers: in the order in which they are filled.
        journal: of the run.
        progress: where the run stands.
        store_dtype: hold states as this; None: as the blocks give them.

    Attributes:
        off: why it was switched off; None while it is on.
        distrusted: it was switched off since serving would have changed what training computes.
        counts_flops: count what nested passes spend. The first pass of each shape takes a third longer then.
        flops: spent in nested passes; what a training pass itself spends is its host's to count.
    """

    def __init__(
        self,
        prefix: Prefix,
        backend: Backend,
        identity: Identity,
        tiers: Sequence[Tier],
        journal: Journal,
        progress: Callable[[], Progress],
        store_dtype: torch.dtype | None = None,
    ) -> None:
        self.prefix = prefix
        self.backend = backend
        self.journal = journal
        self.progress = progress
        self.store_dtype = store_dtype
        self.off: str | None = None
        self.distrusted = False
        self.counts_flops = False
        self.flops = 0
        self.stats = CacheStats(device_of(prefix.model))
        self.repeats = Repeats()
        self._stacks = prefix.stacks
        self.store = Store(tiers, identity, journal)
        self._identity = identity
        self._encoder_decoder = _is_encoder_decoder(prefix.model)
        sides = {stack.path: int(self._encoder_decoder and n > 0) for n, stack in enumerate(prefix.stacks)}
        self.safety = SafetyCheck(prefix, sides, self._note_whole_rows, rounds=store_dtype is not None)
        self._batches = Batches(self.stats.device, store_dtype)
        self._depths: tuple[int, ...] = (0,) * len(prefix.stacks)
        self._sites: list[nn.Module] = []
        self._settings: list[tuple[Any, ...]] = []
        self._modules: list[nn.Module] = []
        self._changes = 0
        self._autocasts: dict[Any, Any] = {}
        self._flops_per_row: dict[Any, float] = {}
        self._asked = (0, 0)
        self._now: _Pass | None = None
        self._entered: Mapping[str, Sequence[Tensor]] = {}
        self._own: dict[str, list[Tensor]] = {}
        self._own_entries: dict[str, list[Tensor]] = {}
        self._marks: dict[Slot, Tensor] = {}
        self._forwards: list[Any] = []
        self._served_rows: Rows | None = None
        self._said: set[str] = set()
        self._undo = ExitStack()
        prefix.look_up = self.look_up
        prefix.admits = self._admits
        prefix.finished = self._finished
        prefix.around = identity
        prefix.on_bypass = self._note_bypass

    # What Safe calls.

    @property
    def state_key(self) -> tuple[Any, ...]:
        """Changes whenever the cost of a training pass, nested passes left out, may change."""
        shown = sum(len(situation.verified) for situation in self.safety.situations.values())
        return self.off is None, self._holds, self.safety.whole_rows, shown, *sorted(self.safety.padding_known)

    @property
    def _holds(self) -> bool:
        return self.repeats.found or self.progress().epoch is not None

    def grown(self) -> None:
        """The prefix has changed; what is held is advanced at its next use."""
        self._undo.close()
        self._depths = tuple(self.prefix.depths[stack.path] for stack in self._stacks)
        if self.off is not None:
            return
        pairs = zip(self._stacks, self._depths, strict=True)
        blocks = [block for stack, depth in pairs for block in stack.blocks[:depth]]
        self._sites = [site for block in blocks for _, site in self.backend.sites(block)]
        self._settings = [self.backend.settings(site) for site in self._sites]
        self._modules = [module for block in blocks for module in block.modules()]
        self._forwards = [module.__dict__.get("forward") for module in self._modules]
        self._identity.watch(self._depths)
        for block in blocks:
            for context in self.backend.merges(block, self._merged):
                self._undo.enter_context(context)

    def logs(self) -> dict[str, float]:
        """Scalars: hit rate since the last call, MiB held, seconds saved so far."""
        if self.off is not None or not self.stats.looked_up:
            return {}
        now = self.stats.hits + self.stats.advanced, self.stats.looked_up
        found, asked = (a - b for a, b in zip(now, self._asked, strict=True))
        self._asked = now
        logs = {f"safe/cache_{name}_mib": round(size / 2**20, 3) for name, size in self.store.nbytes.items()}
        if asked:
            logs["safe/cache_hit_rate"] = round(found / asked, 4)
        if self.stats.seconds_saved is not None:
            logs["safe/cache_seconds_saved"] = round(self.stats.seconds_saved, 3)
        return logs

    def switch_off(self, reason: str) -> None:
        """Hold nothing any more, and say why; the prefix is run from now on."""
        if self.off is None:
            self.off = reason
            self.journal.write("cache_off", step=self.progress().step, reason=reason)
            note(f"Prefix cache off: {reason}.")
            self._give_back()

    def close(self) -> None:
        """Write down what it did, and give everything back; a run that ends here leaves nothing on disk."""
        if self.stats.looked_up:
            self.journal.write(
                "cache",
                step=self.progress().step,
                hits=self.stats.hits,
                advanced=self.stats.advanced,
                misses=self.stats.misses,
                nbytes=self.store.nbytes,
                damaged=self.store.damaged,
                flops=self.flops if self.counts_flops else None,
                seconds_saved=self.stats.seconds_saved,
            )
        self._give_back()

    def state_dict(self) -> dict[str, Any]:
        """What was decided, and which samples a full memory holds."""
        return {
            "off": self.off,
            "whole_rows": self.safety.whole_rows,
            "situations": {
                **self.safety.shown,
                **{k: [sorted(s.verified), s.calls] for k, s in self.safety.situations.items() if s.verified},
            },
            "held": self.store.held_in_memory(),
            "repeats": self.repeats.found,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` wrote."""
        self.safety.whole_rows = state["whole_rows"]  # what else is known of padding may hold of another loss
        self.safety.shown = dict(state.get("situations", {}))
        self.repeats.found = state.get("repeats", False)
        if state["off"] is not None:
            self.switch_off(state["off"])
        self.store.hold_in_memory_only(state["held"])

    def _give_back(self) -> None:
        self._undo.close()
        self.prefix.look_up = self.prefix.watch_boundary = self.prefix.finished = self.prefix.around = None
        self.prefix.on_bypass = self.prefix.watch_entry = self.prefix.admits = None
        self._now = None
        self.store.close()

    def _note_whole_rows(self, reason: str) -> None:
        self.journal.write("cache_whole_rows", step=self.progress().step, reason=reason)
        note(
            f"Prefix cache: {reason}. Whole rows are held: a sample is found again at the width it came with; with "
            "padding to a fixed length, always."
        )

    def _note_bypass(self) -> None:
        self._say(
            "training calls a part of the model, and what that is called with is not looked up; give Safe the module "
            "that is called"
        )

    def _merged(self) -> None:
        self.switch_off("an adapter of the frozen prefix is being merged into its base weights, which rounds them")

    # What the prefix asks.

    def look_up(self, call: Call) -> Starts:
        """Where the pass that begins with this call starts; empty: at the embeddings."""
        self._now = self._served_rows = None
        self.prefix.watch_boundary = self.prefix.watch_entry = None
        try:
            if self.off is None and any(self._depths) and self._may_serve(call.inputs):
                starts = self._look_up(call)
                # Only where something is to be seen: a compiler would trace it, and compile anew when it changes.
                self.prefix.watch_boundary = self.safety.watch if self.safety.watches else None
                self.prefix.watch_entry = self._watch_entry if self.safety.collect is not None else None
                return starts
        except NotBySample as error:
            self.switch_off(str(error))
        except Exception as error:  # whatever it is: the prefix can always be run
            fact = error.fact if isinstance(error, AdafreezeError) else f"{type(error).__name__}: {error}"
            self.switch_off(f"it failed ({fact})")
        return {}

    def _may_serve(self, inputs: Mapping[str, Any]) -> bool:
        config = _config(self.prefix.model)
        asked = [inputs.get(name) for name in _WHOLE_PASS]
        if any(value is not None and value is not False for value in asked):
            return False
        if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
            return False
        now = (module.__dict__.get("forward") for module in self._modules)
        if not all(forward is before for forward, before in zip(now, self._forwards, strict=True)):
            self._say("the forward of a module in the frozen prefix was replaced, so such passes are not looked up")
            return False
        if (reader := read_by(self._modules)) is not None:
            self._say(f"a hook of yours reads {reader} in the frozen prefix, so passes with it are not looked up")
            return False
        return [self.backend.settings(site) for site in self._sites] == self._settings

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.journal.write("cache_waits", step=self.progress().step, reason=text)
            note(f"Prefix cache: {text}.")

    def _look_up(self, call: Call) -> Starts:
        whole = self.safety.whole_rows
        rows = Rows(call.inputs, encoder_decoder=self._encoder_decoder, whole=whole)
        if not self._holds:
            with self.stats.timed(self.stats.write, rows.count):
                repeated = self.repeats.see(rows.keys())
            if not repeated:
                self.stats.count(0, 0, rows.count)
                self._judge()
                return {}
            self.stats.since_hit = 0
        if self._identity.changed():
            self._hash_again()
        ambient = autocast_now(self.stats.device)
        situation = self.safety.situation(rows, ambient)
        with self._counted():
            self.safety.examine(situation, rows, call, self._held_below(situation, rows))
            looked = self.safety.refusal is None and bool(situation.layouts)
            trusted = looked and self.safety.trusts_padding(situation, rows, call)
        if self.safety.refusal is not None:
            self.distrusted = True
            self.switch_off(self.safety.refusal)
        if self.off is not None:
            return {}
        if self.safety.whole_rows is not whole:
            rows = Rows(call.inputs, encoder_decoder=self._encoder_decoder, whole=True)
            situation = self.safety.situation(rows, ambient)
            with self._counted():
                self.safety.examine(situation, rows, call)
        # Hosts put autocast around the call or within it; which one a call is going to run under is seen by trying.
        self.prefix.autocast = self._autocasts.setdefault(ambient, self.prefix.autocast)
        self._now = _Pass(situation, rows, [], [])
        if not situation.layouts:
            return {}  # how often its stacks are called is seen in this pass
        try:
            return self._served(situation, rows, call, trusted)
        finally:
            situation.fresh = None

    def _keys(self, situation: Situation, rows: Rows) -> tuple[list[bytes], list[int]]:
        """Under which the samples are held, and the position of each slot's stack."""
        stacks = [position for position, _, _ in situation.layouts]
        return rows.keys(f"{self.prefix.autocast} {self.safety.whole_rows} {self.store_dtype} {stacks}"), stacks

    def _held_below(self, situation: Situation, rows: Rows) -> Callable[[Sequence[int]], Starts]:
        """From where a deeper prefix is first run on some of these rows: from what a less deep one gave, if it is held.

        The rest of the way is what the pass has to go in any case.
        """
        below = situation.below
        if situation.layouts or situation.several_calls or below is None or not below.layouts:
            return lambda _: {}
        keys, stacks = self._keys(below, rows)
        entries = self.store.read(keys, tuple(self._depths[position] for position in stacks), stacks)
        held = {entry.depths if entry is not None else () for entry in entries}
        if len(held) > 1 or not any(next(iter(held))):
            return lambda _: {}
        (depths,) = held
        return lambda group: self._batches.together(rows, group, [entries[row] for row in group], depths, below.layouts)

    def _served(self, situation: Situation, rows: Rows, call: Call, trusted: bool) -> Starts:
        width = max(rows.width(0), 1)
        with self.stats.timed(self.stats.read, rows.count * width):
            keys, stacks = self._keys(situation, rows)
            depths = tuple(self._depths[position] for position in stacks)
            nothing = (0,) * len(depths)
            # While it is not known whether anything reads padding, all rows are computed, padding and all.
            entries: list[Entry | None] = [None] * rows.count
            if trusted:
                entries = self.store.read(keys, depths, stacks)
            groups: dict[tuple[int, ...], list[int]] = {}
            for row, entry in enumerate(entries):
                groups.setdefault(nothing if entry is None else entry.depths, []).append(row)
            found = groups.pop(depths, [])
            missing = len(groups.get(nothing, []))
        if situation.several_calls and groups:
            self.stats.count(len(found), rows.count - len(found) - missing, missing)
            return self._filled_by_this_pass(situation, rows, keys, groups)
        if not missing:
            with self._counted():
                if not self.safety.keeps_width(situation, rows, call):
                    return {}
        starts: Starts = {}
        marks = {row: entry.marks for row, entry in enumerate(entries) if entry is not None and entry.marks}
        fresh = set(groups.get(nothing, []))
        if found and not self._keeps_states(situation, rows, call, found, entries):
            return {}
        if not groups:
            with self.stats.timed(self.stats.read, 0):
                starts = self._batches.together(rows, range(rows.count), entries, depths, situation.layouts)
        self.stats.count(len(found), rows.count - len(found) - missing, missing)
        if groups:
            starts = self._completed(situation, rows, call, keys, entries, groups, depths, marks)
        self._judge()
        if not starts or self.off is not None:
            return {}
        before = self.safety.flops
        kinds = self._kinds(rows, keys, [mark for row, mark in marks.items() if row not in fresh])
        may = self.safety.shadow(situation, kinds, rows, call, starts)
        self.flops += (self.safety.flops - before) * self.counts_flops
        if self.safety.refusal is not None:
            self.distrusted = True
            self.switch_off(self.safety.refusal)
        if not may:
            return {}
        self._served_rows = rows
        self._expect(situation, rows.count, marks)
        self.stats.skip(width * (len(found) * sum(depths) + sum(len(group) * sum(of) for of, group in groups.items())))
        return starts

    def _keeps_states(
        self, situation: Situation, rows: Rows, call: Call, found: list[int], entries: Sequence[Entry | None]
    ) -> bool:
        """Whether what was held in narrower batches may stand in a wider one than all before, and the reverse."""
        width = max(rows.width(0), rows.width(1))
        held = [(entry.marks[-1], row) for row in found if (entry := entries[row])]
        if self.safety.whole_rows or not width or not held:
            return True
        narrow, wide = min(held), max(held)
        if narrow[0] < width and width >= WIDER * situation.widest:
            situation.widest, row = width, narrow[1]
        elif wide[0] > width and (not situation.narrowest or WIDER * width <= situation.narrowest):
            situation.narrowest, row = width, wide[1]
        else:
            return True
        with self._counted():
            keeps = self.safety.keeps_states(situation, rows, call, row, entries[row].states)  # type: ignore[union-attr]
        if not keeps and self.safety.refusal is not None:
            self.distrusted = True
            self.switch_off(self.safety.refusal)
        return keeps

    def _filled_by_this_pass(
        self, situation: Situation, rows: Rows, keys: list[bytes], groups: Mapping[tuple[int, ...], list[int]]
    ) -> Starts:
        """Run the prefix, and hold what comes of the rows that are not held, or not so deep."""
        missing = sorted(row for group in groups.values() for row in group)
        self._judge()
        own: dict[str, list[Tensor]] = {}
        self.safety.collect = lambda path, _, hidden: own.setdefault(path, []).append(hidden)
        self._own, self._own_entries = own, {}
        self._now = _Pass(situation, rows, keys, missing)
        return {}

    def _finished(self, output: Any, calls: Mapping[str, int]) -> None:
        """A training pass has ended."""
        now, self._now = self._now, None
        self.safety.collect, self._marks = None, {}
        if self.off is not None:
            return
        try:
            if self._served_rows is not None:
                self.safety.hears(output, self._served_rows)
            problem = self.safety.finished(output, calls, now.situation if now is not None else None)
            if self.safety.refusal is not None or problem is not None:
                self.distrusted = True
                self.switch_off(self.safety.refusal or f"a pass that starts above the prefix differs: {problem}")
            elif now is not None and now.missing and now.situation.layouts:
                everyone = list(range(now.rows.count))
                marks = self._marks_of(now.situation, now.rows, now.keys, everyone, self._own_entries)
                self._write(now.situation, now.rows, now.keys, everyone, self._own, marks)
            if now is not None and not now.situation.layouts:
                self.stats.since_hit = 0  # what was looked up was another number of calls, and never held
        except Exception as error:
            self.switch_off(f"it failed ({type(error).__name__}: {error})")

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with CountFlops() if self.counts_flops else nullcontext() as count:
            yield
        self.flops += count.total if count is not None else 0

    def _judge(self) -> None:
        progress = self.progress()
        reason = self.stats.verdict(sum(self._depths), progress.epoch, progress.remaining + self.stats.looked_up)
        if reason is not None:
            if self.safety.waits_for_gradient:
                reason = "the loss does not depend on the prefix, so nothing shows whether padding is read"
            self.switch_off(reason)

    def _hash_again(self) -> None:
        before = self._identity.of(self._depths)
        self._identity.forget()
        self._identity.watch(self._depths)
        if self._identity.of(self._depths) != before:
            self.stats.since_hit = 0  # what was held is another prefix's: samples have to come once more
            self._changes += 1
            if self._changes > MOST_CHANGES:
                self.switch_off("the weights of the frozen prefix keep changing")

    def _completed(
        self,
        situation: Situation,
        rows: Rows,
        call: Call,
        keys: list[bytes],
        entries: list[Entry | None],
        groups: Mapping[tuple[int, ...], list[int]],
        depths: tuple[int, ...],
        marks: dict[int, tuple[float, ...]],
    ) -> Starts:
        """Compute what is missing, in groups of equal depth, and put it beside what was found."""
        computed: list[Computed] = []
        autocast = self.prefix.autocast
        for held, group in sorted(groups.items()):  # from the embeddings first: they show how wide states are
            states = self._computed(situation, rows, call, group, held, [entries[row] for row in group])
            if states is None:
                self.switch_off("a training pass does not come to the boundary of every stack")
                return {}
            if self.prefix.autocast != autocast or not self.safety.keeps_width(situation, rows, call, states):
                return {}
            computed.append((group, states))
            entered = self._marks_of(situation, rows, keys, group, self._entered)
            if any(held):  # what was held is right where what it was made of still enters
                entered = [marks.get(row, mark) for row, mark in zip(group, entered, strict=True)]
            self._write(situation, rows, keys, group, states, entered)
            for row, mark in zip(group, entered, strict=True):
                entries[row], marks[row] = None, mark
        return self._batches.together(rows, range(rows.count), entries, depths, situation.layouts, computed)

    def _computed(
        self,
        situation: Situation,
        rows: Rows,
        call: Call,
        group: list[int],
        held: tuple[int, ...],
        entries: list[Entry | None],
    ) -> dict[str, list[Tensor]] | None:
        """The hidden states of some rows at the boundary, from what is held of them."""
        fresh, situation.fresh = situation.fresh, None
        if fresh is not None and len(group) == rows.count:
            self._entered = situation.fresh_entries
            return fresh
        inputs = rows.take(group)
        starts: Starts = {}
        if any(held):
            starts = self._batches.together(rows, group, entries, held, situation.layouts)
        shapes = tuple((name, v.shape[1:]) for name, v in sorted(inputs.items()) if isinstance(v, Tensor) and v.ndim)
        kind = (held, self._depths, shapes)
        work = len(group) * max(rows.width(0), 1) * (sum(self._depths) - sum(held))
        until = self.safety.until(situation)
        # What a forward pass draws below the prefix, it is to draw once.
        with traceless(self.prefix.modules) if self.safety.writes else keep_random_state():
            if kind in self._flops_per_row or not self.counts_flops:
                with self.stats.timed(self.stats.compute, work):
                    states = self.prefix.compute(call, inputs, starts, until)
            else:
                with CountFlops() as count:
                    states = self.prefix.compute(call, inputs, starts, until)
                self._flops_per_row[kind] = count.total / len(group)
        self.flops += round(self._flops_per_row.get(kind, 0) * len(group))
        self._entered = self.prefix.entered
        return states

    def _kinds(self, rows: Rows, keys: Sequence[bytes], marks: Sequence[tuple[float, ...]]) -> frozenset[str]:
        """What is to be shown before a pass may start from such states.

        A batch that comes again as it was, which PPO's inner epochs do, shows nothing of samples in another place, in
        other company, or at another width.
        """
        if not marks:
            return frozenset({"computed"})
        batch, width = self._batch(rows, keys)
        moved, resized = any(mark[-2] != batch for mark in marks), any(mark[-1] != width for mark in marks)
        return frozenset({"held"} | ({"moved"} if moved else set()) | ({"resized"} if resized else set()))

    def _batch(self, rows: Rows, keys: Sequence[bytes]) -> tuple[float, float]:
        """Samples and their order as a number that a float holds, and how wide the rows are."""
        return float(xxhash.xxh3_64_intdigest(b"".join(keys)) >> 16), float(max(rows.width(0), rows.width(1)))

    # What enters block 0.

    def _marks_of(
        self,
        situation: Situation,
        rows: Rows,
        keys: Sequence[bytes],
        group: Sequence[int],
        entered: Mapping[str, Sequence[Tensor]],
    ) -> list[tuple[float, ...]]:
        """For each row two numbers of each slot, NaN where the samples cannot be told apart there; and of the batch."""
        nothing = torch.full((len(group), 2), float("nan"), dtype=torch.float64)
        found = []
        for slot in situation.layouts:
            _, path, call = slot
            layout, of_path = situation.entries.get(slot), entered.get(path, ())
            known = layout is not None and call < len(of_path)
            found.append(marks_of(layout, of_path[call], rows, group).cpu() if known else nothing)  # type: ignore[arg-type]
        batch = self._batch(rows, keys)
        return [(*row, *batch) for row in torch.cat(found, 1).tolist()] if found else [batch] * len(group)

    def _expect(self, situation: Situation, count: int, marks: Mapping[int, tuple[float, ...]]) -> None:
        """What is to enter block 0 in the pass that is about to be served."""
        self._marks = {}
        for number, slot in enumerate(situation.layouts):
            if slot in situation.entries:
                nothing = (float("nan"),) * (2 * len(situation.layouts))
                numbers = [(marks.get(row) or nothing)[2 * number : 2 * number + 2] for row in range(count)]
                self._marks[slot] = torch.tensor(numbers, dtype=torch.float64)

    def _admits(self, path: str, call: int, hidden: Tensor) -> bool:
        if self._is_as_before(path, call, hidden):
            return True
        self.stats.take_back()
        return False

    def _is_as_before(self, path: str, call: int, hidden: Tensor) -> bool:
        if captures_outputs():
            self._say(f"the model records what the blocks of {path} return, so such calls run the prefix")
            return False
        now = self._now
        slot = next((slot for slot in self._marks if slot[1:] == (path, call)), None)
        if now is None or slot is None:
            return True
        layout, everyone = now.situation.entries[slot], range(now.rows.count)
        if not self.safety.as_wide(layout, now.rows, hidden):
            return False
        if hidden.shape[layout.dimension] == layout.rows * now.rows.count:
            marks = marks_of(layout, hidden, now.rows, everyone).cpu()
            if self.safety.marks_agree(marks, self._marks[slot]):
                return True
        self._say(
            "what enters the frozen prefix is not what the same samples gave before (embeddings that were written to, "
            "a hook on them, noise that began later), so such passes run it"
        )
        return False

    def _watch_entry(self, path: str, call: int, hidden: Tensor) -> None:
        if self.safety.collect is not None:
            self._own_entries.setdefault(path, []).append(hidden)

    def _write(
        self,
        situation: Situation,
        rows: Rows,
        keys: list[bytes],
        group: list[int],
        states: Mapping[str, Sequence[Tensor]],
        marks: Sequence[tuple[float, ...]],
    ) -> None:
        progress = self.progress()
        if progress.epoch is not None and progress.remaining <= progress.epoch:
            return  # in the last epoch no sample comes again
        with self.stats.timed(self.stats.write, len(group)):
            stacks = [position for position, _, _ in situation.layouts]
            depths = tuple(self._depths[position] for position in stacks)
            # Of the stacks that this kind of pass calls: a vision tower is none of them in a batch of texts.
            identity = self._identity.of_calls(depths, stacks)
            pieces = self._batches.apart(rows, group, states, situation.layouts)
            items = [
                (keys[row], Entry(identity, depths, one, mark))
                for row, one, mark in zip(group, pieces, marks, strict=True)
            ]
            reason = self.store.hold(items, progress.step)
        if reason is not None:
            self.switch_off(reason)


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


def _is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model, or one inside it, says so; a wrapper has no configuration of its own."""
    return any(getattr(_config(module), "is_encoder_decoder", False) for module in model.modules())
