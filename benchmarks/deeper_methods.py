"""What might make a deep static prefix cheaper in quality, as methods for ``adafreeze compare``."""

from __future__ import annotations

from contribution_methods import Depth

from adafreeze.methods import Setup


class Rank(Depth):
    """The ranks of the frozen blocks given to the live ones, at equal parameters (and equal alpha / r)."""

    def configure(self, setup: Setup) -> None:
        """Freeze, with higher ranks."""
        super().configure(setup)
        lora, factor = setup.lora(self.name), self._factor(setup)
        lora.r, lora.lora_alpha = round(lora.r * factor), lora.lora_alpha * round(lora.r * factor) / lora.r

    def _factor(self, setup: Setup) -> float:
        blocks: int = setup.base.config.num_hidden_layers
        return blocks / (blocks - self.blocks)


class Warm(Rank):
    """The learning rate times √(blocks / live blocks), the length of an Adam step with all blocks."""

    def configure(self, setup: Setup) -> None:
        """Freeze, with a higher rate."""
        Depth.configure(self, setup)
        setup.training.learning_rate *= self._factor(setup) ** 0.5


globals().update(
    {
        f"{kind.__name__}{depth}": type(
            f"{kind.__name__}{depth}", (kind,), {"name": f"{kind.__name__.lower()}-{depth}", "blocks": depth}
        )
        for kind in (Rank, Warm)
        for depth in range(1, 32)
    }
)
