"""Scores: how the importance of a unit is measured. One class each, 0 = unimportant."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from torch import Tensor

from ..errors import AdafreezeError
from .cka import CKAReference

__all__ = ["SCORES", "Captures", "Score", "random_score", "resolve_score"]


class Captures(Protocol):
    """What a score can look at, by unit name. ``adafreeze.measure.Scorer`` implements it."""

    seed: int

    def outputs(self) -> dict[str, Tensor]:
        """The unit's output on the probe, of shape (tokens, features)."""

    def local_outputs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The same without and with the unit's own adapter, on the same input."""

    def weights(self) -> dict[str, Tensor]:
        """The parameters of each live unit, flattened."""

    def gradient_norms(self) -> dict[str, Tensor]:
        """The summed gradient norms of each live unit since the last measurement; empty before the first step."""

    def names(self) -> list[str]:
        """The names of all units."""


class Score:
    """One way to score units. To add one: subclass this, and add an instance to ``SCORES``.

    Attributes:
        name: as in ``SafeConfig(score=...)``.
        reads: what it is made of. A parallel host refuses scores of what it hides (``Parallel.hidden``);
            ``"outputs"`` takes forward passes on the probe, and has its size fitted to the budget.
        reference: the capture that the present one is compared with: ``"start"``, the model as training began;
            ``"previous"``, the last measurement; None if a capture is a pair of both sides.
    """

    name: str = ""
    reads: Literal["outputs", "weights", "gradients", "nothing"] = "outputs"
    reference: Literal["start", "previous"] | None = "start"

    def capture(self, captures: Captures) -> Mapping[str, Any]:
        """What is compared, by unit name."""
        return captures.outputs()

    def prepare(self, before: Any, normalize_rows: bool) -> Any:
        """Preprocess the first side of ``compare``, once."""
        return before

    def compare(self, before: Any, after: Any) -> float:
        """The score of a unit, from its prepared capture at the reference and its capture now."""
        raise NotImplementedError


class CKAScore(Score):
    """1 − CKA of a unit's output when training began and now (Son et al. 2025, Kornblith et al. 2019)."""

    def __init__(self, name: str, *, debiased: bool = False) -> None:
        self.name, self.debiased = name, debiased

    def prepare(self, before: Tensor, normalize_rows: bool) -> CKAReference:
        """Center the reference, and scale its rows to unit length if ``normalize_rows``."""
        return CKAReference(before, self.debiased, normalize_rows)

    def compare(self, before: CKAReference, after: Tensor) -> float:
        """1 − CKA."""
        return before.score(after)


class LocalCKAScore(CKAScore):
    """1 − CKA of a unit's output without and with its own adapter, on the same input: needs no reference."""

    reference = None

    def capture(self, captures: Captures) -> Mapping[str, Any]:
        """Pairs of outputs."""
        return captures.local_outputs()


class GradNormScore(Score):
    """AutoFreeze (Liu et al. 2021): |‖g‖_before − ‖g‖_now| / ‖g‖_before, of the gradients of one interval."""

    name, reads, reference = "grad_norm", "gradients", "previous"

    def capture(self, captures: Captures) -> Mapping[str, Tensor]:
        """Gradient norms."""
        return captures.gradient_norms()

    def compare(self, before: Tensor, after: Tensor) -> float:
        """The relative change; infinite, so that it decides nothing, if there was no gradient before."""
        return float((before - after).abs() / before.abs()) if float(before) else float("inf")


class WeightChangeScore(Score):
    """GradES (Wen et al. 2025): mean |θ_now − θ_before| since the previous measurement."""

    name, reads, reference = "weight_change", "weights", "previous"

    def capture(self, captures: Captures) -> Mapping[str, Tensor]:
        """Weights."""
        return captures.weights()

    def compare(self, before: Tensor, after: Tensor) -> float:
        """The mean absolute change."""
        return float((after - before).abs().mean())


class RandomScore(Score):
    """A fixed random number for each unit: the control of every comparison."""

    name, reads, reference = "random", "nothing", None

    def capture(self, captures: Captures) -> Mapping[str, tuple[None, float]]:
        """The scores."""
        return {name: (None, random_score(name, captures.seed)) for name in captures.names()}

    def compare(self, before: Any, after: float) -> float:
        """The captured number."""
        return after


class FunctionScore(Score):
    """A user's function (before, after) -> float of two outputs of shape (tokens, features)."""

    def __init__(self, function: Callable[[Tensor, Tensor], float]) -> None:
        self.function = function
        self.name = getattr(function, "__name__", "callable")

    def compare(self, before: Tensor, after: Tensor) -> float:
        """What the function returns.

        Raises:
            AdafreezeError: it returns no number.
        """
        score = self.function(before, after)
        try:
            return float(score)
        except (TypeError, ValueError, RuntimeError) as error:
            raise AdafreezeError(
                f"The score {self.name} returned a {type(score).__name__}, which is not a number.",
                fix="Return one float for the two outputs of a unit.",
            ) from error


def random_score(name: str, seed: int) -> float:
    """A number between 0 and 1 (exclusive) that is fixed for a unit and a seed.

    >>> random_score("layer.0", 0) == random_score("layer.0", 0) != random_score("layer.1", 0)
    True
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=6).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2**48


SCORES: dict[str, Score] = {
    score.name: score
    for score in (
        CKAScore("cka"),
        CKAScore("cka_debiased", debiased=True),
        LocalCKAScore("local_cka"),
        GradNormScore(),
        WeightChangeScore(),
        RandomScore(),
    )
}


def resolve_score(score: str | Score | Callable[[Tensor, Tensor], float]) -> Score:
    """The score of that name; a ``Score`` as it is; a function compares outputs."""
    if isinstance(score, Score):
        return score
    return FunctionScore(score) if callable(score) else SCORES[score]
