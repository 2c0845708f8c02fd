"""Scores by name: how a unit's importance is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from .cka import CKAReference

__all__ = ["SCORES", "Score", "random_score", "resolve_score"]


@dataclass(frozen=True)
class Score:
    """One way to score a unit.

    Attributes:
        name: as in ``SafeConfig(score=...)``.
        needs: what is compared. ``"outputs"``: the unit's output pre-trained and now, (tokens, features);
            ``"local_outputs"``: its output without and with its own adapter on the same input; ``"weights"``: its
            parameters, flattened; ``"gradients"``: its accumulated gradient norm; ``"nothing"``.
        prepare: (before, normalize_rows) -> what ``compare`` wants of the first side, computed once.
        compare: (prepared, after) -> score, 0 = unimportant.
        moving_reference: "before" is the previous measurement, not the start.
    """

    name: str
    needs: str
    prepare: Callable[[Tensor, bool], Any] = lambda before, _: before
    compare: Callable[[Any, Tensor], float] = lambda *_: 0.0
    moving_reference: bool = False


def _cka(before: Tensor, normalize_rows: bool, debiased: bool = False) -> CKAReference:
    return CKAReference(before, debiased, normalize_rows)


def _relative_change(before: Tensor, after: Tensor) -> float:
    """AutoFreeze (Liu et al. 2021): |‖g‖_before − ‖g‖_now| / ‖g‖_before over the gradients of one interval.

    Infinite, so that nothing is decided by it, where there was no gradient before.
    """
    return float((before - after).abs() / before.abs()) if float(before) else float("inf")


def _mean_absolute_change(before: Tensor, after: Tensor) -> float:
    """GradES (Wen et al. 2025): mean |θ_now − θ_before| since the previous measurement."""
    return float((after - before).abs().mean())


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
        Score("cka", "outputs", _cka, CKAReference.score),
        Score("cka_debiased", "outputs", partial(_cka, debiased=True), CKAReference.score),
        Score("local_cka", "local_outputs", _cka, CKAReference.score),
        Score("grad_norm", "gradients", compare=_relative_change, moving_reference=True),
        Score("weight_change", "weights", compare=_mean_absolute_change, moving_reference=True),
        Score("random", "nothing"),
    )
}


def resolve_score(score: str | Callable[[Tensor, Tensor], float]) -> Score:
    """The score of that name; a function (before, after) -> float compares outputs."""
    if callable(score):
        return Score(getattr(score, "__name__", "callable"), "outputs", compare=score)
    return SCORES[score]
