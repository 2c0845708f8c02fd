"""Summary: many outcomes to one row a method, against a reference on the same tasks and seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .outcome import Outcome

__all__ = ["Difference", "Row", "default_metric", "summarize"]

# The first of these that a task gives is its score.
METRICS = ("accuracy", "matthews_correlation", "pearson", "f1", "exact_match", "bleu", "rougeL", "perplexity", "loss")
BETTER_LOW = ("perplexity", "loss")
RATIOS = ("mean_saved_bytes", "peak_saved_bytes", "flops", "seconds", "cpu_seconds")


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences with the bounds of its 95 % confidence interval; NaN bounds where n = 1."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Row:
    """One method, on one task or on average over all.

    Attributes:
        task: None: averaged over the tasks.
        method: its name.
        seeds: that it ran with; over all tasks: runs.
        score: mean over seeds; over all tasks: the mean of their means, NaN where of some scores more is better, and
            of others less.
        sd: standard deviation over seeds; None over all tasks, or of one seed.
        difference: of the score against the reference's on the same task and seed; None for the reference itself.
        ratios: mean saved bytes, peak, FLOPs, seconds and CPU seconds against the reference's, means over pairs.
        frozen: units frozen at the end, mean over seeds.
        units: that can freeze.
        theory: saved bytes and FLOPs by arithmetic against plain; None where nothing froze.
        reason: why there are no numbers.
    """

    task: str | None
    method: str
    seeds: int = 0
    score: float = math.nan
    sd: float | None = None
    difference: Difference | None = None
    ratios: Mapping[str, float] | None = None
    frozen: float = 0.0
    units: int = 0
    theory: tuple[float, float] | None = None
    reason: str | None = None


def default_metric(outcomes: Iterable[Outcome]) -> str | None:
    """The name of the score of a task: the first known one that all its outcomes have."""
    found = [outcome.metrics for outcome in outcomes if outcome.reason is None]
    return next((name for name in METRICS if found and all(name in metrics for metrics in found)), None)


def summarize(outcomes: Sequence[Outcome], metrics: Mapping[str, str], reference: str) -> list[Row]:
    """Rows by task and method, in the order in which they come, then the averages over tasks.

    A difference of one task is the mean of its n paired differences, with Student's interval of n − 1 degrees of
    freedom. The average over T tasks is the mean of theirs, with variance Σ s²ₜ/nₜ / T² and Welch–Satterthwaite's
    degrees of freedom: an interval for these tasks, over seeds.

    Args:
        outcomes: of all methods, tasks and seeds.
        metrics: the score of each task.
        reference: the method that all are compared with.
    """
    tasks = list(dict.fromkeys(outcome.task for outcome in outcomes))
    methods = list(dict.fromkeys(outcome.method for outcome in outcomes))
    rows: list[Row] = []
    pairs: dict[tuple[str | None, str], list[float]] = {}
    alike = len({metric in BETTER_LOW for metric in metrics.values()}) < 2
    for task in tasks:
        scale = _scale(metrics[task], [outcome for outcome in outcomes if outcome.task == task])
        for method in methods:
            here = [outcome for outcome in outcomes if (outcome.task, outcome.method) == (task, method)]
            there = {o.seed: o for o in outcomes if (o.task, o.method) == (task, reference) and o.reason is None}
            if here:
                row, differences = _row(task, method, here, there, metrics[task], scale, method == reference)
                rows.append(row)
                pairs[task, method] = differences
    if len(tasks) > 1:
        for method in methods:
            of_method = [row for row in rows if row.method == method]
            rows.append(_average(method, of_method, [pairs[row.task, method] for row in of_method], len(tasks), alike))
    return rows


def _scale(metric: str, outcomes: Sequence[Outcome]) -> float:
    """100 for a score that is a share: it is shown in points. F1 is one in GLUE, and in points in SQuAD."""
    if metric in BETTER_LOW:
        return 1.0
    return 100.0 if all(abs(o.metrics[metric]) <= 1 for o in outcomes if o.reason is None) else 1.0


def _row(
    task: str,
    method: str,
    here: list[Outcome],
    there: Mapping[int, Outcome],
    metric: str,
    scale: float,
    is_reference: bool,
) -> tuple[Row, list[float]]:
    ran = [outcome for outcome in here if outcome.reason is None]
    if not ran:
        return Row(task, method, reason=here[0].reason), []
    scores = [outcome.metrics[metric] * scale for outcome in ran]
    both = [(outcome, there[outcome.seed]) for outcome in ran if outcome.seed in there]
    differences = [(one.metrics[metric] - other.metrics[metric]) * scale for one, other in both]
    theories = [outcome.theory() for outcome in ran] if any(outcome.freezes for outcome in ran) else []
    known = [theory for theory in theories if theory is not None]
    row = Row(
        task,
        method,
        seeds=len(ran),
        score=statistics.fmean(scores),
        sd=statistics.stdev(scores) if len(scores) > 1 else None,
        difference=None if is_reference or not both else _interval([differences]),
        ratios={
            name: statistics.fmean(
                getattr(a, name) / getattr(b, name) if getattr(b, name) else math.nan for a, b in both
            )
            for name in RATIOS
        }
        if both
        else None,
        frozen=statistics.fmean(outcome.frozen for outcome in ran),
        units=max(len(outcome.units) for outcome in ran),
        theory=(statistics.fmean(a for a, _ in known), statistics.fmean(b for _, b in known)) if known else None,
    )
    return row, differences


def _average(method: str, rows: list[Row], differences: list[list[float]], tasks: int, alike: bool) -> Row:
    ran = [row for row in rows if row.reason is None]
    if len(ran) < tasks:  # an average over fewer tasks could not be compared with the others
        reason = next((row.reason for row in rows if row.reason), "not run on every task")
        return Row(None, method, reason=reason)
    compared = [row.ratios for row in ran if row.ratios is not None]
    theories = [row.theory for row in ran if row.theory is not None]
    whole = len(theories) == tasks
    return Row(
        None,
        method,
        seeds=sum(row.seeds for row in ran),
        score=statistics.fmean(row.score for row in ran) if alike else math.nan,
        difference=_interval(differences) if alike and all(row.difference is not None for row in ran) else None,
        ratios={name: statistics.fmean(r[name] for r in compared) for name in RATIOS}
        if len(compared) == tasks
        else None,
        frozen=statistics.fmean(row.frozen for row in ran),
        units=round(statistics.fmean(row.units for row in ran)),
        theory=(statistics.fmean(a for a, _ in theories), statistics.fmean(b for _, b in theories)) if whole else None,
    )


def _interval(groups: list[list[float]]) -> Difference:
    from scipy.stats import t

    mean = statistics.fmean(statistics.fmean(group) for group in groups)
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
