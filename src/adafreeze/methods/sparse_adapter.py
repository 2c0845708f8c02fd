"""SparseAdapter: adapters pruned before the first step."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from ..errors import ProbeError
from ..measure.draw import collect
from ..model.blocks import device_of
from ..model.restore import keep_random_state
from .method import Method, Setup

__all__ = ["SparseAdapter"]

TOKENS = 2048


class SparseAdapter(Method):
    """SparseAdapter (He et al. 2022), by the sensitivity of SNIP (Lee et al. 2019).

    In each adapter matrix the weights with the smallest |w · ∂loss/∂w| are set to zero and stay zero. Our reading for
    adapters that start as the identity: if the product is zero for the whole matrix, |∂loss/∂w| decides (LoRA's B,
    which starts at zero), and if that is zero too, |w| (LoRA's A).

    Attributes:
        sparsity: the share of each matrix that is pruned.
    """

    name = "sparse-adapter"
    sparsity = 0.5

    def prepare(self, model: PeftModel, setup: Setup) -> None:
        """Add the callback that prunes when the training data is available."""
        setup.callbacks.append(_Prune(self.sparsity, setup.training.seed))


class _Prune(TrainerCallback):
    def __init__(self, sparsity: float, seed: int) -> None:
        self.sparsity, self.seed = sparsity, seed
        self.handles: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune, and mask the gradients of pruned weights; random states are unchanged."""
        model = kwargs["model"]
        adapters = {
            name: p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in name
        }
        with keep_random_state():
            gradients = _gradients(model, adapters, kwargs["train_dataloader"], self.seed)
        for name, parameter in adapters.items():
            kept = _kept(parameter.detach(), gradients[name], self.sparsity)
            with torch.no_grad():
                parameter.mul_(kept)
            self.handles.append(parameter.register_hook(kept.mul))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


def _gradients(model: nn.Module, adapters: dict[str, nn.Parameter], source: Any, seed: int) -> dict[str, Tensor]:
    """Gradients of the loss on some training samples, without dropout."""
    training, device = model.training, device_of(model)
    model.eval()
    sums = {name: torch.zeros_like(parameter) for name, parameter in adapters.items()}
    try:
        for chunk in collect(source, TOKENS, seed, getattr(model.config, "pad_token_id", None)):
            moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in chunk.items()}
            loss = getattr(model(**moved), "loss", None)
            if loss is None:
                raise ProbeError(
                    "sparse-adapter prunes by the gradient of the loss, but the model returns no loss for its training "
                    "data, such as when labels are missing.",
                    fix="Leave out sparse-adapter.",
                )
            found = torch.autograd.grad(loss, list(adapters.values()), materialize_grads=True)
            for total, gradient in zip(sums.values(), found, strict=True):
                total += gradient
    finally:
        model.train(training)
    return sums


def _kept(weight: Tensor, gradient: Tensor, sparsity: float) -> Tensor:
    """1 for weights that stay, 0 for pruned ones."""
    score = (weight * gradient).abs()
    if not score.any():
        score = gradient.abs() if gradient.any() else weight.abs()
    kept = torch.zeros_like(weight).flatten()
    kept[score.flatten().topk(weight.numel() - int(sparsity * weight.numel())).indices] = 1
    return kept.view_as(weight)
