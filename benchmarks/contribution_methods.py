"""The runs of benchmarks/contribution.py, as methods for ``adafreeze compare``."""

from __future__ import annotations

from typing import ClassVar

from adafreeze.methods import Method, Setup
from adafreeze.methods.plain import Plain
from adafreeze.methods.rivals import StaticPrefix


class Depth(StaticPrefix):
    """The lowest ``blocks`` frozen from step 0 at rest."""

    blocks: ClassVar[int]

    def configure(self, setup: Setup) -> None:
        """Freeze at the start."""
        self.share = self.blocks / setup.base.config.num_hidden_layers
        super().configure(setup)


class Without(Plain):
    """Adapters in all blocks but one."""

    block: ClassVar[int]

    def configure(self, setup: Setup) -> None:
        """Leave one block out."""
        super().configure(setup)
        setup.lora(self.name).layers_to_transform = self.adapted(setup.base.config.num_hidden_layers)

    def adapted(self, blocks: int) -> list[int]:
        """The blocks with adapters."""
        return [index for index in range(blocks) if index != self.block]


class Alone(Without):
    """Adapters in one block."""

    def adapted(self, blocks: int) -> list[int]:
        """The block."""
        return [self.block]


def variants(field: str, *kinds: type[Method]) -> dict[str, type[Method]]:
    """Depth1 ... by name: ``compare`` takes FILE.py:Class."""
    return {
        f"{kind.__name__}{number}": type(
            f"{kind.__name__}{number}", (kind,), {"name": f"{kind.__name__.lower()}-{number}", field: number}
        )
        for kind in kinds
        for number in range(32)
    }


globals().update(variants("blocks", Depth) | variants("block", Without, Alone))
