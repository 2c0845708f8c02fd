"""Plain adapter-tuning, and what can be had without freezing: fewer blocks, fewer steps, recomputation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..model import find_stacks
from .method import Method, Setup

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["Checkpointing", "EqualFlops", "Plain", "TopBlocks"]


class Plain(Method):
    """All adapters train to the end."""

    name = "plain"

    def configure(self, setup: Setup) -> None:
        """Nothing freezes."""
        setup.safe = None


class TopBlocks(Plain):
    """Adapters on as many top blocks as SAFE leaves live, and on no other: PEFT's ``layers_to_transform``."""

    name = "top-blocks"
    after = ("safe",)

    def configure(self, setup: Setup) -> None:
        """Leave the lower blocks out."""
        super().configure(setup)
        safe, stacks = setup.outcome("safe"), find_stacks(setup.base)
        if len(stacks) > 1 or not hasattr(setup.adapter, "layers_to_transform"):
            raise ConfigError(
                "Adapters cannot be put on the top blocks alone.",
                cause="layers_to_transform counts blocks of one stack, and not every adapter has it.",
                fix="--adapter lora, and a model with one stack",
            )
        given = setup.adapter.layers_to_transform
        blocks = range(len(stacks[0])) if given is None else [given] if isinstance(given, int) else sorted(given)
        setup.adapter.layers_to_transform = list(blocks[round(len(blocks) * safe.frozen / max(1, len(safe.units))) :])


class EqualFlops(Plain):
    """Plain, for as many steps as SAFE's FLOPs pay for; the learning rate comes down within them."""

    name = "equal-flops"
    after = ("plain", "safe")

    def configure(self, setup: Setup) -> None:
        """Shorten the run."""
        super().configure(setup)
        plain, safe = setup.outcome("plain"), setup.outcome("safe")
        if not plain.flops:
            raise ConfigError("FLOPs were not counted.", cause="--count_costs false", fix="--count_costs true")
        setup.training.max_steps = max(1, round(plain.steps * safe.flops / plain.flops))


class Checkpointing(Plain):
    """Every block recomputes its activations in the backward pass (Chen et al. 2016)."""

    name = "checkpointing"

    def prepare(self, model: PeftModel, setup: Setup) -> None:
        """Switch it on."""
        try:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise ConfigError(
                f"{type(setup.base).__name__} has no activation checkpointing.",
                cause=str(error).splitlines()[0],
                fix="Leave out checkpointing.",
            ) from error
