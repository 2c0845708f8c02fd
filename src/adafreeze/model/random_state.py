"""The random states of Python, NumPy and torch (all devices) in this process."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["keep_random_state", "random_state", "set_random_state"]


def random_state() -> dict[str, Any]:
    """The current random states."""
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
