"""Bytes of an optimizer: what it keeps for each parameter, and what its step holds for a moment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..costs.memory import bytes_of

__all__ = ["optimizer_bytes", "optimizer_names", "state_bytes"]

# Tensors like the parameter that an optimizer keeps whose name contains this; "ademamix" before "adam".
_TENSORS = {"adafactor": 0, "ademamix": 3, "adam": 2, "rmsprop": 1, "adagrad": 1, "lion": 1, "sgd": 0}
# These keep what depends on more than the parameter's shape.
_OTHERS = ("galore", "apollo", "schedule", "lomo", "grok", "anyprecision", "stable")
# Of a fused step nothing shows; one parameter after the other takes two temporaries of the largest; foreach one of all.
_STEP_TEMPORARIES = 2


def optimizer_names() -> list[str]:
    """Names of optimizers whose state is known, of those that ``TrainingArguments.optim`` takes.

    >>> {"adamw_torch", "sgd", "adamw_bnb_8bit"} <= set(optimizer_names())
    True
    """
    from transformers.training_args import OptimizerNames

    names = [entry.value for entry in OptimizerNames]
    return sorted(
        name for name in names if any(part in name for part in _TENSORS) and not any(part in name for part in _OTHERS)
    )


def state_bytes(name: str, parameters: Iterable[Tensor]) -> int:
    """Bytes of state that the optimizer ``name`` keeps for ``parameters``, all of them once stepped.

    Adam and AdamW: two tensors like the parameter, and a step counter of 4 bytes; 8-bit ones with one byte an
    element; SGD without momentum: nothing; Adafactor: a row and a column of each matrix.

    >>> state_bytes("adamw_torch", [torch.zeros(8, 4)])
    260
    """
    name = name.lower()
    tensors = next((count for part, count in _TENSORS.items() if part in name), 2)
    total = 0.0
    for one in parameters:
        width = 1 if "8bit" in name else 0.5 if "4bit" in name else one.element_size()
        total += tensors * one.numel() * width + (4 if tensors else 0)
        if "adafactor" in name:
            total += 4 * (sum(one.shape[-2:]) if one.ndim > 1 else one.numel())
    return int(total)


def optimizer_bytes(optimizer: Any, parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """State of an optimizer for ``parameters``, and what its step holds beside it, in bytes.

    State that is there already is counted, the rest is estimated by the optimizer's name.

    Args:
        optimizer: a torch optimizer, or the name of one.
        parameters: that train.
    """
    parameters = list(parameters)
    named = isinstance(optimizer, str)
    name = optimizer if named else type(optimizer).__name__
    state: dict[Any, Any] = {} if named else optimizer.state
    stepped = [parameter for parameter in parameters if state.get(parameter)]
    kept = [value for parameter in stepped for value in state[parameter].values() if isinstance(value, Tensor)]
    known = {id(parameter) for parameter in stepped}
    total = bytes_of(kept) + state_bytes(name, (p for p in parameters if id(p) not in known))
    return total, _step_bytes(optimizer, parameters)


def _step_bytes(optimizer: Any, parameters: list[nn.Parameter]) -> int:
    sizes = [parameter.numel() * parameter.element_size() for parameter in parameters]
    groups = [] if isinstance(optimizer, str) else optimizer.param_groups
    if (optimizer if isinstance(optimizer, str) else "").endswith("fused") or any(g.get("fused") for g in groups):
        return 0
    on_device = any(parameter.device.type == "cuda" for parameter in parameters)
    if any(group.get("foreach") for group in groups) or (on_device and isinstance(optimizer, torch.optim.Optimizer)):
        return sum(sizes)
    return _STEP_TEMPORARIES * max(sizes, default=0)
