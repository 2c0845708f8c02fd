"""From the second time that a sample comes, its pass starts above the frozen prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from ..costs.flops import CountFlops
from ..decide.run_length import RunLength
from ..errors import ConfigError, error_line, note, warn
from ..freeze.prefix import Computed, Prefix, Slot, Starts, autocast_now
from ..journal import Journal
from ..model.backends import Backend
from ..model.batch import Call
from ..model.blocks import configs_of, device_of
from ..model.restore import keep_random_state
from ..model.rows import NotBySample, Rows, samples_in
from ..model.traces import captures_outputs, read_by, traceless
from .codec import CODECS
from .compare import Refused, Rounding
from .identity import Identity
from .independence import IndependenceCheck
from .kept import KeptFolder
from .kinds import BELOW, PassKind, PassKinds
from .layout import assemble, fingerprints, split
from .one_pass import OnePass
from .padding import EvaluationPaddingCheck, PaddingCheck
from .shadow import ShadowCheck
from .stats import CacheStats, Repeats
from .store import Store
from .tiers import Entry, Origin, Tier

__all__ = ["PrefixCache"]

# Passes that ask for more than the last hidden states run the prefix.
_WHOLE_PASS = ("output_hidden_states", "output_attentions", "past_key_values", "use_cache")
# Among what was verified: evaluation stores whole rows.
WHOLE_ROWS = "whole rows in evaluation"
# Weights that change more often than this are not a frozen prefix.
MOST_CHANGES = 3


class _SwitchedOff(Exception):
    """The cache is of no use in this run; the text is the reason."""


@dataclass(frozen=True)
class _Passes:
    """What is checked and counted of passes in training, or in evaluation."""

    padding: PaddingCheck
    independence: IndependenceCheck
    shadow: ShadowCheck
    stats: CacheStats


class _Stored(NamedTuple):
    """Some samples that were stored: what the model was called with for them, and their keys."""

    kind: PassKind
    call: Call
    rows: Rows
    keys: list[bytes]
    depths: tuple[int, ...]


class PrefixCache:
    """Looks up what the frozen prefix computes for a sample, and computes it if it is not stored.

    Before each pass of training or evaluation the batch is split into samples. The key of a sample is 128 bits of all
    that the model is called with for it, unpadded, and of the autocast state. The value is its unpadded hidden states
    at the boundary, for each call of a stack in the pass, with the identity of the prefix (``Identity``). What is not
    stored is computed by a nested pass over those rows, which ends at the boundary; what is stored at a smaller depth
    passes only the new blocks. Then the pass starts at the boundary, with the hidden states that the prefix would
    compute: equal to the bit at fixed padding, and up to rounding for a sample at another width. If a stack is called
    several times in a pass, a batch that is not stored completely runs its prefix, and the results are stored.

    Nothing is served before checks on the real batch show that serving changes nothing (``IndependenceCheck``,
    ``PaddingCheck``, ``ShadowCheck``). Passes in training mode without gradients or in evaluation mode with them, with
    other active adapters than the trained ones, that ask for all hidden states or return keys and values to continue
    from, or with a user's hook on a block of the prefix, run the model as if there were no cache. If the length of an
    epoch is not known, nothing is stored before samples come again (``Repeats``). A failure of the cache ends the
    cache, never the run.

    Args:
        prefix: the cache becomes its ``server``.
        backend: knows the adapters' state.
        identity: of the prefix.
        tiers: in the order in which they are filled.
        journal: of the run.
        length: where the run stands.
        dtype: of stored states, as ``SafeConfig.cache_dtype``.
        kept: stores that outlive the run.

    Attributes:
        off: why it was switched off; None while it is on.
        distrusted: it was switched off because serving would have changed what training computes.
        counts_flops: count the FLOPs of nested passes. The first pass of each shape takes a third longer then.
        flops: of nested passes.
        filled: samples whose states were stored ahead of the run, until a pass finds some.
        all_filled: they are all samples of the run.
        written: bytes of all states stored so far.
    """

    def __init__(
        self,
        prefix: Prefix,
        backend: Backend,
        identity: Identity,
        tiers: Sequence[Tier],
        journal: Journal,
        length: RunLength,
        dtype: str | None = None,
        kept: KeptFolder | None = None,
    ) -> None:
        self.prefix = prefix
        self.backend = backend
        self.journal = journal
        self.length = length
        self._dtype, self._codec = dtype, CODECS[dtype]
        self.off: str | None = None
        self.distrusted = False
        self.counts_flops = False
        self.flops = 0
        self.filled = self.written = 0
        self.all_filled = False
        self.repeats = Repeats()
        self.store = Store(tiers, identity, journal, kept)
        self._identity = identity
        # A wrapper has no configuration of its own.
        self._configs = configs_of(prefix.model.modules())
        self._encoder_decoder = any(getattr(config, "is_encoder_decoder", False) for config in self._configs)
        self.rounding = Rounding(prefix, self._codec)
        self.kinds = PassKinds(prefix)
        self._training = self._passes(PaddingCheck(prefix, self.rounding, self._note_whole_rows))
        self._evaluation = self._passes(EvaluationPaddingCheck(prefix, self.rounding, lambda _: None))
        self._now = self._training
        self._sites: list[nn.Module] = []
        self._settings: list[tuple[Any, ...]] = []
        self._modules: list[nn.Module] = []
        self._forwards: list[Any] = []
        self._changes = 0
        self._autocasts: dict[Any, Any] = {}  # seen inside the model, by that outside
        self._flops_per_row: dict[Any, float] = {}
        self._logged = (0, 0)
        self._stored: _Stored | None = None  # to be verified in the next pass
        self._lasting: dict[str, Any] = {}
        self._kept_at: tuple[int, ...] | None = None
        self._evaluation_runs: str | None = None
        self._noted: set[str] = set()
        self._pass: OnePass | None = None
        self._undo = ExitStack()
        prefix.server = self

    def _passes(self, padding: PaddingCheck) -> _Passes:
        prefix, rounding = self.prefix, self.rounding
        independence = IndependenceCheck(prefix, padding, rounding, encoder_decoder=self._encoder_decoder)
        return _Passes(
            padding, independence, ShadowCheck(prefix, padding, rounding), CacheStats(device_of(prefix.model))
        )

    # For Safe.

    @property
    def padding(self) -> PaddingCheck:
        """What is known about padding in training."""
        return self._training.padding

    @property
    def stats(self) -> CacheStats:
        """What was found in training."""
        return self._training.stats

    @property
    def evaluation(self) -> CacheStats:
        """What was found in evaluation."""
        return self._evaluation.stats

    @property
    def _evaluates(self) -> bool:
        return self._now is self._evaluation

    @property
    def state_key(self) -> tuple[Any, ...]:
        """Changes whenever the cost of a training pass, without nested passes, may change."""
        verified = sum(len(kind.verified) for kind in self.kinds.known.values())
        return self.off is None, self._stores, self.padding.whole_rows, verified, *sorted(self.padding.known)

    @property
    def _stores(self) -> bool:
        return self.repeats.found or self.length.progress.epoch is not None or self.store.kept is not None

    def grown(self) -> None:
        """The prefix has changed. Entries of a shallower one are advanced at their next use."""
        self._undo.close()
        if self.off is not None:
            return
        blocks = self.prefix.blocks
        self._sites = [site for block in blocks for _, site in self.backend.sites(block)]
        self._settings = [self.backend.settings(site) for site in self._sites]
        self._modules = [module for block in blocks for module in block.modules()]
        self._forwards = [module.__dict__.get("forward") for module in self._modules]
        self._identity.watch(self._depths)
        self.all_filled = False
        self.stats.grown()
        for block in blocks:
            for context in self.backend.merges(block, self._merged):
                self._undo.enter_context(context)

    @contextmanager
    def weights_move(self) -> Iterator[None]:
        """Moving weights of the prefix within the block is no change of them."""
        self._identity.before_pass()
        yield
        self._identity.moved()

    @property
    def complete(self) -> bool:
        """Whether the states of all samples are held, as far as can be known: no pass has to run the prefix."""
        return self.off is None and (self.all_filled or self.stats.repeats(self.length.progress.epoch))

    @property
    def _depths(self) -> tuple[int, ...]:
        return tuple(self.prefix.depths.values())

    def logs(self) -> dict[str, float]:
        """Scalars: hit rate since the last call, MiB stored, seconds saved so far."""
        if self.off is not None or not self.stats.looked_up:
            return {}
        now = self.stats.hits + self.stats.advanced, self.stats.looked_up
        found, asked = (a - b for a, b in zip(now, self._logged, strict=True))
        self._logged = now
        logs = {f"safe/cache_{name}_mib": round(size / 2**20, 3) for name, size in self.store.nbytes.items()}
        if asked:
            logs["safe/cache_hit_rate"] = round(found / asked, 4)
        if self.stats.seconds_saved is not None:
            logs["safe/cache_seconds_saved"] = round(self.stats.seconds_saved, 3)
        return logs

    def switch_off(self, reason: str) -> None:
        """Run the prefix from now on; free everything stored."""
        if self.off is None:
            self.off = reason
            self.journal.write("cache_off", step=self.length.progress.step, reason=reason)
            note(f"Prefix cache off: {reason}.")
            self._free()

    def close(self) -> None:
        """Journal the statistics and free everything; a run that ends leaves nothing on disk."""
        if self.stats.looked_up or self.evaluation.looked_up:
            self.journal.write(
                "cache",
                step=self.length.progress.step,
                hits=self.stats.hits,
                advanced=self.stats.advanced,
                misses=self.stats.misses,
                nbytes=self.store.nbytes,
                damaged=self.store.damaged,
                flops=self.flops if self.counts_flops else None,
                seconds_saved=self.stats.seconds_saved,
                evaluation_hits=self.evaluation.hits + self.evaluation.advanced,
                evaluation_misses=self.evaluation.misses,
            )
        self._free()

    def state_dict(self) -> dict[str, Any]:
        """What was decided and verified, and which samples a full memory stores."""
        return {
            "off": self.off,
            "whole_rows": self.padding.whole_rows,
            "kinds": self.kinds.state_dict(),
            "memory": self.store.keys_in_memory(),
            "repeats": self.repeats.found,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        # Not which padding is known not to matter: the loss may be another one now.
        self.padding.whole_rows = state["whole_rows"]
        self.kinds.restored = dict(state["kinds"])
        self.repeats.found = state["repeats"]
        if state["off"] is not None:
            self.switch_off(state["off"])
        self.store.restrict_memory(state["memory"])

    def _free(self) -> None:
        self._undo.close()
        self._identity.stop_watching()
        self.prefix.server = self._pass = None
        self._save_kinds()
        self.store.close()

    def _note_whole_rows(self, reason: str) -> None:
        self.kinds.known.clear()
        self._training.shadow.current = None
        self.journal.write("cache_whole_rows", step=self.length.progress.step, reason=reason)
        note(
            f"Prefix cache: {reason}. Samples are stored as whole rows, and found again only at the same width; pad to "
            "a fixed length to find them always."
        )

    def _note_wait(self, reason: str) -> None:
        if reason not in self._noted:
            self._noted.add(reason)
            self.journal.write("cache_waits", step=self.length.progress.step, reason=reason)
            note(f"Prefix cache: {reason}.")

    def _merged(self) -> None:
        self.switch_off("an adapter of the frozen prefix is being merged into its base weights, which rounds them")

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """A failure switches the cache off; the prefix can always run."""
        with ExitStack() as modes:
            if self._evaluates:
                modes.enter_context(torch.inference_mode(False))  # what is made in inference mode cannot be written to
                modes.enter_context(torch.no_grad())
            try:
                yield
            except (Refused, NotBySample, _SwitchedOff) as error:
                self._give_up(str(error), distrusted=isinstance(error, Refused))
            except Exception as error:
                self._give_up(f"it failed ({getattr(error, 'fact', None) or error_line(error)})")

    def _give_up(self, reason: str, *, distrusted: bool = False) -> None:
        if not self._evaluates:
            self.distrusted |= distrusted
            self.switch_off(reason)
        elif self._evaluation_runs is None:
            self._evaluation_runs, self._pass = reason, None
            self.journal.write("cache_evaluation_off", step=self.length.progress.step, reason=reason)
            note(f"Prefix cache: evaluation runs the prefix: {reason}.")

    # For the prefix: what ``Server`` asks.

    def before_pass(self) -> None:
        """Notice weights that were written to since the last pass."""
        self._identity.before_pass()

    def after_pass(self) -> None:
        """What a pass does to its own weights is no change."""
        self._identity.after_pass()

    def look_up(self, call: Call) -> tuple[Starts, bool] | None:
        """At the boundary, for calls whose states are stored or were computed; None if the pass is not looked up."""
        self._pass = None
        self._now = self._training if self.prefix.model.training else self._evaluation
        starts: Starts = {}
        with self._guarded():
            runs = self._evaluates and self._evaluation_runs is not None
            if any(self._depths) and not runs and self._may_serve(call.inputs):
                starts = self._look_up(call)
        if (now := self._pass) is None:
            return None
        compares = self._now.padding.awaits_gradient or self._now.shadow.current is not None
        return starts, compares or now.filling is not None

    def admits(self, slot: Slot, hidden: Tensor) -> bool:
        """Only if what enters block 0 has the fingerprints of what the states were computed from."""
        with self._guarded():
            if self._is_expected(slot, hidden):
                return True
            if self._pass is not None:
                self._pass.admitted = False
        return False

    def entered(self, slot: Slot, hidden: Tensor) -> None:
        """Keep it for its fingerprints, if the states of this pass are to be stored. Do not compare other inputs."""
        with self._guarded():
            if self._now.shadow.current is not None and not self._is_expected(slot, hidden):
                self._now.shadow.current = None
        if self._pass is not None and self._pass.filling is not None:
            self._pass.filling.entered[slot] = hidden

    @torch.compiler.disable
    def at_boundary(self, slot: Slot, hidden: Tensor) -> None:
        """Compare or keep the states."""
        with self._guarded():
            self._now.padding.watch_boundary(slot, hidden)
            self._now.shadow.compare_states(slot, hidden.detach())
            if self._pass is not None and self._pass.filling is not None:
                self._pass.filling.boundary[slot] = hidden.detach()

    def finished(self, output: Any, calls: Mapping[str, int]) -> None:
        """Complete the comparison, and store what this pass computed."""
        now, self._pass = self._pass, None
        if now is None:
            return
        with self._guarded():
            if now.served:
                self._now.padding.watch_outputs(output, now.rows)
            seen = {path: calls.get(path, 0) for path, depth in self.prefix.depths.items() if depth}
            if output is not None and not now.kind.has_calls(seen):
                self._now.shadow.current = None
            self._now.shadow.finished(output)
            now.kind.returned |= output is not None and not now.served
            named = isinstance(output, dict) and "labels" in now.rows.inputs
            if self._evaluates and not now.served and _returns_keys(output) and not named:
                now.kind.continues = True
                self._note_wait(
                    "evaluation that returns keys and values runs the prefix; pass use_cache=False if you do not "
                    "continue from them"
                )
            if now.filling is not None and now.kind.layouts:
                everyone = range(now.rows.count)
                self._write(now, everyone, now.filling.boundary, now.origins(everyone, now.filling.entered))
            if not now.admitted:
                now.hits = now.advanced = now.work = 0
            if self.filled and now.keys and now.reads and not self._evaluates:
                if not (now.hits or now.advanced) and now.kind.verified:
                    note(
                        f"Filling the prefix cache was of no use: none of its {self.filled:,} samples is in this "
                        "batch. The run calls the model with other inputs than the collator returns."
                    )
                self.filled = 0
            if now.keys:
                misses = now.rows.count - now.hits - now.advanced
                self._now.stats.count(now.hits, now.advanced, misses, now.work, packed=now.rows.is_packed)
            if not now.admitted or not now.kind.layouts:
                self._now.stats.since_hit = 0  # the samples may come again
            if not self._evaluates:
                self._judge()
            self._save_kinds()

    def bypassed(self) -> None:
        """Note it once."""
        self._note_wait(
            "training calls a part of the model, and its inputs are not looked up; pass the module that is called to "
            "Safe"
        )

    # For filling.

    def fill(self, call: Call) -> tuple[int, int]:
        """Store the states of a batch that is not trained on; returns the samples that were stored, and new ones."""
        self._now = self._training
        with self._guarded(), torch.no_grad():
            rows = samples_in(call.inputs, encoder_decoder=self._encoder_decoder, whole=self._now.padding.whole_rows)
            self._follow_weights(call, rows)
            self._verify_stored()
            rows, kind, _, fresh = self._examined(call, rows, fills=True)
            if not kind.layouts:
                raise _SwitchedOff("only a training pass shows how often its stacks are called")
            now = OnePass(kind, rows, self._keys(kind, rows), ahead=True)
            depths, groups, entries = self._grouped(now, reads=True)
            found = groups.pop(depths, [])
            origins = {row: entry.origin for row, entry in entries.items()}
            self._completed(now, call, depths, groups, entries, origins, fresh if not found else None)
            return len(found), rows.count - len(found)
        return 0, 0

    # One training pass.

    def _may_serve(self, inputs: Mapping[str, Any]) -> bool:
        asked = [inputs.get(name) for name in _WHOLE_PASS]
        asked += [getattr(config, name, False) for config in self._configs for name in _WHOLE_PASS[:2]]
        if any(value is not None and value is not False for value in asked):
            if self._evaluates:  # such as generation
                return False
            self._note_wait(f"passes that ask for one of {', '.join(_WHOLE_PASS)} run the prefix")
            return False
        now = (module.__dict__.get("forward") for module in self._modules)
        if not all(forward is before for forward, before in zip(now, self._forwards, strict=True)):
            self._note_wait("the forward of a module in the frozen prefix was replaced, so such passes run the prefix")
            return False
        if (reader := read_by(self._modules)) is not None:
            self._note_wait(f"a hook of yours reads {reader} in the frozen prefix, so passes with it run the prefix")
            return False
        if [self.backend.settings(site) for site in self._sites] != self._settings:
            self._note_wait(
                "passes in which adapters of the frozen prefix are off, merged, others or scaled differently run it"
            )
            return False
        return True

    def _look_up(self, call: Call) -> Starts:
        if self._evaluates and self._identity.changed():
            return {}  # an average of weights may be in their place, for this evaluation only
        rows = samples_in(call.inputs, encoder_decoder=self._encoder_decoder, whole=self._now.padding.whole_rows)
        self._follow_weights(call, rows)
        if not self._stores and not self._evaluates:
            with self._now.stats.timed(self._now.stats.write, rows.count):
                repeated = self.repeats.see(rows.keys())
            if not repeated:
                self._now.stats.count(0, 0, rows.count)
                self._judge()
                return {}
            self._now.stats.since_hit = 0
        self._verify_stored()
        rows, kind, trusted, fresh = self._examined(call, rows)
        self._pass = OnePass(kind, rows)
        if not kind.layouts:
            return {}  # this pass shows how often its stacks are called
        if self._evaluates and kind.continues:
            return {}
        self._pass.keys = self._keys(kind, rows)
        if self._evaluates and not (kind.returned or kind.inherited):
            self._pass.filling = Computed({}, {}, {})  # the model's own pass shows what it returns
            return {}
        return self._served(self._pass, call, trusted, fresh)

    def _examined(self, call: Call, rows: Rows, *, fills: bool = False) -> tuple[Rows, PassKind, bool, Computed | None]:
        """Check the kind of a pass if it is new.

        Returns:
            Its samples, its kind, whether stored states can be used, and what was computed meanwhile.
        """
        ambient = autocast_now(self._now.stats.device)
        # Hosts apply autocast around the call or inside it. Which one applies inside is known after the first pass.
        self.prefix.autocast = self._autocasts.get(ambient, self.prefix.autocast)
        padding = self._now.padding
        while True:
            whole = padding.whole_rows
            kind = self.kinds.of(rows, ambient, whole_rows=whole)
            with self._counted():
                fresh = self._now.independence.examine(kind, rows, call, self._below(kind, rows))
                stored = (
                    partial(kind.starts, fresh, self.prefix.depths) if fills else partial(self._all_stored, kind, rows)
                )
                trusted = padding.trusts(kind, rows, call, stored, without_gradient=fills)
            if padding.whole_rows is whole:
                break
            rows = samples_in(call.inputs, encoder_decoder=self._encoder_decoder, whole=True)
        self.prefix.autocast = self._autocasts.setdefault(ambient, self.prefix.autocast)
        return rows, kind, trusted, fresh

    def _follow_weights(self, call: Call, rows: Rows) -> None:
        """Notice changed weights, and open the stores of states that outlive the run when the prefix is another one."""
        if self._identity.changed():
            self._hash_again()
        kept, depths = self.store.kept, self._depths
        if kept is None or self._kept_at == depths:
            return
        if self._kept_at is None and (read := self.prefix.read_before_blocks(call, rows.inputs)) is not None:
            self._identity.cover_entering(read)
        self._kept_at = depths
        if (reason := self._identity.why_private(depths)) is not None:
            self.journal.write("cache_not_kept", step=self.length.progress.step, reason=reason)
            self.store.not_kept = reason
            if not kept.stores:
                note(f"States are not kept: {reason}.")
            kept.leave()
        else:
            try:
                kept.open(self._identity, list(self.prefix.depths), depths)
            except (OSError, ConfigError) as error:
                self.store.kept = None
                fix = error.fix if isinstance(error, ConfigError) else "Give another folder: SafeConfig(cache_dir=...)."
                warn(f"States cannot be kept in {kept.home} ({getattr(error, 'fact', error)}).", fix=fix)
        self.kinds.kept = kept.stores[0].kinds if kept.stores else {}
        if self.kinds.kept.get(WHOLE_ROWS) is True:  # outputs have positions, or an earlier head read padding
            self._evaluation.padding.whole_rows = True
        if kept.exact is not None:
            self.journal.write("cache_kept", step=self.length.progress.step, samples=kept.exact.samples)
            note(f"Kept states: {kept.exact.samples:,} samples found in {kept.exact.folder}. New ones are added.")

    def _save_kinds(self) -> None:
        for store in self.store.kept.stores[:1] if self.store.kept is not None else ():
            lasting = self.kinds.lasting()
            if self._evaluation.padding.whole_rows:
                lasting[WHOLE_ROWS] = True
            if lasting != self._lasting:
                self._lasting = lasting
                store.save_kinds(lasting)

    def _all_stored(self, kind: PassKind, rows: Rows) -> Starts:
        """Where a pass starts if all its samples are stored at the full depth; else empty."""
        depths = tuple(kind.depths(self.prefix.depths).values())
        entries = self.store.read(self._keys(kind, rows), depths, kind.slots)
        found = {row: entry for row, entry in enumerate(entries) if entry is not None and entry.depths == depths}
        return self._assembled(kind, rows, range(rows.count), depths, found) if len(found) == rows.count else {}

    def _keys(self, kind: PassKind, rows: Rows) -> list[bytes]:
        # Of its own in evaluation, whose other widths would round what training finds again.
        passes = "evaluation" if self._evaluates else "training"
        salt = f"{passes} {self.prefix.autocast} {self._now.padding.whole_rows} {self._dtype} {kind.slots}"
        return rows.keys(salt, flags=kind.flags_matter)

    def _below(self, kind: PassKind, rows: Rows) -> Callable[[Sequence[int]], Starts]:
        """Where the first passes of a prefix that has grown start: at what the shallower one has stored of all rows."""
        below = kind.shallower
        if kind.layouts or below is None or not below.layouts or below.several_calls or below.calls != kind.calls:
            return lambda _: {}
        if not self._now.padding.is_harmless(below, rows):
            return lambda _: {}
        entries = self.store.read(self._keys(below, rows), tuple(kind.depths(self.prefix.depths).values()), below.slots)
        depths = {entry.depths if entry is not None else () for entry in entries}
        if len(depths) > 1 or not any(next(iter(depths))):
            return lambda _: {}
        at_depth = next(iter(depths))
        found = {row: entry for row, entry in enumerate(entries) if entry is not None}
        return lambda at: self._assembled(below, rows, at, at_depth, found)

    def _assembled(
        self,
        kind: PassKind,
        rows: Rows,
        at: Sequence[int],
        depths: tuple[int, ...],
        entries: Mapping[int, Entry],
        computed: Sequence[tuple[Sequence[int], Mapping[Slot, Tensor]]] = (),
    ) -> Starts:
        by_slot = dict(zip(kind.slots, depths, strict=True))
        return assemble(kind.layouts, by_slot, entries, computed, rows, at, self._now.stats.device, self._codec)

    def _served(self, now: OnePass, call: Call, trusted: bool, fresh: Computed | None) -> Starts:
        """Where the pass starts; empty if it runs the prefix."""
        kind, rows = now.kind, now.rows
        width = max(rows.width(0), 1)
        with self._now.stats.timed(self._now.stats.read, rows.count * width):
            # While it is not known whether anything reads padding, all rows are computed, with their padding.
            now.reads = trusted
            depths, groups, entries = self._grouped(now, reads=trusted)
            found, missing = groups.pop(depths, []), groups.get((0,) * len(depths), [])
        now.hits, now.advanced = len(found), rows.count - len(found) - len(missing)
        if kind.several_calls and groups:
            now.filling = Computed({}, {}, {})
            return {}
        origins = {row: entry.origin for row, entry in entries.items()}
        stored = {row: origins[row] for row in found}
        advanced = {row: origin for row, origin in origins.items() if row not in stored}
        sources = now.sources(stored, advanced)
        sees = self.prefix.sees_entries or kind.inherited
        if not missing and not self._now.padding.whole_rows and not (kind.shows_width and sees):
            sources = replace(sources, names=sources.names | {f"{rows.width(0)} and {rows.width(1)} wide"})
        # Before memory puts the advanced states in the place of these.
        below = {} if kind.may_start(sources) else self._from_below(kind, rows, groups, entries)
        computed = self._completed(now, call, depths, groups, entries, origins, fresh)
        if computed is None:
            return {}
        with self._now.stats.timed(self._now.stats.read, 0) if not groups else nullcontext():
            at_depth = {row: entries[row] for row in found}
            starts = self._assembled(kind, rows, range(rows.count), depths, at_depth, computed)
        if not starts:
            return {}
        now.expect(origins)
        with self._counted():
            if sources.names <= kind.verified and (new := kind.new_widths(sources)):
                # Compare one or two rows instead of the whole batch, so that the pass can be served.
                at = [
                    row for name in new for row in kind.showing(name, advanced if BELOW in name else stored, now.width)
                ]
                if self._now.independence.verify_rows(rows, call, sorted(set(at)), kind, starts, now.expected):
                    kind.verify(sources)
            if not self._now.shadow.allows(kind, sources, rows, call, starts):
                return below
        skipped = len(found) * sum(depths) + sum(len(group) * sum(of) for of, group in groups.items())
        now.served, now.work = True, width * skipped
        return starts

    def _from_below(
        self, kind: PassKind, rows: Rows, groups: Mapping[tuple[int, ...], list[int]], entries: Mapping[int, Entry]
    ) -> Starts:
        """Where a pass starts that is to be compared: at the boundary of the shallower prefix, if that was verified."""
        below, depths = kind.shallower, next(iter(groups), ())
        if below is None or len(entries) < rows.count or len(groups) != 1 or len(groups[depths]) < rows.count:
            return {}
        if below.calls != kind.calls or not below.layouts or not below.verified >= {"computed", "stored", "moved"}:
            return {}
        return self._assembled(below, rows, range(rows.count), depths, entries)

    def _grouped(
        self, now: OnePass, *, reads: bool
    ) -> tuple[tuple[int, ...], dict[tuple[int, ...], list[int]], dict[int, Entry]]:
        """The depths by call, the rows by the depths of their stored states, and these."""
        depths = tuple(now.kind.depths(self.prefix.depths).values())
        read = self.store.read(now.keys, depths, now.kind.slots) if reads else []
        entries = {row: entry for row, entry in enumerate(read) if entry is not None}
        groups: dict[tuple[int, ...], list[int]] = {}
        for row in range(now.rows.count):
            groups.setdefault(entries[row].depths if row in entries else (0,) * len(depths), []).append(row)
        return depths, groups, entries

    def _completed(
        self,
        now: OnePass,
        call: Call,
        depths: tuple[int, ...],
        groups: Mapping[tuple[int, ...], list[int]],
        entries: Mapping[int, Entry],
        origins: dict[int, Origin],
        fresh: Computed | None,
    ) -> list[tuple[list[int], dict[Slot, Tensor]]] | None:
        """Compute and store what is missing, in groups of equal depth; None if it is of no use in this pass."""
        computed: list[tuple[list[int], dict[Slot, Tensor]]] = []
        autocast = self.prefix.autocast
        for depth, group in sorted(groups.items()):
            lower = {} if any(depth) or now.kind.several_calls else self.store.lower
            states = fresh if len(group) == now.rows.count and not lower else None
            states = states or self._compute(now, call, group, depth, entries, lower)
            layouts = now.kind.layouts.items()
            keeps_width = all(
                self._now.padding.keeps_width(one, now.rows, states.boundary[slot], group) for slot, one in layouts
            )
            if self.prefix.autocast != autocast or not keeps_width:
                return None
            if (self.store.keeps or now.ahead) and now.kind.own_code is None and not any(depth):
                with self._counted():
                    self._now.independence.compare_alone(now.rows, call, now.kind, states, group)
                if "stored" not in now.kind.verified:
                    self._stored = self._some(now, call, group[:2], depths)
            computed.append((group, states.boundary))
            here = now.origins(group, states.entered)
            for place, row in enumerate(group):
                # An advanced entry is valid while what it was computed from enters. Its new blocks ran in this batch.
                here[place] = here[place]._replace(fingerprint=origins.setdefault(row, here[place]).fingerprint)
            self._write(now, group, states.boundary, here)
            if states.lower:
                by_slot = {slot: lower.get(slot[0], 0) for slot in now.kind.slots}
                self.store.put_lower(self._entries(now, group, tuple(by_slot.values()), states.lower, here))
        return computed

    def _some(self, now: OnePass, call: Call, at: Sequence[int], depths: tuple[int, ...]) -> _Stored:
        whole, inputs = self._now.padding.whole_rows, now.rows.take(at)
        rows = samples_in(inputs, encoder_decoder=self._encoder_decoder, whole=whole)
        return _Stored(now.kind, replace(call, inputs={}), rows, [now.keys[row] for row in at], depths)

    def _verify_stored(self) -> None:
        """Compare what was stored of some samples in an earlier pass with what the prefix computes for them now.

        So a later run, which starts from stored states only, need not run its prefix to compare them.
        """
        then, self._stored = self._stored, None
        if then is None or tuple(then.kind.depths(self.prefix.depths).values()) != then.depths:
            return
        entries = self.store.read(then.keys, then.depths, then.kind.slots)
        with self._counted(), traceless(self.prefix.modules):
            own = self.prefix.compute(then.call, then.rows.inputs, {}, then.kind.layouts)
        if own is None or not self._is_read(entries, then.depths):
            return
        now, everyone = OnePass(then.kind, then.rows), range(then.rows.count)
        now.expect({row: entry.origin for row, entry in enumerate(entries)})
        for slot, numbers in now.expected.items():
            here = fingerprints(then.kind.entry_layouts[slot], own.entered[slot], then.rows, everyone).cpu()
            if not self.rounding.same_fingerprints(here, numbers):
                return  # embeddings were written to, or a hook on them has begun
        layouts, slots = then.kind.layouts, then.kind.slots
        computed = split(layouts, slots, own.boundary, then.rows, everyone, self._codec)
        for entry, pieces in zip(entries, computed, strict=True):
            for slot, stored, piece in zip(slots, entry.states, pieces, strict=True):
                if stored is None or piece is None:
                    continue
                both = (self._codec.decode(one, layouts[slot].dtype) for one in (stored, piece))
                if not self.rounding.same_states(*both):
                    raise Refused("what is stored of a sample is not what the prefix computes for it later")
        then.kind.verified |= {"stored", "moved"}

    @staticmethod
    def _is_read(entries: Sequence[Entry | None], depths: tuple[int, ...]) -> TypeGuard[Sequence[Entry]]:
        return all(entry is not None and entry.depths == depths for entry in entries)

    def _compute(
        self,
        now: OnePass,
        call: Call,
        group: list[int],
        depths: tuple[int, ...],
        entries: Mapping[int, Entry],
        lower: Mapping[str, int],
    ) -> Computed:
        """Run some rows to the boundary, from the states of their entries."""
        inputs = now.rows.take(group)
        starts = self._assembled(now.kind, now.rows, group, depths, entries)
        shapes = tuple((name, v.shape[1:]) for name, v in sorted(inputs.items()) if isinstance(v, Tensor) and v.ndim)
        key = (depths, self._depths, shapes)
        work = len(group) * max(now.rows.width(0), 1) * (sum(self._depths) - sum(depths))
        # A forward pass that draws random numbers below the prefix must draw them once.
        undo = traceless(self.prefix.modules) if now.kind.writes else keep_random_state()
        counts = self.counts_flops and key not in self._flops_per_row
        with undo, CountFlops() if counts else self._now.stats.timed(self._now.stats.compute, work) as count:
            states = self.prefix.compute(call, inputs, starts, now.kind.layouts, lower)
        if count is not None:
            self._flops_per_row[key] = count.total / len(group)
        if not self._evaluates:
            self.flops += round(self._flops_per_row.get(key, 0) * len(group))
        if states is None:
            raise _SwitchedOff("a training pass does not reach the boundary of every stack")
        return states

    def _write(
        self, now: OnePass, group: Sequence[int], states: Mapping[Slot, Tensor], origins: Sequence[Origin]
    ) -> None:
        progress, kind = self.length.progress, now.kind
        last = progress.epoch is not None and progress.remaining <= (0 if self._evaluates else progress.epoch)
        if last and not now.ahead and not self.store.keeps:
            return  # no sample comes again
        with self._now.stats.timed(self._now.stats.write, len(group)):
            items = self._entries(now, group, tuple(kind.depths(self.prefix.depths).values()), states, origins)
            nbytes = sum(entry.nbytes for _, entry in items)
            if not self.written and progress.epoch and self.store.keeps and not (now.ahead or self._evaluates):
                self.store.check_size(progress.epoch, round(nbytes / len(items) * progress.epoch))
            self.written += nbytes
            reason = self.store.put(items, progress.step)
        if reason is not None:
            raise _SwitchedOff(reason)

    def _entries(
        self,
        now: OnePass,
        group: Sequence[int],
        depths: tuple[int, ...],
        states: Mapping[Slot, Tensor],
        origins: Sequence[Origin],
    ) -> list[tuple[bytes, Entry]]:
        """What is stored of the rows of ``group``, by key."""
        identity = self.store.identity_of(depths, now.kind.slots)
        pieces = split(now.kind.layouts, now.kind.slots, states, now.rows, group, self._codec)
        return [
            (now.keys[row], Entry(identity, depths, piece, origin))
            for row, piece, origin in zip(group, pieces, origins, strict=True)
        ]

    def _is_expected(self, slot: Slot, hidden: Tensor) -> bool:
        if captures_outputs():
            self._note_wait(f"the model records what the blocks of {slot[0]} return, so such calls run the prefix")
            return False
        now = self._pass
        if now is None or slot not in now.expected:
            return True
        layout, count = now.kind.entry_layouts[slot], now.rows.count
        if not self._now.padding.keeps_width(layout, now.rows, hidden):
            return False
        if layout.packed or hidden.shape[layout.dimension] == layout.rows * count:
            entered = fingerprints(layout, hidden, now.rows, range(count)).cpu()
            if self.rounding.same_fingerprints(entered, now.expected[slot]):
                return True
        self._note_wait(
            "what enters the frozen prefix for a sample has changed (embeddings that were written to, a hook on them, "
            "noise that began later), so such passes run the prefix"
        )
        return False

    # Bookkeeping.

    def _judge(self) -> None:
        progress = self.length.progress
        reason = self._now.stats.verdict(
            sum(self._depths), progress.epoch, progress.remaining + self._now.stats.looked_up
        )
        if reason is not None and self._now.padding.awaited:
            reason = "the loss does not depend on the prefix, so nothing shows whether padding is read"
        if reason is not None:
            raise _SwitchedOff(reason)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with CountFlops() if self.counts_flops and not self._evaluates else nullcontext() as count:
            yield
        self.flops += count.total if count is not None else 0

    def _hash_again(self) -> None:
        before = self._identity.of(self._depths)
        self._identity.forget()
        self._identity.watch(self._depths)
        if self._identity.of(self._depths) != before:
            self._kept_at = self._stored = None
            self._now.stats.since_hit = 0  # all samples have to be stored again
            self._changes += 1
            if self._changes > MOST_CHANGES:
                raise _SwitchedOff("the weights of the frozen prefix keep changing")


def _returns_keys(output: Any) -> bool:
    """Whether there is a key-value cache in a model's output."""
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    return any(hasattr(part, "get_seq_length") for part in parts)
