"""What of a run's history is drawn, and the words beside each drawing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..journal import History
from ..journal.history import is_score
from ..sizes import readable
from .charts import Caption, Chart, Curve, bands, heat_map, lines, number_text

__all__ = ["analysis_charts", "curves_of", "headline", "run_charts", "slug"]

TRAINS, RECOMPUTES, FROZEN, LOOKED_UP = "trains", "trains, recomputes", "frozen, computed", "frozen, looked up"
# (log name, place on the page, title, factor).
LOGGED = (
    ("loss", "loss", "Training loss", 1.0),
    ("saved_bytes", "saved-bytes", "Saved bytes of a micro-step, MiB", 2.0**-20),
    ("flops_per_step", "flops", "FLOPs of a step, GFLOP", 1e-9),
    ("seconds_per_step", "seconds", "Seconds of a step", 1.0),
    ("safe/allocated_peak_mib", "allocator", "Allocator peak, MiB", 1.0),
    ("safe/cache_hit_rate", "hits", "Samples found in the prefix cache, share since the log before", 1.0),
    ("learning_rate", "rate", "Learning rate", 1.0),
)


def headline(history: History, plain: History | None) -> str:
    """What was saved, in one sentence; against ``plain`` where there is one."""
    blocks = sum(history.stacks.values())
    depth = sum(history.freezes[-1][2].values()) if history.freezes else 0
    ended = "" if history.done else f" The journal ends at step {history.steps} of {history.total_steps}."
    if not history.freezes:
        dry = ""
        if history.would_freeze:
            (first, _), (last, names) = history.would_freeze[0], history.would_freeze[-1]
            dry = f" A dry run: from step {first} on units would have, {len(names)} by step {last}."
        return f"Nothing froze in {history.steps} steps.{dry}{ended}"
    when = history.freezes[0][0]
    said = f"From step {when} of {history.total_steps} on blocks froze, {depth} of {blocks} by the end"
    if plain is None or plain is history:
        return f"{said}.{ended}"
    ratios = {
        word: ours / theirs
        for name, word in (
            ("mean_saved_bytes", "mean saved bytes"),
            ("flops", "FLOPs"),
            ("seconds", "time"),
            ("cpu_seconds", "CPU time"),
        )
        if (ours := history.cost(name)) and (theirs := plain.cost(name))
    }
    if not ratios:
        return f"{said}.{ended}"
    parts = [f"{word} {100 * (ratio - 1):+.0f} %".replace("-", "−") for word, ratio in ratios.items()]
    scores, others = history.metrics(), plain.metrics()
    score = next((name for name in scores if name in others and name != "loss"), "loss")
    if score in scores and score in others:
        parts.append(f"{score} {number_text(scores[score])} for {number_text(others[score])}")
    return f"{said}; against {plain.name}, {', '.join(parts)}.{ended}"


def run_charts(history: History) -> Iterator[Chart]:
    """Scores and stack of one run, where it has any."""
    if history.units and any(scores for _, scores in history.scores):
        yield _scores(history)
    if history.stacks:
        yield _stack(history)


def curves_of(histories: Sequence[History]) -> Iterator[Chart]:
    """Every series that is logged, of all runs over each other; the freezes of the first that froze are marked."""
    marks = next(([step for step, _, _ in h.freezes] for h in histories if h.freezes), [])
    evaluations = sorted({name for h in histories for name in h.logs if is_score(name)})
    chosen = [*LOGGED, *((name, name.replace("_", "-"), name.removeprefix("eval_") + ", held out", 1.0)
                         for name in evaluations)]  # fmt: skip
    for name, place, title, factor in chosen:
        curves = [Curve(h.name, [(x, y * factor) for x, y in h.logs[name]]) for h in histories if h.logs.get(name)]
        if curves and any(len(curve.points) > 1 for curve in curves):
            text = "; ".join(
                f"{c.label}: {number_text(c.points[0][1])} at first, {number_text(c.points[-1][1])} at the end, "
                f"between {number_text(min(y for _, y in c.points))} and {number_text(max(y for _, y in c.points))}"
                for c in curves
            )
            yield lines(Caption(place, title, f"{text}."), curves, marks=marks)


def analysis_charts(found: Mapping[str, Any]) -> Iterator[Chart]:
    """Landscape and spectrum that ``adafreeze analyze`` wrote."""
    runs: Mapping[str, Any] = found["runs"]
    steps = found["steps"]
    slices = [Curve(name, list(zip(steps, run["line"], strict=True))) for name, run in runs.items()]
    text = "; ".join(f"{name}: {number_text(run['loss'])} at the weights" for name, run in runs.items())
    yield lines(
        Caption("landscape", "Loss along a filter-normalised direction", f"{text}."), slices, x="norms of the weights"
    )
    spectra = [Curve(name, list(enumerate(run["eigenvalues"], 1))) for name, run in runs.items()]
    text = "; ".join(
        f"{name}: largest {number_text(run['eigenvalues'][0])}, trace {number_text(run['trace'])}"
        for name, run in runs.items()
    )
    yield lines(Caption("spectrum", "Largest eigenvalues of the Hessian", f"{text}."), spectra, x="rank")


def _scores(history: History) -> Chart:
    steps = [step for step, _ in history.scores]
    values = [[scores.get(unit, math.nan) for _, scores in history.scores] for unit in history.units]
    froze = {name: step for step, names, _ in history.freezes for name in names}
    last: dict[str, float] = {}
    for _, scores in history.scores:
        last |= scores
    order = sorted(last, key=lambda name: last[name])
    text = (
        f"{len(history.units)} units, measured {len(steps)} times. Last measured, the least important is "
        f"{order[0]} ({number_text(last[order[0]])}), the most important {order[-1]} ({number_text(last[order[-1]])}). "
        + "".join(f"{len(names)} froze at step {step}. " for step, names, _ in history.freezes)
    )
    labels = _short(history.units, history.stacks)
    title = "Importance of each unit: 1 − CKA with what it was, stronger is more; a line where it froze"
    caption = Caption(f"scores-{slug(history.name)}", title, text.strip())
    return heat_map(caption, labels, steps, values, [froze.get(unit) for unit in history.units])


def _stack(history: History) -> Chart:
    end = max(1, history.steps)
    names = _stack_names(history.stacks)
    rows: list[str] = []
    spans: list[list[tuple[float, float, str]]] = []
    for path, blocks in history.stacks.items():
        for index in range(blocks):
            rows.append(f"{names[path]}{index}")
            spans.append(list(_spans(history, path, index, end)))
    counts = [(step, sum(prefixes.values())) for step, _, prefixes in history.freezes]
    text = f"{len(rows)} blocks. " + "".join(f"From step {step} on {depth} are frozen. " for step, depth in counts)
    if history.cache is not None:
        found = history.cache.get("hits", 0) + history.cache.get("advanced", 0)
        text += f"{found:,} of {found + history.cache.get('misses', 0):,} samples were then looked up."
    kinds = (TRAINS, FROZEN, LOOKED_UP, RECOMPUTES)
    return bands(Caption(f"stack-{slug(history.name)}", "What each block does", text.strip()), rows, spans, kinds, end)


def _spans(history: History, path: str, index: int, end: int) -> Iterator[tuple[float, float, str]]:
    cached_until = 0 if history.cache is None else end
    if history.cache_off is not None:
        cached_until = history.cache_off[0]
    changes = {0, end} | {step for step, _, _ in history.freezes} | {step for step, _ in history.recomputed}
    changes |= {cached_until} if 0 < cached_until < end else set()
    before: tuple[float, float, str] | None = None
    for start, stop in pairwise(sorted(change for change in changes if change <= end)):
        depth = next((p.get(path, 0) for step, _, p in reversed(history.freezes) if step <= start), 0)
        chosen: list[str] = next((names for step, names in reversed(history.recomputed) if step <= start), [])
        if index < depth:
            kind = LOOKED_UP if start < cached_until else FROZEN
        else:
            kind = RECOMPUTES if f"{path}.{index}" in chosen else TRAINS
        if before is not None and before[2] == kind:
            before = (before[0], stop, kind)
        else:
            if before is not None:
                yield before
            before = (start, stop, kind)
    if before is not None:
        yield before


def costs(histories: Sequence[History]) -> list[tuple[str, list[str]]]:
    """Rows of a table: a name, and a cell for each run."""
    shown: list[tuple[str, list[str]]] = []
    for title, name, written in (
        ("mean saved bytes", "mean_saved_bytes", readable),
        ("peak saved bytes", "peak_saved_bytes", readable),
        ("FLOPs", "flops", lambda value: f"{value / 1e12:.3g} T"),
        ("time", "seconds", lambda value: f"{value:,.0f} s"),
        ("CPU time of the process", "cpu_seconds", lambda value: f"{value:,.0f} s"),
    ):
        values = [h.cost(name) for h in histories]
        if any(value is not None for value in values):
            shown.append((title, ["-" if value is None else written(value) for value in values]))
    scores = dict.fromkeys(name for h in histories for name in h.metrics())
    for name in scores:
        found = [h.metrics().get(name) for h in histories]
        shown.append((name, ["-" if value is None else number_text(value) for value in found]))
    return shown


def _stack_names(stacks: Mapping[str, int]) -> dict[str, str]:
    """What tells stacks apart, in three letters: enc, dec; nothing where there is one."""
    if len(stacks) < 2:
        return dict.fromkeys(stacks, "")
    split = {path: path.split(".") for path in stacks}
    place = next((i for i, parts in enumerate(zip(*split.values(), strict=False)) if len(set(parts)) > 1), 0)
    return {path: f"{parts[place][:3]} " for path, parts in split.items()}


def _short(units: Sequence[str], stacks: Mapping[str, int]) -> list[str]:
    """The number of the block, and of a smaller unit the last of its name."""
    names = _stack_names(stacks)
    labels = []
    for unit in units:
        path = max((path for path in stacks if unit.startswith(f"{path}.")), key=len, default="")
        index, *rest = unit.removeprefix(f"{path}.").split(".")
        labels.append(f"{names.get(path, '')}{index}" + (f" {rest[-1][:6]}" if rest else ""))
    return labels


def slug(name: str) -> str:
    """A run's name as part of a place on the page."""
    return "".join(c if c.isalnum() else "-" for c in name).strip("-") or "run"
