"""before_step: a hook between backward pass and optimizer step, wherever the backward pass is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["before_step"]


def before_step(optimizer: torch.optim.Optimizer, call: Callable[[], None]) -> Any:
    """Have ``call`` made before each step, with the gradients there; returns the handle that ends it.

    Where a closure makes the backward pass, as Lightning's whole training step does, that is after the closure.
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
