"""What a model is called with in training, where no dataloader shows it: TRL's online methods generate it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model.draw import MOST_SAMPLES, rows_of

__all__ = ["Seen"]


class Seen:
    """Keeps on the host what the training passes of ``model`` get, up to as many samples as a probe has at most.

    Args:
        model: that the host calls.
        batches: what was kept in an earlier process.

    Attributes:
        batches: names to tensors, and to plain values.
    """

    def __init__(self, model: nn.Module, batches: Sequence[dict[str, Any]] = ()) -> None:
        self.batches = list(batches)
        self._samples = 0
        self._handle = model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def remove(self) -> None:
        """Look no longer."""
        self._handle.remove()

    def _keep(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or not torch.is_grad_enabled() or self._samples >= MOST_SAMPLES:
            return
        inputs = {**kwargs, "input_ids": args[0]} if args else kwargs
        self._samples += rows_of(inputs)
        self.batches.append(
            {
                name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
                for name, value in inputs.items()
                if isinstance(value, (Tensor, bool, int, float, str))
            }
        )
