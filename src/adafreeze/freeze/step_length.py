"""StepLength: what still trains takes over the part of an optimizer step that the frozen units no longer take."""

from __future__ import annotations

import math
from typing import Any

import torch

__all__ = ["MOST_SCALE", "StepLength", "sqrt_scale"]

MOST_SCALE = 3.0  # the most that was tried


def sqrt_scale(units: int, live: int) -> float:
    """√(units / live), at most 3: by so much larger steps of the live units are as long as those of all were.

    Adam and its kin move every parameter by about the learning rate, so that a step over N parameters is lr·√N long.
    Where n of them are left, lr·√(N/n) keeps its length.

    >>> [round(sqrt_scale(6, live), 3) for live in (6, 2, 1, 0)]
    [1.0, 1.732, 2.449, 3.0]
    """
    return min(MOST_SCALE, math.sqrt(units / live)) if live else MOST_SCALE


class StepLength:
    """Scales the learning rates of an optimizer while it steps, and only then: schedulers and logs see their own.

    Args:
        optimizer: the real one, or a wrapper of accelerate's or DeepSpeed's; None is left alone.
        rule: ``"sqrt"``, or a number for as soon as anything is frozen.
        units: that can freeze.

    Attributes:
        scale: the factor; 1 changes nothing.
    """

    def __init__(self, optimizer: Any, rule: float | str, units: int) -> None:
        self.scale, self._rule, self._units = 1.0, rule, units
        self._stretched: list[tuple[dict[str, Any], Any, Any]] = []  # group, its own rate, the one for this step
        while (inner := getattr(optimizer, "optimizer", None)) is not None:
            optimizer = inner
        self._handles: list[Any] = []
        if isinstance(optimizer, torch.optim.Optimizer):
            self._handles = [
                optimizer.register_step_pre_hook(self._stretch),
                optimizer.register_step_post_hook(self._put_back),
            ]

    def after_freeze(self, frozen: int) -> None:
        """So many of the units are frozen now."""
        if not frozen or not self._handles:
            self.scale = 1.0
        else:
            self.scale = sqrt_scale(self._units, self._units - frozen) if self._rule == "sqrt" else float(self._rule)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _stretch(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._put_back()  # after a step that failed
        for group in optimizer.param_groups if self.scale != 1.0 else ():
            own = group.get("lr")
            if own is not None:  # Adafactor's, which finds its own
                group["lr"] = own * self.scale
                self._stretched.append((group, own, group["lr"]))

    def _put_back(self, *_: Any) -> None:
        for group, own, stretched in self._stretched:
            if group["lr"] is stretched:  # and nobody has set another since
                group["lr"] = own
        self._stretched = []
