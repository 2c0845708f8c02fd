"""Charts as inline SVG: no script is needed to see them, and none to read their values."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

__all__ = ["Caption", "Chart", "Curve", "bands", "heat_map", "lines"]

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 720, 84, 16, 16, 48
POINTS = 400  # of a curve, at most
CELLS = 6000  # of a heat map, at most; and no more columns than can be seen
COLUMNS = 160
ROWS = 4000  # of a curve in the data, at most
# Okabe & Ito (2008): told apart with any colour vision. Black is left to the text.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 3", "10 4")  # and without any colour at all


@dataclass(frozen=True)
class Caption:
    """What stands for a drawing where it is not seen.

    Attributes:
        name: of its place on the page and of its file, letters and dashes.
        title: what it shows, with the unit.
        text: what can be read off it, in a sentence.
    """

    name: str
    title: str
    text: str


@dataclass(frozen=True)
class Chart:
    """A drawing, and what stands for it.

    Attributes:
        caption: its words.
        svg: the drawing; values in ``data-tip``.
        csv: its data.
        legend: (label, colour, dashes of the line or None where it is no line) by entry.
    """

    caption: Caption
    svg: str
    csv: str
    legend: tuple[tuple[str, str, str | None], ...] = ()

    @property
    def link(self) -> str:
        """The data as the address of a download."""
        return f"data:text/csv;base64,{base64.b64encode(self.csv.encode()).decode()}"


@dataclass(frozen=True)
class Curve:
    """Points (x, y) under one label; ``steps``: y holds until the next point."""

    label: str
    points: Sequence[tuple[float, float]]


def lines(caption: Caption, curves: Sequence[Curve], *, x: str = "step", marks: Sequence[float] = ()) -> Chart:
    """Curves over one axis; the y axis starts at 0 unless that would flatten them.

    Args:
        caption: its words.
        curves: at least one point among them.
        x: what the horizontal axis counts.
        marks: x values of vertical lines, the freezes.
    """
    height = 230
    every = [point for curve in curves for point in curve.points]
    xs, ys = [point[0] for point in every], [point[1] for point in every]
    low, high = min(ys), max(ys)
    low = 0.0 if low >= 0 and low < 0.6 * high else low
    across, down = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT), _scale(low, high, height - BOTTOM, TOP)
    parts = [_axes(across, down, (min(xs), max(xs)), (low, high), height, x)]
    parts += [f'<line class="mark" x1="{across(m):.1f}" x2="{across(m):.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>'
              for m in marks if min(xs) <= m <= max(xs)]  # fmt: skip
    styles = [_style(number) for number in range(len(curves))]
    for curve, (colour, dash) in zip(curves, styles, strict=True):
        points = thin(curve.points)
        path = " ".join(f"{across(a):.1f},{down(b):.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" '
                     f'stroke-dasharray="{dash}"/>')  # fmt: skip
        radius = 3 if len(points) <= 60 else 2
        parts += [
            f'<circle cx="{across(a):.1f}" cy="{down(b):.1f}" r="{radius}" fill="{colour}" '
            f'data-tip="{escape(curve.label)}: {number_text(b)} at {x} {number_text(a)}"/>'
            for a, b in points
        ]
    rows = [(curve.label, a, b) for curve in curves for a, b in thin(curve.points, ROWS)]
    legend = tuple((curve.label, *style) for curve, style in zip(curves, styles, strict=True))
    return Chart(caption, _svg(parts, height, caption.title), _csv(("curve", x, "value"), rows), legend)


def heat_map(
    caption: Caption, rows: Sequence[str], columns: Sequence[float], values: Sequence[Sequence[float]],
    frozen_at: Sequence[float | None],
) -> Chart:  # fmt: skip
    """A cell for each row and column, darker where the square root of its share of the largest is; rows bottom up.

    Of more columns than can be seen, each cell stands for a stretch of them, and shows the largest value in it.

    Args:
        caption: its words.
        rows: labels, the lowest first.
        columns: steps.
        values: by row; NaN where nothing was measured.
        frozen_at: the column from which on the row is frozen, or None.
    """
    count = max(1, min(len(columns), COLUMNS, CELLS // max(1, len(rows))))
    bounds = [round(i * len(columns) / count) for i in range(count + 1)]
    stretches = [range(a, b) for a, b in pairwise(bounds)]
    tall = max(8, min(26, 520 // max(1, len(rows))))
    height = TOP + tall * len(rows) + BOTTOM
    wide = (WIDTH - LEFT - RIGHT) / count
    most = max((v for row in values for v in row if math.isfinite(v)), default=0.0) or 1.0
    parts = _labels(rows, tall)
    data: list[tuple[str, float, float]] = []
    for number, (label, row, stop) in enumerate(zip(rows, values, frozen_at, strict=True)):
        top = TOP + tall * (len(rows) - 1 - number)
        for place, stretch in enumerate(stretches):
            column = _largest(row, stretch)
            data.append((label, columns[column], row[column]))
            value, left = row[column], LEFT + place * wide
            is_frozen = stop is not None and columns[column] >= stop
            said = f"{number_text(value)}" if math.isfinite(value) else "not measured"
            shade = math.sqrt(max(0.0, value) / most) if math.isfinite(value) else 0.0
            kind = "cell frozen" if is_frozen and not math.isfinite(value) else "cell"
            parts.append(
                f'<rect class="{kind}" x="{left:.1f}" y="{top}" width="{wide:.2f}" height="{tall - 1}" '
                f'fill-opacity="{0.06 + 0.94 * shade:.3f}" data-tip="{escape(label)}, step {columns[column]:g}: {said}'
                f'{", frozen" if is_frozen else ""}"/>'
            )
        if stop is not None:
            place = next((i for i, stretch in enumerate(stretches) if columns[stretch[-1]] >= stop), count)
            at = LEFT + place * wide
            parts.append(f'<line class="freeze" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{top + tall - 1}"/>')
    shown = sorted({0, count // 2, count - 1})
    ticks = [(LEFT + (place + 0.5) * wide, f"{columns[stretches[place][0]]:g}") for place in shown]
    parts.append(_below(ticks, height, "step"))
    return Chart(caption, _svg(parts, height, caption.title), _csv(("unit", "step", "score"), data))


def bands(
    caption: Caption, rows: Sequence[str], spans: Sequence[Sequence[tuple[float, float, str]]],
    kinds: Sequence[str], end: float,
) -> Chart:  # fmt: skip
    """A bar for each row, in spans of what it was at that time; rows bottom up.

    Args:
        caption: its words.
        rows: labels, the lowest first.
        spans: by row: (from, to, kind).
        kinds: all kinds, in the order of the legend.
        end: of the axis.
    """
    tall = max(6, min(26, 520 // max(1, len(rows))))
    height = TOP + tall * len(rows) + BOTTOM
    across = _scale(0, end, LEFT, WIDTH - RIGHT)
    colour = dict(zip(kinds, COLOURS, strict=False))
    parts = _labels(rows, tall)
    for number, (label, row) in enumerate(zip(rows, spans, strict=True)):
        top = TOP + tall * (len(rows) - 1 - number)
        parts += [
            f'<rect x="{across(a):.1f}" y="{top}" width="{max(0.0, across(b) - across(a)):.1f}" height="{tall - 1}" '
            f'fill="{colour[kind]}" data-tip="{escape(label)}: {escape(kind)}, steps {a:g} to {b:g}"/>'
            for a, b, kind in row
        ]
    parts.append(_below([(across(tick), f"{tick:g}") for tick in _ticks(0, end)], height, "step"))
    data = [(label, a, b, kind) for label, row in zip(rows, spans, strict=True) for a, b, kind in row]
    shown = {kind for row in spans for _, _, kind in row}
    legend = tuple((kind, colour[kind], None) for kind in kinds if kind in shown)
    return Chart(caption, _svg(parts, height, caption.title), _csv(("block", "from", "to", "state"), data), legend)


def thin(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points: of each stretch the lowest and the highest, so that no peak is lost.

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
    """Four digits.

    >>> number_text(1234567), number_text(0.000123456), number_text(5)
    ('1,234,567', '0.0001235', '5')
    """
    if float(value).is_integer() or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _scale(low: float, high: float, start: float, end: float):  # type: ignore[no-untyped-def]
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    if high <= low:
        return [low]
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    size = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first = math.ceil(low / size - 1e-9)
    return [round(i * size, 12) for i in range(first, math.floor(high / size + 1e-9) + 1)]


def _style(number: int) -> tuple[str, str]:
    """Colour and dashes of a curve, another pair for each of the first 36."""
    return COLOURS[number % len(COLOURS)], DASHES[(number + number // len(COLOURS)) % len(DASHES)]


def _largest(row: Sequence[float], stretch: range) -> int:
    """Where in the stretch the largest value is; its start where none was measured."""
    return max(stretch, key=lambda column: row[column] if math.isfinite(row[column]) else -math.inf)


def _labels(rows: Sequence[str], tall: int) -> list[str]:
    """To the left of rows that stand bottom up, as many as there is room for."""
    every = max(1, math.ceil(14 / tall))
    return [
        f'<text class="tick" x="{LEFT - 6}" y="{TOP + tall * (len(rows) - number - 0.5) + 4:.1f}" text-anchor="end">'
        f"{escape(rows[number])}</text>"
        for number in range(0, len(rows), every)
    ]


def _below(ticks: Sequence[tuple[float, str]], height: int, what: str) -> str:
    """Under the drawing: (place, label) of each tick, and what is counted."""
    parts = [f'<text class="tick" x="{at:.1f}" y="{height - BOTTOM + 20}" text-anchor="middle">{label}</text>'
             for at, label in ticks]  # fmt: skip
    named = f'<text class="tick" x="{WIDTH - RIGHT}" y="{height - 4}" text-anchor="end">{escape(what)}</text>'
    return "".join([*parts, named])


def _axes(across, down, xs, ys, height: int, x: str) -> str:  # type: ignore[no-untyped-def]
    parts = []
    for tick in _ticks(*ys):
        at = down(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{number_text(tick)}</text>')
    parts.append(_below([(across(tick), number_text(tick)) for tick in _ticks(*xs)], height, x))
    return "".join(parts)


def _svg(parts: Sequence[str], height: int, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}" '
        f'preserveAspectRatio="xMidYMid meet">{"".join(parts)}</svg>'
    )


def _csv(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()
