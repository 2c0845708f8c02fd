"""Bytes of an optimizer: its state, and the temporaries of its step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..costs.memory import bytes_of

__all__ = ["optimizer_bytes", "optimizer_names", "state_bytes"]

# State tensors per parameter, by a part of the optimizer's name; "ademamix" before "adam".
_TENSORS = {"adafactor": 0, "ademamix": 3, "adam": 2, "rmsprop": 1, "adagrad": 1, "lion": 1, "sgd": 0}
# The state of these depends on more than the parameter's shape.
_OTHERS = ("galore", "apollo", "schedule", "lomo", "grok", "anyprecision", "stable")
# Temporaries of an optimizer that updates one parameter at a time, in sizes of the largest parameter.
_STEP_TEMPORARIES = 2


def optimizer_names() -> list[str]:
    """The values of ``TrainingArguments.optim`` whose state is known.

    >>> {"adamw_torch", "sgd", "adamw_bnb_8bit"} <= set(optimizer_names())
    True
    """
    from transformers.training_args import OptimizerNames

    names = [entry.value for entry in OptimizerNames]
    return sorted(
        name for name in names if any(part in name for part in _TENSORS) and not any(part in name for part in _OTHERS)
    )


def state_bytes(name: str, parameters: Iterable[Tensor]) -> int:
    """Bytes of state that the optimizer ``name`` keeps for ``parameters`` after its first step.

    Adam and AdamW keep two tensors like the parameter and a step counter of 4 bytes, 8-bit variants one byte per
    element; SGD without momentum keeps nothing; Adafactor keeps a row and a column of each matrix.

    >>> state_bytes("adamw_torch", [torch.zeros(8, 4)])
    260
    """
    name = name.lower()
    tensors = next((count for part, count in _TENSORS.items() if part in name), 2)
    total = 0.0
    for parameter in parameters:
        width = 1 if "8bit" in name else 0.5 if "4bit" in name else parameter.element_size()
        total += tensors * parameter.numel() * width + (4 if tensors else 0)
        if "adafactor" in name:
            total += 4 * (sum(parameter.shape[-2:]) if parameter.ndim > 1 else parameter.numel())
    return int(total)


def optimizer_bytes(optimizer: Any, parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Bytes of an optimizer's state for ``parameters``, and of the temporaries of its step.

    Existing state is counted; missing state, and that of an optimizer given by name, is estimated.
    """
    parameters = list(parameters)
    sizes = [parameter.nbytes for parameter in parameters]
    if isinstance(optimizer, str):
        temporary = 0 if optimizer.endswith("fused") else _STEP_TEMPORARIES * max(sizes, default=0)
        return state_bytes(optimizer, parameters), temporary
    state: dict[Any, Any] = optimizer.state
    kept = [v for p in parameters for v in (state.get(p) or {}).values() if isinstance(v, Tensor)]
    missing = (parameter for parameter in parameters if not state.get(parameter))
    total = bytes_of(kept) + state_bytes(type(optimizer).__name__, missing)
    groups = optimizer.param_groups
    on_cuda = any(parameter.device.type == "cuda" for parameter in parameters)
    if any(group.get("fused") for group in groups):
        return total, 0
    if any(group.get("foreach") for group in groups) or (on_cuda and isinstance(optimizer, torch.optim.Optimizer)):
        return total, sum(sizes)
    return total, _STEP_TEMPORARIES * max(sizes, default=0)
