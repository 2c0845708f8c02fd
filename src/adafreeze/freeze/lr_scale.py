"""LRScaler: larger steps of the live units make up for those that frozen units no longer take."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch

from ..model.units import Unit
from .before_step import WhileStepping

__all__ = ["LRScaler", "sqrt_scale"]

MOST_SCALE = 3.0  # larger scales were never tried


def sqrt_scale(units: int, live: int) -> float:
    """√(units / live), at most 3: with it a step of the live units is as long as one of all units was.

    Adam and similar optimizers move every parameter by about the learning rate, so a step over N parameters has length
    lr·√N. With n of them left, lr·√(N/n) keeps that length.

    >>> [round(sqrt_scale(6, live), 3) for live in (6, 2, 1, 0)]
    [1.0, 1.732, 2.449, 3.0]
    """
    return min(MOST_SCALE, math.sqrt(units / live)) if live else MOST_SCALE


class LRScaler:
    """Scales the learning rates of the param groups with adapters, only while the optimizer steps.

    A head in the same group as an adapter is scaled as well.

    Args:
        optimizer: the real one, or a wrapper of accelerate or DeepSpeed; None does nothing.
        rule: ``"sqrt"``, or the factor to use once anything is frozen.
        units: that can freeze. If no group contains their parameters (ZeRO has flat copies), all groups are scaled.

    Attributes:
        scale: the factor; 1 changes nothing.
    """

    def __init__(self, optimizer: Any, rule: float | str, units: Collection[Unit]) -> None:
        self.scale, self._rule, self._units = 1.0, rule, units
        self._own: set[int] = set()  # ids of their parameters
        while (inner := getattr(optimizer, "optimizer", None)) is not None:
            optimizer = inner
        self._optimizer = optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
        self._rates = WhileStepping(self._optimizer, "lr", self._scaled) if self._optimizer is not None else None

    def after_freeze(self, frozen: Collection[str]) -> None:
        """Set the scale for these frozen units; other names in ``frozen`` do not count."""
        self._own = {id(p) for unit in self._units for p in unit.all_parameters()}
        live = sum(unit.name not in frozen for unit in self._units)
        if live == len(self._units) or not self._groups():
            self.scale = 1.0
        else:
            self.scale = sqrt_scale(len(self._units), live) if self._rule == "sqrt" else float(self._rule)

    def remove(self) -> None:
        """Remove the hooks."""
        if self._rates is not None:
            self._rates.remove()
        self._rates, self._optimizer = None, None

    def _groups(self) -> list[dict[str, Any]]:
        """Groups with a learning rate (Adafactor has its own) and an adapter; without any adapter, all groups."""
        groups = [group for group in getattr(self._optimizer, "param_groups", ()) if group.get("lr") is not None]
        return [group for group in groups if any(id(p) in self._own for p in group["params"])] or groups

    def _scaled(self) -> list[tuple[dict[str, Any], Any]]:
        return [(group, group["lr"] * self.scale) for group in self._groups()] if self.scale != 1.0 else []
