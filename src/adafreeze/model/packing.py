"""Batches as JSON, for checkpoints and for other ranks."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["packed", "unpacked"]

# Marks a tensor among the plain values; no input has this name.
_TENSOR = "<tensor>"


def packed(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Batches of tensors and JSON values as JSON values; tensors become base64 safetensors.

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
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()  # safetensors refuses shared storages
            return {_TENSOR: name}
        if isinstance(value, Mapping):
            return {name: plain(item) for name, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    rest = [plain(batch) for batch in batches]
    return {"tensors": base64.b64encode(save(tensors)).decode(), "rest": rest}


def unpacked(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Undo ``packed``; tuples come back as lists."""
    from safetensors.torch import load

    tensors = load(base64.b64decode(state["tensors"]))

    def whole(value: Any) -> Any:
        if isinstance(value, Mapping):
            return tensors[value[_TENSOR]] if _TENSOR in value else {name: whole(item) for name, item in value.items()}
        return [whole(item) for item in value] if isinstance(value, list) else value

    return [whole(batch) for batch in state["rest"]]
