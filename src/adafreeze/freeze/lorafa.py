"""LoRA-FA: PEFT's optimizer steps A and B of a layer together, and finds them by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .before_step import WhileStepping

__all__ = ["LoraFAPairs"]


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
        return {_stem(name) for parameter, name in pairs if id(parameter) in frozen and "lora" in name}

    def _without_frozen(self) -> Iterator[tuple[dict[str, Any], list[str]]]:
        for group in self._optimizer.param_groups:
            stems = self._stems(group)
            yield group, ["" if "lora" in name and _stem(name) in stems else name for name in group["names"]]


def _stem(name: str) -> str:
    return name[: name.find("lora")]
