"""Charts as inline SVG: they need no script to be seen, and each contains its data as CSV."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

__all__ = ["Caption", "Chart", "Curve", "bands", "heat_map", "lines"]

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 720, 84, 16, 16, 48
POINTS = 400  # drawn per curve
CELLS, COLUMNS = 6000, 160  # drawn per heat map
ROWS = 4000  # per curve in the CSV data
# Okabe & Ito (2008): distinguishable with any color vision. Black is used for text.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 3", "10 4")  # and distinguishable without color


@dataclass(frozen=True)
class Caption:
    """The texts of a chart."""

    name: str  # of the HTML element and the CSV file, letters and dashes
    title: str  # what the chart shows, with the unit
    text: str  # what can be read from it, in a sentence


@dataclass(frozen=True)
class Chart:
    """A drawing with its texts and data."""

    caption: Caption  # the texts
    svg: str  # the drawing, with values in ``data-tip``
    csv: str  # the data
    legend: tuple[tuple[str, str, str | None], ...] = ()  # (label, color, dashes or None for an area) per entry

    @property
    def link(self) -> str:
        """A data URL of the CSV."""
        return f"data:text/csv;base64,{base64.b64encode(self.csv.encode()).decode()}"


@dataclass(frozen=True)
class Curve:
    """Points (x, y) with a label."""

    label: str
    points: Sequence[tuple[float, float]]


def lines(caption: Caption, curves: Sequence[Curve], *, x: str = "step", marks: Sequence[float] = ()) -> Chart:
    """Curves with at least one point in total, and vertical lines at ``marks``.

    The y axis starts at 0 unless that would flatten the curves.
    """
    height = 230
    xs, ys = zip(*(point for curve in curves for point in curve.points), strict=True)
    low, high = min(ys), max(ys)
    low = 0.0 if 0 <= low < 0.6 * high else low
    across, down = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT), _scale(low, high, height - BOTTOM, TOP)
    parts = [_below([(across(tick), number_text(tick)) for tick in _ticks(min(xs), max(xs))], height, x)]
    for tick in _ticks(low, high):
        y = down(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number_text(tick)}</text>')
    for mark in (across(mark) for mark in marks if min(xs) <= mark <= max(xs)):
        parts.append(f'<line class="mark" x1="{mark:.1f}" x2="{mark:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
    legend = []
    for number, curve in enumerate(curves):
        # A different pair for each of the first 36.
        color, dash = COLORS[number % len(COLORS)], DASHES[(number + number // len(COLORS)) % len(DASHES)]
        legend.append((curve.label, color, dash))
        points = thin(curve.points)
        path = " ".join(f"{across(a):.1f},{down(b):.1f}" for a, b in points)
        style = f'fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"'
        parts.append(f'<polyline points="{path}" {style}/>')
        radius = 3 if len(points) <= 60 else 2
        parts += [
            f'<circle cx="{across(a):.1f}" cy="{down(b):.1f}" r="{radius}" fill="{color}" '
            f'data-tip="{escape(curve.label)}: {number_text(b)} at {x} {number_text(a)}"/>'
            for a, b in points
        ]
    rows = [(curve.label, a, b) for curve in curves for a, b in thin(curve.points, ROWS)]
    return _chart(caption, parts, height, ("curve", x, "value"), rows, tuple(legend))


def heat_map(
    caption: Caption, rows: Sequence[str], columns: Sequence[float], values: Sequence[Sequence[float]],
    frozen_at: Sequence[float | None],
) -> Chart:  # fmt: skip
    """A cell per row and column, shaded by the square root of its value relative to the largest; rows bottom up.

    ``values`` are by row, NaN if not measured. ``frozen_at`` is the step at which a row froze, or None. If there are
    too many columns, a cell shows the largest value of several.
    """
    count = max(1, min(len(columns), COLUMNS, CELLS // max(1, len(rows))))
    stretches = [range(a, b) for a, b in pairwise(round(i * len(columns) / count) for i in range(count + 1))]
    tall, height, tops, parts = _rows(rows, least=8)
    wide = (WIDTH - LEFT - RIGHT) / count
    most = max((v for row in values for v in row if math.isfinite(v)), default=0.0) or 1.0
    data: list[tuple[str, float, float]] = []
    for label, row, stop, top in zip(rows, values, frozen_at, tops, strict=True):
        for place, stretch in enumerate(stretches):
            column = max(stretch, key=lambda column: row[column] if math.isfinite(row[column]) else -math.inf)
            step, value = columns[column], row[column]
            data.append((label, step, value))
            measured, frozen = math.isfinite(value), stop is not None and step >= stop
            shade = math.sqrt(max(0.0, value) / most) if measured else 0.0
            parts.append(
                f'<rect class="{"cell frozen" if frozen and not measured else "cell"}" x="{LEFT + place * wide:.1f}" '
                f'y="{top}" width="{wide:.2f}" height="{tall - 1}" fill-opacity="{0.06 + 0.94 * shade:.3f}" '
                f'data-tip="{escape(label)}, step {step:g}: {number_text(value) if measured else "not measured"}'
                f'{", frozen" if frozen else ""}"/>'
            )
        if stop is not None:
            place = next((i for i, stretch in enumerate(stretches) if columns[stretch[-1]] >= stop), count)
            at = f"{LEFT + place * wide:.1f}"
            parts.append(f'<line class="freeze" x1="{at}" x2="{at}" y1="{top}" y2="{top + tall - 1}"/>')
    ticks = [(LEFT + (i + 0.5) * wide, f"{columns[stretches[i][0]]:g}") for i in sorted({0, count // 2, count - 1})]
    parts.append(_below(ticks, height, "step"))
    return _chart(caption, parts, height, ("unit", "step", "score"), data)


def bands(
    caption: Caption, rows: Sequence[str], spans: Sequence[Sequence[tuple[float, float, str]]],
    states: Sequence[str], end: float,
) -> Chart:  # fmt: skip
    """A band per row that shows its state over time, by ``spans`` of (from, to, state); rows bottom up."""
    tall, height, tops, parts = _rows(rows, least=6)
    across = _scale(0, end, LEFT, WIDTH - RIGHT)
    color = dict(zip(states, COLORS, strict=False))
    data = [(label, *span) for label, row in zip(rows, spans, strict=True) for span in row]
    for label, row, top in zip(rows, spans, tops, strict=True):
        parts += [
            f'<rect x="{across(a):.1f}" y="{top}" width="{max(0.0, across(b) - across(a)):.1f}" height="{tall - 1}" '
            f'fill="{color[state]}" data-tip="{escape(label)}: {escape(state)}, steps {a:g} to {b:g}"/>'
            for a, b, state in row
        ]
    parts.append(_below([(across(tick), f"{tick:g}") for tick in _ticks(0, end)], height, "step"))
    shown = {state for *_, state in data}
    legend = tuple((state, color[state], None) for state in states if state in shown)
    return _chart(caption, parts, height, ("block", "from", "to", "state"), data, legend)


def thin(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points: the lowest and the highest of each stretch, so that no peak is lost.

    >>> thin([(i, 9.0 if i == 5 else 0.0) for i in range(100)], most=10)[1]
    (5, 9.0)
    """
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def number_text(value: float) -> str:
    """Four significant digits.

    >>> number_text(1234567), number_text(0.000123456), number_text(5)
    ('1,234,567', '0.0001235', '5')
    """
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 10_000 else f"{value:.4g}"


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / ((high - low) or 1.0) * (end - start)


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    if high <= low:
        return [low]
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    size = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [round(i * size, 12) for i in range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1)]


def _rows(labels: Sequence[str], least: int) -> tuple[int, int, list[int], list[str]]:
    """The height of a row and of the drawing, the y of each row (bottom up), and as many labels as fit."""
    tall = max(least, min(26, 520 // max(1, len(labels))))
    tops = [TOP + tall * (len(labels) - 1 - number) for number in range(len(labels))]
    texts = [
        f'<text class="tick" x="{LEFT - 6}" y="{top + tall / 2 + 4:.1f}" text-anchor="end">{escape(label)}</text>'
        for label, top in list(zip(labels, tops, strict=True))[:: math.ceil(14 / tall)]
    ]
    return tall, TOP + tall * len(labels) + BOTTOM, tops, texts


def _below(ticks: Sequence[tuple[float, str]], height: int, label: str) -> str:
    """The ticks (x, text) and the label of the horizontal axis."""
    texts = [(x, height - BOTTOM + 20, "middle", text) for x, text in ticks]
    texts.append((WIDTH - RIGHT, height - 4, "end", escape(label)))
    return "".join(
        f'<text class="tick" x="{x:.1f}" y="{y}" text-anchor="{anchor}">{text}</text>' for x, y, anchor, text in texts
    )


def _chart(
    caption: Caption, parts: Sequence[str], height: int, head: Sequence[str], rows: Sequence[Sequence[object]],
    legend: tuple[tuple[str, str, str | None], ...] = (),
) -> Chart:  # fmt: skip
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(caption.title)}" '
        f'preserveAspectRatio="xMidYMid meet">{"".join(parts)}</svg>'
    )
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return Chart(caption, svg, text.getvalue(), legend)
