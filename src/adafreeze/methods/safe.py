"""SAFE as published, with our defaults, and with one part of it left out or added."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ..config import AS_PUBLISHED, SafeConfig
from .method import Method, Setup

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["Safe", "SafeBudget", "SafeNoCache", "SafePaper"]


class Safe(Method):
    """Our defaults, prefix cache included, and whatever flags the user gave.

    Attributes:
        fields: of SafeConfig, which win over the user's.
    """

    name = "safe"
    fields: ClassVar[dict[str, Any]] = {}

    def configure(self, setup: Setup) -> None:
        """Freeze."""
        setup.safe = SafeConfig.from_dict({**setup.settings, **self.fields})


class SafeNoCache(Safe):
    """The frozen prefix is computed in every step."""

    name = "safe-no-cache"
    fields: ClassVar[dict[str, Any]] = {"cache": "off", "cache_dir": None}


class SafePaper(Safe):
    """As published (Son et al. 2025): the cubic threshold on raw scores, units anywhere, no cache."""

    name = "safe-paper"
    fields: ClassVar[dict[str, Any]] = {"policy": "threshold", **AS_PUBLISHED, "cache": "off", "cache_dir": None}

    def configure(self, setup: Setup) -> None:
        """Freeze, in the user's time or the paper's."""
        setup.safe = SafeConfig.paper(**{**setup.settings, **self.fields})


class SafeBudget(Safe):
    """Under a memory budget from step 0: half-way between plain training and checkpointing every block.

    The two are what ``adafreeze.plan`` counts for a batch of the longest rows.
    """

    name = "safe-budget"

    def prepare(self, model: PeftModel, setup: Setup) -> None:
        """Set the budget."""
        from ..memory.plan import plan

        training = setup.training
        longest = sorted(setup.rows, key=_length)[-training.train_batch_size :]
        optimizer = str(getattr(training.optim, "value", training.optim))
        found = plan(
            model, inputs=dict(setup.collator(longest)), optim=optimizer, target=training.device.type, padding=True
        )
        assert setup.safe is not None
        setup.safe = setup.safe.changed(memory_budget=(found.plain.peak + found.checkpointed.peak) // 2)


def _length(row: Any) -> int:
    return len(row.get("input_ids", ()))
