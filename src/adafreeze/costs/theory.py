"""The theoretical savings of a sequence of prefix depths, to compare with the counted ones."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["expected_ratios"]

# Share of a block's backward pass for the gradient of its input through query, key and value: three of its twelve d × d
# products (with a feed-forward layer of 4 d). The lowest live block does not compute it.
TO_INPUT = 3 / 12


def expected_ratios(
    blocks: int, prefix_by_step: Sequence[int], steps_per_epoch: float | None = None
) -> tuple[float, float]:
    """Saved bytes and FLOPs relative to plain adapter-tuning, for a stack of L equal blocks, averaged over steps.

    A step with k of L blocks in the prefix keeps (L − k)/L of the saved bytes. Its forward pass costs L, its backward
    pass L − k − δ with δ = 1/4; plain training costs 2L − δ. With the prefix cache the forward pass costs L − c, where
    c is the depth of the prefix when the sample last came: the mean over the epoch before. Embeddings, head, adapters,
    attention scores and the probe are ignored.

    Args:
        blocks: L.
        prefix_by_step: k of each step.
        steps_per_epoch: with a prefix cache that contains all samples; None without one.

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
