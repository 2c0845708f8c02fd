"""Draws samples for the probe from a dataloader, batches, or one batch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ..errors import AdafreezeError, ProbeError, warn
from ..model.batch import (
    CHUNK,
    INPUTS,
    REAL_TOKENS,
    Chunk,
    as_mapping,
    by_sample,
    chunks_of,
    leaves,
    main_input,
    real_tokens,
    rows_of,
)
from ..model.restore import keep_random_state
from ..model.untouched import untouched

__all__ = [
    "LARGER",
    "Calls",
    "batch_size_of",
    "calls_of",
    "collated",
    "collect",
    "length_of",
    "samples_of",
    "split",
    "train_samples",
    "varies",
]

# Without graph and optimizer, a batch this many times as large takes no more memory than a training step.
LARGER = 4

# At least this many samples, if available, so that the probe is not a single long document.
LEAST_SAMPLES = 32
MOST_SAMPLES = 512

# Names with one entry per sample in every collator. For other names, samples are also collated alone to check.
BY_SAMPLE = {*INPUTS, "attention_mask", "token_type_ids", "labels", "decoder_input_ids", "decoder_attention_mask"}


class Calls(list[Chunk]):
    """A batch that the host takes apart: the inputs of each call of the model."""


def calls_of(batch: Any) -> list[Any]:
    """A batch as the list of what the model is called with."""
    return list(batch) if isinstance(batch, Calls) else [batch]


OWN_SAMPLES = "Pass your own samples: SafeCallback(probe=[batch, ...]) or Safe(..., probe=[batch, ...])"


def split(batch: Any, pad_token_id: int | None = None) -> Iterator[Chunk]:
    """Check a batch and cut it into chunks of CHUNK samples, if it can be cut; an empty batch yields nothing."""
    if isinstance(batch, Calls):
        for call in batch:
            yield from split(call, pad_token_id)
        return
    chunk = as_mapping(batch)
    if chunk is None:
        raise ProbeError(
            f"A probe batch is a {type(batch).__name__}, not a mapping from input names to tensors, but the model is "
            "called as model(**batch).",
            fix="Return a dict from the collator, or pass batches by the names of the model's forward: "
            'probe=[{"input_ids": ..., "attention_mask": ...}, ...]',
        )
    if main_input(chunk) is None:
        names = "labels" if set(chunk) == {"labels"} else ", ".join(chunk) or "nothing"
        raise ProbeError(
            f"A probe batch contains only {names}, no tensor whose first dimension is the samples.",
            fix="Pass batches as the model gets them in training: probe=train_dataloader",
        )
    ids = chunk.get("input_ids")
    if isinstance(ids, Tensor) and chunk.get("attention_mask") is None and pad_token_id is not None and ids.ndim == 2:
        real = ids != pad_token_id
        if not bool((real[:, 0] & real[:, -1]).all()):
            if chunk.get("position_ids") is None:  # packed rows come without a mask, and their padding is at the end
                warn(
                    "The probe has padded rows and no attention_mask: the model attends to the padding, in training "
                    "too; only the scores leave it out.",
                    fix="Return attention_mask from the collator.",
                )
            chunk[REAL_TOKENS] = real
    if rows_of(chunk):
        yield from chunks_of(chunk)


def collect(source: Any, tokens: int, seed: int, pad_token_id: int | None) -> list[Chunk]:
    """Chunks from ``source`` with at least ``tokens`` real tokens and LEAST_SAMPLES samples, if it has that many.

    Does not change the state of a dataloader's dataset and collator.

    Raises:
        ProbeError: ``source`` has no usable samples, or drawing would use them up.
    """
    if _is_loader(source):
        dataset = train_samples(source).dataset
        try:
            with untouched(dataset, source.collate_fn):
                return _enough(_from_loader(source, seed), tokens, pad_token_id)
        except AdafreezeError:
            raise
        except Exception as error:  # from the user's code, on samples in the probe's order
            raise ProbeError(
                f"Collating single samples of {type(dataset).__name__} for the probe failed: "
                f"{type(error).__name__}: {error}",
                fix=OWN_SAMPLES,
            ) from error
    if as_mapping(source) is not None:
        source = [source]
    if not isinstance(source, Iterable):
        raise ProbeError(
            f"A probe cannot be drawn from {type(source).__name__}: it is not a dataloader, a batch, or an iterable of "
            "batches.",
            fix="Safe(model, probe=train_dataloader, ...)",
        )
    return _enough(source, tokens, pad_token_id)


def _enough(batches: Iterable[Any], tokens: int, pad_token_id: int | None) -> list[Chunk]:
    taken: list[Chunk] = []
    seen_tokens = seen_samples = 0
    for chunk in itertools.chain.from_iterable(split(batch, pad_token_id) for batch in batches):
        taken.append(chunk)
        seen_samples += rows_of(chunk)
        seen_tokens += real_tokens(chunk)
        if seen_samples >= MOST_SAMPLES or (seen_tokens >= tokens and seen_samples >= LEAST_SAMPLES):
            break
    return taken


def _is_loader(source: Any) -> bool:
    return hasattr(source, "dataset") and hasattr(source, "collate_fn")


def train_samples(loader: Any) -> Any:
    """``loader``, if its dataset has samples by index.

    Raises:
        ProbeError: its samples come in order only, perhaps only once.
    """
    dataset = getattr(loader, "dataset", None)
    by_index = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not _is_loader(loader) or isinstance(dataset, IterableDataset) or not by_index:
        raise ProbeError(
            f"A probe cannot be drawn from {type(loader if dataset is None else dataset).__name__} without using up "
            "samples of the run: it has no samples by index.",
            fix=OWN_SAMPLES,
        )
    return loader


def _from_loader(loader: Any, seed: int) -> Iterator[Any]:
    """Batches in random order; of samples of similar length, since padding costs time and is not scored."""
    dataset, collate = loader.dataset, loader.collate_fn
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator)[:MOST_SAMPLES].tolist()
    samples = (dataset[index] for index in order)
    if getattr(loader, "batch_sampler", loader) is None:  # the dataset's entries are batches
        yield from map(collate, samples)
        return
    while window := list(itertools.islice(samples, LEAST_SAMPLES)):
        window.sort(key=length_of)
        for start in range(0, len(window), CHUNK):
            yield from collated(collate, window[start : start + CHUNK])


def length_of(sample: Any) -> int:
    """Tokens of a sample of text; 0 if unknown."""
    ids = sample.get("input_ids") if isinstance(sample, Mapping) else None
    return len(ids) if ids is not None else 0


def collated(collate: Any, samples: list[Any]) -> list[Any]:
    """What the model is called with for these samples: together if that can be cut by sample, else for each sample."""

    def _together(some: list[Any]) -> list[Any]:  # copies, since some collators pop from the samples
        return calls_of(collate([copy.copy(one) if isinstance(one, (dict, list)) else one for one in some]))

    with suppress(Exception):  # lengths that cannot be stacked, as in training with batches of one
        calls = _together(samples)
        inputs = [as_mapping(call) or {} for call in calls]
        if any(main_input(one) is None for one in inputs):
            return calls  # which ``split`` refuses
        # A padding-free collator puts all samples into one row.
        fits = all(by_sample(one) and rows_of(one) >= len(samples) for one in inputs)
        # Of tensors only: words and flags beside them are no reason to collate every sample once more.
        tensors = {path[-1] for one in inputs for path, value in leaves(one) if isinstance(value, Tensor)}
        known = tensors <= BY_SAMPLE
        if fits and (known or all(map(_has_one_each, itertools.chain(*(_together([sample]) for sample in samples))))):
            return calls
    return [call for sample in samples for call in _together([sample])]


def _has_one_each(batch: Any) -> bool:
    return all(len(value) == 1 for _, value in leaves(as_mapping(batch)) if isinstance(value, Tensor) and value.ndim)


def samples_of(source: Any) -> int | None:
    """Number of samples in a dataloader; None if unknown, or if the same sample may be in many rows."""
    dataset: Any = None if getattr(source, "rows_repeat", False) else getattr(source, "dataset", None)
    return len(dataset) if hasattr(dataset, "__len__") and hasattr(source, "collate_fn") else None


def batch_size_of(source: Any) -> int:
    """Number of samples in a batch of a dataloader, or in a batch; 1 if unknown."""
    for one in (source, getattr(source, "batch_sampler", None)):
        size = getattr(one, "batch_size", None)
        if isinstance(size, int):
            return size
    if isinstance(source, (list, tuple)) and source:
        source = source[0]
    return max(1, rows_of(as_mapping(source) or {}))


def varies(source: Any) -> bool:
    """Whether a dataloader returns other inputs for the same samples each time (random masking, augmentation).

    Draws a few samples twice without advancing random states of the run. False if this cannot be checked.
    """
    with suppress(Exception):  # training itself raises what is wrong with the data
        dataset, collate = train_samples(source).dataset, source.collate_fn
        batched = getattr(source, "batch_sampler", source) is not None
        index = range(min(CHUNK if batched else 1, len(dataset)))
        with untouched(dataset, collate), keep_random_state():
            one, other = (
                dict(leaves(dict(enumerate(map(as_mapping, calls_of(collate(samples)))))))
                for samples in ([dataset[i] for i in index] if batched else dataset[0] for _ in range(2))
            )
        return one.keys() != other.keys() or any(
            not torch.equal(value, other[path])
            for path, value in one.items()
            if isinstance(value, Tensor) and "label" not in path[-1]
        )
    return False
