"""LoRA-FA and DoRA, from PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .method import Method, Setup

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["DoRA", "LoRAFA"]


def _lora(setup: Setup, method: str) -> Any:
    if not setup.is_lora():
        raise ConfigError(
            f"{method} is a kind of LoRA.",
            cause=f"The adapters are {getattr(setup.adapter.peft_type, 'value', setup.adapter.peft_type)}.",
            fix="--adapter lora",
        )
    return setup.adapter


class LoRAFA(Method):
    """LoRA-FA (Zhang et al. 2023): A stays as it was drawn, by PEFT's ``create_lorafa_optimizer``."""

    name = "lora-fa"

    def prepare(self, model: PeftModel, setup: Setup) -> None:
        """Make its optimizer, which freezes every A."""
        from peft.optimizers import create_lorafa_optimizer

        adapter = _lora(setup, "LoRA-FA")
        if adapter.use_dora:
            raise ConfigError("LoRA-FA has no DoRA.", cause="Its gradient is LoRA's.", fix="--adapter lora")
        setup.optimizer = create_lorafa_optimizer(
            model,
            r=adapter.r,
            lora_alpha=adapter.lora_alpha,
            lr=setup.training.learning_rate,
            weight_decay=setup.training.weight_decay,
        )


class DoRA(Method):
    """DoRA (Liu et al. 2024): LoRA with a magnitude of its own."""

    name = "dora"

    def configure(self, setup: Setup) -> None:
        """Turn LoRA into it."""
        _lora(setup, "DoRA").use_dora = True
