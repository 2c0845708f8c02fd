"""Records what a model is called with, for training loops whose dataloader does not show it."""

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
    """Copies the inputs of training passes to the host, for as many samples as a probe has at most.

    Args:
        model: that the host library calls.
        batches: recorded in an earlier process.

    Attributes:
        batches: inputs by the names of forward's parameters; a dictionary of features stays one under its name.
    """

    def __init__(self, model: nn.Module, batches: Sequence[dict[str, Any]] = ()) -> None:
        self.batches = list(batches)
        self._samples = 0
        self._model = model
        # The inputs of the first step are available only after it, when the adapters have changed.
        self._initial = {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and type(parameter.detach()) is Tensor
        }
        self._handle = forward_pre_hook(model, self._record)

    def remove(self) -> None:
        """Stop recording."""
        self._handle.remove()

    @contextmanager
    def initial_weights(self) -> Iterator[None]:
        """Restore the weights from before recording within the ``with`` block."""
        parameters = dict(self._model.named_parameters())
        now = {name: parameters[name].detach().clone() for name in self._initial}
        try:
            for name, before in self._initial.items():
                parameters[name].data.copy_(before)
            yield
        finally:
            for name, value in now.items():
                parameters[name].data.copy_(value)

    def _record(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or not torch.is_grad_enabled() or self._samples >= MOST_SAMPLES:
            return
        inputs = _on_host(arguments(model, args, kwargs))
        self._samples += rows_of(inputs)
        self.batches.append(inputs)


def _on_host(value: Any) -> Any:
    """Tensors, plain values, and dictionaries and lists of them; drops all else."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: _on_host(item) for name, item in value.items() if _is_plain(item)}
    if isinstance(value, (list, tuple)):
        return [_on_host(item) for item in value]
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (Tensor, Mapping, bool, int, float, str))
