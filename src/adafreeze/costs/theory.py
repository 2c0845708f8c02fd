"""What a sequence of prefix depths saves by arithmetic, to stand beside what was counted."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["expected_ratios"]


def expected_ratios(blocks: int, prefix_by_step: Sequence[int]) -> tuple[float, float]:
    """Saved bytes and FLOPs against plain adapter-tuning, for a stack of L equal blocks, averaged over steps.

    A step with k of L blocks in the prefix keeps (L − k)/L of the saved bytes. Its forward pass is whole and its
    backward pass costs as much a block: (L + (L − k)) / 2L of the FLOPs. Embeddings, head and the probe are left
    out.

    Args:
        blocks: L.
        prefix_by_step: k of each step.

    Returns:
        (saved bytes ratio, FLOPs ratio).

    >>> [round(ratio, 2) for ratio in expected_ratios(6, [0] * 20 + [4] * 80)]
    [0.47, 0.73]
    """
    steps = len(prefix_by_step)
    live = sum(blocks - depth for depth in prefix_by_step) / (blocks * steps)
    return live, (1 + live) / 2
