"""What a sequence of prefix depths saves by arithmetic, to stand beside what was counted."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["expected_ratios"]

# Of a block's backward pass: the gradient of its input through query, key and value, three of its twelve d × d products
# (with a feed-forward layer of 4 d). The lowest block that trains has nobody below to hand it to.
TO_INPUT = 3 / 12


def expected_ratios(
    blocks: int, prefix_by_step: Sequence[int], steps_per_epoch: float | None = None
) -> tuple[float, float]:
    """Saved bytes and FLOPs against plain adapter-tuning, for a stack of L equal blocks, averaged over steps.

    A step with k of L blocks in the prefix keeps (L − k)/L of the saved bytes. Its forward pass is whole, L, and its
    backward pass costs as much a block, but for δ = 1/4 of the lowest block's: L − k − δ. Plain training costs
    2L − δ. With the prefix cache the forward pass costs L − c, with c the depth to which a sample's states are held:
    that of the prefix when the sample last came, in the epoch before, on average over where in that epoch it came.
    Embeddings, head, adapters, attention scores and the probe are left out.

    Args:
        blocks: L.
        prefix_by_step: k of each step.
        steps_per_epoch: with the prefix cache on, holding all samples; None without it.

    Returns:
        (saved bytes ratio, FLOPs ratio).

    >>> [round(ratio, 2) for ratio in expected_ratios(6, [0] * 20 + [4] * 80)]
    [0.47, 0.73]
    >>> round(expected_ratios(6, [0] * 20 + [4] * 80, steps_per_epoch=20)[1], 2)
    0.52
    """
    steps = len(prefix_by_step)
    frozen = sum(prefix_by_step) / steps
    looked_up = 0.0
    if steps_per_epoch is not None:
        starts = [*range(0, steps, max(1, round(steps_per_epoch))), steps]
        for start, end, after in zip(starts, starts[1:], starts[2:], strict=False):
            looked_up += sum(prefix_by_step[start:end]) / (end - start) * (after - end) / steps
    plain = 2 * blocks - TO_INPUT
    return 1 - frozen / blocks, max(0.0, plain - frozen - looked_up) / plain
