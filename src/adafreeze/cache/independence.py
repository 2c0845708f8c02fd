"""Checks that the prefix computes the same for a sample in any batch, and finds how samples lie in its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor, nn

from ..errors import error_line
from ..freeze.prefix import Computed, Prefix, Slot, Starts
from ..model.batch import Call
from ..model.rows import Rows
from ..model.traces import stateful_forward, traceless
from .compare import Refused, Rounding
from .kinds import PassKind
from .layout import Layout, find_layout, fingerprints
from .padding import PaddingCheck

__all__ = ["IndependenceCheck"]

# Position embeddings that depend on the length of a batch, and those that also depend on the batches before it.
BY_LENGTH, BY_HISTORY = "longrope", "dynamic"


class IndependenceCheck:
    """Runs the prefix on a whole batch, and on some of its rows in another order and other company.

    This shows randomness, and dependence on the place of a row or on other rows.
    """

    def __init__(self, prefix: Prefix, padding: PaddingCheck, rounding: Rounding, *, encoder_decoder: bool) -> None:
        self.prefix = prefix
        self.padding = padding
        self.rounding = rounding
        self._encoder_decoder = encoder_decoder

    def examine(
        self, kind: PassKind, rows: Rows, call: Call, below: Callable[[Sequence[int]], Starts]
    ) -> Computed | None:
        """Fill in the layouts of a kind of pass that has none, or refuse.

        Args:
            kind: of the pass.
            rows: of its batch.
            call: how the model is called with them.
            below: where passes over some of the rows start. A prefix that has grown is examined from the states of the
                shallower one, whose blocks were examined before.

        Returns:
            What was computed of all rows, if this pass can use it.
        """
        prefix = self.prefix
        until = [slot for slot, depth in kind.depths(prefix.depths).items() if depth]
        if kind.layouts or not until:
            return None
        _refuse_by_code(prefix)
        if BY_LENGTH in _rope_types(prefix.modules) and not self.padding.whole_rows:
            self.padding.take_whole_rows("position embeddings depend on the length of the batch (rope_type='longrope')")
            return None
        written: list[tuple[nn.Module, str]] = []
        with traceless(prefix.modules, lambda module, name: written.append((module, name))):
            whole = prefix.compute(call, rows.inputs, below(range(rows.count)), until)
            if whole is None:
                if kind.recounted:
                    raise Refused("a training pass does not reach the boundary of every stack")
                return None  # this pass shows how often its stacks are called
            group, part = self._find_layouts(kind, rows, call, whole, below)
        with traceless(prefix.modules):
            kind.flags_matter = kind.own_code is not None or self._flags_matter(rows, group, call, part, below)
        inside = {id(module) for block in prefix.blocks for module in block.modules()}
        for module, name in written:
            if id(module) in inside:
                raise Refused(f"a block of the prefix writes to {type(module).__name__}.{name} in each pass")
        kind.writes = bool(written) or (kind.shallower is not None and kind.shallower.writes)
        if any(not one.by_position and rows.is_padded(one.side) for one in kind.layouts.values()):
            self.padding.take_whole_rows("padding cannot be found in the hidden states, which are not by position")
        return None if kind.several_calls else whole

    def _find_layouts(
        self, kind: PassKind, rows: Rows, call: Call, whole: Computed, below: Callable[[Sequence[int]], Starts]
    ) -> tuple[list[int], Computed]:
        """Returns the rows of which a part of the batch was computed, and what came of it."""
        count, until = rows.count, list(whole.boundary)
        # A quarter of the rows, from last to first. What only the others would show is noticed when stored states are
        # first compared with those of the model's own pass, which has all rows.
        size = min(count - 1, max(2, -(-count // 4)))
        group = list(range(count - 1, -1, -(count // size)))[:size] if size else [0, 0]
        try:
            part = self.prefix.compute(call, rows.take(group, rows.otherwise()), below(group), until)
        except Exception as error:
            raise Refused(f"a pass on a part of the batch fails ({error_line(error)})") from error
        if part is None:
            raise Refused("a training pass on a part of the batch does not reach the boundary of every stack")
        for slot in until:
            path = slot[0]
            hidden, piece = whole.boundary[slot], part.boundary[slot]
            if not isinstance(hidden, Tensor):
                raise Refused(f"the blocks of {path} return a {type(hidden).__name__} instead of hidden states")
            packed = Layout(hidden.dtype, packed=True, by_position=True)
            layout = packed if rows.is_packed else find_layout(hidden, piece, count, len(group))
            if layout is None or (rows.is_packed and hidden.shape[:2] != (1, rows.positions(0, range(count)))):
                raise Refused(f"the hidden states of {path}, {tuple(hidden.shape)}, have no dimension of the samples")
            ways = [replace(layout, interleaved=way) for way in ((False, True) if layout.rows > 1 else (False,))]
            found = next((way for way in ways if self._same_rows(way, hidden, piece, rows, group)), None)
            if found is None:
                if rows.is_packed:
                    raise Refused("documents of a packed row attend to each other, so no state is that of one document")
                again = self.prefix.compute(call, rows.inputs, below(range(count)), until)
                _refuse_dependence(again is not None and torch.equal(again.boundary[slot], hidden))
            if rows.is_packed:
                kind.layouts[slot] = found
                if whole.entered[slot].shape[:2] == hidden.shape[:2]:
                    kind.entry_layouts[slot] = replace(found, dtype=whole.entered[slot].dtype)
                continue
            side = int(self._encoder_decoder and path != self.prefix.stacks[0].path)
            width = rows.width(side)
            plain = found.dimension == 0 and found.rows == 1 and hidden.ndim > 2 and hidden.shape[1] == width
            by_position = plain and width > 0 and not self.padding.whole_rows
            kind.layouts[slot] = replace(found, by_position=by_position, side=side)
            enters = whole.entered[slot]
            if (entry := find_layout(enters, part.entered[slot], count, len(group))) is not None:
                by_position = by_position and enters.shape == hidden.shape
                kind.entry_layouts[slot] = replace(
                    entry, interleaved=found.interleaved, by_position=by_position, side=side
                )
        return group, part

    def _flags_matter(
        self,
        rows: Rows,
        group: Sequence[int],
        call: Call,
        part: Computed,
        below: Callable[[Sequence[int]], Starts],
    ) -> bool:
        """Whether the states are others without the arguments that are True or False.

        TRL's trainers add some (``use_cache=False``) to what the collator returns. States that were stored before the
        first training pass are found by it only if these do not count.
        """
        inputs = rows.without_flags()
        if inputs is None:
            return False
        try:
            bare = self.prefix.compute(call, rows.take(group, inputs), below(group), list(part.boundary))
        except Exception:  # such as a flag that forward() has no default for
            return True
        if bare is None:
            return True
        pairs = [(bare.boundary[slot], part.boundary[slot]) for slot in part.boundary]
        return not all(isinstance(one, Tensor) and torch.equal(one, other) for one, other in pairs)

    def verify_rows(
        self,
        rows: Rows,
        call: Call,
        at: Sequence[int],
        kind: PassKind,
        starts: Starts,
        expected: Mapping[Slot, Tensor],
    ) -> bool:
        """Compute some rows of a batch to the boundary and compare them with the states that a pass would start from.

        Args:
            rows: of the batch.
            call: how the model is called with them.
            at: the rows to compute.
            kind: of the pass.
            starts: of the whole batch.
            expected: fingerprints of what enters block 0, of the whole batch.

        Raises:
            Refused: they differ.

        Returns:
            False if that shows nothing: the pass ends below the boundary, or something else enters block 0.
        """
        with traceless(self.prefix.modules):
            own = self.prefix.compute(call, rows.take(at), {}, kind.layouts)
        if own is None:
            return False
        for slot, numbers in expected.items():
            here = fingerprints(kind.entry_layouts[slot], own.entered[slot], rows, at).cpu()
            if not self.rounding.same_fingerprints(here, numbers[list(at)]):
                return False
        for slot, start in starts.items():
            layout = kind.layouts[slot]
            computed = layout.by_sample(own.boundary[slot], rows, at)
            served = layout.by_sample(start.states, rows, range(rows.count))
            for place, row in enumerate(at):
                first, last = layout.span(rows, row, computed.shape[1])
                if not self.rounding.same_states(computed[place, first:last], served[row, first:last]):
                    raise Refused("what the prefix computes for a sample depends on the width of its batch")
        return True

    def compare_alone(self, rows: Rows, call: Call, kind: PassKind, states: Computed, group: Sequence[int]) -> None:
        """Compare the shortest of some rows with what is computed of it alone, without its padding.

        One row in the widest batches so far shows what other runs will ask, which find these states in batches of
        their own widths.

        Args:
            rows: of the batch.
            call: how the model is called with them.
            kind: of the pass.
            states: computed of the rows of ``group``.
            group: the rows.

        Raises:
            Refused: they differ.
        """
        sides = {layout.side for layout in kind.layouts.values() if layout.by_position}
        if sides != {0} or self._encoder_decoder:
            return
        place = min(range(len(group)), key=lambda place: rows.length(group[place]))
        first, last = rows.spans(0)[group[place]]
        if last - first == rows.width(0) or kind.span("stored", last - first, rows.width(0)) is not None:
            return
        with traceless(self.prefix.modules):
            alone = self.prefix.compute(call, rows.alone(group[place]), {}, kind.layouts)
        if alone is None:
            return
        for slot, layout in kind.layouts.items():
            in_batch = layout.by_sample(states.boundary[slot], rows, group)[place, first:last]
            if not self.rounding.same_states(in_batch, alone.boundary[slot].squeeze(layout.dimension)):
                raise Refused("what the prefix computes for a sample depends on the width of its batch")
        kind.add_span("stored", last - first, rows.width(0))

    def _same_rows(self, layout: Layout, hidden: Tensor, piece: Tensor, rows: Rows, group: list[int]) -> bool:
        samples, taken = layout.by_sample(hidden, rows, range(rows.count)), layout.by_sample(piece, rows, group)
        return all(self.rounding.same_states(samples[row], taken[place]) for place, row in enumerate(group))


def _refuse_by_code(prefix: Prefix) -> None:
    """What one look at the prefix might not show."""
    if prefix.drops_layers:
        raise Refused("a setting for layer drop leaves out blocks of the prefix at random (set it to 0.0)")
    if any(BY_HISTORY in one for one in _rope_types(prefix.modules)):
        raise Refused("position embeddings depend on earlier batches (rope_type='dynamic')")
    for module in prefix.modules:
        for forward in stateful_forward(module):
            raise Refused(f"a forward was replaced by a {type(forward).__name__}, which has state of its own")


def _rope_types(modules: Sequence[nn.Module]) -> set[str]:
    found = (getattr(module, "rope_type", None) for module in modules)
    return {str(one) for value in found for one in (value.values() if isinstance(value, dict) else [value])}


def _refuse_dependence(repeatable: bool) -> NoReturn:
    if repeatable:
        raise Refused("the prefix's output for a sample depends on its place in the batch, or on the other samples")
    raise Refused(
        "the prefix gives a sample another output each time (NEFTune noise, or dropout behind the embeddings that is a "
        "function and no module; BART and its relatives take model.model.encoder.dropout = "
        "model.model.decoder.dropout = 0.0, or from_pretrained(..., dropout=0.0))"
    )
