"""What a freeze changes in the steps of an optimizer: learning rates, and the pairs of LoRA-FA."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..model.units import Unit

__all__ = ["LRScaler", "LoraFAPairs", "WhileStepping", "before_step", "sqrt_scale"]

MOST_SCALE = 3.0  # larger scales were never tried


def before_step(optimizer: torch.optim.Optimizer, call: Callable[[], None]) -> Any:
    """Run ``call`` before each step, when the gradients are there; returns a handle with ``remove()``.

    If a closure runs the backward pass, as in Lightning, ``call`` runs after the closure.
    """

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            call()
            return None

        def then_call() -> Any:
            loss = closure()
            call()
            return loss

        return args[:1], {**kwargs, "closure": then_call}

    return optimizer.register_step_pre_hook(hook)


class WhileStepping:
    """Replaces entries of param groups during each optimizer step; schedulers, logs and checkpoints see the old ones.

    Args:
        optimizer: the real one, not accelerate's wrapper.
        key: of the entries.
        values: returns (param group, value for this step).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        key: str,
        values: Callable[[], Iterable[tuple[dict[str, Any], Any]]],
    ) -> None:
        self._key, self._values = key, values
        self._replaced: list[tuple[dict[str, Any], Any, Any]] = []  # group, its own value, the one for this step
        self._handles: list[Any] = [
            optimizer.register_step_pre_hook(self._put_back),  # after a step that failed
            before_step(optimizer, self._replace),
            optimizer.register_step_post_hook(self._put_back),
        ]
        # Of two on one optimizer, the one that replaced last must put back first.
        post_hooks: Any = optimizer._optimizer_step_post_hooks
        post_hooks.move_to_end(self._handles[-1].id, last=False)

    def remove(self) -> None:
        """Remove the hooks."""
        self._put_back()
        for handle in self._handles:
            handle.remove()

    def _replace(self) -> None:
        self._put_back()  # a closure can be called more than once
        for group, value in self._values():
            self._replaced.append((group, group[self._key], value))
            group[self._key] = value

    def _put_back(self, *_: Any) -> None:
        for group, own, replaced in self._replaced:
            now = group[self._key]  # other code may have set it since; a compiled step gives floats a new identity
            if now is replaced or (isinstance(own, float) and now == replaced):
                group[self._key] = own
        self._replaced = []


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


class LoraFAPairs:
    """Lets ``peft.optimizers.LoraFAOptimizer`` skip frozen pairs of A and B.

    Its step multiplies B's gradient by (A Aᵀ)⁻¹ wherever "lora" is in a name, and fails without a gradient. So frozen
    pairs have an empty name during a step; between steps, and in checkpoints, all names are as they were.

    Args:
        optimizer: the real one, not accelerate's wrapper.
        frozen: returns the parameters that are frozen now.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, frozen: Callable[[], Iterable[nn.Parameter]]) -> None:
        self._optimizer = optimizer
        self._frozen = frozen
        self._names: WhileStepping | None = None

    @classmethod
    def of(cls, optimizer: Any, frozen: Callable[[], Iterable[nn.Parameter]]) -> LoraFAPairs | None:
        """For ``optimizer``, if it is a LoraFAOptimizer; by name, since PEFT may not have that module."""
        found = any(kind.__name__ == "LoraFAOptimizer" for kind in type(optimizer).__mro__)
        return cls(optimizer, frozen) if found else None

    def freeze(self) -> None:
        """Free the moments of frozen pairs, which ``state`` keeps under the name up to "lora", and skip them."""
        for group in self._optimizer.param_groups:
            for stem in self._stems(group):
                self._optimizer.state.pop(f"{stem}lora", None)  # type: ignore[call-overload]
        self._names = self._names or WhileStepping(self._optimizer, "names", self._without_frozen)

    def restore(self) -> None:
        """Step all pairs again."""
        if self._names is not None:
            self._names.remove()
        self._names = None

    def _stems(self, group: dict[str, Any]) -> set[str]:
        frozen = {id(parameter) for parameter in self._frozen()}
        pairs = zip(group["params"], group["names"], strict=True)
        return {name.partition("lora")[0] for parameter, name in pairs if id(parameter) in frozen and "lora" in name}

    def _without_frozen(self) -> Iterator[tuple[dict[str, Any], list[str]]]:
        for group in self._optimizer.param_groups:
            stems = self._stems(group)
            yield (
                group,
                ["" if "lora" in name and name.partition("lora")[0] in stems else name for name in group["names"]],
            )
