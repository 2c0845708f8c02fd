"""What a model is called with in training, where no dataloader shows it: generated, or made by the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..measure.draw import MOST_SAMPLES
from ..model.batch import arguments, rows_of
from ..model.patches import forward_pre_hook

__all__ = ["BatchRecorder"]


class BatchRecorder:
    """Keeps on the host what the training passes of ``model`` get, up to as many samples as a probe has at most.

    Args:
        model: that the host calls.
        batches: what was kept in an earlier process.

    Attributes:
        batches: what it was called with, by the names of its forward's parameters; a dictionary of features under the
            name of the parameter that took it.
    """

    def __init__(self, model: nn.Module, batches: Sequence[dict[str, Any]] = ()) -> None:
        self.batches = list(batches)
        self._samples = 0
        self._model = model
        # What is kept of the first step comes after it: by then the adapters have moved.
        self._began = {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and type(parameter.detach()) is Tensor
        }
        self._handle = forward_pre_hook(model, self._keep)

    def remove(self) -> None:
        """Look no longer."""
        self._handle.remove()

    @contextmanager
    def as_it_began(self) -> Iterator[None]:
        """The weights of the time when it began to look, in their places."""
        parameters = dict(self._model.named_parameters())
        now = {name: parameters[name].detach().clone() for name in self._began}
        try:
            for name, before in self._began.items():
                parameters[name].data.copy_(before)
            yield
        finally:
            for name, value in now.items():
                parameters[name].data.copy_(value)

    def _keep(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or not torch.is_grad_enabled() or self._samples >= MOST_SAMPLES:
            return
        inputs = _on_host(arguments(model, args, kwargs))
        self._samples += rows_of(inputs)
        self.batches.append(inputs)


def _on_host(value: Any) -> Any:
    """Tensors, plain values, and dictionaries and lists of them; nothing of what else is in there."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: _on_host(item) for name, item in value.items() if _is_kept(item)}
    if isinstance(value, (list, tuple)):
        return [_on_host(item) for item in value]
    return value


def _is_kept(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_kept, value))
    return isinstance(value, (Tensor, Mapping, bool, int, float, str))
