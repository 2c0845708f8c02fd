"""Batches as text: for a checkpoint, or for the other ranks."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["packed", "unpacked"]


# Stands for a tensor among the plain values; the name of an input it cannot be.
_TENSOR = "<tensor>"


def packed(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Batches of tensors, and of JSON values beside them, as JSON values; tensors as base64 safetensors.

    >>> import torch
    >>> batch = {"input": {"input_ids": torch.tensor([[1, 2]])}, "use_cache": False}
    >>> unpacked(packed([batch]))
    [{'input': {'input_ids': tensor([[1, 2]])}, 'use_cache': False}]
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()  # no two may share their storage
            return {_TENSOR: name}
        if isinstance(value, Mapping):
            return {name: plain(item) for name, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    rest = [plain(batch) for batch in batches]
    return {"tensors": base64.b64encode(save(tensors)).decode(), "rest": rest}


def unpacked(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What ``packed`` was given; tuples come back as lists."""
    from safetensors.torch import load

    tensors = load(base64.b64decode(state["tensors"]))

    def whole(value: Any) -> Any:
        if isinstance(value, Mapping):
            return tensors[value[_TENSOR]] if _TENSOR in value else {name: whole(item) for name, item in value.items()}
        return [whole(item) for item in value] if isinstance(value, list) else value

    batches: list[dict[str, Any]] = [whole(batch) for batch in state["rest"]]
    for key, tensor in tensors.items():
        place, dot, name = key.partition(".")
        if dot:  # as written before batches could be nested
            batches[int(place)][name] = tensor
    return batches
