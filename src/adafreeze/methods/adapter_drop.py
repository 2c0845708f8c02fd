"""AdapterDrop: in each step the lowest blocks run without their adapters."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from ..model import find_stacks
from ..model.backends import find_backend
from .method import Method, Setup

__all__ = ["AdapterDrop"]


class AdapterDrop(Method):
    """Robust AdapterDrop (Rücklé et al. 2021).

    Each step draws n uniformly from 0 to L − 1 and disables the adapters of the lowest n of L blocks, which then get no
    gradient. All adapters are enabled in evaluations and in the saved adapter. With SAFE, L counts the live blocks.
    """

    name = "adapterdrop"

    def prepare(self, model: PeftModel, setup: Setup) -> None:
        """Add the callback that draws."""
        drop = _Drop(model, setup.training.seed)
        setup.callbacks.append(drop)
        setup.kinds.append(lambda: drop.dropped)


class _Drop(TrainerCallback):
    def __init__(self, model: nn.Module, seed: int) -> None:
        backend = find_backend(model)
        blocks = [block for stack in find_stacks(model) for block in stack.blocks]
        self.layers: list[list[Any]] = [[layer for _, layer in backend.sites(block)] for block in blocks]
        self.generator = torch.Generator().manual_seed(seed)
        self.dropped = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Disable the adapters of the lowest blocks."""
        live = [layers for layers in self.layers if any(p.requires_grad for x in layers for p in x.parameters())]
        self.dropped = int(torch.randint(max(1, len(live)), (), generator=self.generator))
        for layers in live[: self.dropped]:
            for layer in layers:
                layer._disable_adapters = True  # enable_adapters(False) would change requires_grad too

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Enable all adapters before scores are measured at the end of the step."""
        for layers in self.layers:
            for layer in layers:
                layer._disable_adapters = False
