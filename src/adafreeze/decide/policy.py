"""Policies: which units freeze next, from scores, schedule and what is frozen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from ..errors import ConfigError

__all__ = ["POLICIES", "Policy", "PolicyInput", "choose", "is_prefix_only", "prefix_only"]

Block = tuple[str, ...]


@dataclass(frozen=True)
class PolicyInput:
    """What a policy sees.

    Attributes:
        step: optimizer steps done.
        ramp: 0 at the end of the warm-up, 1 from ``ramp_end`` on (``cubic_ramp``).
        scores: the latest score of each unit; one that was never measured is missing.
        chains: for each independent chain of stacks (a T5 encoder and its decoder are one), for each block from
            bottom to top, the names of its units; ``()`` for a block without any.
        frozen: units frozen so far.
        freeze_share: part of the total score that may be frozen when ramp = 1.
        threshold: τ_T.
        min_live_blocks: blocks of each chain that keep a live unit.
        something_else_trains: a head trains too, so that even the last unit may freeze.
        learning: units that have had a gradient so far; None if unknown. Training cannot continue with units alone
            that never get one, such as blocks above the layer that the head reads.
    """

    step: int
    ramp: float
    scores: Mapping[str, float]
    chains: tuple[tuple[Block, ...], ...]
    frozen: frozenset[str] = frozenset()
    freeze_share: float = 0.6
    threshold: float = 0.01
    min_live_blocks: int = 1
    something_else_trains: bool = False
    learning: frozenset[str] | None = None

    def finite_score(self, name: str) -> float | None:
        """The unit's score, or None if it is missing or not finite."""
        score = self.scores.get(name, math.nan)
        return score if math.isfinite(score) else None

    def learners(self, names: Iterable[str]) -> set[str]:
        """Those of ``names`` that learn; all of them if none is known to."""
        known = set(names)
        return known & (self.learning or set()) or known


Policy = Callable[[PolicyInput], Iterable[str]]
_P = TypeVar("_P", bound=Policy)


def prefix_only(policy: _P) -> _P:
    """Decorator: declares that ``policy`` freezes only prefixes, the lowest blocks of each chain.

    ``min_live_blocks`` then keeps the topmost blocks live, and units that cannot join a prefix never freeze. Without
    it, the blocks with the highest scores stay live. An object sets ``prefix_only = True`` on its class instead.
    """
    policy.prefix_only = True  # type: ignore[attr-defined]
    return policy


def is_prefix_only(policy: str | Policy) -> bool:
    """Whether ``policy`` declares that it freezes only prefixes."""
    return bool(getattr(_resolve(policy), "prefix_only", False))


@prefix_only
def share(given: PolicyInput) -> Iterator[str]:
    """The longest prefix of each chain whose scores sum to at most ramp · freeze_share of the chain's total.

    Nothing freezes while every score is 0. Only a prefix truncates the backward pass, so nothing else freezes. A live
    unit without a finite score ends the prefix; a frozen one counts with its last score, or 0 if it was never measured.
    """
    if given.ramp <= 0:
        return
    for chain in given.chains:
        total = sum(given.finite_score(name) or 0.0 for block in chain for name in block)
        allowed = given.ramp * given.freeze_share * total
        if allowed <= 0:
            continue
        spent = 0.0
        for block in chain:
            if any(given.finite_score(name) is None for name in block if name not in given.frozen):
                break
            spent += sum(given.finite_score(name) or 0.0 for name in block)
            if not spent <= allowed:  # a NaN, from a sum that overflows, freezes nothing
                break
            yield from block


def threshold(given: PolicyInput) -> Iterator[str]:
    """Every unit whose score is below τ(t) = ramp · threshold, in any block (Son et al. 2025)."""
    for chain in given.chains:
        for block in chain:
            for name in block:
                score = given.finite_score(name)
                if score is not None and score < given.ramp * given.threshold:
                    yield name


@prefix_only
def bottom_up(given: PolicyInput) -> Iterator[str]:
    """The lowest ⌊ramp · freeze_share · B⌋ of the B blocks with adapters of each chain, regardless of score."""
    for chain in given.chains:
        filled = [block for block in chain if block]
        count = given.ramp * given.freeze_share * len(filled)
        for block in filled[: int(count + 1e-9)]:  # 0.58 · 50 is 28.999999999999996
            yield from block


POLICIES: dict[str, Policy] = {"share": share, "threshold": threshold, "bottom_up": bottom_up}


def _resolve(policy: str | Policy) -> Policy:
    return policy if callable(policy) else POLICIES[policy]


def choose(policy: str | Policy, given: PolicyInput) -> list[str]:
    """Units to freeze next, bottom to top: what ``policy`` returns, less what must stay live.

    In every chain ``min_live_blocks`` blocks keep a live unit that learns: the topmost of those that would freeze if
    the policy is ``prefix_only``, else those with the highest score (the upper of equals). The last live unit of the
    model, chosen in the same way, never freezes unless something else trains.

    Raises:
        ConfigError: the policy returned a name that is no unit, or no names at all.

    >>> chain = (("bottom",), ("middle",), ("top",))
    >>> choose("share", PolicyInput(9, 1.0, {"bottom": 0.1, "middle": 0.1, "top": 1.8}, (chain,), freeze_share=0.1))
    ['bottom', 'middle']
    """
    policy = _resolve(policy)
    by_place = is_prefix_only(policy)
    returned = policy(given)
    name = getattr(policy, "__name__", policy)
    if isinstance(returned, str) or not isinstance(returned, Iterable):
        raise ConfigError(
            f"The policy {name!r} returned {returned!r}, but must return a list of the names of units to freeze.",
            fix="return [...]  # names from PolicyInput.chains; [] for none",
        )
    answer = list(returned)
    order = [name for chain in given.chains for block in chain for name in block]
    strangers = [one for one in answer if one not in order]
    if strangers:
        raise ConfigError(
            f"The policy {name!r} returned {strangers[0]!r}, but the units of this model are {', '.join(order[:3])}, "
            "...",
            fix="Return names from PolicyInput.chains.",
        )
    wanted = set(answer) - given.frozen
    for chain in given.chains:
        wanted -= _must_stay(chain, wanted, given, by_place)
    learners = given.learners(order)
    if not given.something_else_trains and wanted & learners and wanted | given.frozen >= learners:
        last = [name for name in order if name in wanted & learners]
        wanted.discard(last[-1] if by_place else max(reversed(last), key=lambda name: given.finite_score(name) or 0.0))
    return [name for name in order if name in wanted]


def _must_stay(chain: tuple[Block, ...], wanted: set[str], given: PolicyInput, by_place: bool) -> set[str]:
    gone = wanted | given.frozen
    learners = given.learners(name for block in chain for name in block)
    blocks = [learners.intersection(block) for block in chain]
    live = sum(not block <= gone for block in blocks)
    doomed = [index for index, block in enumerate(blocks) if block & wanted and block <= gone]
    short = min(given.min_live_blocks - live, len(doomed))
    if short <= 0:
        return set()

    def importance(index: int) -> tuple[float, int]:
        names = set(chain[index]) & wanted
        return (0.0 if by_place else max(given.finite_score(name) or 0.0 for name in names), index)

    kept = sorted(doomed, key=importance)[-short:]
    if by_place:  # above a block that stays live, a freeze would shorten no backward pass
        kept = list(range(min(kept), len(chain)))
    return {name for index in kept for name in chain[index] if name in wanted}
