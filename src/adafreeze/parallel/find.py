"""The table of libraries that distribute a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..model.units import Unit
from .base import Parallel
from .ddp import DDP
from .deepspeed import DeepSpeedZero
from .fsdp import FSDP2

__all__ = ["find_parallel"]

HOSTS: tuple[type[Parallel], ...] = (FSDP2, DeepSpeedZero, DDP, Parallel)


def find_parallel(model: nn.Module, optimizer: Any, units: Mapping[str, Unit]) -> Parallel:
    """The library that distributes ``model``, ready for freezes; checked before step 0.

    Args:
        model: as the host calls it, or inside its wrapper.
        optimizer: of the run; accelerate's or DeepSpeed's wrapper, or the real one.
        units: by name.

    Raises:
        RunError: nn.DataParallel, FSDP1, or an unknown version of DeepSpeed.
    """
    hosts = (host.find(model, optimizer, units) for host in HOSTS)
    return next(host for host in hosts if host is not None)
