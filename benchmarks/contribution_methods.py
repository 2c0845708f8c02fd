"""The runs of benchmarks/contribution.py, as methods for ``adafreeze compare``."""

from __future__ import annotations

from typing import ClassVar

from adafreeze.methods import Method, Setup
from adafreeze.methods.plain import Plain
from adafreeze.methods.safe import Safe


def nothing(_: object) -> list[str]:
    """Policy: no freeze after step 0."""
    return []


class Depth(Safe):
    """The lowest ``blocks`` frozen from step 0 at rest: no score, no later freeze, no scaled learning rates."""

    blocks: ClassVar[int]

    def configure(self, setup: Setup) -> None:
        """Freeze at the start."""
        share = self.blocks / setup.base.config.num_hidden_layers
        rule = {"score": "random", "wait_for_loss": False, "lr_scale": 1.0}
        setup.freeze(**rule, policy=nothing, freeze_at_start=share)


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


def _variant(kind: type[Method], field: str, number: int) -> type[Method]:
    return type(f"{kind.__name__}{number}", (kind,), {"name": f"{kind.__name__.lower()}-{number}", field: number})


# Depth1 ... as attributes, because `compare` takes FILE.py:Class.
globals().update(
    {
        made.__name__: made
        for kind, field in ((Depth, "blocks"), (Without, "block"), (Alone, "block"))
        for made in (_variant(kind, field, number) for number in range(32))
    }
)
