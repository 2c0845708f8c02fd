"""Computes the states of all training samples ahead of the run, in large batches and without a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from tqdm.auto import tqdm

from ..errors import RunError, note
from ..measure.draw import LARGER, batch_size_of, calls_of, collated, length_of, train_samples
from ..model.batch import Call, as_mapping
from ..model.blocks import device_of
from ..model.restore import keep_random_state, temporarily
from ..model.untouched import untouched
from .lookup import PrefixCache

__all__ = ["fill"]


def fill(cache: PrefixCache, source: Any, *, rank: int = 0, ranks: int = 1, strict: bool = False) -> None:
    """Store the states of a dataloader's samples that are not stored yet.

    Samples of similar length share a batch, so that little is padding. What is stored already, by this run or another,
    is not computed again: after an interruption this goes on where it was.

    Args:
        cache: of the run.
        source: the train dataloader; its dataset and collator are used.
        rank: of this process; it takes every ``ranks``-th batch.
        ranks: processes.
        strict: raise if the states cannot be kept, or not all of them.

    Raises:
        ProbeError: the source has no samples by index.
        RunError: ``strict``, and the cache is off, or its budget is too small.
    """
    dataset, collate = train_samples(source).dataset, source.collate_fn
    model, count, device = cache.prefix.model, len(dataset), device_of(cache.prefix.model)
    found = computed = 0
    flags = [(module, "training", module.training) for module in model.modules()]
    with untouched(dataset, collate), keep_random_state(), temporarily(flags):
        model.train()  # which blocks of the prefix ignore
        # A dataset whose entries are batches has no samples to sort.
        by_sample = getattr(source, "batch_sampler", source) is not None
        lengths = [length_of(dataset[index]) for index in range(count)] if by_sample else [1] * count
        batches = _batches(lengths, LARGER * batch_size_of(source) if by_sample else 1)[rank::ranks]
        bar = tqdm(total=sum(map(len, batches)), desc="filling the prefix cache", unit="samples", disable=rank > 0)
        for number, indices in enumerate(batches):
            samples = [dataset[index] for index in indices]
            for call in collated(collate, samples) if by_sample else calls_of(collate(samples[0])):
                inputs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), as_mapping(call) or {})
                stored, new = cache.fill(Call.of(model, (), inputs))
                found, computed = found + stored, computed + new
            bar.update(len(indices))
            if strict and cache.off is None and not cache.store.keeps:
                raise RunError(
                    f"The states of this model cannot be kept: {cache.store.not_kept}.", fix="Train without filling."
                )
            if number == 0 and cache.written:
                share = sum(lengths[index] for index in indices) / max(1, sum(lengths)) or len(indices) / count
                cache.store.check_size(count, round(cache.written / share), strict=strict)
            if cache.off is not None or not (cache.store.has_room or found):
                break
        else:
            cache.all_filled = cache.store.has_room and ranks == 1  # other ranks' samples come here later
        bar.close()
    if cache.off is not None:
        if strict:
            raise RunError(f"The states of this model cannot be stored: {cache.off}.", fix="Train without filling.")
        return
    cache.filled = found + computed
    whose = f" by rank {rank} of {ranks}" if ranks > 1 else ""
    note(f"Prefix cache filled{whose}: {found:,} states were stored, {computed:,} are new.")


def _batches(lengths: list[int], size: int) -> list[list[int]]:
    """Indices by length. The first batch has the shortest and the longest, so that the checks see all widths."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    short, long = size // 2, max(size // 2, len(order) - size + size // 2)
    order = [*order[:short], *order[long:], *order[short:long]]
    return [order[start : start + size] for start in range(0, len(order), size)]
