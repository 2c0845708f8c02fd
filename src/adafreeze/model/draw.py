"""Drawing samples for the probe from whatever the user has: a dataloader, batches, one batch."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ProbeError, warn

Chunk = dict[str, Any]

# One forward pass of the probe takes this many samples: enough to be efficient, few enough to cut finely.
CHUNK = 8
# Tokens come from at least this many samples where the data has them, so that one long document is not the probe.
LEAST_SAMPLES = 32
MOST_SAMPLES = 512

# A mask for the probe alone: under its own name, since passing it on would change what the model computes.
REAL_TOKENS = "real_tokens"

INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")


def rows_of(chunk: Mapping[str, Any]) -> int:
    """The number of samples in a chunk: the first dimension of its model input."""
    return next((len(chunk[name]) for name in INPUTS if isinstance(chunk.get(name), Tensor)), 0)


def split(batch: Any, pad_token_id: int | None = None) -> Iterator[Chunk]:
    """Check a batch and cut it into chunks of CHUNK samples."""
    tensors = _checked(batch, pad_token_id)
    rows = rows_of(tensors)
    for start in range(0, rows, CHUNK):
        yield {
            key: value[start : start + CHUNK]
            if isinstance(value, Tensor) and value.ndim and len(value) == rows
            else value
            for key, value in tensors.items()
        }


def collect(source: Any, tokens: int, seed: int, pad_token_id: int | None) -> Iterator[Chunk]:
    """Chunks from ``source`` until they hold ``tokens`` real tokens and LEAST_SAMPLES samples."""
    seen_tokens = seen_samples = 0
    for chunk in _chunks(source, seed, pad_token_id):
        yield chunk
        seen_samples += rows_of(chunk)
        seen_tokens += real_tokens(chunk)
        if seen_samples >= MOST_SAMPLES or (seen_tokens >= tokens and seen_samples >= LEAST_SAMPLES):
            return


def _chunks(source: Any, seed: int, pad_token_id: int | None) -> Iterator[Chunk]:
    if isinstance(source, Mapping) or (hasattr(source, "data") and isinstance(source.data, Mapping)):
        yield from split(source, pad_token_id)
    elif hasattr(source, "dataset") and hasattr(source, "collate_fn"):
        collate = _own_copy(source.collate_fn)
        for samples in _sample_groups(source.dataset, seed):
            batch = collate(samples)
            # Padding-free, it makes one row of them all.
            if len(samples) > 1 and isinstance(batch, Mapping) and rows_of(batch) == 1:
                for sample in samples:
                    yield from split(collate([sample]), pad_token_id)
            else:
                yield from split(batch, pad_token_id)
    elif isinstance(source, Iterable):
        for batch in source:
            yield from split(batch, pad_token_id)
    else:
        raise ProbeError(
            f"A probe cannot be drawn from {type(source).__name__}.",
            cause="It is neither a dataloader, nor a batch, nor an iterable of batches.",
            fix="Safe(model, probe=train_dataloader, ...)",
        )


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
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(dataset), generator=generator)[:MOST_SAMPLES].tolist()
        return (dataset[index] for index in order)
    stream = iter(dataset)
    if stream is dataset:
        raise ProbeError(
            f"A probe cannot be drawn from {type(dataset).__name__} without using up samples of the run.",
            cause="It is a one-way stream: what the probe takes, training would miss.",
            fix="Give samples of your own: SafeCallback(probe=[batch, ...]) or Safe(..., probe=[batch, ...])",
        )
    return itertools.islice(stream, MOST_SAMPLES)


def _checked(batch: Any, pad_token_id: int | None) -> Chunk:
    data = batch if isinstance(batch, Mapping) else getattr(batch, "data", None)
    if not isinstance(data, Mapping):
        raise ProbeError(
            f"A probe batch is a {type(batch).__name__}.",
            cause="The model is called as model(**batch), so a batch must map input names to tensors.",
            fix='Use a collator that returns a dict, e.g. {"input_ids": ..., "attention_mask": ..., "labels": ...}.',
        )
    chunk = dict(data)
    names = [name for name in INPUTS if isinstance(chunk.get(name), Tensor)]
    if not names:
        only = "only labels" if set(chunk) == {"labels"} else f"only {', '.join(map(str, chunk)) or 'nothing'}"
        raise ProbeError(
            f"A probe batch holds {only}.",
            cause=f"Scores are measured on a forward pass, which needs one of {', '.join(INPUTS)}.",
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


def padded_tokens(chunk: Chunk) -> int:
    """Positions that the model computes for a chunk."""
    ids = chunk.get("input_ids")
    # Patches of an image and frames of a sound are counted only by the model; 64 a sample is enough to spread.
    return ids.numel() if isinstance(ids, Tensor) else 64 * rows_of(chunk)


def real_tokens(chunk: Chunk) -> int:
    """Those of them that are no padding."""
    for name in (REAL_TOKENS, "attention_mask"):
        mask = chunk.get(name)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return int(mask.sum())
    return padded_tokens(chunk)


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
    data = source if isinstance(source, Mapping) else getattr(source, "data", {})
    return max(1, rows_of(data) if isinstance(data, Mapping) else 1)


def varies(source: Any) -> bool:
    """Whether a dataloader gives the same samples other inputs when asked again (random masking, augmentation).

    Draws a few samples twice; no random state of the run advances. False where it cannot be told.
    """
    dataset: Any = getattr(source, "dataset", None)
    collate = getattr(source, "collate_fn", None)
    if collate is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return False
    collate, index = _own_copy(collate), range(min(CHUNK, len(dataset)))
    with suppress(Exception):  # whatever is wrong with the data, training itself will say it
        with keep_random_state():
            batches = [dict(collate([dataset[i] for i in index])) for _ in range(2)]
        return any(
            not torch.equal(batches[0][name], batches[1][name])
            for name in INPUTS
            if isinstance(batches[0].get(name), Tensor)
        )
    return False


def _own_copy(collate: Callable[..., Any]) -> Callable[..., Any]:
    """A collator whose own random generator (masking) is not the run's."""
    twin = copy.copy(collate)
    generator = getattr(collate, "generator", None)
    if generator is not None and twin is not collate:
        twin.generator = copy.deepcopy(generator)  # type: ignore[attr-defined]
    return twin


def random_state() -> dict[str, Any]:
    """The random states of Python, NumPy, torch's CPU and all accelerators of this process."""
    devices = _accelerators()
    every = getattr(devices, "get_rng_state_all", None) or (lambda: [devices.get_rng_state()])
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "cpu": torch.get_rng_state(),
        "accelerators": every() if devices is not None else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what ``random_state`` found; of accelerators, on as many as there are."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    devices = _accelerators()
    for index, one in enumerate(state["accelerators"][: torch.accelerator.device_count()]):
        numbered = hasattr(devices, "set_rng_state_all")  # MPS is one, without a number
        devices.set_rng_state(one, *([index] if numbered else []))


def _accelerators() -> Any:
    return torch.get_device_module() if torch.accelerator.is_available() else None


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Put the random states of Python, NumPy and torch (all devices) back as they were."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
