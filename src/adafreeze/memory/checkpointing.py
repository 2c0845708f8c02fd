"""Which blocks compute their activations again in the backward pass, so that a step stays under a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..model.blocks import Stack, without_cache
from ..model.patches import held_attribute, patched_forward

__all__ = ["BlockCost", "Checkpointing", "least_recompute"]

Block = tuple[str, int]
"""A block: path of its stack, and its index."""

# Blocks whose FLOPs differ by less are of one kind. Of bytes freed per FLOP the lowest block gives less, as its input
# needs no gradient: up to that difference the lower one goes first.
ALIKE = 0.02
ALIKE_GAIN = 0.25


@dataclass(frozen=True)
class BlockCost:
    """What recomputing one block gives, and what it costs.

    Attributes:
        freed: bytes that it saves for the backward pass, less its input, which is all that recomputing keeps.
        flops: of its forward pass.
    """

    freed: int
    flops: int


class Checkpointing:
    """Lets chosen blocks keep only their input, and compute the rest again when the backward pass needs it.

    Whole blocks, by torch's non-reentrant checkpointing: random states are put back for the second pass, so that
    dropout draws the same masks, and losses and gradients are those of a run that keeps everything.

    Blocks on which checkpointing is on already are the only ones that are recomputed, and are the most that is:
    whoever switched it on for all blocks gets back what fits. In a model without, any block may be.

    Args:
        model: whose ``training`` flag decides.
        stacks: of the model.

    Attributes:
        blocks: those that may be recomputed, bottom to top.
        chosen: those that are, from the next forward pass on.
    """

    def __init__(self, model: nn.Module, stacks: list[Stack]) -> None:
        self.model = model
        found = {(stack.path, index): block for stack in stacks for index, block in enumerate(stack.blocks)}
        switched_on = {name: block for name, block in found.items() if getattr(block, "gradient_checkpointing", False)}
        self.blocks: dict[Block, nn.Module] = switched_on or found
        self.chosen: frozenset[Block] = frozenset()
        self._undo = ExitStack()

    def install(self) -> None:
        """Take over from the model's own checkpointing, until ``restore``."""
        for name, block in self.blocks.items():
            self._undo.enter_context(held_attribute(block, "gradient_checkpointing", False))
            self._undo.enter_context(patched_forward(block, self._forward(name, block)))

    def restore(self) -> None:
        """Leave every block as it was before."""
        self._undo.close()
        self._undo = ExitStack()

    def _forward(self, name: Block, block: nn.Module) -> Callable[..., Any]:
        original = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if name not in self.chosen or not self.model.training or not torch.is_grad_enabled():
                return original(*args, **kwargs)
            # The second pass would put the same keys and values into a cache once more.
            args, kwargs = without_cache(args, kwargs)
            return checkpoint(original, *args, use_reentrant=False, **kwargs)

        return forward


def least_recompute(
    costs: Mapping[Block, BlockCost], peak: Callable[[frozenset[Block]], int], limit: int
) -> frozenset[Block] | None:
    """The blocks to recompute so that ``peak`` is at most ``limit``, for the fewest FLOPs.

    Blocks come by bytes freed per FLOP, equal ones from the bottom up, and as many as are needed. The bottom first,
    because what the top blocks keep is used up before the backward pass comes to the others, and because the bottom is
    what freezes first. Where blocks differ, those are dropped again that turn out not to be needed.

    Args:
        costs: of each block that may be recomputed, bottom to top.
        peak: bytes of a step that recomputes these; asked a few times, near where the freed bytes say to look.
        limit: bytes.

    Returns:
        None if even all of them do not suffice.

    >>> blocks = {("layers", index): BlockCost(freed=10, flops=5) for index in range(4)}
    >>> sorted(least_recompute(blocks, lambda chosen: 60 - 10 * len(chosen), limit=45))
    [('layers', 0), ('layers', 1)]
    """
    if (excess := peak(frozenset()) - limit) <= 0:
        return frozenset()
    useful = {name: cost for name, cost in costs.items() if cost.freed > 0}
    gains = {name: cost.freed / max(1, cost.flops) for name, cost in useful.items()}
    order: list[Block] = []
    for name in useful:
        place = next((i for i, other in enumerate(order) if gains[name] > (1 + ALIKE_GAIN) * gains[other]), len(order))
        order.insert(place, name)

    def fits(count: int) -> bool:
        return peak(frozenset(order[:count])) <= limit

    freed = list(accumulate(useful[name].freed for name in order))
    count = next((i for i, bytes_ in enumerate(freed, 1) if bytes_ >= excess), len(order))
    while not fits(count):
        if count >= len(order):
            return None
        count += 1
    while count > 1 and fits(count - 1):
        count -= 1
    chosen, flops = order[:count], [useful[name].flops for name in order]
    if max(flops) > (1 + ALIKE) * min(flops):
        for name in sorted(chosen[:-1], key=lambda name: -useful[name].flops):
            fewer = [other for other in chosen if other != name]
            if peak(frozenset(fewer)) <= limit:
                chosen = fewer
    return frozenset(chosen)
