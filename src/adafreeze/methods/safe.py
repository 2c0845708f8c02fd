"""SAFE with our defaults and as published, and variants with one part removed or added."""

from __future__ import annotations

from typing import Any, ClassVar

from peft import PeftModel

from ..config import AS_PUBLISHED, SafeConfig
from .method import Method, Setup

__all__ = ["Safe", "SafeBudget", "SafeNoCache", "SafePaper"]

NO_CACHE = {"cache": "off", "cache_dir": None}


class Safe(Method):
    """Our defaults, prefix cache included, and the user's flags.

    Attributes:
        fields: of SafeConfig; they override the user's.
    """

    name = "safe"
    fields: ClassVar[dict[str, Any]] = {}

    def configure(self, setup: Setup) -> None:
        """Enable freezing."""
        setup.freeze(**self.fields)


class SafeNoCache(Safe):
    """The frozen prefix is computed in every step."""

    name = "safe-no-cache"
    fields: ClassVar[dict[str, Any]] = NO_CACHE


class SafePaper(Safe):
    """As published (Son et al. 2025): the cubic threshold on raw scores, units anywhere, no cache."""

    name = "safe-paper"
    fields: ClassVar[dict[str, Any]] = {"policy": "threshold", **AS_PUBLISHED, **NO_CACHE}

    def configure(self, setup: Setup) -> None:
        """Enable freezing, on the user's schedule or the paper's."""
        setup.safe = SafeConfig.paper(**{**setup.settings, **self.fields})


class SafeBudget(Safe):
    """A memory budget from step 0: halfway between plain training and checkpointing every block.

    ``adafreeze.plan`` predicts the two peaks for a batch of the longest rows.
    """

    name = "safe-budget"

    def prepare(self, model: PeftModel, setup: Setup) -> None:
        """Set the budget."""
        from ..memory.plan import plan

        training = setup.training
        longest = sorted(setup.rows, key=lambda row: len(row.get("input_ids", ())))[-training.train_batch_size :]
        optimizer = str(getattr(training.optim, "value", training.optim))
        found = plan(
            model, inputs=dict(setup.collator(longest)), optim=optimizer, target=training.device.type, padding=True
        )
        assert setup.safe is not None
        setup.safe = setup.safe.changed(memory_budget=(found.plain.peak + found.checkpointed.peak) // 2)
