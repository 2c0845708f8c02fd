"""AdapterDrop: in each step the lowest blocks run without their adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..model import find_stacks
from ..model.backends import find_backend
from .method import Method, Setup

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["AdapterDrop"]


class AdapterDrop(Method):
    """Robust AdapterDrop (Rücklé et al. 2021).

    Before each step n is drawn evenly from 0 to L − 1, and the adapters of the lowest n of L blocks are off in it: no
    gradient reaches down there. All of them are on in every evaluation, and in the adapter that is saved. Together
    with SAFE, L counts the blocks that still train.
    """

    name = "adapterdrop"

    def prepare(self, model: PeftModel, setup: Setup) -> None:
        """Draw before each step."""
        drop = _Drop(model, setup.training.seed)
        setup.callbacks.append(drop)
        setup.kinds.append(lambda: drop.dropped)


class _Drop(TrainerCallback):
    def __init__(self, model: nn.Module, seed: int) -> None:
        backend = find_backend(model)
        blocks = [block for stack in find_stacks(model) for block in stack.blocks]
        self.sites: list[list[Any]] = [[site for _, site in backend.sites(block)] for block in blocks]
        self.generator = torch.Generator().manual_seed(seed)
        self.dropped = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Switch the lowest off."""
        live = [sites for sites in self.sites if any(p.requires_grad for site in sites for p in site.parameters())]
        self.dropped = int(torch.randint(max(1, len(live)), (), generator=self.generator))
        for sites in live[: self.dropped]:
            for site in sites:
                site._disable_adapters = True  # enable_adapters(False) would touch requires_grad too

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Switch all on again, before anybody measures at the step's end."""
        for sites in self.sites:
            for site in sites:
                site._disable_adapters = False
