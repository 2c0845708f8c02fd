"""Batches as text: for a checkpoint, or for the other ranks."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["packed", "unpacked"]


def packed(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Batches of tensors, and of JSON values beside them, as JSON values; tensors as base64 safetensors.

    >>> import torch
    >>> batch = {"input_ids": torch.tensor([[1, 2]]), "use_cache": False}
    >>> unpacked(packed([batch]))
    [{'use_cache': False, 'input_ids': tensor([[1, 2]])}]
    """
    from safetensors.torch import save

    tensors = {
        f"{number}.{name}": value.detach().cpu().contiguous()
        for number, batch in enumerate(batches)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }
    rest = [{name: value for name, value in batch.items() if not isinstance(value, Tensor)} for batch in batches]
    return {"tensors": base64.b64encode(save(tensors)).decode(), "rest": rest}


def unpacked(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What ``packed`` was given."""
    from safetensors.torch import load

    batches = [dict(batch) for batch in state["rest"]]
    for key, value in sorted(load(base64.b64decode(state["tensors"])).items()):
        place, _, name = key.partition(".")
        batches[int(place)][name] = value
    return batches
