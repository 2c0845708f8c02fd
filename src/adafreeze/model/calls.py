"""Calls: what a model is called with in one pass, whatever form the host gives it, and the loss that it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .batch import forward_names

__all__ = ["Call", "loss_in"]


@dataclass(frozen=True)
class Call:
    """One call of a module, with every argument under a name.

    Hosts call a model with keywords (Trainer), with positional tensors, or with one dictionary of features
    (sentence-transformers). ``inputs`` is flat: what stands in a dictionary has its key for a name.

    Attributes:
        module: that was called.
        inputs: name to value.
        places: where each name came from: (position or keyword, key in the dictionary there or None).
        positions: how many positional arguments there were.
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
        """The same call with other values; every dictionary is a new one, since a model may write into what it gets."""
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
    """The loss in what a model returned: its ``loss``, or, where transformers returns a tuple, the first of it."""
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, tuple) and not hasattr(output, "loss"):
        loss = output[0] if output else None
    else:
        loss = getattr(output, "loss", output)
    return loss if isinstance(loss, Tensor) and loss.ndim == 0 else None
