"""Whether padding matters to what the prefix computes, or to what reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..freeze.prefix import Prefix, Slot, Start, Starts
from ..model.batch import Call
from ..model.blocks import modules_outside
from ..model.rows import Rows
from ..model.traces import traceless, users_code
from .compare import Rounding, named_tensors, real_positions, sampled, side_of
from .kinds import PassKind
from .layout import Layout

__all__ = ["EvaluationPaddingCheck", "PaddingCheck"]

# Rows that show whether outputs depend on padding.
PROBED = 4


class PaddingCheck:
    """Decides whether samples are stored without padding, or as whole rows because padding matters.

    Without padding, a sample is found again in batches of any width. That is right if a padded sample has the same
    states as an unpadded one, and if nothing above the prefix reads padding. The first is computed; for the second, the
    gradient of a padded pass must be zero at padded positions.

    Attributes:
        whole_rows: padding matters. ``on_whole_rows`` was called with the reason.
        known: sides (0 the encoder's, 1 the decoder's) whose padding is known not to matter.
        awaited: calls whose gradient has to show whether padding matters, with their sides.
    """

    def __init__(self, prefix: Prefix, rounding: Rounding, on_whole_rows: Callable[[str], None]) -> None:
        self.prefix = prefix
        self.rounding = rounding
        self.whole_rows = False
        self.known: set[int] = set()
        self.awaited: dict[Slot, int] = {}
        self._on_whole_rows = on_whole_rows
        self._rows: Rows | None = None  # of the current pass, if its gradient is awaited

    def take_whole_rows(self, reason: str) -> None:
        """Store whole rows from now on."""
        self.whole_rows = True
        self.awaited = {}
        self._on_whole_rows(reason)

    def trusts(
        self, kind: PassKind, rows: Rows, call: Call, starts: Callable[[], Starts], *, without_gradient: bool = False
    ) -> bool:
        """Whether stored states, which have no padding, may be used in this batch. If unknown, awaits its gradient.

        Args:
            kind: of the pass.
            rows: of its batch.
            call: how the model is called with them.
            starts: where the pass would start, if that is known without its prefix.
            without_gradient: it is none of training; what it returns must show it.
        """
        self._rows = None
        if self.is_harmless(kind, rows):
            return True
        # A gradient shows what reads padding now. What reads it later (a gate that starts at zero, another loss from
        # some step on) is known only for the code of libraries.
        if (own := users_code(modules_outside(self.prefix.modules, self.prefix.stacks))) is not None:
            self.take_whole_rows(f"what {own} does with padding is not known")
        elif (kind.inherited or without_gradient) and self._ignores_padding(kind, rows, call, starts()):
            self.known |= set(_padded(kind, rows).values())
            return True
        elif self._changes_states(kind, rows, call):
            self.take_whole_rows("padding changes what the prefix computes (left padding with absolute positions)")
        else:
            self._rows, self.awaited = rows, _padded(kind, rows)
        return False

    def _ignores_padding(self, kind: PassKind, rows: Rows, call: Call, starts: Starts) -> bool:
        """Whether the loss and all outputs at other positions are the same with another filler for padding."""
        if not starts:
            return False
        rows, starts = self._most_padded(kind, rows, starts)
        one, other, changed = (sampled(output, rows) for output in self._probed(kind, rows, call, starts))
        # A loss that is computed outside the model may read any output. A head that starts at zero shows nothing.
        return "loss" in dict(one) and self._same(one, other) and not self._same(one, changed)

    def _most_padded(self, kind: PassKind, rows: Rows, starts: Starts) -> tuple[Rows, Starts]:
        """A few rows show the same as the whole batch, for less; those with the most padding."""
        by_row = all(layout.by_position and not layout.packed for layout in kind.layouts.values())
        if not by_row or rows.count <= PROBED:
            return rows, starts
        sides = set(_padded(kind, rows).values())
        spans = [[rows.spans(side)[row] for side in sides] for row in range(rows.count)]
        lengths = [sum(last - first for first, last in of_row) for of_row in spans]
        at = sorted(sorted(range(rows.count), key=lengths.__getitem__)[:PROBED])
        few = rows.some(at)
        if set(_padded(kind, few).values()) != sides:
            return rows, starts
        return few, {slot: Start(start.depth, start.states[at]) for slot, start in starts.items()}

    def _probed(self, kind: PassKind, rows: Rows, call: Call, starts: Starts) -> Iterator[Any]:
        """What passes from ``starts`` return with two fillers for padding, and with one of them for all positions.

        The fillers are random: a constant one passes through the residual stream, and a LayerNorm removes it.
        """
        generator = torch.Generator().manual_seed(0)
        for seen in (False, False, True):
            filled = dict(starts)
            for slot, side in _padded(kind, rows).items():
                states = starts[slot].states
                real = real_positions(rows, side, states.device).reshape(*states.shape[:2], *[1] * (states.ndim - 2))
                filler = torch.randn(states.shape, generator=generator).to(states) * states.float().std().to(states)
                filled[slot] = Start(starts[slot].depth, states.where(real & (not seen), filler))
            with traceless(self.prefix.modules):
                yield self.prefix.shadow(call, rows.inputs, filled)

    def _same(self, some: list[tuple[str, Tensor]], others: list[tuple[str, Tensor]]) -> bool:
        return [name for name, _ in some] == [name for name, _ in others] and all(
            self.rounding.same_outputs(a, b) for (_, a), (_, b) in zip(some, others, strict=True)
        )

    def is_harmless(self, kind: PassKind, rows: Rows) -> bool:
        """Whether it is known that this batch may have zeros for padding."""
        return self.whole_rows or self.known.issuperset(_padded(kind, rows).values())

    def _changes_states(self, kind: PassKind, rows: Rows, call: Call) -> bool:
        """Whether a padded sample has other states than without its padding."""
        width = rows.width(0)
        padded = next((row for row in range(rows.count) if rows.spans(0)[row] != (0, width)), None)
        if padded is None:
            return False
        with traceless(self.prefix.modules):
            in_batch = self.prefix.compute(call, rows.take([padded]), {}, kind.layouts)
            alone = self.prefix.compute(call, rows.alone(padded), {}, kind.layouts)
        if in_batch is None or alone is None:
            return True
        for slot, layout in kind.layouts.items():
            states = in_batch.boundary[slot]
            if layout.by_position and layout.side == 0:
                states = states[:, slice(*rows.spans(0)[padded])]
            if not self.rounding.same_states(states, alone.boundary[slot]):
                return True
        return False

    @property
    def awaits_gradient(self) -> bool:
        """Whether a gradient of the current pass is awaited."""
        return self._rows is not None

    def watch_boundary(self, slot: Slot, hidden: Tensor) -> None:
        """Check the gradient of a call's boundary, if it is awaited."""
        if self._rows is not None and slot in self.awaited:
            self.prefix.mark(hidden).register_hook(partial(self._check_gradient, slot, self.awaited[slot], self._rows))

    def _check_gradient(self, slot: Slot, side: int, rows: Rows, gradient: Tensor) -> None:
        if slot not in self.awaited or gradient.shape[:2] != (rows.count, rows.width(side)):
            return
        if (reads := _reads_padding(gradient, rows, side)) is None:
            return  # await the next padded pass
        del self.awaited[slot]
        if reads:
            self.take_whole_rows("padding is read above the prefix (labels on it, a mean over all positions)")
        elif side not in self.awaited.values():
            self.known.add(side)

    def watch_outputs(self, output: Any, rows: Rows) -> None:
        """Check the gradients of a served pass's outputs: a loss outside the model may begin to read padding."""
        for name, tensor in named_tensors(output) if not self.whole_rows else ():
            side = side_of(name, tensor, rows)
            if side is not None and rows.is_padded(side) and tensor.requires_grad:
                tensor.register_hook(partial(self._check_output_gradient, side, rows))

    def _check_output_gradient(self, side: int, rows: Rows, gradient: Tensor) -> None:
        if not self.whole_rows and _reads_padding(gradient, rows, side):
            self.take_whole_rows("the loss has begun to read padding, which was zeros in this step")

    def keeps_width(self, layout: Layout, rows: Rows, hidden: Tensor, group: Sequence[int] | None = None) -> bool:
        """Whether the hidden states of ``group`` (default: all) are as wide as the inputs. If not, takes whole rows.

        Some models pad inside to a multiple of a window, and so only at some widths.
        """
        group = range(rows.count) if group is None else group
        if layout.by_position and hidden.shape[1] != rows.positions(layout.side, group):
            self.take_whole_rows("the model pads its inputs to another width")
            return False
        return True


class EvaluationPaddingCheck(PaddingCheck):
    """Decides the same for passes in evaluation mode, which have no gradient to look at.

    What they return is for the user, at padded positions, too. Samples are stored without padding only if no output is
    by position or depends on padding; else as whole rows, which an evaluation finds again in the same batches.
    """

    def is_harmless(self, kind: PassKind, rows: Rows) -> bool:
        """Whether it is known that this batch may have zeros for padding; of each kind, since outputs may be others."""
        return self.whole_rows or kind.ignores_padding or not _padded(kind, rows)

    def trusts(
        self, kind: PassKind, rows: Rows, call: Call, starts: Callable[[], Starts], *, without_gradient: bool = True
    ) -> bool:
        """Whether stored states, which have no padding, may be used in this batch."""
        if self.is_harmless(kind, rows):
            return True
        own = users_code(modules_outside(self.prefix.modules, self.prefix.stacks))
        states = (starts() or self._starts(kind, rows, call)) if own is None else {}
        if states:
            few, starts_of_few = self._most_padded(kind, rows, states)
            one, other, changed = (named_tensors(output) for output in self._probed(kind, few, call, starts_of_few))
            sides = {side_of(name, tensor, few) for name, tensor in one} & set(_padded(kind, rows).values())
            if not sides and self._same(one, changed):
                return False  # a head that starts at zero shows nothing
            if not sides and self._same(one, other) and (kind.inherited or not self._changes_states(kind, rows, call)):
                kind.ignores_padding = True
                return True
        self.take_whole_rows("")
        return False

    def _starts(self, kind: PassKind, rows: Rows, call: Call) -> Starts:
        with traceless(self.prefix.modules):
            return kind.starts(self.prefix.compute(call, rows.inputs, {}, kind.layouts), self.prefix.depths)


def _padded(kind: PassKind, rows: Rows) -> dict[Slot, int]:
    """The calls whose states have padding that is not stored, with their sides."""
    return {slot: one.side for slot, one in kind.layouts.items() if one.by_position and rows.is_padded(one.side)}


def _reads_padding(gradient: Tensor, rows: Rows, side: int) -> bool | None:
    """Whether padding has a gradient.

    None: an overflow under loss scaling shows nothing. Neither does a loss that does not depend on the boundary yet (a
    head that starts at zero).
    """
    size = gradient.detach().abs()
    largest = float(size.max())
    if not 0 < largest < float("inf"):
        return None
    return float(size[~real_positions(rows, side, size.device)].max()) > 1e-6 * largest
