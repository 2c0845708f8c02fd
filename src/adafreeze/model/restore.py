"""What is changed for a while and put back: attributes, containers, and the random states of this process."""

from __future__ import annotations

import logging
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["ABSENT", "keep_random_state", "logging_from", "random_state", "restorer", "set_random_state", "temporarily"]

ABSENT = object()
"""The value of an entry that is not there."""


@contextmanager
def temporarily(changes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes (owner, name, value) within the block, and put the old values back."""
    before: list[tuple[Any, str, Any]] = []
    try:
        for owner, name, value in changes:
            before.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)


@contextmanager
def logging_from(name: str, level: int) -> Iterator[None]:
    """Let the logger ``name`` log only what has this level or a higher one within the block."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def restorer(container: Any, skip: Callable[[Any, Any, Any], bool] = lambda *_: False) -> Callable[[], list[Any]]:
    """Remember the entries of a dict, list, set or deque; the returned function puts them back in place.

    Values are compared by identity, since tensors have no truth value, and nothing is copied.

    Args:
        container: what to put back.
        skip: (key, value before, value now), either value ``ABSENT``: True leaves this entry as it is now. Lists, sets
            and deques have no keys: one skipped entry leaves the whole container.

    Returns:
        A function that returns the keys it put back ([None] for a container without keys).
    """
    if not isinstance(container, dict):
        return _restorer_of_list(container, skip)
    before = dict(container)

    def restore() -> list[Any]:
        changed = [key for key, value in before.items() if container.get(key, ABSENT) is not value]
        changed += [key for key in container if key not in before]
        changed = [k for k in changed if not skip(k, before.get(k, ABSENT), container.get(k, ABSENT))]
        for key in changed:
            if key in before:
                container[key] = before[key]
            else:
                del container[key]
        return changed

    return restore


def _restorer_of_list(container: Any, skip: Callable[[Any, Any, Any], bool]) -> Callable[[], list[Any]]:
    before = list(container)

    def restore() -> list[Any]:
        now = list(container)
        same = len(now) == len(before) and all(map(operator.is_, now, before))
        if same or any(skip(None, value, value) for value in (*before, *now)):
            return []
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(before)
        return [None]

    return restore


def random_state() -> dict[str, Any]:
    """The random states of Python, NumPy and torch (all devices) in this process."""
    devices = _accelerators()
    every = getattr(devices, "get_rng_state_all", None) or (lambda: [devices.get_rng_state()])
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "cpu": torch.get_rng_state(),
        "accelerators": every() if devices is not None else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore ``random_state()``; states of accelerators that this machine does not have are ignored."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    devices = _accelerators()
    for index, one in enumerate(state["accelerators"][: torch.accelerator.device_count()]):
        numbered = hasattr(devices, "set_rng_state_all")  # MPS is a single device
        devices.set_rng_state(one, *([index] if numbered else []))


def _accelerators() -> Any:
    return torch.get_device_module() if torch.accelerator.is_available() else None


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Restore all random states after the block."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
