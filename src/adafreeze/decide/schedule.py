"""When: the end of the warm-up, the cubic ramp, and the steps at which scores are measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["LossFall", "Losses", "Settling", "cubic_ramp", "measurement_steps"]


def cubic_ramp(step: float, warmup_end: float, ramp_end: float) -> float:
    """The paper's ramp, from 0 at t_w to 1 at t_f: ``1 − (1 − (t − t_w)/(t_f − t_w))³``.

    It rises fast at first. The threshold is τ(t) = τ_T · ramp(t), which is the published
    ``τ_T − τ_T·(1 − (t − t_w)/(t_f − t_w))³`` (Son et al. 2025).

    >>> [cubic_ramp(t, 10, 30) for t in (10, 20, 30, 99)]
    [0.0, 0.875, 1.0, 1.0]
    """
    if step >= ramp_end:
        return 1.0
    if step <= warmup_end:
        return 0.0
    return 1.0 - (1.0 - (step - warmup_end) / (ramp_end - warmup_end)) ** 3


def measurement_steps(until: int, count: int) -> tuple[int, ...]:
    """At most ``count`` evenly spaced steps, the last at ``until``.

    >>> measurement_steps(30, 6)
    (5, 10, 15, 20, 25, 30)
    >>> measurement_steps(3, 6)
    (1, 2, 3)
    """
    count = max(1, min(count, until))
    return tuple(round(until * (index + 1) / count) for index in range(count))


class Settling:
    """Detects that the scores have settled.

    They have when, over ``patience`` measurements in a row, the policy's choice stayed the same and no score moved by
    more than ``tolerance`` times the largest. Scores that are all zero, or not finite, have not settled.

    Args:
        patience: measurements, at least 1.
        tolerance: fraction of the largest score.
    """

    def __init__(self, patience: int, tolerance: float) -> None:
        self.patience = patience
        self.tolerance = tolerance
        self._calm = 0
        self._scores: dict[str, float] = {}
        self._choice: frozenset[str] | None = None

    def update(self, scores: Mapping[str, float], choice: frozenset[str]) -> bool:
        """Take one measurement into account; True once settled."""
        self._calm = self._calm + 1 if self._is_calm(scores, choice) else 0
        self._scores, self._choice = dict(scores), choice
        return self._calm >= self.patience

    def _is_calm(self, scores: Mapping[str, float], choice: frozenset[str]) -> bool:
        if not scores or choice != self._choice or scores.keys() != self._scores.keys():
            return False
        if not all(math.isfinite(score) for score in scores.values()) or max(scores.values()) <= 0:
            return False
        allowed = self.tolerance * max(scores.values())
        return all(abs(score - self._scores[name]) <= allowed for name, score in scores.items())

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        choice = None if self._choice is None else sorted(self._choice)
        return {"calm": self._calm, "scores": self._scores, "choice": choice}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was written."""
        self._calm, self._scores = state["calm"], dict(state["scores"])
        self._choice = None if state["choice"] is None else frozenset(state["choice"])


class Losses(NamedTuple):
    """Losses of an interval of training: their number, sum, and sum of squares (tensors while training runs)."""

    number: int = 0
    total: Any = 0.0
    squares: Any = 0.0


class LossFall:
    """Detects that the training loss is still dropping.

    With m₁ ... m_k its means between measurements, and s_k their standard errors, it does while

        m_{k−1} − m_k  >  (m₁ − m_k)/(k − 1)    and    m_{k−1} − m_k  >  2·√(s_{k−1}² + s_k²)

    that is, while it last fell by more than on average and by more than chance. A unit with a low score may then still
    be about to move, so freezing waits (the critical period of Egeria, Wang et al. 2023, arXiv:2201.06227). An interval
    without losses, or with one that is not finite, is skipped.
    """

    def __init__(self) -> None:
        self._means: list[float] = []
        self._error = math.inf

    def update(self, losses: Losses) -> bool:
        """Take the losses since the last measurement into account."""
        count = losses.number
        if not count or not math.isfinite(losses.squares):
            return False
        mean = losses.total / count
        variance = max(0.0, losses.squares / count - mean**2)
        error = math.sqrt(variance / (count - 1)) if count > 1 else math.inf
        before, self._error = self._error, error
        self._means.append(mean)
        if len(self._means) < 3:
            return False
        fall = self._means[-2] - mean
        return fall > (self._means[0] - mean) / (len(self._means) - 1) and fall > 2 * math.hypot(before, error)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"means": self._means, "error": self._error if math.isfinite(self._error) else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was written."""
        self._means = list(state["means"])
        self._error = math.inf if state["error"] is None else state["error"]
