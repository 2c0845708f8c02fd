"""Meter: FLOPs and saved bytes of a whole run, each kind of step counted once."""

from __future__ import annotations

from collections import Counter
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
    """Adds up what a run costs:

        meter = Meter(model, state_key=lambda: safe.state_key)
        with meter.step(batch):
            model(**batch).loss.backward()
        meter.summary()

    Counting slows a step and would spoil timings, so a step is counted the first time its kind is seen: the
    shapes of its batch, together with whatever ``state_key`` says (the frozen set). Steps of one kind cost the
    same to the byte, but for where a batch without padding lets attention take another path than one with.
    Whether there is padding is therefore part of the kind; it is looked up on the CPU only (no device sync).

    Args:
        model: whose parameters and buffers do not count as saved.
        state_key: anything hashable that changes when the cost of a step does.
        nested_flops: running total of FLOPs that somebody else counts inside the steps (the prefix cache, where a
            step computes what is not held yet); they differ from step to step of one kind.
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
        self.nested: list[int] = []
        self.kinds: list[Hashable] = []
        self.costs: dict[Hashable, StepCost] = {}

    @contextmanager
    def step(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Around forward and backward of one micro-step on ``batch``."""
        kind = (self.state_key(), _shapes(batch), self.model.training)
        before = self.nested_flops()
        if kind in self.costs:
            yield
            nested = self.nested_flops() - before
        else:
            with CountFlops() as flops, SavedBytes(self.model) as saved:
                yield
            nested = self.nested_flops() - before
            self.costs[kind] = StepCost(flops.total - nested, saved.total)
        self.kinds.append(kind)
        self.nested.append(nested)

    def series(self, start: int = 0) -> list[StepCost]:
        """The cost of each micro-step from ``start`` on, in order."""
        return [
            StepCost(self.costs[kind].flops + nested, self.costs[kind].saved_bytes)
            for kind, nested in zip(self.kinds[start:], self.nested[start:], strict=True)
        ]

    def summary(self) -> dict[str, float]:
        """``steps`` (micro-steps), ``flops`` (sum), ``peak_saved_bytes`` and ``mean_saved_bytes``."""
        counts = Counter(self.kinds)
        steps = len(self.kinds)
        total = sum(self.costs[kind].saved_bytes * count for kind, count in counts.items())
        return {
            "steps": steps,
            "flops": sum(self.costs[kind].flops * count for kind, count in counts.items()) + sum(self.nested),
            "peak_saved_bytes": max((cost.saved_bytes for cost in self.costs.values()), default=0),
            "mean_saved_bytes": total / steps if steps else 0.0,
        }


def _shapes(batch: Mapping[str, Any]) -> Hashable:
    shapes = tuple((name, tuple(v.shape), str(v.dtype)) for name, v in sorted(batch.items()) if isinstance(v, Tensor))
    mask = batch.get("attention_mask")
    padded = isinstance(mask, Tensor) and mask.device.type == "cpu" and not bool(mask.all())
    return shapes, padded
