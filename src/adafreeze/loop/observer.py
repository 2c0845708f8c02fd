"""Watches a model train from its hooks: audits the freeze, counts tokens, and now and then saved bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..costs.memory import SavedBytes
from ..decide.schedule import Losses
from ..freeze.before_step import before_step
from ..model.batch import arguments, rows_of
from ..model.calls import loss_in
from ..model.patches import forward_hook, forward_pre_hook

__all__ = ["Observer"]


class Observer:
    """Hooks on the model and its optimizer that see every training step and change none.

    Args:
        model: the module that the host calls.
        optimizer: whose step is announced; accelerate's wrapper or the real one.
        before_forward: called before each training forward pass.
        before_optimizer_step: called between backward pass and optimizer step, also where a closure makes both.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        before_forward: Callable[[], None],
        before_optimizer_step: Callable[[], None],
    ) -> None:
        self._model = model
        self._before_forward = before_forward
        self.forwards = 0
        self.samples = 0
        self.tokens = 0
        self._losses = Losses()
        self._last_tokens = 0
        self._saved_per_token: float | None = None
        self._count_next = True
        self._counting: SavedBytes | None = None
        self._handles: list[Any] = [
            forward_pre_hook(model, self._enter),
            forward_hook(model, self._leave, always=True),
        ]
        torch_optimizer = getattr(optimizer, "optimizer", optimizer)
        if isinstance(torch_optimizer, torch.optim.Optimizer):
            self._handles.append(before_step(torch_optimizer, before_optimizer_step))

    @property
    def saved_bytes(self) -> float | None:
        """What autograd keeps of an average micro-batch, by the last count, in bytes; None before the first."""
        if self._saved_per_token is None or not self.forwards:
            return None
        return self._saved_per_token * self.tokens / self.forwards

    def take_losses(self) -> Losses:
        """What the model returned as its loss in training since this was last asked.

        Nothing where it returns none, since the host computes the loss from the outputs.
        """
        losses, self._losses = self._losses, Losses()
        return _on_the_host(losses)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain JSON values."""
        return {"samples": self.samples, "losses": list(_on_the_host(self._losses))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where ``state_dict`` was written."""
        self.samples = state.get("samples", 0)
        self._losses = Losses(*state.get("losses", ()))

    def count_again(self) -> None:
        """Count the saved bytes of the next training forward pass: one step slower by a per cent or so."""
        self._count_next = True

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # Under torch.compile hooks are traced along with the model: what only counts has no place in a graph.
    @torch.compiler.disable
    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or not torch.is_grad_enabled():
            return
        self._before_forward()
        inputs = arguments(model, args, kwargs)
        ids = inputs.get("input_ids")
        self._last_tokens = ids.numel() if isinstance(ids, Tensor) else rows_of(inputs)
        self.samples += rows_of(inputs)
        self.tokens += self._last_tokens
        self.forwards += 1
        if self._count_next and self._last_tokens:
            self._count_next = False
            self._counting = SavedBytes(model)
            self._counting.__enter__()

    @torch.compiler.disable
    def _leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if model.training and torch.is_grad_enabled() and (loss := loss_in(output)) is not None:
            value = loss.detach().float()
            number, total, squares = self._losses
            self._losses = Losses(number + 1, total + value, squares + value * value)
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self._saved_per_token = self._counting.total / self._last_tokens
            self._counting = None


def _on_the_host(losses: Losses) -> Losses:
    return Losses(losses.number, float(losses.total), float(losses.squares))
