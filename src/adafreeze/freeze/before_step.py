"""Hooks between the backward pass and the optimizer step, wherever the host runs the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

__all__ = ["WhileStepping", "before_step"]


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
