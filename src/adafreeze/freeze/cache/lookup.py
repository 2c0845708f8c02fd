"""PrefixCache: from the second time on that a sample comes, its training step starts above the frozen prefix."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...costs.flops import CountFlops
from ...errors import AdafreezeError, note
from ...journal import Journal
from ...model.backends import Backend
from ...model.blocks import device_of
from ...model.rows import NotBySample, Rows
from ..prefix import Prefix, Start, autocast_now
from .batches import Batches, Computed
from .checks import Examiner
from .identity import Identity
from .store import Store
from .tiers import Entry, Tier
from .worth import Repeats, Worth

__all__ = ["PrefixCache", "Progress"]

# Passes that ask for more than the last hidden states run the prefix.
_WHOLE_PASS = ("output_hidden_states", "output_attentions", "past_key_values", "use_cache")
# Weights that change more often than this are no frozen prefix.
MOST_CHANGES = 3


class Progress(NamedTuple):
    """Where the run stands: optimizer steps done, samples still to come, samples of an epoch (None: not known)."""

    step: int
    remaining: int
    epoch: int | None


class PrefixCache:
    """Looks up what the frozen prefix makes of a sample, and computes it where it is not held.

    Before each training pass the batch is taken apart into samples. Key of a sample: 128 bits of its unpadded inputs
    and of the autocast state. Value: its unpadded hidden states at the boundary, with the identity of the prefix
    that gave them (``Identity``). What is not held is computed by a nested pass over those rows
    alone, which ends at the boundary; what is held at a smaller depth goes through the new blocks alone. Then the
    training pass starts at the boundary, with the hidden states that running the prefix would give: to the bit at
    fixed padding, up to rounding where a sample comes at another width.

    Passes without gradients, in evaluation mode, with other adapters on than the trained ones, or that ask for all
    hidden states, run the model as if there were no cache. The first passes are watched before anything is looked
    up (``Examiner``). Where the length of an epoch is not known, no states are held before samples are
    seen to come again (``Repeats``). A failure of the cache ends the cache, and never the run.

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
        self.counts_flops = False
        self.flops = 0
        self.worth = Worth(device_of(prefix.model))
        self.repeats = Repeats()
        self._stacks = prefix.stacks
        self.store = Store(tiers, identity, journal)
        self._identity = identity
        self._encoder_decoder = bool(getattr(_config(prefix.model), "is_encoder_decoder", False))
        sides = {stack.path: int(self._encoder_decoder and n > 0) for n, stack in enumerate(prefix.stacks)}
        self.examiner = Examiner(prefix, sides, self._note_whole_rows)
        self._batches = Batches(prefix.stacks, self.examiner.layouts, self.worth.device, store_dtype)
        self._names = _positional_names(prefix.model)
        self._depths: tuple[int, ...] = (0,) * len(prefix.stacks)
        self._sites: list[nn.Module] = []
        self._settings: list[tuple[Any, ...]] = []
        self._changes = 0
        self._autocasts: dict[Any, Any] = {}
        self._flops_per_row: dict[Any, float] = {}
        self._asked = (0, 0)
        self._undo = ExitStack()
        prefix.look_up = self.look_up

    # What Safe calls.

    @property
    def state_key(self) -> tuple[Any, ...]:
        """Changes whenever the cost of a training pass, nested passes left out, may change."""
        return self.off is None, self._holds, self.examiner.whole_rows, *sorted(self.examiner.padding_known)

    @property
    def _holds(self) -> bool:
        return self.repeats.found or self.progress().epoch is not None

    def grown(self) -> None:
        """The prefix has changed; what is held is advanced at its next use."""
        self._undo.close()
        self._depths = tuple(self.prefix.depths[stack.path] for stack in self._stacks)
        self.examiner.passed = False
        if self.off is not None:
            return
        pairs = zip(self._stacks, self._depths, strict=True)
        blocks = [block for stack, depth in pairs for block in stack.blocks[:depth]]
        self._sites = [site for block in blocks for _, site in self.backend.sites(block)]
        self._settings = [self.backend.settings(site) for site in self._sites]
        self._identity.watch(self._depths)
        for block in blocks:
            for context in self.backend.merges(block, self._merged):
                self._undo.enter_context(context)

    def logs(self) -> dict[str, float]:
        """Scalars: hit rate since the last call, MiB held, seconds saved so far."""
        if self.off is not None or not self.worth.looked_up:
            return {}
        now = self.worth.hits + self.worth.advanced, self.worth.looked_up
        found, asked = (a - b for a, b in zip(now, self._asked, strict=True))
        self._asked = now
        logs = {f"safe/cache_{name}_mib": round(size / 2**20, 3) for name, size in self.store.nbytes.items()}
        if asked:
            logs["safe/cache_hit_rate"] = round(found / asked, 4)
        if self.worth.seconds_saved is not None:
            logs["safe/cache_seconds_saved"] = round(self.worth.seconds_saved, 3)
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
        if self.worth.looked_up:
            self.journal.write(
                "cache",
                step=self.progress().step,
                hits=self.worth.hits,
                advanced=self.worth.advanced,
                misses=self.worth.misses,
                nbytes=self.store.nbytes,
                damaged=self.store.damaged,
                flops=self.flops if self.counts_flops else None,
                seconds_saved=self.worth.seconds_saved,
            )
        self._give_back()

    def state_dict(self) -> dict[str, Any]:
        """What was decided, and which samples a full memory holds."""
        return {
            "off": self.off,
            "whole_rows": self.examiner.whole_rows,
            "padding_known": sorted(self.examiner.padding_known),
            "held": self.store.held_in_memory(),
            "repeats": self.repeats.found,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` wrote."""
        self.examiner.whole_rows, self.examiner.padding_known = state["whole_rows"], set(state["padding_known"])
        self.repeats.found = state.get("repeats", False)
        if state["off"] is not None:
            self.switch_off(state["off"])
        self.store.hold_in_memory_only(state["held"])

    def _give_back(self) -> None:
        self._undo.close()
        self.prefix.look_up = self.prefix.watch_boundary = None
        self.store.close()

    def _note_whole_rows(self) -> None:
        self.journal.write("cache_whole_rows", step=self.progress().step)
        note(
            "Prefix cache: padding is read above the prefix (labels on it, a mean over all positions), or changes what "
            "the prefix gives (left padding with absolute positions), or the model pads its inputs to another width. "
            "Whole rows are held: a sample is found again at the width it came with."
        )

    def _merged(self) -> None:
        self.switch_off("an adapter of the frozen prefix is being merged into its base weights, which rounds them")

    # What the prefix asks.

    def look_up(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Start]:
        """Where the pass with these arguments starts, by stack path; empty: at the embeddings."""
        self.prefix.watch_boundary = None
        try:
            if self.off is None and any(self._depths) and self._may_serve(inputs := self._named(args, kwargs)):
                return self._look_up(inputs)
        except NotBySample as error:
            self.switch_off(str(error))
        except Exception as error:  # whatever it is: the prefix can always be run
            fact = error.fact if isinstance(error, AdafreezeError) else f"{type(error).__name__}: {error}"
            self.switch_off(f"it failed ({fact})")
        return {}

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if len(args) > len(self._names):
            raise NotBySample("the model is called with positional arguments that have no names")
        return {**dict(zip(self._names, args, strict=False)), **kwargs}

    def _may_serve(self, inputs: Mapping[str, Any]) -> bool:
        config = _config(self.prefix.model)
        asked = [inputs.get(name) for name in _WHOLE_PASS]
        if any(value is not None and value is not False for value in asked):
            return False
        if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
            return False
        return [self.backend.settings(site) for site in self._sites] == self._settings

    def _look_up(self, inputs: Mapping[str, Any]) -> Mapping[str, Start]:
        whole = self.examiner.whole_rows
        rows = Rows(inputs, encoder_decoder=self._encoder_decoder, whole=whole)
        if not self._holds:
            with self.worth.timed(self.worth.write, rows.count):
                repeated = self.repeats.see(rows.keys())
            if not repeated:
                self.worth.count(0, 0, rows.count)
                self._judge()
                return {}
            self.worth.since_hit = 0
        if self._identity.changed():
            self._hash_again()
        ambient = autocast_now(self.worth.device)
        if ambient not in self._autocasts:
            self.examiner.passed = False
        with self._counted():
            self.examiner.look(rows)
            trusted = self.examiner.refusal is None and self.examiner.trusts_padding(rows)
        if self.examiner.refusal is not None:
            self.switch_off(self.examiner.refusal)
        if self.off is not None:
            return {}
        # Hosts put autocast around the call or within it; which one a call is going to run under is seen by trying.
        self.prefix.autocast = self._autocasts.setdefault(ambient, self.prefix.autocast)
        if self.examiner.whole_rows is not whole:
            rows = Rows(inputs, encoder_decoder=self._encoder_decoder, whole=True)
        nothing = (0,) * len(self._depths)
        width = max(rows.width(0), 1)
        with self.worth.timed(self.worth.read, rows.count * width):
            keys = rows.keys(f"{self.prefix.autocast} {self.examiner.whole_rows} {self.store_dtype}")
            # While it is not known whether anything reads padding, all rows are computed, padding and all.
            entries: list[Entry | None] = [None] * rows.count
            if trusted:
                entries = self.store.read(keys, self._depths)
            groups: dict[tuple[int, ...], list[int]] = {}
            for row, entry in enumerate(entries):
                groups.setdefault(nothing if entry is None else entry.depths, []).append(row)
            found = groups.pop(self._depths, [])
            missing = len(groups.get(nothing, []))
        if not missing:
            with self._counted():
                if not self.examiner.keeps_width(rows):
                    return {}
        starts: Mapping[str, Start] = {}
        if not groups:
            with self.worth.timed(self.worth.read, 0):
                starts = self._batches.together(rows, range(rows.count), entries, self._depths)
        self.worth.count(len(found), rows.count - len(found) - missing, missing)
        self.worth.skipped_work += width * (
            len(found) * sum(self._depths) + sum(len(group) * sum(depths) for depths, group in groups.items())
        )
        if groups:
            starts = self._completed(rows, keys, entries, groups)
        self._judge()
        return starts

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with CountFlops() if self.counts_flops else nullcontext() as count:
            yield
        self.flops += count.total if count is not None else 0

    def _judge(self) -> None:
        progress = self.progress()
        reason = self.worth.verdict(sum(self._depths), progress.epoch, progress.remaining + self.worth.looked_up)
        if reason is not None:
            self.switch_off(reason)

    def _hash_again(self) -> None:
        before = self._identity.of(self._depths)
        self._identity.forget()
        self._identity.watch(self._depths)
        if self._identity.of(self._depths) != before:
            self._changes += 1
            if self._changes > MOST_CHANGES:
                self.switch_off("the weights of the frozen prefix keep changing")

    def _completed(
        self,
        rows: Rows,
        keys: list[bytes],
        entries: list[Entry | None],
        groups: Mapping[tuple[int, ...], list[int]],
    ) -> Mapping[str, Start]:
        """Compute what is missing, in groups of equal depth, and put it beside what was found."""
        computed: list[Computed] = []
        autocast = self.prefix.autocast
        for depths, group in sorted(groups.items()):  # from the embeddings first: they show how wide states are
            states = self._computed(rows, group, depths, [entries[row] for row in group])
            if states is None:
                self.switch_off("a training pass does not come to the boundary of every stack")
                return {}
            if self.prefix.autocast != autocast or not self.examiner.keeps_width(rows, states):
                return {}
            computed.append((group, states))
            self._write(rows, keys, group, states)
            for row in group:
                entries[row] = None
        if len(computed[0][0]) == rows.count:
            paths = {stack.path: depth for stack, depth in zip(self._stacks, self._depths, strict=True)}
            return {path: Start(paths[path], states) for path, states in computed[0][1].items()}
        return self._batches.together(rows, range(rows.count), entries, self._depths, computed)

    def _computed(
        self, rows: Rows, group: list[int], depths: tuple[int, ...], entries: list[Entry | None]
    ) -> dict[str, Tensor] | None:
        """The hidden states of some rows at the boundary, from what is held of them."""
        inputs = rows.take(group)
        starts = self._batches.together(rows, group, entries, depths) if any(depths) else {}
        shapes = tuple((name, v.shape[1:]) for name, v in sorted(inputs.items()) if isinstance(v, Tensor) and v.ndim)
        kind = (depths, self._depths, shapes)
        work = len(group) * max(rows.width(0), 1) * (sum(self._depths) - sum(depths))
        if kind in self._flops_per_row or not self.counts_flops:
            with self.worth.timed(self.worth.compute, work):
                states = self.prefix.compute(inputs, starts)
        else:
            with CountFlops() as count:
                states = self.prefix.compute(inputs, starts)
            self._flops_per_row[kind] = count.total / len(group)
        self.flops += round(self._flops_per_row.get(kind, 0) * len(group))
        return states

    def _write(self, rows: Rows, keys: list[bytes], group: list[int], states: Mapping[str, Tensor]) -> None:
        progress = self.progress()
        if progress.epoch is not None and progress.remaining <= progress.epoch:
            return  # in the last epoch no sample comes again
        with self.worth.timed(self.worth.write, len(group)):
            identity = self._identity.of(self._depths)
            pieces = self._batches.apart(rows, group, states)
            items = [(keys[row], Entry(identity, self._depths, one)) for row, one in zip(group, pieces, strict=True)]
            reason = self.store.hold(items, progress.step)
        if reason is not None:
            self.switch_off(reason)


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


def _positional_names(model: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds]
    if not names and hasattr(model, "get_base_model"):  # PEFT hands everything on to the model that it wraps
        return _positional_names(model.get_base_model())  # type: ignore[operator]
    return names
