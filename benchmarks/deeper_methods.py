"""What might make a deep static prefix cheaper in quality, as methods for ``adafreeze compare``."""

from __future__ import annotations

from contribution_methods import Depth, variants

from adafreeze.methods import Setup


class Rank(Depth):
    """The ranks of the frozen blocks given to the live ones, at equal parameters (and equal alpha / r)."""

    def configure(self, setup: Setup) -> None:
        """Freeze, with higher ranks."""
        super().configure(setup)
        lora = setup.lora(self.name)
        rank = round(lora.r / (1 - self.share))
        lora.r, lora.lora_alpha = rank, lora.lora_alpha * rank / lora.r


class Warm(Depth):
    """The learning rate times √(blocks / live blocks), the length of an Adam step with all blocks."""

    def configure(self, setup: Setup) -> None:
        """Freeze, with a higher rate."""
        super().configure(setup)
        setup.training.learning_rate /= (1 - self.share) ** 0.5


globals().update(variants("blocks", Rank, Warm))
