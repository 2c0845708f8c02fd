"""Batches of hidden states, taken apart into samples and put together again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ...model.blocks import Stack
from ...model.rows import Rows
from ..prefix import Start
from .checks import Layout
from .tiers import Entry

__all__ = ["Batches", "Computed"]

Computed = tuple[list[int], dict[str, Tensor]]
"""Rows of a batch, and their hidden states by stack path."""


class Batches:
    """Between the boundary's tensors, (samples, positions, features), and what is held of one sample.

    Args:
        stacks: in data-flow order.
        layouts: by stack path.
        device: of the boundary's tensors.
        store_dtype: that states are held in; None: their own.
    """

    def __init__(
        self,
        stacks: Sequence[Stack],
        layouts: Mapping[str, Layout],
        device: torch.device,
        store_dtype: torch.dtype | None,
    ) -> None:
        self.stacks = stacks
        self.layouts = layouts
        self.device = device
        self.store_dtype = store_dtype

    def apart(
        self, rows: Rows, group: Sequence[int], states: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor | None, ...]]:
        """For each row of ``group`` its own positions of each stack's states, on the host; one transfer a stack."""
        host = {path: hidden.detach().to("cpu", self.store_dtype) for path, hidden in states.items()}
        for place, row in enumerate(group):
            pieces: list[Tensor | None] = []
            for stack in self.stacks:
                hidden = host.get(stack.path)
                if hidden is not None:
                    first, last = self.layouts[stack.path].span(rows, row, hidden.shape[1])
                    hidden = hidden[place, first:last].contiguous()
                pieces.append(hidden)
            yield tuple(pieces)

    def together(
        self,
        rows: Rows,
        at: Sequence[int],
        entries: Sequence[Entry | None],
        depths: tuple[int, ...],
        computed: Sequence[Computed] = (),
    ) -> dict[str, Start]:
        """Where a pass over these rows starts: what is held, with zeros for padding, beside what was computed.

        Args:
            rows: of the whole batch.
            at: the rows wanted.
            entries: what is held of each of these; None for those in ``computed``.
            depths: of the hidden states.
            computed: other rows' hidden states; with these, ``at`` is the whole batch.
        """
        starts = {}
        for position, stack in enumerate(self.stacks):
            if not depths[position]:
                continue
            layout = self.layouts[stack.path]
            held = [
                (place, row, state)
                for place, (row, entry) in enumerate(zip(at, entries, strict=True))
                if entry is not None and (state := entry.states[position]) is not None
            ]
            like = held[0][2] if held else computed[0][1][stack.path][0]
            width = rows.width(layout.side) if layout.by_position else like.shape[0]
            shape = (len(at), width, *like.shape[1:])
            dtype = layout.dtype if self.store_dtype is not None else like.dtype
            batch = torch.zeros(shape, dtype=dtype, device=self.device)
            for place, row, state in held:
                first, last = layout.span(rows, row, width)
                batch[place, first:last].copy_(state, non_blocking=True)
            for group, states in computed:
                batch[group] = states[stack.path]
            starts[stack.path] = Start(depths[position], batch)
        return starts
