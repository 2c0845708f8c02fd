"""Meter: FLOPs and saved bytes of a whole run; each kind of step is counted once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .flops import CountFlops
from .memory import SavedBytes

__all__ = ["Meter", "StepCost"]


@dataclass(frozen=True)
class StepCost:
    """FLOPs, forward and backward, and saved bytes of one micro-step."""

    flops: int
    saved_bytes: int


class Meter:
    """Adds up the cost of a run:

        meter = Meter(model, state_key=lambda: safe.state_key)
        with meter.step(batch):
            model(**batch).loss.backward()
        meter.summary()

    Counting slows a step and would distort timings, so only the first step of each kind is counted. The kind is
    ``state_key`` (the frozen set), the shapes of the batch, and whether it has padding, which attention may skip; that
    is checked on the CPU only, to avoid a device sync.

    Args:
        model: whose parameters and buffers do not count as saved.
        state_key: returns a hashable that changes when the cost of a step does.
        nested_flops: running total of FLOPs counted elsewhere within the steps, which differ between steps of one kind
            (the prefix cache computes samples that it does not contain yet).

    Attributes:
        costs: of each micro-step, in order.
        kinds: the cost of each kind of step, without nested FLOPs.
    """

    def __init__(
        self,
        model: nn.Module,
        state_key: Callable[[], Hashable] = lambda: 0,
        nested_flops: Callable[[], int] = lambda: 0,
    ) -> None:
        self.model = model
        self.state_key = state_key
        self.nested_flops = nested_flops
        self.kinds: dict[Hashable, StepCost] = {}
        self.costs: list[StepCost] = []

    @contextmanager
    def step(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Around forward and backward of one micro-step on ``batch``."""
        kind = (self.state_key(), _shapes(batch), self.model.training)
        before = self.nested_flops()
        if kind in self.kinds:
            yield
        else:
            with CountFlops() as flops, SavedBytes(self.model) as saved:
                yield
            self.kinds[kind] = StepCost(flops.total - (self.nested_flops() - before), saved.total)
        cost = self.kinds[kind]
        self.costs.append(StepCost(cost.flops + self.nested_flops() - before, cost.saved_bytes))

    def summary(self) -> dict[str, float]:
        """``steps`` (micro-steps), ``flops`` (sum), ``peak_saved_bytes`` and ``mean_saved_bytes``."""
        saved = [cost.saved_bytes for cost in self.costs]
        return {
            "steps": len(self.costs),
            "flops": sum(cost.flops for cost in self.costs),
            "peak_saved_bytes": max(saved, default=0),
            "mean_saved_bytes": sum(saved) / len(saved) if saved else 0.0,
        }


def _shapes(batch: Mapping[str, Any]) -> Hashable:
    shapes = tuple((name, tuple(v.shape), str(v.dtype)) for name, v in sorted(batch.items()) if isinstance(v, Tensor))
    mask = batch.get("attention_mask")
    padded = isinstance(mask, Tensor) and mask.device.type == "cpu" and not bool(mask.all())
    return shapes, padded
