"""Summary: outcomes condensed to one row per method, compared with a reference on the same tasks and seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .outcome import Outcome

__all__ = ["Difference", "Row", "default_metric", "summarize"]

# The score of a task is the first of these metrics that it has.
METRICS = ("accuracy", "matthews_correlation", "pearson", "f1", "exact_match", "bleu", "rougeL", "perplexity", "loss")
LOWER_IS_BETTER = ("perplexity", "loss")
RATIOS = ("mean_saved_bytes", "peak_saved_bytes", "flops", "seconds", "cpu_seconds")


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences with its 95 % confidence interval; the bounds are NaN for one pair."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Row:
    """One method, on one task or averaged over all."""

    task: str | None  # None for the average over tasks
    method: str  # its name
    seeds: int = 0  # number of runs
    # mean over seeds; over tasks the mean of means, NaN if higher is better for only some of the scores
    score: float = math.nan
    sd: float | None = None  # standard deviation over seeds; None for the average over tasks, or one seed
    # of the score to the reference on the same task and seed; None for the reference
    difference: Difference | None = None
    ratios: Mapping[str, float] | None = None  # costs in ``RATIOS`` relative to the reference, means over pairs
    frozen: float = 0.0  # units frozen at the end, mean over seeds
    units: int = 0  # number of units
    theory: tuple[float, float] | None = None  # expected saved bytes and FLOPs relative to plain; None if nothing froze
    reason: str | None = None  # why there are no numbers


def default_metric(outcomes: Iterable[Outcome]) -> str | None:
    """The score of a task: the first of ``METRICS`` that all its outcomes have."""
    found = [outcome.metrics for outcome in outcomes if outcome.reason is None]
    return next((name for name in METRICS if found and all(name in metrics for metrics in found)), None)


def summarize(outcomes: Sequence[Outcome], metrics: Mapping[str, str], reference: str) -> list[Row]:
    """Rows by task and method in order of appearance, then the averages over tasks, compared with a reference method.

    The difference on one task is the mean of n paired differences, with Student's interval of n − 1 degrees of freedom.
    The average over T tasks is the mean of theirs, with variance Σ s²ₜ/nₜ / T² and Welch–Satterthwaite's degrees of
    freedom: an interval for these tasks, over seeds. ``metrics`` names the score of each task.
    """
    tasks = list(dict.fromkeys(outcome.task for outcome in outcomes))
    methods = list(dict.fromkeys(outcome.method for outcome in outcomes))
    known = {(outcome.task, outcome.method) for outcome in outcomes}
    table = _Table(outcomes, metrics, reference)
    rows = [table.row(method, [task]) for task in tasks for method in methods if (task, method) in known]
    return rows + [table.row(method, tasks) for method in methods if len(tasks) > 1]


class _Table:
    def __init__(self, outcomes: Sequence[Outcome], metrics: Mapping[str, str], reference: str) -> None:
        self.outcomes, self.metrics, self.reference = outcomes, metrics, reference
        self.done = {(o.task, o.method, o.seed): o for o in outcomes if o.reason is None}

    def score(self, outcome: Outcome) -> float:
        """In points if all scores of the task are between 0 and 1 (F1 is in points in SQuAD, but not in GLUE)."""
        name = self.metrics[outcome.task]
        scores = [o.metrics[name] for o in self.done.values() if o.task == outcome.task]
        points = name not in LOWER_IS_BETTER and all(abs(score) <= 1 for score in scores)
        return outcome.metrics[name] * (100.0 if points else 1.0)

    def row(self, method: str, tasks: list[str]) -> Row:
        """The row of ``method`` on one task, or the average over several: the mean of the means of each task."""
        task = tasks[0] if len(tasks) == 1 else None
        groups = [[o for o in self.done.values() if (o.task, o.method) == (name, method)] for name in tasks]
        if not all(groups):  # an average over fewer tasks could not be compared with the others
            reasons = (o.reason for o in self.outcomes if o.method == method and o.task in tasks and o.reason)
            return Row(task, method, reason=next(reasons, "not run on every task"))
        scores = [[self.score(o) for o in group] for group in groups]
        others = [[(o, self.done.get((o.task, self.reference, o.seed))) for o in group] for group in groups]
        pairs = [[(o, other) for o, other in group if other is not None] for group in others]
        comparable = len({self.metrics[name] in LOWER_IS_BETTER for name in tasks}) == 1
        difference = None
        if comparable and all(pairs) and method != self.reference:
            difference = _interval([[self.score(o) - self.score(other) for o, other in group] for group in pairs])
        theories = [
            [t for o in group if (t := o.theory())] if any(o.freezes for o in group) else [] for group in groups
        ]
        return Row(
            task,
            method,
            seeds=sum(map(len, groups)),
            score=_mean(scores) if comparable else math.nan,
            sd=statistics.stdev(scores[0]) if task is not None and len(scores[0]) > 1 else None,
            difference=difference,
            ratios={name: _mean([[_ratio(name, *p) for p in group] for group in pairs]) for name in RATIOS}
            if all(pairs)
            else None,
            frozen=_mean([[o.frozen for o in group] for group in groups]),
            units=round(statistics.fmean(max(len(o.units) for o in group) for group in groups)),
            theory=(_mean([[t[0] for t in ts] for ts in theories]), _mean([[t[1] for t in ts] for ts in theories]))
            if all(theories)
            else None,
        )


def _ratio(name: str, outcome: Outcome, reference: Outcome) -> float:
    return getattr(outcome, name) / (getattr(reference, name) or math.nan)


def _mean(groups: Sequence[Sequence[float]]) -> float:
    return statistics.fmean(statistics.fmean(group) for group in groups)


def _interval(groups: list[list[float]]) -> Difference:
    from scipy.stats import t

    mean = _mean(groups)
    count = sum(map(len, groups))
    if any(len(group) < 2 for group in groups):
        return Difference(mean, math.nan, math.nan, count)
    parts = [statistics.variance(group) / len(group) / len(groups) ** 2 for group in groups]
    variance = sum(parts)
    if variance == 0:
        return Difference(mean, mean, mean, count)
    freedom = variance**2 / sum(part**2 / (len(group) - 1) for part, group in zip(parts, groups, strict=True))
    half = float(t.ppf(0.975, freedom)) * math.sqrt(variance)
    return Difference(mean, mean - half, mean + half, count)
