"""Activation checkpointing of chosen blocks: as few as a memory budget needs, or of all but the costly results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ..costs.memory import count_saved
from ..errors import ConfigError
from ..model.blocks import Stack, without_cache
from ..model.patches import held_attribute, patched_forward

__all__ = ["Checkpointing", "fewest_checkpointed"]

Block = tuple[str, int]
"""A block: path of its stack, and its index."""

# Blocks whose FLOPs differ by less count as equal. The lowest block frees fewer bytes per FLOP, since its input needs
# no gradient: up to ALIKE_GAIN the lower block comes first all the same.
ALIKE = 0.02
ALIKE_GAIN = 0.25

# A product over at least this many numbers is kept: LoRA's B, over r of them, costs less to compute again.
LEAST_INNER = 64
# Where each product has its left factor.
LEFT_FACTOR = {"aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0, "aten::baddbmm": 1}
# The one factor is no weight: keep such a product if it is no larger than a factor, so not the n × n attention scores.
BATCHED = {"aten::bmm", "aten::baddbmm"}


class Checkpointing:
    """Switches activation checkpointing on for single blocks.

    It is torch's non-reentrant checkpointing, which restores random states: losses and gradients are those of a run
    without it. In a model whose checkpointing is on already, only its checkpointed blocks are candidates.

    Args:
        model: as the host calls it; blocks are checkpointed in training mode only.
        stacks: of the model.
        selective: keep the results of matrix products and attention, and recompute what lies between (norms,
            activations, rotary embeddings, masks, casts, LoRA's branches), for about 1 % of the FLOPs.

    Raises:
        ConfigError: ``selective``, and torch is too old.

    Attributes:
        every: the blocks of all stacks, bottom to top.
        blocks: those that can be checkpointed.
        chosen: those that are checkpointed, from the next forward pass on.
    """

    def __init__(self, model: nn.Module, stacks: list[Stack], *, selective: bool = False) -> None:
        self.model = model
        self._context: dict[str, Any] = {"context_fn": _selective_contexts} if selective else {}
        if selective and "op_output" not in signature(SelectiveCheckpointContext).parameters:
            raise ConfigError(
                f"Selective checkpointing needs a newer torch: {torch.__version__} does not show what it keeps.",
                fix='pip install -U torch, or model.gradient_checkpointing_enable() without checkpointing="selective"',
            )
        self.every = {(stack.path, index): block for stack in stacks for index, block in enumerate(stack.blocks)}
        switched_on = {
            name: block for name, block in self.every.items() if getattr(block, "gradient_checkpointing", False)
        }
        self.blocks: dict[Block, nn.Module] = switched_on or self.every
        self.chosen: frozenset[Block] = frozenset()
        self._undo = ExitStack()

    def install(self) -> None:
        """Replace the model's own checkpointing, until ``restore``."""
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
            # Without the key-value cache: the second forward pass would append the same entries again.
            args, kwargs = without_cache(args, kwargs)
            return checkpoint(original, *args, use_reentrant=False, **self._context, **kwargs)

        return forward


def _selective_contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_keeps)  # type: ignore[no-any-return]


def _keeps(context: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether the result of an operator is kept. Kept results are no saved tensors, so they are counted here."""
    if not _is_costly(operator.name().partition(".")[0], args):
        return CheckpointPolicy.PREFER_RECOMPUTE
    if not context.is_recompute:
        count_saved(context.op_output)
    return CheckpointPolicy.MUST_SAVE


def _is_costly(name: str, args: tuple[Any, ...]) -> bool:
    if "scaled_dot_product" in name or "flash_attn" in name:
        return True
    if name not in LEFT_FACTOR:
        return False
    left, right = args[LEFT_FACTOR[name] :][:2]
    if left.shape[-1] < LEAST_INNER:
        return False
    made = left.shape[:-1].numel() * right.shape[-1]
    return name not in BATCHED or made <= max(left.numel(), right.numel())


def fewest_checkpointed(
    costs: Mapping[Block, tuple[int, int]], peak: Callable[[frozenset[Block]], int], limit: int
) -> frozenset[Block] | None:
    """The blocks to checkpoint so that ``peak`` is at most ``limit``, for the fewest FLOPs.

    Blocks are taken by bytes freed per FLOP, equal ones from the bottom up: the backward pass frees the top blocks'
    activations before it reaches the bottom, and the bottom freezes first. If blocks differ in size, those that turn
    out not to be needed are dropped.

    Args:
        costs: of each candidate, bottom to top: bytes that checkpointing it frees (all that it saves, less its input),
            and FLOPs of its forward pass.
        peak: bytes of a step that checkpoints these blocks; called a few times.
        limit: bytes.

    Returns:
        None if even all of them do not suffice.

    >>> blocks = {("layers", index): (10, 5) for index in range(4)}
    >>> sorted(fewest_checkpointed(blocks, lambda chosen: 60 - 10 * len(chosen), limit=45))
    [('layers', 0), ('layers', 1)]
    """
    if (excess := peak(frozenset()) - limit) <= 0:
        return frozenset()
    freed = {name: nbytes for name, (nbytes, _) in costs.items() if nbytes > 0}
    flops = {name: costs[name][1] for name in freed}
    gains = {name: freed[name] / max(1, flops[name]) for name in freed}
    order: list[Block] = []
    for name in freed:
        place = next((i for i, other in enumerate(order) if gains[name] > (1 + ALIKE_GAIN) * gains[other]), len(order))
        order.insert(place, name)

    def fits(count: int) -> bool:
        return peak(frozenset(order[:count])) <= limit

    sums = accumulate(freed[name] for name in order)
    count = next((i for i, nbytes in enumerate(sums, 1) if nbytes >= excess), len(order))
    while not fits(count):
        if count >= len(order):
            return None
        count += 1
    while count > 1 and fits(count - 1):
        count -= 1
    chosen = order[:count]
    if max(flops.values()) > (1 + ALIKE) * min(flops.values()):
        for name in sorted(chosen[:-1], key=lambda name: -flops[name]):
            fewer = [other for other in chosen if other != name]
            if peak(frozenset(fewer)) <= limit:
                chosen = fewer
    return frozenset(chosen)
