"""Policies: scores, schedule and frozen set in; units to freeze next out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..errors import ConfigError

__all__ = ["POLICIES", "Policy", "PolicyInput", "choose", "freezes_prefixes"]

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
        learning: units that have had a gradient so far; None where that is not known. A unit that never gets one (a
            block above what the head reads) is nothing that a run could go on with.
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
        """The unit's score, or None where there is none that can be judged by."""
        score = self.scores.get(name, math.nan)
        return score if math.isfinite(score) else None

    def learners(self, names: Iterable[str]) -> set[str]:
        """Those of ``names`` that learn; all of them where none is known to."""
        known = set(names)
        return known & (self.learning or set()) or known


Policy = Callable[[PolicyInput], Iterable[str]]


def share(situation: PolicyInput) -> Iterator[str]:
    """The longest prefix of each chain whose scores sum to at most ramp · freeze_share of the chain's total.

    Where every score is 0, nothing has moved yet that could be judged by, and nothing freezes.

    Only a prefix truncates the backward pass, so nothing else is frozen. A live unit without a finite score ends
    the prefix; a frozen one counts with its last score, or 0 if it was frozen before any was taken.
    """
    if situation.ramp <= 0:
        return
    for chain in situation.chains:
        total = sum(situation.finite_score(name) or 0.0 for block in chain for name in block)
        allowed = situation.ramp * situation.freeze_share * total
        if allowed <= 0:
            continue
        spent = 0.0
        for block in chain:
            if any(situation.finite_score(name) is None for name in block if name not in situation.frozen):
                break
            spent += sum(situation.finite_score(name) or 0.0 for name in block)
            if not spent <= allowed:  # so that NaN, from sums beyond the floats, freezes nothing
                break
            yield from block


def threshold(situation: PolicyInput) -> Iterator[str]:
    """Every unit whose score is below τ(t) = ramp · threshold, wherever it stands (Son et al. 2025)."""
    for chain in situation.chains:
        for block in chain:
            for name in block:
                score = situation.finite_score(name)
                if score is not None and score < situation.ramp * situation.threshold:
                    yield name


def bottom_up(situation: PolicyInput) -> Iterator[str]:
    """The lowest ⌊ramp · freeze_share · B⌋ of the B blocks with adapters of each chain, whatever they score."""
    for chain in situation.chains:
        filled = [block for block in chain if block]
        count = situation.ramp * situation.freeze_share * len(filled)
        for block in filled[: int(count + 1e-9)]:  # 0.58 · 50 is 28.999999999999996
            yield from block


POLICIES: dict[str, Policy] = {"share": share, "threshold": threshold, "bottom_up": bottom_up}


def freezes_prefixes(policy: str | Policy) -> bool:
    """Whether ``policy`` freezes nothing but prefixes, so that what cannot join one need not freeze."""
    return (policy if callable(policy) else POLICIES[policy]) in (share, bottom_up)


def choose(policy: str | Policy, situation: PolicyInput) -> list[str]:
    """Units to freeze next, bottom to top: what ``policy`` wants, less what must stay live.

    In every chain ``min_live_blocks`` blocks keep a live unit that learns: of those that would freeze, the upper ones
    under ``share`` and ``bottom_up``, which freeze prefixes; under any other policy the ones with the highest score,
    the upper of equals. The last live unit of the model, chosen in the same way, never freezes unless something else
    trains.

    Raises:
        ConfigError: the policy returned a name that is no unit, or no names at all.

    >>> chain = (("bottom",), ("middle",), ("top",))
    >>> choose("share", PolicyInput(9, 1.0, {"bottom": 0.1, "middle": 0.1, "top": 1.8}, (chain,), freeze_share=0.1))
    ['bottom', 'middle']
    """
    policy = policy if callable(policy) else POLICIES[policy]
    by_place = freezes_prefixes(policy)
    returned = policy(situation)
    name = getattr(policy, "__name__", policy)
    if isinstance(returned, str) or not isinstance(returned, Iterable):
        raise ConfigError(
            f"The policy {name!r} returned {returned!r}.",
            cause="It must return the names of the units to freeze: a list, or any other iterable of strings.",
            fix="return [...]  # names taken from situation.chains; [] for none",
        )
    answer = list(returned)
    order = [name for chain in situation.chains for block in chain for name in block]
    strangers = [one for one in answer if one not in order]
    if strangers:
        raise ConfigError(
            f"The policy {name!r} returned {strangers[0]!r}.",
            cause=f"That is no unit of this model; its units are {', '.join(order[:3])}, ...",
            fix="Return names taken from situation.chains.",
        )
    wanted = set(answer) - situation.frozen
    for chain in situation.chains:
        wanted -= _must_stay(chain, wanted, situation, by_place)
    learners = situation.learners(order)
    if not situation.something_else_trains and wanted & learners and wanted | situation.frozen >= learners:
        last = [name for name in order if name in wanted & learners]
        wanted.discard(
            last[-1] if by_place else max(reversed(last), key=lambda name: situation.finite_score(name) or 0.0)
        )
    return [name for name in order if name in wanted]


def _must_stay(chain: tuple[Block, ...], wanted: set[str], situation: PolicyInput, by_place: bool) -> set[str]:
    gone = wanted | situation.frozen
    learners = situation.learners(name for block in chain for name in block)
    blocks = [learners.intersection(block) for block in chain]
    live = sum(not block <= gone for block in blocks)
    doomed = [index for index, block in enumerate(blocks) if block & wanted and block <= gone]
    short = min(situation.min_live_blocks - live, len(doomed))
    if short <= 0:
        return set()

    def importance(index: int) -> tuple[float, int]:
        names = set(chain[index]) & wanted  # what froze before does not come back, whatever it scored
        return (0.0 if by_place else max(situation.finite_score(name) or 0.0 for name in names), index)

    kept = sorted(doomed, key=importance)[-short:]
    if by_place:  # above a block that stays live, a freeze would shorten no backward pass
        kept = list(range(min(kept), len(chain)))
    return {name for index in kept for name in chain[index] if name in wanted}
