"""LRScaler: what still trains takes over the part of an optimizer step that the frozen units no longer take."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch

from ..model.units import Unit
from .before_step import before_step

__all__ = ["LRScaler", "sqrt_scale"]

MOST_SCALE = 3.0  # the most that was tried


def sqrt_scale(units: int, live: int) -> float:
    """√(units / live), at most 3: by so much larger steps of the live units are as long as those of all were.

    Adam and its kin move every parameter by about the learning rate, so that a step over N parameters is lr·√N long.
    Where n of them are left, lr·√(N/n) keeps its length.

    >>> [round(sqrt_scale(6, live), 3) for live in (6, 2, 1, 0)]
    [1.0, 1.732, 2.449, 3.0]
    """
    return min(MOST_SCALE, math.sqrt(units / live)) if live else MOST_SCALE


class LRScaler:
    """Scales the learning rates of an optimizer while it steps, and only then: schedulers and logs see their own.

    Those of the parameter groups that hold adapters: a head that shares a group with them is scaled as well.

    Args:
        optimizer: the real one, or a wrapper of accelerate's or DeepSpeed's; None is left alone.
        rule: ``"sqrt"``, or a number for as soon as anything is frozen.
        units: that can freeze. Where no group holds a parameter of theirs (ZeRO's are flat copies), all are meant.

    Attributes:
        scale: the factor; 1 changes nothing.
    """

    def __init__(self, optimizer: Any, rule: float | str, units: Collection[Unit]) -> None:
        self.scale, self._rule, self._units = 1.0, rule, units
        self._own: set[int] = set()  # ids of their parameters
        self._stretched: list[tuple[dict[str, Any], Any, Any]] = []  # group, its own rate, the one for this step
        while (inner := getattr(optimizer, "optimizer", None)) is not None:
            optimizer = inner
        self._optimizer: Any = None
        self._handles: list[Any] = []
        if isinstance(optimizer, torch.optim.Optimizer):
            self._optimizer = optimizer
            self._handles = [
                optimizer.register_step_pre_hook(self._put_back),  # after a step that failed
                before_step(optimizer, self._stretch),
                optimizer.register_step_post_hook(self._put_back),
            ]
            # Of two on one optimizer the one that stretched last puts back first.
            post_hooks: Any = optimizer._optimizer_step_post_hooks
            post_hooks.move_to_end(self._handles[-1].id, last=False)

    def after_freeze(self, frozen: Collection[str]) -> None:
        """The units of these names are frozen now, others perhaps among them."""
        self._own = {id(p) for unit in self._units for p in (*unit.parameters(), *unit.shared_parameters())}
        live = sum(unit.name not in frozen for unit in self._units)
        if live == len(self._units) or not self._groups():
            self.scale = 1.0
        else:
            self.scale = sqrt_scale(len(self._units), live) if self._rule == "sqrt" else float(self._rule)

    def remove(self) -> None:
        """Take the hooks off."""
        self._put_back()
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizer = [], None

    def _groups(self) -> list[dict[str, Any]]:
        """Those with a learning rate (Adafactor finds its own) and an adapter of ours."""
        groups = [group for group in getattr(self._optimizer, "param_groups", ()) if group.get("lr") is not None]
        return [group for group in groups if any(id(p) in self._own for p in group["params"])] or groups

    def _stretch(self) -> None:
        self._put_back()  # of a closure that is called more than once
        for group in self._groups() if self.scale != 1.0 else ():
            own = group["lr"]
            group["lr"] = own * self.scale
            self._stretched.append((group, own, group["lr"]))

    def _put_back(self, *_: Any) -> None:
        for group, own, stretched in self._stretched:
            now = group["lr"]  # another, if somebody has set it since; a compiled step gives floats a new identity
            if now is stretched or (isinstance(own, float) and now == stretched):
                group["lr"] = own
        self._stretched = []
