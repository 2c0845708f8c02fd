"""Drawing samples for the probe from whatever the user has: a dataloader, batches, one batch."""

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
from ..model.random_state import keep_random_state
from ..model.untouched import untouched

__all__ = [
    "batch_size_of",
    "collect",
    "samples_of",
    "split",
    "train_samples",
    "varies",
]

# Tokens come from at least this many samples where the data has them, so that one long document is not the probe.
LEAST_SAMPLES = 32
MOST_SAMPLES = 512

# Names that hold one entry per sample in every collator; of others, samples are collated alone to see.
BY_SAMPLE = {*INPUTS, "attention_mask", "token_type_ids", "labels", "decoder_input_ids", "decoder_attention_mask"}

OWN_SAMPLES = "Give samples of your own: SafeCallback(probe=[batch, ...]) or Safe(..., probe=[batch, ...])"


def split(batch: Any, pad_token_id: int | None = None) -> Iterator[Chunk]:
    """Check a batch, and cut it into chunks of CHUNK samples where it can be cut; of an empty one there are none."""
    chunk = _checked(batch, pad_token_id)
    if rows_of(chunk):
        yield from chunks_of(chunk)


def collect(source: Any, tokens: int, seed: int, pad_token_id: int | None) -> list[Chunk]:
    """Chunks from ``source`` until they hold ``tokens`` real tokens and LEAST_SAMPLES samples.

    Of a dataloader neither dataset nor collator keeps a trace of it.

    Raises:
        ProbeError: nothing can be drawn from it, or only by using it up.
    """
    if not _is_loader(source):
        return _enough((c for batch in _batches(source) for c in split(batch, pad_token_id)), tokens)
    dataset = train_samples(source).dataset
    try:
        with untouched(dataset, source.collate_fn):
            return _enough(_from_loader(source, seed, pad_token_id), tokens)
    except AdafreezeError:
        raise
    except Exception as error:  # of the user's own code, on samples in an order of the probe's
        raise ProbeError(
            f"No probe can be drawn from the train data: {type(error).__name__}: {error}",
            cause=f"{type(dataset).__name__} was asked for single samples, and they were collated as the dataloader "
            "does it.",
            fix=OWN_SAMPLES,
        ) from error


def _enough(chunks: Iterator[Chunk], tokens: int) -> list[Chunk]:
    taken: list[Chunk] = []
    seen_tokens = seen_samples = 0
    for chunk in chunks:
        taken.append(chunk)
        seen_samples += rows_of(chunk)
        seen_tokens += real_tokens(chunk)
        if seen_samples >= MOST_SAMPLES or (seen_tokens >= tokens and seen_samples >= LEAST_SAMPLES):
            break
    return taken


def _batches(source: Any) -> Iterable[Any]:
    if as_mapping(source) is not None:
        return [source]
    if isinstance(source, Iterable):
        return source
    raise ProbeError(
        f"A probe cannot be drawn from {type(source).__name__}.",
        cause="It is neither a dataloader, nor a batch, nor an iterable of batches.",
        fix="Safe(model, probe=train_dataloader, ...)",
    )


def _is_loader(source: Any) -> bool:
    return hasattr(source, "dataset") and hasattr(source, "collate_fn")


def train_samples(loader: Any) -> Any:
    """A dataloader of the run, if samples can be drawn from its dataset by index.

    Raises:
        ProbeError: it can only be gone through, as training does; perhaps only once.
    """
    dataset = getattr(loader, "dataset", None)
    by_index = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not _is_loader(loader) or isinstance(dataset, IterableDataset) or not by_index:
        raise ProbeError(
            f"A probe cannot be drawn from {type(loader if dataset is None else dataset).__name__} without using up "
            "samples of the run.",
            cause="Its samples cannot be taken by index, and may come only once: what the probe takes, training would "
            "miss.",
            fix=OWN_SAMPLES,
        )
    return loader


def _from_loader(loader: Any, seed: int, pad_token_id: int | None) -> Iterator[Chunk]:
    collate = loader.collate_fn
    if getattr(loader, "batch_sampler", loader) is None:  # the dataset's entries are batches
        for batch in _samples(loader.dataset, seed):
            yield from split(collate(batch), pad_token_id)
        return
    for samples in _sample_groups(loader.dataset, seed):
        for batch in _collated(collate, samples):
            yield from split(batch, pad_token_id)


def _collated(collate: Any, samples: list[Any]) -> list[Any]:
    """One batch of these samples if it can be cut again, else each sample alone."""

    def of(some: list[Any]) -> Any:
        return collate([copy.copy(one) if isinstance(one, (dict, list)) else one for one in some])  # some pop from it

    with suppress(Exception):  # lengths that only fit one by one, as in training with batches of one
        batch = of(samples)
        inputs = as_mapping(batch) or {}
        if main_input(inputs) is None:
            return [batch]  # which is refused
        # Padding-free, it has one row of them all.
        fits = by_sample(inputs) and rows_of(inputs) >= len(samples)
        if fits and (inputs.keys() <= BY_SAMPLE or all(_has_one_each(of([sample])) for sample in samples)):
            return [batch]
    return [of([sample]) for sample in samples]


def _has_one_each(batch: Any) -> bool:
    return all(len(value) == 1 for _, value in leaves(as_mapping(batch)) if isinstance(value, Tensor) and value.ndim)


def _sample_groups(dataset: Any, seed: int) -> Iterator[list[Any]]:
    """Groups of CHUNK samples; sorted by length within a window, since padding is computed and not looked at."""
    samples = _samples(dataset, seed)
    while window := list(itertools.islice(samples, LEAST_SAMPLES)):
        window.sort(key=_length)
        yield from (window[start : start + CHUNK] for start in range(0, len(window), CHUNK))


def _length(sample: Any) -> int:
    ids = sample.get("input_ids") if isinstance(sample, Mapping) else None
    return len(ids) if ids is not None else 0


def _samples(dataset: Any, seed: int) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator)[:MOST_SAMPLES].tolist()
    return (dataset[index] for index in order)


def _checked(batch: Any, pad_token_id: int | None) -> Chunk:
    chunk = as_mapping(batch)
    if chunk is None:
        raise ProbeError(
            f"A probe batch is a {type(batch).__name__}.",
            cause="The model is called as model(**batch), so a batch must map input names to tensors.",
            fix="Let the collator return a dict, or give batches by the names in the model's forward: "
            'probe=[{"input_ids": ..., "attention_mask": ...}, ...]',
        )
    if main_input(chunk) is None:
        only = "only labels" if set(chunk) == {"labels"} else f"only {', '.join(chunk) or 'nothing'}"
        raise ProbeError(
            f"A probe batch holds {only}.",
            cause="Scores are measured on a forward pass, which needs a tensor with the samples as first dimension.",
            fix="Pass batches as the model gets them in training: probe=train_dataloader",
        )
    ids = chunk.get("input_ids")
    if isinstance(ids, Tensor) and chunk.get("attention_mask") is None and pad_token_id is not None and ids.ndim == 2:
        real = ids != pad_token_id
        if not bool((real[:, 0] & real[:, -1]).all()):
            warn(
                "The probe has padded rows and no attention_mask.",
                cause="The model attends to the padding, in training too; scores leave it out by the pad token id.",
                fix="Let the collator return attention_mask.",
            )
            chunk[REAL_TOKENS] = real
    return chunk


def samples_of(source: Any) -> int | None:
    """Samples of one pass over a dataloader; None where that is not known."""
    dataset: Any = getattr(source, "dataset", None)
    return len(dataset) if hasattr(dataset, "__len__") and hasattr(source, "collate_fn") else None


def batch_size_of(source: Any) -> int:
    """Samples of a micro-batch: of a dataloader, or of a batch; 1 where that is not known."""
    for one in (source, getattr(source, "batch_sampler", None)):
        size = getattr(one, "batch_size", None)
        if isinstance(size, int):
            return size
    if isinstance(source, (list, tuple)) and source:
        source = source[0]
    return max(1, rows_of(as_mapping(source) or {}))


def varies(source: Any) -> bool:
    """Whether a dataloader gives the same samples other inputs when asked again (random masking, augmentation).

    Draws a few samples twice; no random state of the run advances. False where it cannot be told.
    """
    with suppress(Exception):  # whatever is wrong with the data, training itself will say it
        dataset, collate = train_samples(source).dataset, source.collate_fn
        batched = getattr(source, "batch_sampler", source) is not None
        index = range(min(CHUNK if batched else 1, len(dataset)))
        with untouched(dataset, collate), keep_random_state():
            one, other = (
                dict(leaves(as_mapping(collate([dataset[i] for i in index] if batched else dataset[0]))))
                for _ in range(2)
            )
        return one.keys() != other.keys() or any(
            not torch.equal(value, other[path])
            for path, value in one.items()
            if isinstance(value, Tensor) and "label" not in path[-1]
        )
    return False
