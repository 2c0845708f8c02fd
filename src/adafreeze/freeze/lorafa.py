"""LoRA-FA: PEFT's optimizer takes A and B of a layer together, and by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["LoraFAPairs"]


class LoraFAPairs:
    """Keeps ``peft.optimizers.LoraFAOptimizer`` off frozen pairs of A and B.

    Its step multiplies B's gradient by (A Aᵀ)⁻¹ wherever "lora" is in a name, and fails where there is no gradient.
    During a step frozen pairs have an empty name, and are passed over; between steps, and so in checkpoints, all names
    are as they were.

    Args:
        optimizer: the real one, not accelerate's wrapper.
        frozen: gives the parameters that are frozen now.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, frozen: Callable[[], Iterable[nn.Parameter]]) -> None:
        self._optimizer = optimizer
        self._frozen = frozen
        self._names: list[tuple[dict[str, Any], list[str]]] = []
        self._hooks: list[Any] = []

    @classmethod
    def of(cls, optimizer: Any, frozen: Callable[[], Iterable[nn.Parameter]]) -> LoraFAPairs | None:
        """For ``optimizer``, if it is of that kind: by its name, as PEFT's module may not be there to ask."""
        found = any(kind.__name__ == "LoraFAOptimizer" for kind in type(optimizer).__mro__)
        return cls(optimizer, frozen) if found else None

    def freeze(self) -> None:
        """Free the moments of frozen pairs, which lie in ``state`` by the name up to "lora", and skip them from now."""
        for group in self._optimizer.param_groups:
            for stem in self._stems(group):
                self._optimizer.state.pop(f"{stem}lora", None)  # type: ignore[call-overload]
        if not self._hooks:
            self._hooks = [
                self._optimizer.register_step_pre_hook(self._hide),
                self._optimizer.register_step_post_hook(self._show),
            ]

    def restore(self) -> None:
        """Step all pairs again."""
        self._show()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _stems(self, group: dict[str, Any]) -> set[str]:
        frozen = {id(parameter) for parameter in self._frozen()}
        pairs = zip(group["params"], group["names"], strict=True)
        return {_stem(name) for parameter, name in pairs if id(parameter) in frozen and "lora" in name}

    def _hide(self, *_: Any) -> None:
        self._show()  # a step that raised left them hidden
        for group in self._optimizer.param_groups:
            stems = self._stems(group)
            self._names.append((group, group["names"]))
            group["names"] = ["" if "lora" in name and _stem(name) in stems else name for name in group["names"]]

    def _show(self, *_: Any) -> None:
        for group, names in self._names:
            group["names"] = names
        self._names = []


def _stem(name: str) -> str:
    return name[: name.find("lora")]
