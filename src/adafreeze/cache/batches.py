"""Batches of hidden states, taken apart into samples and put together again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..freeze.prefix import Start
from ..model.rows import Rows, Span
from .tiers import Entry

__all__ = ["Batches", "Computed", "Layout", "Slot", "find_layout", "marks_of"]

Slot = tuple[int, str, int]
"""One call of a stack in a pass of the model: position of the stack, its path, number of the call."""

Computed = tuple[list[int], dict[str, list[Tensor]]]
"""Rows of a batch, and their hidden states by stack path and call."""


@dataclass(frozen=True)
class Layout:
    """How the hidden states of one call of a stack lie in a batch.

    Attributes:
        dtype: theirs.
        dimension: that of the samples: 0 in most models, 1 where the sequence comes first.
        rows: of one sample: 4 where a sample is four choices that the model flattens.
        interleaved: the rows of one sample do not follow each other: first come the first rows of all samples.
        by_position: dimension 1 is the text's, so that padding can be left out; else a sample is held whole.
        side: whose positions they are: 0 the encoder's (or only) text, 1 the decoder's.
    """

    dtype: torch.dtype
    dimension: int = 0
    rows: int = 1
    interleaved: bool = False
    by_position: bool = False
    side: int = 0

    def apart(self, hidden: Tensor, samples: int) -> Tensor:
        """(samples, ...) from the boundary's tensor."""
        lead = hidden.movedim(self.dimension, 0)
        if self.rows == 1:
            return lead
        if self.interleaved:
            return lead.unflatten(0, (self.rows, samples)).transpose(0, 1)
        return lead.unflatten(0, (samples, self.rows))

    def together(self, samples: Tensor) -> Tensor:
        """The boundary's tensor from (samples, ...)."""
        if self.rows > 1:
            samples = (samples.transpose(0, 1) if self.interleaved else samples).flatten(0, 1)
        return samples.movedim(0, self.dimension).contiguous()

    def span(self, rows: Rows, row: int, width: int) -> Span:
        """Which positions of a row are the sample's own."""
        return rows.spans(self.side)[row] if self.by_position else (0, width)


def find_layout(whole: Tensor, part: Tensor, samples: int, of_part: int) -> Layout | None:
    """How samples lie in ``whole``, by the shape that fewer or more of them have.

    Args:
        whole: hidden states of all samples of a batch.
        part: of other samples, at the same width.
        samples: in ``whole``.
        of_part: samples in ``part``, another number.

    Returns:
        None where no dimension grows with the number of samples.
    """
    if whole.ndim != part.ndim:
        return None
    grown = [d for d, (a, b) in enumerate(zip(whole.shape, part.shape, strict=True)) if a != b]
    if len(grown) != 1:
        return None
    (dimension,) = grown
    rows, rest = divmod(whole.shape[dimension], samples)
    if rest or part.shape[dimension] != rows * of_part:
        return None
    return Layout(whole.dtype, dimension, rows)


def marks_of(layout: Layout, hidden: Tensor, rows: Rows, group: Sequence[int]) -> Tensor:
    """(samples, 2): two numbers of what enters block 0 for each of these rows, its padding left out.

    The sum and the sum of squares, over the positions and weighted by them, of a fixed random projection of the
    features: what is held of a sample is served only where these are as they were. The key knows what the model is
    called with; embeddings that somebody has written to through ``.data``, a hook on them, or noise that begins in
    mid-run, only these see.
    """
    samples = layout.apart(hidden, len(group)).float()
    if not samples.is_floating_point() or samples.ndim < 2:
        samples = samples.reshape(len(group), -1)
    width = samples.shape[-1]
    generator = torch.Generator().manual_seed(width)
    direction = torch.randn(width, generator=generator).to(samples.device)
    projected = (samples * direction).sum(-1)
    weights = torch.arange(projected[0].numel(), dtype=torch.float32).cos().add_(1.5)  # so that order counts
    if layout.by_position:
        weights = weights.reshape(projected.shape[1:])
        placed = torch.zeros(projected.shape)
        for place, row in enumerate(group):
            first, last = layout.span(rows, row, projected.shape[1])
            placed[place, first:last] = weights[: last - first]
        weights = placed
    weights = weights.to(projected.device)
    projected = projected.reshape(len(group), -1)
    weights = weights.reshape(-1, projected.shape[1])
    return torch.stack([(weights * projected).sum(1), (weights * projected.square()).sum(1)], 1).double()


class Batches:
    """Between the boundary's tensors and what is held of one sample.

    Args:
        device: of the boundary's tensors.
        store_dtype: that states are held in; None: their own.
    """

    def __init__(self, device: torch.device, store_dtype: torch.dtype | None) -> None:
        self.device = device
        self.store_dtype = store_dtype

    def apart(
        self, rows: Rows, group: Sequence[int], states: Mapping[str, Sequence[Tensor]], layouts: Mapping[Slot, Layout]
    ) -> Iterator[tuple[Tensor | None, ...]]:
        """For each row of ``group`` its own positions of each slot's states, on the host; one transfer a slot."""
        host: dict[Slot, Tensor] = {}
        for slot, layout in layouts.items():
            _, path, call = slot
            if path in states:
                hidden = layout.apart(states[path][call].detach(), len(group))
                host[slot] = hidden.to("cpu", self.store_dtype)
        for place, row in enumerate(group):
            pieces: list[Tensor | None] = []
            for slot, layout in layouts.items():
                piece = host[slot][place] if slot in host else None
                if piece is not None and layout.by_position:
                    first, last = layout.span(rows, row, len(piece))
                    piece = piece[first:last]
                pieces.append(None if piece is None else piece.contiguous())
            yield tuple(pieces)

    def together(
        self,
        rows: Rows,
        at: Sequence[int],
        entries: Sequence[Entry | None],
        depths: tuple[int, ...],
        layouts: Mapping[Slot, Layout],
        computed: Sequence[Computed] = (),
    ) -> dict[str, list[Start | None]]:
        """Where a pass over these rows starts: what is held, with zeros for padding, beside what was computed.

        Args:
            rows: of the whole batch.
            at: the rows wanted.
            entries: what is held of each of these; None for those in ``computed``.
            depths: of the hidden states, by slot.
            layouts: by slot.
            computed: other rows' hidden states; with these, ``at`` is the whole batch.
        """
        starts: dict[str, list[Start | None]] = {}
        for position, ((_, path, call), layout) in enumerate(layouts.items()):
            calls = starts.setdefault(path, [])
            calls += [None] * (call + 1 - len(calls))
            if not depths[position]:
                continue
            held = [
                (place, row, state)
                for place, (row, entry) in enumerate(zip(at, entries, strict=True))
                if entry is not None and (state := entry.states[position]) is not None
            ]
            others = [(group, layout.apart(states[path][call], len(group))) for group, states in computed]
            like = held[0][2] if held else others[0][1][0]
            shape = (len(at), *like.shape)
            if layout.by_position:
                shape = (len(at), rows.width(layout.side), *like.shape[1:])
            dtype = layout.dtype if self.store_dtype is not None else like.dtype
            batch = torch.zeros(shape, dtype=dtype, device=self.device)
            for place, row, state in held:
                if layout.by_position:
                    first, last = layout.span(rows, row, shape[1])
                    batch[place, first:last].copy_(state, non_blocking=True)
                else:
                    batch[place].copy_(state, non_blocking=True)
            for group, samples in others:
                batch[group] = samples
            calls[call] = Start(depths[position], layout.together(batch))
        return starts
