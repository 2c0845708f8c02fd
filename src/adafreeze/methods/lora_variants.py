"""LoRA-FA and DoRA, from PEFT."""

from __future__ import annotations

from peft import PeftModel

from ..errors import ConfigError
from .method import Method, Setup

__all__ = ["DoRA", "LoRAFA"]


class LoRAFA(Method):
    """LoRA-FA (Zhang et al. 2023): A keeps its initial values, by PEFT's ``create_lorafa_optimizer``."""

    name = "lora-fa"

    def prepare(self, model: PeftModel, setup: Setup) -> None:
        """Make its optimizer, which freezes every A."""
        from peft.optimizers import create_lorafa_optimizer

        adapter = setup.lora("LoRA-FA")
        if adapter.use_dora:
            raise ConfigError("LoRA-FA cannot train DoRA adapters.", fix="--adapter lora")
        setup.optimizer = create_lorafa_optimizer(
            model,
            r=adapter.r,
            lora_alpha=adapter.lora_alpha,
            lr=setup.training.learning_rate,
            weight_decay=setup.training.weight_decay,
        )


class DoRA(Method):
    """DoRA (Liu et al. 2024): LoRA with a trained magnitude."""

    name = "dora"

    def configure(self, setup: Setup) -> None:
        """Enable it."""
        setup.lora("DoRA").use_dora = True
