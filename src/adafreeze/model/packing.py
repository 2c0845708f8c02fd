"""Batches as JSON, for checkpoints and for other ranks."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

__all__ = ["packed", "tensors_as_text", "tensors_of_text", "unpacked"]


def tensors_as_text(tensors: Mapping[str, Tensor]) -> str:
    """Tensors by name, as base64 safetensors."""
    return base64.b64encode(save(dict(tensors))).decode()


def tensors_of_text(text: str) -> dict[str, Tensor]:
    """Undo ``tensors_as_text``."""
    return load(base64.b64decode(text))


# Marks a tensor among the plain values; no input has this name.
_TENSOR = "<tensor>"


def packed(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Batches of tensors and JSON values as JSON values; tensors become base64 safetensors.

    >>> import torch
    >>> batch = {"input": {"input_ids": torch.tensor([[1, 2]])}, "use_cache": False}
    >>> unpacked(packed([batch]))
    [{'input': {'input_ids': tensor([[1, 2]])}, 'use_cache': False}]
    """
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
    return {"tensors": tensors_as_text(tensors), "rest": rest}


def unpacked(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Undo ``packed``; tuples come back as lists."""
    tensors = tensors_of_text(state["tensors"])

    def whole(value: Any) -> Any:
        if isinstance(value, Mapping):
            return tensors[value[_TENSOR]] if _TENSOR in value else {name: whole(item) for name, item in value.items()}
        return [whole(item) for item in value] if isinstance(value, list) else value

    return [whole(batch) for batch in state["rest"]]
