"""What a sequence of prefix depths saves by arithmetic, to stand beside what was counted."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["expected_ratios"]


def expected_ratios(
    blocks: int, prefix_by_step: Sequence[int], steps_per_epoch: float | None = None
) -> tuple[float, float]:
    """Saved bytes and FLOPs against plain adapter-tuning, for a stack of L equal blocks, averaged over steps.

    A step with k of L blocks in the prefix keeps (L − k)/L of the saved bytes. Its forward pass is whole and its
    backward pass costs as much a block: (L + (L − k)) / 2L of the FLOPs. With the prefix cache the forward pass
    costs L − c, with c the depth to which a sample's states are held: that of the prefix when the sample last came,
    in the epoch before, on average over where in that epoch it came. Embeddings, head and the probe are left out.

    Args:
        blocks: L.
        prefix_by_step: k of each step.
        steps_per_epoch: with the prefix cache on, holding all samples; None without it.

    Returns:
        (saved bytes ratio, FLOPs ratio).

    >>> [round(ratio, 2) for ratio in expected_ratios(6, [0] * 20 + [4] * 80)]
    [0.47, 0.73]
    >>> round(expected_ratios(6, [0] * 20 + [4] * 80, steps_per_epoch=20)[1], 2)
    0.53
    """
    steps = len(prefix_by_step)
    live = sum(blocks - depth for depth in prefix_by_step) / (blocks * steps)
    looked_up = 0.0
    if steps_per_epoch is not None:
        starts = [*range(0, steps, max(1, round(steps_per_epoch))), steps]
        for start, end, after in zip(starts, starts[1:], starts[2:], strict=False):
            looked_up += sum(prefix_by_step[start:end]) / (end - start) * (after - end)
    return live, (1 + live) / 2 - looked_up / (2 * blocks * steps)
