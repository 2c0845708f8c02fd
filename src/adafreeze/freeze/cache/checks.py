"""Checks on the model itself, before its prefix is looked up in place of being run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...model.blocks import Stack, patched_forward, quiet, starting_at
from ...model.draw import keep_random_state
from ...model.flow import tensors_in
from ...model.rows import Rows, Span
from ..prefix import Prefix

__all__ = ["Examiner", "Layout", "differs_without_padding", "is_random", "is_read_elsewhere"]


# Settings under which a model skips whole blocks in training, each with a probability.
_LAYER_DROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop", "layer_drop")


@dataclass(frozen=True)
class Layout:
    """How a stack's hidden states lie in a batch.

    Attributes:
        dtype: theirs.
        by_position: dimension 1 is the text's, so that padding can be left out; else a sample is held whole.
        side: whose positions they are: 0 the encoder's (or only) text, 1 the decoder's.
    """

    dtype: torch.dtype
    by_position: bool
    side: int

    def span(self, rows: Rows, row: int, width: int) -> Span:
        """Which positions of a row are the sample's own."""
        return rows.spans(self.side)[row] if self.by_position else (0, width)


class Examiner:
    """Looks at the first training passes: whether any may start at the boundary, and what padding means to them.

    Attributes:
        layouts: by stack path.
        passed: the model was looked at with its prefix as it is, and nothing was found.
        whole_rows: padding matters, so it is content.
        padding_known: sides (0 the encoder's, 1 the decoder's) of which it is known whether their padding matters.
        refusal: why no pass may ever start at the boundary.
    """

    def __init__(self, prefix: Prefix, sides: Mapping[str, int], on_whole_rows: Callable[[], None]) -> None:
        self.prefix = prefix
        self.sides = sides
        self.on_whole_rows = on_whole_rows
        self.layouts: dict[str, Layout] = {}
        self.whole_rows = False
        self.padding_known: set[int] = set()
        self.refusal: str | None = None
        self.passed = False
        self._waiting: set[str] = set()
        self._widths: set[tuple[int, int]] = set()

    def look(self, rows: Rows) -> None:
        """Look at the model with the first sample, unless it was looked at since the prefix last grew."""
        if self.passed:
            return
        with keep_random_state():
            self._look(rows, rows.take([0]))

    def _look(self, rows: Rows, one: Mapping[str, Any]) -> None:
        states = self.prefix.compute(one, {})
        if states is None:
            self.refusal = "a training pass does not come to the boundary of every stack"
            return
        for path, hidden in states.items():
            side = self.sides[path]
            by_position = not self.whole_rows and hidden.ndim > 2 and rows.width(side) > 0
            self.layouts[path] = Layout(hidden.dtype, by_position, side)
        self._widths.clear()
        self.keeps_width(rows, states)
        self._look_at_model(one)
        self.passed = self.refusal is None

    def keeps_width(self, rows: Rows, states: Mapping[str, Tensor] | None = None) -> bool:
        """Whether hidden states are as wide as these inputs; if not, whole rows are taken from now on.

        Some models pad inside, to a multiple of a window, and so at some widths only: each is looked at once.

        Args:
            rows: of a batch.
            states: computed of some of them; None: those of the first are, at a width that was not seen before.
        """
        widths = rows.width(0), rows.width(1)
        if self.whole_rows or widths in self._widths:
            return True
        if states is None:
            with keep_random_state():
                states = self.prefix.compute(rows.take([0]), {})
        for path, hidden in (states or {}).items():
            if self.layouts[path].by_position and hidden.shape[1] != widths[self.layouts[path].side]:
                self._take_whole_rows()
                return False
        self._widths.add(widths)
        return True

    def trusts_padding(self, rows: Rows) -> bool:
        """Whether held states, which have no padding, may stand in this batch; asks its gradient otherwise."""
        layouts = [self.layouts[path] for path, depth in self.prefix.depths.items() if depth]
        sides = {layout.side for layout in layouts if layout.by_position and rows.is_padded(layout.side)}
        if self.whole_rows or sides <= self.padding_known:
            return True
        if differs_without_padding(self.prefix, rows, self.layouts):
            self._take_whole_rows()
            return False
        self._waiting = {
            path
            for path, depth in self.prefix.depths.items()
            if depth and self.layouts[path].by_position and self.layouts[path].side in sides
        }
        self.prefix.watch_boundary = partial(self._ask_for_gradient, rows)
        return False

    def _look_at_model(self, one: Mapping[str, Any]) -> None:
        config = getattr(self.prefix.model, "config", None)
        dropped = [name for name in _LAYER_DROP if getattr(config, name, None)]
        if dropped:
            self.refusal = f"{dropped[0]} leaves out blocks of the prefix by chance"
        elif is_random(self.prefix, one):
            self.refusal = "the prefix gives a sample another output each time (NEFTune noise, or dropout of its own)"
        elif is_read_elsewhere(self.prefix.model, self.prefix.stacks, self.prefix.depths, one):
            self.refusal = (
                "what stands above the prefix reads more of it than its last output "
                "(shared keys and values, all hidden states, or a loss over routers)"
            )

    def _ask_for_gradient(self, rows: Rows, path: str, hidden: Tensor) -> None:
        if path in self._waiting:
            hidden.requires_grad_().register_hook(partial(self._see_gradient, rows, path))

    def _see_gradient(self, rows: Rows, path: str, gradient: Tensor) -> None:
        """Where padding has a gradient, something above reads it: labels on padding, a mean over all positions."""
        size = gradient.detach().abs()
        largest = float(size.max())
        if largest != largest or largest in (0.0, float("inf")):
            return  # an overflow under loss scaling says nothing; the next padded pass is asked
        for row, (first, last) in enumerate(rows.spans(self.layouts[path].side)):
            size[row, first:last] = 0
        self._waiting.discard(path)
        if float(size.max()) > 1e-6 * largest:
            self._take_whole_rows()
        elif not any(self.layouts[other].side == self.layouts[path].side for other in self._waiting):
            self.padding_known.add(self.layouts[path].side)

    def _take_whole_rows(self) -> None:
        self.whole_rows = True
        self._waiting = set()
        for path, layout in self.layouts.items():
            self.layouts[path] = replace(layout, by_position=False)
        self.on_whole_rows()


def is_random(prefix: Prefix, inputs: Mapping[str, Any]) -> bool:
    """Whether two training passes of the prefix over one sample differ (NEFTune, noise, dropout that is no module)."""
    first, second = prefix.compute(inputs, {}), prefix.compute(inputs, {})
    if first is None or second is None:
        return True
    return not all(torch.equal(first[path], second[path]) for path in first)


def is_read_elsewhere(
    model: nn.Module, stacks: list[Stack], depths: Mapping[str, int], inputs: Mapping[str, Any]
) -> bool:
    """Whether the model's output depends on its prefix through more than the boundary.

    Such are blocks that read the keys and values of an earlier block, heads that read all hidden states, losses over
    the routers of all experts: skipping the prefix would change what they compute. One sample is run whole and from
    the boundary, without dropout, and all that the model returns is compared.
    """
    recorded: dict[int, Any] = {}

    def recording(block: nn.Module, position: int) -> Any:
        original = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            recorded[position] = original(*args, **kwargs)
            return recorded[position]

        return forward

    with ExitStack() as undo:
        undo.enter_context(torch.no_grad())
        undo.enter_context(quiet(model))
        with ExitStack() as watching:
            for position, stack in enumerate(stacks):
                if depths[stack.path]:
                    block = stack.blocks[depths[stack.path] - 1]
                    watching.enter_context(patched_forward(block, recording(block, position)))
            whole = list(tensors_in(model.forward(**inputs)))
        with starting_at(recorded, stacks, depths):
            skipped = list(tensors_in(model.forward(**inputs)))
    return len(whole) != len(skipped) or not all(map(_close, whole, skipped))


def differs_without_padding(prefix: Prefix, rows: Rows, layouts: Mapping[str, Layout]) -> bool:
    """Whether a padded sample's own positions come out otherwise when it is run without its padding.

    They do with left padding and absolute positions, and where padding is attended to.
    """
    for row in range(rows.count):
        first, last = rows.spans(0)[row]
        if (first, last) != (0, rows.width(0)):
            break
    else:
        return False
    with keep_random_state():
        padded, alone = prefix.compute(rows.take([row]), {}), prefix.compute(rows.alone(row), {})
    if padded is None or alone is None:
        return True
    for path, states in padded.items():
        if layouts[path].by_position and layouts[path].side == 0:
            states = states[:, first:last]
        if not _close(states, alone[path]):
            return True
    return False


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, position by position: one huge position may not hide another."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    # Kernels for other shapes round otherwise: by 1e-6 in float32, by 1e-2 in the sixteen-bit types.
    tolerance = 5e-2 if a.dtype.itemsize < 4 else 1e-3
    a, b = (t.float().reshape(-1, t.shape[-1] if t.ndim else 1) for t in (a, b))
    return bool(((a - b).norm(dim=1) <= tolerance * a.norm(dim=1) + 1e-6).all())
