"""Which charts and tables a report shows of a history, with their texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..journal import History, is_score
from ..sizes import readable
from .charts import Caption, Chart, Curve, bands, heat_map, lines, number_text

__all__ = ["COSTS", "analysis_charts", "costs", "curves_of", "headline", "run_charts", "slug"]

TRAINS, FROZEN, CACHED = "trains", "frozen, computed", "frozen, cached"
CHECKPOINTED, SELECTIVE = "trains, checkpointed", "trains, selectively checkpointed"
# (name in ``History.cost``, title, text of a value).
COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("mean_saved_bytes", "mean saved bytes", readable),
    ("peak_saved_bytes", "peak saved bytes", readable),
    ("flops", "FLOPs", lambda value: f"{value / 1e12:.3g} T"),
    ("seconds", "time", lambda value: f"{value:,.0f} s"),
    ("cpu_seconds", "CPU time of the process", lambda value: f"{value:,.0f} s"),
)
# (log key, name on the page, title, factor).
LOGGED = (
    ("loss", "loss", "Training loss", 1.0),
    ("saved_bytes", "saved-bytes", "Saved bytes per micro-step, MiB", 2.0**-20),
    ("flops_per_step", "flops", "FLOPs per step, GFLOP", 1e-9),
    ("seconds_per_step", "seconds", "Seconds per step", 1.0),
    ("safe/cache_hit_rate", "hits", "Hit rate of the prefix cache since the last log", 1.0),
    ("learning_rate", "rate", "Learning rate", 1.0),
)


def headline(history: History, plain: History | None) -> str:
    """The savings in one sentence, relative to ``plain`` if given."""
    ended = "" if history.done else f" The journal ends at step {history.steps} of {history.total_steps}."
    if not history.freezes:
        dry = ""
        if history.would_freeze:
            (first, _), (last, names) = history.would_freeze[0], history.would_freeze[-1]
            dry = f" Dry run: units would have frozen from step {first} on, {len(names)} by step {last}."
        return f"Nothing froze in {history.steps} steps.{dry}{ended}"
    (when, _), (_, depth) = history.depths[0], history.depths[-1]
    blocks = sum(history.stacks.values())
    text = f"Blocks froze from step {when} of {history.total_steps} on, {depth} of {blocks} by the end"
    parts = []
    if plain is not None and plain is not history:
        for name, word, _ in COSTS:
            if name != "peak_saved_bytes" and (ours := history.cost(name)) and (theirs := plain.cost(name)):
                parts.append(f"{word} {100 * (ours / theirs - 1):+.0f} %".replace("-", "−"))
    if plain is None or not parts:
        return f"{text}.{ended}"
    scores, others = history.metrics(), plain.metrics()
    score = next((name for name in scores if name in others and name != "loss"), "loss")
    if score in scores and score in others:
        parts.append(f"{score} {number_text(scores[score])} instead of {number_text(others[score])}")
    return f"{text}; compared with {plain.name}: {', '.join(parts)}.{ended}"


def run_charts(history: History) -> Iterator[Chart]:
    """Scores and blocks of one run."""
    if history.units and any(scores for _, scores in history.scores):
        yield _scores(history)
    if history.stacks:
        yield _blocks(history)


def curves_of(histories: Sequence[History]) -> Iterator[Chart]:
    """Every logged series, all runs in one chart; marks the freezes of the first run with freezes."""
    marks = next(([step for step, _ in h.depths] for h in histories if h.freezes), [])
    evaluations = sorted({name for h in histories for name in h.logs if is_score(name)})
    held_out = [(n, n.replace("_", "-"), n.removeprefix("eval_") + ", held out", 1.0) for n in evaluations]
    for name, place, title, factor in (*LOGGED, *held_out):
        curves = [Curve(h.name, [(x, y * factor) for x, y in h.logs[name]]) for h in histories if h.logs.get(name)]
        if any(len(curve.points) > 1 for curve in curves):
            text = "; ".join(
                f"{c.label}: {number_text(c.points[0][1])} at first, {number_text(c.points[-1][1])} at the end, "
                f"between {number_text(min(y for _, y in c.points))} and {number_text(max(y for _, y in c.points))}"
                for c in curves
            )
            yield lines(Caption(place, title, f"{text}."), curves, marks=marks)


def analysis_charts(found: Mapping[str, Any]) -> Iterator[Chart]:
    """Landscape and spectrum written by ``adafreeze analyze``."""
    runs: Mapping[str, Any] = found["runs"]
    slices = [Curve(name, list(zip(found["steps"], run["line"], strict=True))) for name, run in runs.items()]
    text = "; ".join(f"{name}: {number_text(run['loss'])} at the weights" for name, run in runs.items())
    caption = Caption("landscape", "Loss along a filter-normalized direction", f"{text}.")
    yield lines(caption, slices, x="norms of the weights")
    spectra = [Curve(name, list(enumerate(run["eigenvalues"], 1))) for name, run in runs.items()]
    text = "; ".join(
        f"{name}: largest {number_text(run['eigenvalues'][0])}, trace {number_text(run['trace'])}"
        for name, run in runs.items()
    )
    yield lines(Caption("spectrum", "Largest eigenvalues of the Hessian", f"{text}."), spectra, x="rank")


def _scores(history: History) -> Chart:
    steps = [step for step, _ in history.scores]
    values = [[scores.get(unit, math.nan) for _, scores in history.scores] for unit in history.units]
    last: dict[str, float] = {}
    for _, scores in history.scores:
        last |= scores
    least, most = min(last, key=last.__getitem__), max(last, key=last.__getitem__)
    text = (
        f"{len(history.units)} units, measured {len(steps)} times. At the last measurement the least important is "
        f"{least} ({number_text(last[least])}), the most important {most} ({number_text(last[most])}). "
        + "".join(f"{len(names)} froze at step {step}. " for step, names, _ in history.freezes)
    )
    title = (
        "Importance of each unit: 1 − CKA with its initial output (darker is more important; a line marks its freeze)"
    )
    caption = Caption(f"scores-{slug(history.name)}", title, text.strip())
    frozen = [history.frozen.get(unit) for unit in history.units]
    return heat_map(caption, _short(history.units, history.stacks), steps, values, frozen)


def _blocks(history: History) -> Chart:
    end = max(1, history.steps)
    names = _stack_names(history.stacks)
    blocks = [(path, index) for path, count in history.stacks.items() for index in range(count)]
    spans = [list(_spans(history, path, index, end)) for path, index in blocks]
    text = f"{len(blocks)} blocks. " + "".join(f"From step {step} on {n} are frozen. " for step, n in history.depths)
    if history.cache is not None:
        found = history.cache["hits"] + history.cache["advanced"]
        text += f"The cache then served {found:,} of {found + history.cache['misses']:,} samples."
    caption = Caption(f"stack-{slug(history.name)}", "State of each block", text.strip())
    labels = [f"{names[path]}{index}" for path, index in blocks]
    return bands(caption, labels, spans, (TRAINS, FROZEN, CACHED, CHECKPOINTED, SELECTIVE), end)


def _spans(history: History, path: str, index: int, end: int) -> Iterator[tuple[float, float, str]]:
    """(from, to, state) of one block; consecutive spans have different states."""
    cached_until = 0 if history.cache is None else end
    if history.cache_off is not None:
        cached_until = history.cache_off[0]
    changes = {0, end, cached_until, *(step for step, _ in history.depths), *(at for at, *_ in history.checkpointed)}
    begun, before = 0, ""
    for start in sorted(change for change in changes if change < end):
        depth = next((p.get(path, 0) for step, _, p in reversed(history.freezes) if step <= start), 0)
        _, full, selective = next((one for one in reversed(history.checkpointed) if one[0] <= start), (0, [], []))
        if index < depth:
            state = CACHED if start < cached_until else FROZEN
        else:
            name = f"{path}.{index}"
            state = CHECKPOINTED if name in full else SELECTIVE if name in selective else TRAINS
        if before and state != before:
            yield begun, start, before
            begun = start
        before = state
    yield begun, end, before


def costs(histories: Sequence[History]) -> list[tuple[str, list[str]]]:
    """Rows of a table: a name, and a cell per run."""
    shown: list[tuple[str, list[str]]] = []
    for name, title, text_of in COSTS:
        values = [h.cost(name) for h in histories]
        if any(value is not None for value in values):
            shown.append((title, ["-" if value is None else text_of(value) for value in values]))
    metrics = [h.metrics() for h in histories]
    for name in dict.fromkeys(name for found in metrics for name in found):
        shown.append((name, [number_text(found[name]) if name in found else "-" for found in metrics]))
    return shown


def _stack_names(stacks: Mapping[str, int]) -> dict[str, str]:
    """Three letters that distinguish the stacks, such as enc and dec; empty for a single stack."""
    if len(stacks) < 2:
        return dict.fromkeys(stacks, "")
    split = {path: path.split(".") for path in stacks}
    place = next((i for i, parts in enumerate(zip(*split.values(), strict=False)) if len(set(parts)) > 1), 0)
    return {path: f"{parts[place][:3]} " for path, parts in split.items()}


def _short(units: Sequence[str], stacks: Mapping[str, int]) -> list[str]:
    """The block number, and for a smaller unit the last part of its name."""
    names = _stack_names(stacks)
    labels = []
    for unit in units:
        path = max((path for path in stacks if unit.startswith(f"{path}.")), key=len, default="")
        index, *rest = unit.removeprefix(f"{path}.").split(".")
        labels.append(f"{names.get(path, '')}{index}" + (f" {rest[-1][:6]}" if rest else ""))
    return labels


def slug(name: str) -> str:
    """A run's name as an HTML id."""
    return "".join(c if c.isalnum() else "-" for c in name).strip("-") or "run"
