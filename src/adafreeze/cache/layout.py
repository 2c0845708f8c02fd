"""How samples lie in a batch of hidden states: splitting batches into samples, and assembling them again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..freeze.prefix import Slot, Start
from ..model.rows import Rows, Span
from .codec import Codec
from .tiers import Entry

__all__ = ["Layout", "assemble", "find_layout", "fingerprints", "split"]


@dataclass(frozen=True)
class Layout:
    """How the hidden states of one call of a stack lie in a batch.

    Attributes:
        dtype: of the hidden states.
        dimension: of the samples: 0 in most models, 1 where the sequence comes first.
        rows: per sample: 4 where a sample is four choices that the model flattens.
        interleaved: the first rows of all samples come first, not all rows of the first sample.
        by_position: dimension 1 is the text's, so that padding can be left out; else a sample is stored whole.
        side: whose positions these are: 0 the encoder's (or only) text, 1 the decoder's.
        packed: samples are documents in one row.
    """

    dtype: torch.dtype
    dimension: int = 0
    rows: int = 1
    interleaved: bool = False
    by_position: bool = False
    side: int = 0
    packed: bool = False

    def by_sample(self, hidden: Tensor, rows: Rows, group: Sequence[int]) -> Tensor:
        """(samples, ...) from the boundary's tensor of these rows; packed documents are padded to the longest."""
        samples = len(group)
        if self.packed:
            lengths = [rows.length(row) for row in group]
            split = pad_sequence(list(hidden[0].split(lengths)), batch_first=True)
            return F.pad(split, (0, 0) * (hidden.ndim - 2) + (0, rows.width(0) - split.shape[1]))
        lead = hidden.movedim(self.dimension, 0)
        if self.rows == 1:
            return lead
        if self.interleaved:
            return lead.unflatten(0, (self.rows, samples)).transpose(0, 1)
        return lead.unflatten(0, (samples, self.rows))

    def batched(self, samples: Tensor, rows: Rows, group: Sequence[int]) -> Tensor:
        """The boundary's tensor of these rows from (samples, ...)."""
        if self.packed:
            return torch.cat([samples[place, : rows.length(row)] for place, row in enumerate(group)])[None]
        if self.rows > 1:
            samples = (samples.transpose(0, 1) if self.interleaved else samples).flatten(0, 1)
        return samples.movedim(0, self.dimension).contiguous()

    def span(self, rows: Rows, row: int, width: int) -> Span:
        """The positions of a row that are stored."""
        return rows.spans(self.side)[row] if self.by_position else (0, width)


def find_layout(whole: Tensor, part: Tensor, samples: int, of_part: int) -> Layout | None:
    """Find the dimension of the samples by comparing the shapes of two batches of different sizes.

    Args:
        whole: hidden states of a batch.
        part: of another batch at the same width.
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


def fingerprints(layout: Layout, hidden: Tensor, rows: Rows, group: Sequence[int]) -> Tensor:
    """(samples, 2): a fingerprint of what enters block 0 for each row of ``group``, without padding.

    The sum and the sum of squares, weighted by position, of a fixed random projection of the features. A key covers
    only what the model is called with. The fingerprint also covers embeddings that were written to through ``.data``,
    hooks on them, and noise that begins during the run.
    """
    samples = layout.by_sample(hidden, rows, group).float()
    if samples.ndim < 2:
        samples = samples.reshape(len(group), -1)
    generator = torch.Generator().manual_seed(samples.shape[-1])
    direction = torch.randn(samples.shape[-1], generator=generator).to(samples.device)
    projected = (samples * direction).sum(-1)
    weights = torch.arange(projected[0].numel(), dtype=torch.float32).cos().add_(1.5)  # so that order counts
    if layout.by_position:
        unpadded = torch.zeros(projected.shape)
        weights = weights.reshape(projected.shape[1:])
        for place, row in enumerate(group):
            first, last = layout.span(rows, row, projected.shape[1])
            unpadded[place, first:last] = weights[: last - first]
        weights = unpadded
    projected = projected.reshape(len(group), -1)
    weights = weights.to(projected.device).reshape(-1, projected.shape[1])
    return torch.stack([(weights * projected).sum(1), (weights * projected.square()).sum(1)], 1).double()


def split(
    layouts: Mapping[Slot, Layout],
    slots: Sequence[Slot],
    states: Mapping[Slot, Tensor],
    rows: Rows,
    group: Sequence[int],
    codec: Codec,
) -> Iterator[tuple[Tensor | None, ...]]:
    """For each row of ``group`` its unpadded states by slot, encoded, on the CPU (one transfer per slot)."""
    host = {
        slot: codec.encode(layout.by_sample(states[slot].detach(), rows, group)).cpu()
        for slot, layout in layouts.items()
        if slot in states
    }
    for place, row in enumerate(group):
        pieces: list[Tensor | None] = []
        for slot in slots:
            piece = host[slot][place] if slot in host else None
            if piece is not None:
                first, last = layouts[slot].span(rows, row, len(piece))
                piece = piece[first:last].contiguous()
            pieces.append(piece)
        yield tuple(pieces)


def assemble(
    layouts: Mapping[Slot, Layout],
    depths: Mapping[Slot, int],
    entries: Mapping[int, Entry],
    computed: Sequence[tuple[Sequence[int], Mapping[Slot, Tensor]]],
    rows: Rows,
    at: Sequence[int],
    device: torch.device,
    codec: Codec,
) -> dict[Slot, Start]:
    """Where a pass over some rows of a batch starts: stored states, with zeros for padding, and computed ones.

    Args:
        layouts: by slot.
        depths: of the hidden states, by slot, in the order of the entries' states.
        entries: stored states, by row.
        computed: rows and their hidden states. If there are any, ``at`` must be the whole batch.
        rows: of the whole batch.
        at: the rows of the pass.
        device: of the boundary's tensors.
        codec: decodes stored states.
    """
    starts = {}
    for position, (slot, depth) in enumerate(depths.items()):
        if not depth:
            continue
        layout = layouts[slot]
        stored = [
            (place, row, codec.decode(state.to(device, non_blocking=True), layout.dtype) if codec.rounds else state)
            for place, row in enumerate(at)
            if row in entries and (state := entries[row].states[position]) is not None
        ]
        fresh = [(group, layout.by_sample(states[slot], rows, group)) for group, states in computed]
        like = stored[0][2] if stored else fresh[0][1][0]
        shape = (len(at), rows.width(layout.side) if layout.by_position else len(like), *like.shape[1:])
        batch = torch.zeros(shape, dtype=like.dtype, device=device)
        for place, row, state in stored:
            first, last = layout.span(rows, row, shape[1])
            batch[place, first:last].copy_(state, non_blocking=True)
        for group, samples in fresh:
            batch[group] = samples
        starts[slot] = Start(depth, layout.batched(batch, rows, at))
    return starts
