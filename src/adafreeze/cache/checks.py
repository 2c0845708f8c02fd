"""Checks on the model itself, before its prefix is looked up in place of being run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from ..costs.flops import CountFlops
from ..freeze.prefix import Prefix, Start, Starts
from ..model.blocks import modules_outside
from ..model.calls import Call
from ..model.rows import Rows
from ..model.traces import stateful_forward, traceless, users_code
from .batches import Layout, Slot, find_layout
from .identity import HOSTS_SET

__all__ = ["SafetyCheck", "Situation"]

PADS_INSIDE = "the model pads its inputs to another width"

# Kinds of calls that a run may have before it is said that none will come again.
MOST_SITUATIONS = 32
# How often a stack is called in a pass may differ so often between passes of one kind.
MOST_COUNTS = 3
# The part of a run's FLOPs that looking again may cost.
SPOT_CHECKS = 0.002
# Numbers of an output that are compared at most: a sample of its rows, so that no second copy of all logits is held.
MOST_COMPARED, LEAST_ROWS = 2**16, 4

# Relative differences that rounding may make. Kernels for other shapes sum in another order: 1e-6 in float32 a block,
# more above it, and 1e-2 in the sixteen-bit types and under autocast to them.
OF_STATES, OF_OUTPUTS, COARSE = 2e-5, 1e-4, 5e-2
# What enters block 0 is mostly looked up in a table, and so the same to the bit: of its two numbers, in sixteen bits.
OF_MARKS_COARSE = 5e-3

# Position embeddings that depend on the length of a batch, and those that also depend on the batches before it.
BY_LENGTH, BY_HISTORY = "longrope", "dynamic"


@dataclass
class Situation:
    """One kind of training pass: what the result of serving it may depend on, but for the samples.

    Attributes:
        key: of the names, ranks and dtypes of the inputs, autocast, modules in training mode, flags and hooks of the
            modules in no block, and prefix depths.
        calls: how often each stack is called in such a pass.
        layouts: of each call of a stack, once the prefix was looked at.
        below: the last situation of this kind in a prefix that was less deep.
        entries: the same of what enters block 0, where samples can be told apart in it.
        verified: what was shown: that passes may start from states ``"computed"`` for them, and from ``"held"`` ones;
            where a sample was ``"moved"``: it was held in another batch or place; or ``"resized"``: at another width.
        fresh_entries: what entered block 0 with ``fresh``.
        fresh: hidden states of all rows of the pass at hand, where looking at the prefix has computed them.
        spot: passes between two looks, from the FLOPs counted at the first.
        passes: served since the last look.
        counts: how often ``calls`` turned out to be another number.
        widest: rows in which states that were held in narrower batches were shown to be the same.
        narrowest: rows in which states that were held in wider ones were.
    """

    key: str
    calls: dict[str, int]
    below: Situation | None = None
    layouts: dict[Slot, Layout] = field(default_factory=dict)
    entries: dict[Slot, Layout] = field(default_factory=dict)
    verified: set[str] = field(default_factory=set)
    fresh: dict[str, list[Tensor]] | None = None
    fresh_entries: dict[str, list[Tensor]] = field(default_factory=dict)
    spot: int = 0
    passes: int = 0
    counts: int = 0
    widest: int = 0
    narrowest: int = 0

    @property
    def several_calls(self) -> bool:
        """Whether some stack is called more than once in a pass."""
        return any(count > 1 for count in self.calls.values())


@dataclass
class _Look:
    """What a training pass is compared with while it runs the model's own code: the same pass, served.

    Attributes:
        situation: of the pass.
        kinds: of the states that are to be shown.
        starts: that it would have been served, until the pass has come to them.
        rows: of its batch.
        outputs: samples of all that the served pass returned; None where the states alone are in question.
        without_padding: it began with zeros in place of padding, as a pass from held states does.
        problem: what differs.
    """

    situation: Situation
    kinds: frozenset[str]
    starts: dict[str, list[Start | None]]
    rows: Rows
    outputs: list[tuple[str, Tensor]] | None
    without_padding: bool = False
    problem: str | None = None


class SafetyCheck:
    """Shows on the real batch that serving changes nothing, before anything is served; and again now and then.

    In a new situation the prefix is looked at: it is run on the whole batch and on its rows in other groups and another
    order, so that what depends on chance, on a row's place or on its company is seen, and how rows lie in its output.
    Then the whole pass is run as it would be served, without a graph and without a trace (``Prefix.shadow``), the
    training pass itself runs the model's own code, and all that the two return is compared. When held states are first
    used, they are compared with those of the model's own pass. The whole is done again at times that follow from
    counted FLOPs. The peak does not rise: the served pass is over, but for a sample of its outputs, when the graph is
    built.

    Attributes:
        shown: what an earlier process has shown of situations: verified kinds, and calls.
        whole_rows: padding matters, so it is content.
        padding_known: sides (0 the encoder's, 1 the decoder's) of which it is known whether their padding matters.
        refusal: why no pass may ever start at the boundary.
        flops: spent on looking.
        writes: the prefix, or what stands below it, writes to its modules, which a nested pass must not do.
        collect: called with all that ``watch`` is.
        rounds: states are held in fewer bits than they had.
    """

    def __init__(
        self, prefix: Prefix, sides: Mapping[str, int], on_whole_rows: Callable[[str], None], *, rounds: bool = False
    ) -> None:
        self.prefix = prefix
        self.rounds = rounds
        self.sides = sides
        self.on_whole_rows = on_whole_rows
        self.situations: dict[str, Situation] = {}
        self.shown: dict[str, tuple[Sequence[str], dict[str, int]]] = {}
        self.whole_rows = False
        self.padding_known: set[int] = set()
        self.refusal: str | None = None
        self.flops = 0
        self._calls: dict[str, dict[str, int]] = {}  # of a kind of pass, whatever the depths
        self._last: dict[str, Situation] = {}
        self._waiting: dict[tuple[str, int], int] = {}  # calls whose gradient is asked for, and the side of each
        self._widths: set[tuple[str, int, int]] = set()
        self.writes = False
        self._outside_of: list[nn.Module] = []
        self._outside_modules: list[nn.Module] = []
        self._beside_embeddings: list[nn.Module] = []
        self._flags: list[tuple[dict[str, Any], str]] = []
        self._rows: Rows | None = None
        self._look: _Look | None = None
        self.collect: Callable[[str, int, Tensor], None] | None = None

    # The situation of a pass.

    def situation(self, rows: Rows, ambient: Any) -> Situation:
        """Of a pass on these rows, in the prefix as it is now."""
        training = tuple(module.training for module in self.prefix.modules)
        depths = tuple(self.prefix.depths.values())
        switches = self._switches()
        outside = [module.training for module in self._outside_modules]
        kind = xxhash.xxh3_64_hexdigest(repr((rows.signature(), str(ambient), outside, switches)).encode())
        # A block that joins the prefix is in evaluation mode from then on: that is no other kind of pass.
        key = f"{kind} {self.whole_rows} {depths} {hash(training)}"
        if key not in self.situations:
            if len(self.situations) >= MOST_SITUATIONS:
                self.refusal = f"the model was called in {MOST_SITUATIONS} different ways"
            calls = {stack.path: 1 for stack in self.prefix.stacks} | self._calls.get(kind, {})
            verified, counted = self.shown.get(key, ((), {}))
            of_kind = f"{kind} {self.whole_rows}"
            below = self._last.get(of_kind)
            self.situations[key] = Situation(key, calls | counted, below, verified=set(verified))
            self._last[of_kind] = self.situations[key]
            if below is not None:
                below.below = None
                # What depends on the width of a batch (position embeddings) does so in the lowest block already.
                self.situations[key].widest, self.situations[key].narrowest = below.widest, below.narrowest
        return self.situations[key]

    def _switches(self) -> tuple[Any, ...]:
        """Flags, words and scales of the modules in no block, and how many hooks each has.

        Somebody's own code may begin to make another mask in mid-run, or a hook to change what enters the blocks beside
        the hidden states. Whole numbers count passes, and scales in that code may be annealed: both are left out.
        """
        if self._outside_of is not self.prefix.modules:
            self._outside_of = self.prefix.modules
            self._outside_modules = modules_outside(self.prefix.modules, self.prefix.stacks)
            # What a hook on embeddings changes is seen in what enters block 0, and until it is gone.
            self._beside_embeddings = [
                module
                for module in self._outside_modules
                if not any(isinstance(part, nn.Embedding) for part in module.modules())
            ]
            self._flags = []
            for module in self._outside_modules:
                kinds = {bool, str} if users_code([module]) is not None else {bool, str, float}
                content = module.__dict__
                plain = (name for name, v in content.items() if type(v) in kinds and not name.startswith("_"))
                self._flags += [(content, name) for name in plain if name not in HOSTS_SET]
        hooks = tuple(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self._beside_embeddings)
        return hooks, tuple(content.get(name) for content, name in self._flags)

    def slots(self, situation: Situation) -> list[Slot]:
        """All calls of all stacks in such a pass."""
        stacks = enumerate(self.prefix.stacks)
        return [(n, stack.path, call) for n, stack in stacks for call in range(situation.calls[stack.path])]

    def until(self, situation: Situation) -> dict[str, int]:
        """How often each stack comes to its boundary."""
        return {path: n for path, n in situation.calls.items() if n and self.prefix.depths[path]}

    # What the prefix makes of a batch, before anything of it is held.

    def examine(
        self, situation: Situation, rows: Rows, call: Call, held: Callable[[Sequence[int]], Starts] = lambda _: {}
    ) -> None:
        """Look at the prefix in a new situation; ``refusal`` says what was found.

        Args:
            situation: of the pass.
            rows: of its batch.
            call: as which the model is called with them.
            held: where a pass over these rows may start: what a prefix that was less deep gave, if all is held.
        """
        situation.fresh = None
        if situation.layouts:
            return
        if self.prefix.drops_layers:
            self.refusal = "a setting for layer drop leaves out blocks of the prefix by chance (set it to 0.0)"
            return
        rope = self._rope_types()
        if any(BY_HISTORY in one for one in rope):
            self.refusal = "position embeddings depend on the batches before (rope_type='dynamic')"
            return
        if BY_LENGTH in rope and not self.whole_rows:
            self._take_whole_rows("position embeddings depend on the length of the batch (rope_type='longrope')")
            return
        if (foreign := next((f for module in self.prefix.modules for f in stateful_forward(module)), None)) is not None:
            self.refusal = f"a forward was replaced by a {type(foreign).__name__}, which has a state of its own"
            return
        until = self.until(situation)
        if not until:
            return
        inside = {id(module): type(module).__name__ for block in self.prefix.blocks for module in block.modules()}
        names: list[str] = []

        def notice(module: nn.Module, name: str) -> None:
            self.writes = True
            if id(module) in inside:
                names.append(f"{inside[id(module)]}.{name}")

        with traceless(self.prefix.modules, notice):
            whole = self.prefix.compute(call, rows.inputs, held(range(rows.count)), until)
            if whole is None:
                if situation.counts:
                    self.refusal = "a training pass does not come to the boundary of every stack"
                return
            entered = self.prefix.entered
            problem = self._look_at_rows(situation, rows, call, held, whole, entered)
        if problem is None and names:
            problem = f"a block of the prefix writes to {names[0]} in each pass"
        if problem is not None:
            self.refusal = problem
            situation.layouts, situation.entries = {}, {}
            return
        if not situation.several_calls:
            situation.fresh, situation.fresh_entries = whole, entered
        self.keeps_width(situation, rows, call, whole)

    def _rope_types(self) -> set[str]:
        found = (getattr(module, "rope_type", None) for module in self.prefix.modules)
        return {str(one) for value in found for one in (value.values() if isinstance(value, dict) else [value])}

    def _look_at_rows(
        self,
        situation: Situation,
        rows: Rows,
        call: Call,
        held: Callable[[Sequence[int]], Starts],
        whole: Mapping[str, Sequence[Tensor]],
        entered: Mapping[str, Sequence[Tensor]],
    ) -> str | None:
        """Run some rows in another group, and find how they lie; returns what stands against taking them apart."""
        count = rows.count
        # A quarter of them, from last to first: each at another place and in other company. What only the others would
        # show is seen when held states are first compared with those of the model's own pass, which are of all rows.
        size = min(count - 1, max(2, -(-count // 4)))
        group = list(range(count - 1, -1, -(count // size)))[:size] if size else [0, 0]
        until = self.until(situation)
        try:
            part = self.prefix.compute(call, rows.take(group, rows.otherwise()), held(group), until)
        except Exception as error:
            return f"a pass on a part of the batch fails ({type(error).__name__}: {_first_line(error)})"
        entered_part = self.prefix.entered
        if part is None:
            return "a training pass on a part of the batch does not come to the boundary of every stack"
        again: Mapping[str, Sequence[Tensor]] | None = None
        for position, path, number in self.slots(situation):
            if path not in until:
                situation.layouts[position, path, number] = Layout(torch.float32)
                continue
            hidden, piece = whole[path][number], part[path][number]
            if not isinstance(hidden, Tensor):
                return f"the blocks of {path} hand on a {type(hidden).__name__} and no hidden states"
            layout = find_layout(hidden, piece, count, len(group))
            if layout is None:
                return f"the hidden states of {path}, {tuple(hidden.shape)}, are not so many rows of each sample"
            for interleaved in (False, True) if layout.rows > 1 else (False,):
                one = replace(layout, interleaved=interleaved)
                samples, taken = one.apart(hidden, count), one.apart(piece, len(group))
                if all(self._agree(samples[row], taken[place]) for place, row in enumerate(group)):
                    break
            else:
                again = again or self.prefix.compute(call, rows.inputs, held(range(count)), until)
                if again is None or not torch.equal(again[path][number], hidden):
                    return (
                        "the prefix gives a sample another output each time (NEFTune noise, or dropout behind the "
                        "embeddings that is a function and no module; BART and its relatives take "
                        "model.model.encoder.dropout = model.model.decoder.dropout = 0.0, or "
                        "from_pretrained(..., dropout=0.0))"
                    )
                return "what the prefix makes of a sample depends on its place in the batch, or on the others in it"
            side = self.sides[path]
            width = rows.width(side)
            plain = one.dimension == 0 and one.rows == 1 and hidden.ndim > 2 and hidden.shape[1] == width
            situation.layouts[position, path, number] = replace(
                one, by_position=plain and width > 0 and not self.whole_rows, side=side
            )
            enters = entered[path][number]
            entry = find_layout(enters, entered_part[path][number], count, len(group))
            if entry is not None:
                by_position = situation.layouts[position, path, number].by_position and enters.shape == hidden.shape
                situation.entries[position, path, number] = replace(
                    entry, interleaved=one.interleaved, by_position=by_position, side=side
                )
        return None

    def keeps_width(
        self, situation: Situation, rows: Rows, call: Call, states: Mapping[str, Sequence[Tensor]] | None = None
    ) -> bool:
        """Whether hidden states are as wide as these inputs; if not, whole rows are taken from now on.

        Some models pad inside, to a multiple of a window, and so at some widths only. Where what enters block 0 is as
        wide as what leaves the prefix, each pass sees it there (``as_wide``); else each width is looked at once. Where
        positions are not the second dimension, padding cannot be left out either.

        Args:
            situation: of the pass.
            rows: of a batch.
            call: as which the model is called with them.
            states: computed of some of them; None: those of the first are, at a width that was not seen before.
        """
        widths = situation.key, rows.width(0), rows.width(1)
        if self.whole_rows or widths in self._widths:
            return True
        if states is None:
            of = situation.entries
            if self.prefix.sees_entries and all(slot in of and of[slot].by_position for slot in situation.layouts):
                return True
            with traceless(self.prefix.modules):
                states = self.prefix.compute(call, rows.take([0]), {}, self.until(situation))
        for (_, path, number), layout in situation.layouts.items():
            width = widths[1 + layout.side]
            if states is None or path not in states or not width:
                continue
            moved = layout.by_position and states[path][number].shape[1] != width
            if moved:
                self._take_whole_rows(PADS_INSIDE)
                return False
            if not layout.by_position and rows.is_padded(layout.side):
                self._take_whole_rows("the hidden states of the prefix do not lie position by position")
                return False
        self._widths.add(widths)
        return True

    def keeps_states(
        self, situation: Situation, rows: Rows, call: Call, row: int, states: Sequence[Tensor | None]
    ) -> bool:
        """Whether a sample that was held at another width has the same states in this batch; if not, ``refusal``.

        Position embeddings may be others from some length of the batch on. One sample is computed, in batches that are
        wider or narrower by a quarter than all before.
        """
        with traceless(self.prefix.modules):
            now = self.prefix.compute(call, rows.take([row]), {}, self.until(situation))
        for ((_, path, number), layout), state in zip(situation.layouts.items(), states, strict=True):
            if state is None or not layout.by_position:
                continue
            first, last = rows.spans(layout.side)[row]
            own = None if now is None else now[path][number][0, first:last]
            if own is None or not self._agree(own, state.to(own.device, own.dtype)):
                self.refusal = "what the prefix gives for a sample depends on the width of its batch"
                return False
        return True

    def as_wide(self, layout: Layout, rows: Rows, hidden: Tensor) -> bool:
        """Whether what enters block 0 is as wide as the inputs; if not, whole rows are taken from now on."""
        if not layout.by_position or hidden.shape[1] == rows.width(layout.side):
            return True
        self._take_whole_rows(PADS_INSIDE)
        return False

    def marks_agree(self, a: Tensor, b: Tensor) -> bool:
        """Whether what enters block 0 is what entered it before, up to rounding; NaN where nothing is known of it."""
        tolerance = OF_MARKS_COARSE if isinstance(self.prefix.autocast, torch.dtype) else 10 * OF_STATES
        near = (a - b).abs() <= tolerance * torch.stack([b[:, 1].abs().sqrt(), b[:, 1].abs()], 1) + 1e-9
        return bool((near | b.isnan()).all())

    def _agree(self, a: Tensor, b: Tensor, tolerance: float = OF_STATES) -> bool:
        coarse = isinstance(self.prefix.autocast, torch.dtype) or self.rounds
        return _close(a, b, tolerance, coarse)

    # What padding means.

    def trusts_padding(self, situation: Situation, rows: Rows, call: Call) -> bool:
        """Whether held states, which have no padding, may stand in this batch; asks its gradient otherwise."""
        layouts = {slot: layout for slot, layout in situation.layouts.items() if self.prefix.depths[slot[1]]}
        sides = {one.side for one in layouts.values() if one.by_position and rows.is_padded(one.side)}
        if self.whole_rows or sides <= self.padding_known:
            return True
        # A gradient shows what reads padding now. What will read it later (a gate that begins at zero, another loss
        # from some step on) only code can tell, and of code that is not a library's nothing is known.
        if (own := users_code(self._outside_modules)) is not None:
            self._take_whole_rows(f"what {own} does with padding is not known")
            return False
        if self._differs_without_padding(situation, rows, call):
            self._take_whole_rows("padding changes what the prefix gives (left padding with absolute positions)")
            return False
        self._rows = rows
        self._waiting = {
            (p, n): one.side for (_, p, n), one in layouts.items() if one.by_position and one.side in sides
        }
        return False

    def _differs_without_padding(self, situation: Situation, rows: Rows, call: Call) -> bool:
        """Whether a padded sample's own positions come out otherwise when it is run without its padding.

        They do with left padding and absolute positions, and where padding is attended to.
        """
        for row in range(rows.count):
            first, last = rows.spans(0)[row]
            if (first, last) != (0, rows.width(0)):
                break
        else:
            return False
        until = self.until(situation)
        with traceless(self.prefix.modules):
            padded = self.prefix.compute(call, rows.take([row]), {}, until)
            alone = self.prefix.compute(call, rows.alone(row), {}, until)
        if padded is None or alone is None:
            return True
        for (_, path, number), layout in situation.layouts.items():
            if path in padded:
                states = padded[path][number]
                if layout.by_position and layout.side == 0:
                    states = states[:, first:last]
                if not self._agree(states, alone[path][number]):
                    return True
        return False

    @property
    def waits_for_gradient(self) -> bool:
        """Whether no gradient has shown yet what padding means."""
        return bool(self._waiting)

    def hears(self, output: Any, rows: Rows) -> None:
        """Look at the gradients of a served pass's outputs: a loss outside the model may begin to read padding."""
        for side in (0, 1):
            width = rows.width(side)
            if self.whole_rows or not width or not rows.is_padded(side):
                continue
            for _, tensor in _named_tensors(output):
                if tensor.requires_grad and tensor.shape[:2] == (rows.count, width):
                    tensor.register_hook(partial(self._hear, side, rows))

    def _hear(self, side: int, rows: Rows, gradient: Tensor) -> None:
        real = _real(rows, side, gradient.device)
        size = gradient.detach().abs()
        largest = size.max()
        if not self.whole_rows and bool(size[~real].max() > 1e-6 * largest) and bool(largest.isfinite()):
            self._take_whole_rows("the loss has begun to read padding, which in this step was zeros")

    def _see_gradient(self, slot: tuple[str, int], side: int, rows: Rows, gradient: Tensor) -> None:
        """Where padding has a gradient, something above reads it: labels on padding, a mean over all positions."""
        if slot not in self._waiting or gradient.shape[:2] != (rows.count, rows.width(side)):
            return
        size = gradient.detach().abs()
        largest = float(size.max())
        if largest != largest or largest in (float("inf"), 0.0):
            # An overflow under loss scaling says nothing, nor does a loss that does not depend on the boundary (a head
            # that begins at zero); the next padded pass is asked.
            return
        for row, (first, last) in enumerate(rows.spans(side)):
            size[row, first:last] = 0
        del self._waiting[slot]
        if float(size.max()) > 1e-6 * largest:
            self._take_whole_rows("padding is read above the prefix (labels on it, a mean over all positions)")
        elif side not in self._waiting.values():
            self.padding_known.add(side)

    def _take_whole_rows(self, reason: str) -> None:
        self.whole_rows = True
        self._waiting = {}
        self.situations.clear()
        self._look = None
        self.on_whole_rows(reason)

    # The shadow of a pass.

    def shadow(self, situation: Situation, kinds: frozenset[str], rows: Rows, call: Call, starts: Starts) -> bool:
        """Whether this pass may be served; if that is still to be shown, its shadow is run, and compared at its end."""
        due = situation.spot and situation.passes >= situation.spot
        if kinds <= situation.verified and not due:
            situation.passes += 1
            return True
        before = self.flops
        waiting = {path: list(calls) for path, calls in starts.items()}
        if "computed" in situation.verified and not due:
            # That a pass may start there is shown; what is new is how the states were held, so these are compared.
            self._look = _Look(situation, kinds, waiting, rows, None)
            return False
        starts, without = self._without_padding(situation, rows, starts)
        try:
            with traceless(self.prefix.modules), CountFlops() as count:
                outputs = self.prefix.shadow(call, rows.inputs, starts)
        except Exception as error:
            self.refusal = f"a pass that starts above the prefix fails ({type(error).__name__}: {_first_line(error)})"
            return False
        self.flops += count.total
        self._look = _Look(situation, kinds, waiting, rows, _sampled(outputs, rows), without)
        situation.passes = 0
        if not situation.spot:
            blocks, skipped = sum(map(len, self.prefix.stacks)), sum(self.prefix.depths.values())
            prefix = count.total * skipped / max(1, blocks - skipped)
            # Of a served pass, forward and backward, which takes about three times its forward pass.
            situation.spot = max(1, round((prefix + self.flops - before) / (3 * max(1, count.total) * SPOT_CHECKS)))
        return False

    def _without_padding(self, situation: Situation, rows: Rows, starts: Starts) -> tuple[Starts, bool]:
        """``starts`` with zeros for padding, which held states do not have, and whether there is any."""
        changed: dict[str, list[Start | None]] = {path: list(calls) for path, calls in starts.items()}
        some = False
        for (_, path, number), layout in situation.layouts.items():
            calls = changed.get(path, [])
            start = calls[number] if number < len(calls) else None
            if start is not None and layout.by_position and rows.is_padded(layout.side):
                real = _real(rows, layout.side, start.states.device)
                real = real.reshape(*real.shape, *[1] * (start.states.ndim - 2))
                calls[number] = Start(start.depth, start.states.where(real, 0))
                some = True
        return changed, some

    @property
    def watches(self) -> bool:
        """Whether ``watch`` has anything to do in the pass that begins."""
        return bool(self._waiting) or self._look is not None or self.collect is not None

    @torch.compiler.disable
    def watch(self, path: str, number: int, hidden: Tensor) -> None:
        """The boundary of a training pass."""
        if (path, number) in self._waiting:
            assert self._rows is not None
            see = partial(self._see_gradient, (path, number), self._waiting[path, number], self._rows)
            self.prefix.mark(hidden).register_hook(see)
        if self._look is not None:
            self._compare_states(self._look, path, number, hidden.detach())
        if self.collect is not None:
            self.collect(path, number, hidden.detach())

    def finished(self, output: Any, calls: Mapping[str, int], situation: Situation | None) -> str | None:
        """The training pass has ended; returns what differs from serving it, if something was compared and does."""
        look, self._look = self._look, None
        if situation is not None and output is not None and not self._has_learned(situation, calls):
            return None
        if look is None or output is None:
            return None
        problem = look.problem or self._difference(look, output)
        if problem is None:
            look.situation.verified |= look.kinds | {"computed"}
        elif look.problem is None and look.without_padding:
            # The states are right; whether padding is all that differs, the next look shows.
            self._take_whole_rows("a pass with zeros in place of padding gives something else")
            return None
        return problem

    def _has_learned(self, situation: Situation, calls: Mapping[str, int]) -> bool:
        """Whether stacks were called as often as was thought; if not, the situation is looked at anew."""
        seen = {path: calls.get(path, 0) for path, depth in self.prefix.depths.items() if depth}
        if all(situation.calls[path] == count for path, count in seen.items()):
            return True
        situation.calls.update(seen)
        self._calls.setdefault(situation.key.split()[0], {}).update(seen)
        situation.layouts, situation.entries = {}, {}
        situation.verified, situation.fresh = set(), None
        situation.counts += 1
        if situation.counts > MOST_COUNTS:
            self.refusal = "a stack is called another number of times in each pass"
        return False

    def _compare_states(self, look: _Look, path: str, number: int, own: Tensor) -> None:
        """Of one call: what the pass would have started from, which is then given up, before a graph is built on it."""
        starts = look.starts.get(path, [])
        if number >= len(starts) or (start := starts[number]) is None:
            return
        starts[number] = None
        served, stack = start.states, [stack.path for stack in self.prefix.stacks].index(path)
        layout = look.situation.layouts[stack, path, number]
        if own.shape != served.shape and layout.by_position and own.shape[1] != look.rows.width(layout.side):
            self._take_whole_rows(PADS_INSIDE)
            return
        if own.shape != served.shape:
            look.problem = f"the states of {path} have the shape {tuple(own.shape)} and not {tuple(served.shape)}"
            return
        if layout.by_position and look.rows.is_padded(layout.side):
            real = _real(look.rows, layout.side, own.device)
            own, served = own[real], served[real]
        if not self._agree(own, served):
            look.problem = f"the states of {path} are others than a pass of the model gives now"

    def _difference(self, look: _Look, output: Any) -> str | None:
        if look.outputs is None:
            return None
        own_outputs = _sampled(output, look.rows)
        if [name for name, _ in own_outputs] != [name for name, _ in look.outputs]:
            differing = {name for name, _ in own_outputs} ^ {name for name, _ in look.outputs}
            return f"{', '.join(sorted(differing)[:3]) or 'its output'} is not made of the blocks above it alone"
        for (name, own), (_, served) in zip(own_outputs, look.outputs, strict=True):
            if not self._agree(own, served, OF_OUTPUTS):
                values = ""
                if own.ndim == 0 or own.numel() == 1:
                    values = f" ({float(served):.7g} and not {float(own):.7g})"
                return f"{name or 'the output'} is another one{values}"
        return None


def _real(rows: Rows, side: int, device: torch.device) -> Tensor:
    """(samples, positions) bool: which are no padding."""
    real = torch.zeros(rows.count, rows.width(side), dtype=torch.bool)
    for row, (first, last) in enumerate(rows.spans(side)):
        real[row, first:last] = True
    return real.to(device)


def _named_tensors(output: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """All tensors of an output, each with where it stands."""
    if isinstance(output, Tensor):
        return [(name, output)]
    if isinstance(output, Mapping):
        # Keys and values for generation come unasked, and of skipped blocks there are none.
        items = [(str(key), item) for key, item in output.items() if key != "past_key_values"]
        return [pair for key, item in items for pair in _named_tensors(item, key)]
    if isinstance(output, (tuple, list)):
        return [pair for n, item in enumerate(output) for pair in _named_tensors(item, f"{name}[{n}]")]
    if dataclasses.is_dataclass(output):
        return [pair for key, item in vars(output).items() for pair in _named_tensors(item, key)]
    return []


def _sampled(output: Any, rows: Rows) -> list[tuple[str, Tensor]]:
    """Of each tensor of an output some rows, evenly spaced, and nothing at padded positions."""
    found = []
    for name, tensor in _named_tensors(output):
        tensor = tensor.detach()
        for side in (0, 1):
            width = rows.width(side)
            if width and tensor.shape[:2] == (rows.count, width) and rows.is_padded(side):
                tensor = tensor[_real(rows, side, tensor.device)]
                break
        if tensor.ndim > 1:
            tensor = tensor.reshape(-1, tensor.shape[-1])
            most = max(LEAST_ROWS, MOST_COMPARED // max(1, tensor.shape[-1]))
            tensor = tensor[:: max(1, -(-len(tensor) // most))]
        found.append((name, tensor.clone()))
    return found


def _close(a: Tensor, b: Tensor, tolerance: float, coarse: bool) -> bool:
    """Equal but for rounding, position by position: one huge position may not hide another."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b) or not a.numel():
        return True
    if not a.is_floating_point():
        return False
    tolerance = COARSE if coarse or a.dtype.itemsize < 4 else tolerance
    a, b = (t.float().reshape(-1, t.shape[-1] if t.ndim else 1) for t in (a, b))
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
    least = 1e-3 * tolerance * float(a.norm(dim=1).mean()) + 1e-7
    return bool(((a - b).norm(dim=1) <= tolerance * a.norm(dim=1) + least).all())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
