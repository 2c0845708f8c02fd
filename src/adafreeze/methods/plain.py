"""Plain adapter-tuning, and alternatives to freezing: fewer blocks, fewer steps, activation checkpointing."""

from __future__ import annotations

from peft import PeftModel

from ..errors import ConfigError
from ..model import find_stacks
from .method import Method, Setup

__all__ = ["Checkpointing", "EqualFlops", "Plain", "TopBlocks"]


class Plain(Method):
    """All adapters train to the end."""

    name = "plain"

    def configure(self, setup: Setup) -> None:
        """Disable freezing."""
        setup.safe = None


class TopBlocks(Plain):
    """Adapters only on as many top blocks as SAFE leaves live, by PEFT's ``layers_to_transform``."""

    name = "top-blocks"
    after = ("safe",)

    def configure(self, setup: Setup) -> None:
        """Leave out the lower blocks."""
        super().configure(setup)
        safe, stacks = setup.outcome("safe"), find_stacks(setup.base)
        if len(stacks) > 1 or not hasattr(setup.adapter, "layers_to_transform"):
            raise ConfigError(
                f"layers_to_transform cannot select the top blocks: the model has {len(stacks)} stacks, or "
                f"{type(setup.adapter).__name__} has no such field.",
                fix="--adapter lora, and a model with one stack",
            )
        given = setup.adapter.layers_to_transform
        blocks = range(len(stacks[0])) if given is None else [given] if isinstance(given, int) else sorted(given)
        setup.adapter.layers_to_transform = list(blocks[round(len(blocks) * safe.frozen / max(1, len(safe.units))) :])


class EqualFlops(Plain):
    """Plain for as many steps as SAFE's FLOPs pay for; the learning rate schedule is shortened with it."""

    name = "equal-flops"
    after = ("plain", "safe")

    def configure(self, setup: Setup) -> None:
        """Shorten the run."""
        super().configure(setup)
        plain, safe = setup.outcome("plain"), setup.outcome("safe")
        if not plain.flops:
            raise ConfigError("The FLOPs of plain were not counted.", fix="--count_costs true")
        setup.training.max_steps = max(1, round(plain.steps * safe.flops / plain.flops))


class Checkpointing(Plain):
    """Activation checkpointing of every block (Chen et al. 2016)."""

    name = "checkpointing"

    def prepare(self, model: PeftModel, setup: Setup) -> None:
        """Enable it."""
        try:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise ConfigError(str(error).splitlines()[0], fix="Leave out checkpointing.") from error
