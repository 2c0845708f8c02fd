"""The arguments of one call of a model in any form, and the loss it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .batch import forward_names

__all__ = ["Call", "loss_in"]


@dataclass(frozen=True)
class Call:
    """One call of a module, with a name for every argument.

    Hosts call a model with keywords (Trainer), positional tensors, or one dictionary of features
    (sentence-transformers).

    Attributes:
        module: the called module.
        inputs: name to value; a value inside a dictionary has its key as its name.
        places: name to (position or keyword, key in the dictionary there or None).
        positions: number of positional arguments.
    """

    module: nn.Module
    inputs: dict[str, Any]
    places: dict[str, tuple[int | str, Any]]
    positions: int

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Name the arguments of a call of ``module``."""
        names = forward_names(module)
        inputs: dict[str, Any] = {}
        places: dict[str, tuple[int | str, Any]] = {}

        def add(name: str, place: int | str, value: Any) -> None:
            entries = [(name, None, value)]
            if isinstance(value, Mapping):
                entries = [(str(key), key, item) for key, item in value.items()]
            for short, key, item in entries:
                free = short if short not in inputs else f"{name}.{short}"
                inputs[free], places[free] = item, (place, key)

        for position, value in enumerate(args):
            add(names[position] if position < len(names) else f"argument {position}", position, value)
        for name, value in kwargs.items():
            add(name, name, value)
        return cls(module, inputs, places, len(args))

    def arguments(self, inputs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with other values; dictionaries are new, since a model may write into its inputs."""
        found: dict[int | str, Any] = {}
        for name, value in inputs.items():
            place, key = self.places[name]
            if key is None:
                found[place] = value
            else:
                found.setdefault(place, {})[key] = value
        args = tuple(found.pop(position, {}) for position in range(self.positions))
        return args, {str(name): value for name, value in found.items()}


def loss_in(output: Any) -> Tensor | None:
    """The loss in a model's output: its ``loss``, or the first entry of a tuple."""
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, tuple) and not hasattr(output, "loss"):
        loss = output[0] if output else None
    else:
        loss = getattr(output, "loss", output)
    return loss if isinstance(loss, Tensor) and loss.ndim == 0 else None
