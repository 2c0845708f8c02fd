"""PlannedStep: what one training step holds and computes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PlannedStep"]


@dataclass(frozen=True)
class PlannedStep:
    """One training step with so many blocks in the frozen prefix; bytes, and FLOPs of one micro-batch.

    ``weights + adapters + optimizer + saved + transient = peak``: what the step holds beside weights and saved bytes at
    its fullest moment, gradients among it, is ``transient``.

    Attributes:
        prefix: blocks in it.
        weights: parameters outside the adapters, and buffers.
        adapters: parameters that train before anything freezes.
        gradients: of all that train now.
        optimizer: state for all that train now.
        saved: what autograd keeps of the forward pass.
        transient: see above.
        peak: the most that the step holds.
        forward_flops: of the forward pass.
        backward_flops: of the backward pass, with what it recomputes.
        cached_flops: of both passes where the prefix cache has all samples.
    """

    prefix: int
    weights: int
    adapters: int
    gradients: int
    optimizer: int
    saved: int
    transient: int
    peak: int
    forward_flops: int
    backward_flops: int
    cached_flops: int

    @property
    def flops(self) -> int:
        """Of both passes, nothing cached."""
        return self.forward_flops + self.backward_flops
