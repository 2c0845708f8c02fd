"""Activation checkpointing of chosen blocks: as few as a memory budget needs, or of all but the costly results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)

from ..costs.memory import count_saved
from ..errors import ConfigError
from ..model.blocks import Stack, without_cache
from ..model.patches import held_attribute, patched_forward
from .rehearsal import rehearse

__all__ = ["NOTHING", "Block", "Checkpointing", "Recomputed", "fewest_checkpointed", "least_recomputed"]

Block = tuple[str, int]
"""A block: path of its stack, and its index."""


@dataclass(frozen=True)
class Recomputed:
    """What the backward pass computes again.

    Attributes:
        full: blocks of which only the input is kept.
        selective: blocks of which the results of matrix products and attention are kept, too. What lies between (norms,
            activations, rotary embeddings, masks, casts, LoRA's branches) takes about 1 % of the FLOPs.
    """

    full: frozenset[Block] = frozenset()
    selective: frozenset[Block] = frozenset()


NOTHING = Recomputed()

# Blocks whose FLOPs differ by less count as equal. The lowest block frees fewer bytes per FLOP, since its input needs
# no gradient: up to ALIKE_GAIN the lower block comes first all the same.
ALIKE = 0.02
ALIKE_GAIN = 0.25

# Whether torch shows a policy the result that it decides on, which is counted.
CAN_BE_SELECTIVE = "op_output" in signature(SelectiveCheckpointContext).parameters

# A product over at least this many numbers is kept: LoRA's B, over r of them, costs less to compute again.
LEAST_INNER = 64
# Where each product has its left factor.
LEFT_FACTOR = {"aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0, "aten::baddbmm": 1}
# The one factor is no weight: keep such a product if it is no larger than a factor, so not the n × n attention scores.
BATCHED = {"aten::bmm", "aten::baddbmm"}


def _own_of_torch() -> Callable[..., Any]:
    """``torch.utils.checkpoint.checkpoint``, also where Unsloth has put one in its place that is always reentrant.

    Through that one the block above the prefix, whose input needs no gradient, would get none.
    """
    module = torch.utils.checkpoint
    own: Callable[..., Any] = getattr(module, "_unsloth_pristine_checkpoint", module.checkpoint)
    return own


class Checkpointing:
    """Switches activation checkpointing on for single blocks.

    It is torch's non-reentrant checkpointing, which restores random states: losses and gradients are those of a run
    without it. In a model whose checkpointing is on already, only its checkpointed blocks are candidates.

    Args:
        model: as the host calls it; blocks are checkpointed in training mode only.
        stacks: of the model.

    Attributes:
        every: the blocks of all stacks, bottom to top.
        blocks: those that can be checkpointed.
        recomputed: those that are, and how, from the next forward pass on.
    """

    def __init__(self, model: nn.Module, stacks: list[Stack]) -> None:
        self.model = model
        self.every = {(stack.path, index): block for stack in stacks for index, block in enumerate(stack.blocks)}
        switched_on = {
            name: block for name, block in self.every.items() if getattr(block, "gradient_checkpointing", False)
        }
        self.blocks: dict[Block, nn.Module] = switched_on or self.every
        self.recomputed = NOTHING
        self._undo = ExitStack()

    @property
    def all_full(self) -> Recomputed:
        """Every block that can be."""
        return Recomputed(full=frozenset(self.blocks))

    @property
    def all_selective(self) -> Recomputed:
        """Every block that can be.

        Raises:
            ConfigError: torch is too old.
        """
        if not CAN_BE_SELECTIVE:
            raise ConfigError(
                f"Selective checkpointing needs a newer torch: {torch.__version__} does not show what it keeps.",
                fix='pip install -U torch, or model.gradient_checkpointing_enable() without checkpointing="selective"',
            )
        return Recomputed(selective=frozenset(self.blocks))

    def install(self) -> None:
        """Replace the model's own checkpointing, until ``restore``."""
        for name, block in self.blocks.items():
            self._undo.enter_context(held_attribute(block, "gradient_checkpointing", False))
            self._undo.enter_context(patched_forward(block, self._forward(name, block)))

    def check(self, forward: Callable[..., Any], inputs: Mapping[str, Any]) -> None:
        """Rehearse a step with what is recomputed now; a model that cannot be rehearsed passes.

        Raises:
            ConfigError: the model changes a kept result in place, so that the backward pass would fail.
        """
        try:
            rehearse(self.model, inputs, forward=forward)
        except Exception as error:
            if "has been mutated" in str(error):
                raise ConfigError(
                    f"SafeConfig.checkpointing is 'selective', but {type(self.model).__name__} changes the result of a "
                    "matrix product in place, which this kind of checkpointing would keep.",
                    fix="Leave it out; model.gradient_checkpointing_enable() or memory_budget recompute whole blocks.",
                ) from error

    def restore(self) -> None:
        """Leave every block as it was before."""
        self._undo.close()
        self._undo = ExitStack()

    def _forward(self, name: Block, block: nn.Module) -> Callable[..., Any]:
        original = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            full, selective = name in self.recomputed.full, name in self.recomputed.selective
            if not (full or selective) or not self.model.training or not torch.is_grad_enabled():
                return original(*args, **kwargs)
            # Without the key-value cache: the second forward pass would append the same entries again.
            args, kwargs = without_cache(args, kwargs)
            context: dict[str, Any] = {"context_fn": _selective_contexts} if selective else {}
            return _own_of_torch()(original, *args, use_reentrant=False, **context, **kwargs)

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
    if not freed:
        return None
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


def least_recomputed(
    whole: Mapping[Block, tuple[int, int]],
    between: Mapping[Block, tuple[int, int]],
    peak: Callable[[Recomputed], int],
    limit: int,
) -> Recomputed | None:
    """What to recompute so that ``peak`` is at most ``limit``, for the fewest FLOPs.

    Selective checkpointing frees more bytes per FLOP, so whole blocks are recomputed only where that of all blocks does
    not suffice; then as few as possible, and no more of the others selectively than needed. If it frees fewer bytes per
    FLOP (a model whose costly operators are not known), it is not used.

    Args:
        whole: of each candidate, bottom to top: bytes that recomputing it frees, and FLOPs.
        between: the same of selective checkpointing; empty if the model does not allow it.
        peak: bytes of a step; called a few times.
        limit: bytes.

    Returns:
        None if even recomputing all of them does not suffice.

    >>> whole = {("layers", index): (10, 50) for index in range(4)}
    >>> between = {name: (4, 1) for name in whole}
    >>> peak = lambda recomputed: 60 - 10 * len(recomputed.full) - 4 * len(recomputed.selective)
    >>> chosen = least_recomputed(whole, between, peak, limit=40)
    >>> sorted(chosen.full), sorted(chosen.selective)
    ([('layers', 0)], [('layers', 1), ('layers', 2), ('layers', 3)])
    """
    saved, flops = (sum(costs[index] for costs in whole.values()) for index in (0, 1))
    freed, again = (sum(costs[index] for costs in between.values()) for index in (0, 1))
    every = frozenset(between) if freed * flops > saved * again else frozenset()
    some = fewest_checkpointed(
        {name: between[name] for name in whole if name in every}, lambda some: peak(Recomputed(selective=some)), limit
    )
    if some is not None:
        return Recomputed(selective=some)
    rest = {name: (nbytes - between[name][0] if name in every else nbytes, n) for name, (nbytes, n) in whole.items()}
    full = fewest_checkpointed(rest, lambda full: peak(Recomputed(full, every - full)), limit)
    if full is None:
        return None
    others = {name: costs for name, costs in between.items() if name in every - full}
    some = fewest_checkpointed(others, lambda some: peak(Recomputed(full, some)), limit)
    return Recomputed(full, every - full if some is None else some)
