"""The report: histories, tables and charts in one self-contained HTML file."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import ConfigError, RunError
from ..journal import JOURNAL_FILE, History, read_history
from .charts import Chart
from .sections import COSTS, analysis_charts, costs, curves_of, headline, run_charts, slug

__all__ = ["comparison_cells", "write_report"]

SUMMARY_FILE, ANALYSIS_FILE = "compare.json", "analysis.json"
MOST_RUNS = 12


def write_report(places: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] = "report.html") -> Path:
    """Write a report about runs: savings, scores, blocks, costs, curves, settings, and tables of ``compare``.

    Args:
        places: output folders of ``adafreeze train``, ``demo``, ``compare`` or ``analyze``, or journals. For
            ``compare`` the runs of the first task and seed are drawn; at most twelve runs in total, the rest is named.
        output: the file.

    Returns:
        The file.

    Raises:
        ConfigError: jinja2 is not installed.
        RunError: a place contains none of these, or the file cannot be written.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ConfigError(
            "The report needs jinja2, which is not installed.", fix='pip install "adafreeze[report]"'
        ) from error
    histories, left_out, table, landscape = _gather([Path(place).expanduser() for place in places])
    plain = next((h for h in histories if h.method in ("plain", "none")), None)
    plain = plain or next((h for h in histories if h.done and not h.freezes), None)
    prefix = "{}: " if len(histories) > 1 else ""
    shown = [history for history in histories if history.freezes] or histories[:1]
    charts = [chart for history in histories for chart in run_charts(history)]
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = page.from_string(files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")).render(
        histories=histories,
        headlines=[prefix.format(history.name) + headline(history, plain) for history in shown],
        left_out=left_out,
        costs=costs(histories),
        charts=[*charts, *curves_of(histories), *landscape],
        table=table,
        differences=_differences(histories),
        version=__version__,
    )
    path = Path(output).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".part")
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}).", fix="-o a/writable/path.html") from error
    return path


def _gather(
    places: Sequence[Path],
) -> tuple[list[History], list[str], list[dict[str, Any]] | None, list[Chart]]:
    """Histories of the runs drawn, names of the others, rows of a comparison, charts of an analysis."""
    runs: list[tuple[Path, str | None]] = []
    table, landscape = None, []
    for place in places:
        compared, analyzed = (place / SUMMARY_FILE).is_file(), (place / ANALYSIS_FILE).is_file()
        if compared:
            with _written_by("compare", place / SUMMARY_FILE) as summary:
                table = [row | {"cells": comparison_cells(row)} for row in summary["rows"]]
                runs += _cells(place, summary["outcomes"])
        if analyzed:
            with _written_by("analyze", place / ANALYSIS_FILE) as found:
                landscape = list(analysis_charts(found))
        if not (compared or analyzed) or (place / JOURNAL_FILE).is_file():
            runs.append((place, None))
    histories = [read_history(place, name) for place, name in runs[:MOST_RUNS]]
    _make_names_unique(histories)
    return histories, [name or str(place) for place, name in runs[MOST_RUNS:]], table, landscape


def _make_names_unique(histories: Sequence[History]) -> None:
    """Prepend parent folders to equal names, then append numbers."""
    for depth in (2, 3, 4):
        count = Counter(slug(history.name) for history in histories)
        for history in [history for history in histories if count[slug(history.name)] > 1]:
            folders = history.path.absolute().parent.parts
            if history.name.endswith(folders[-1]):  # not a name from `compare`
                history.name = "/".join(folders[-depth:])
    seen: Counter[str] = Counter()
    for history in histories:
        seen[key := slug(history.name)] += 1
        if seen[key] > 1:
            history.name += f" ({seen[key]})"


def _cells(folder: Path, outcomes: Sequence[dict[str, Any]]) -> list[tuple[Path, str | None]]:
    """(folder, method) of the runs of the first task and seed."""
    first = [o for o in outcomes if (o["task"], o["seed"]) == (outcomes[0]["task"], outcomes[0]["seed"])]
    cells = [(folder / o["task"] / o["method"].replace("/", "_") / f"seed-{o['seed']}", o["method"]) for o in first]
    return [(cell, name) for cell, name in cells if (cell / JOURNAL_FILE).is_file()]


def comparison_cells(row: Mapping[str, Any]) -> list[str]:
    """A row of ``compare`` as text: runs, score, difference, ratios (in brackets by arithmetic), frozen units."""

    def text(value: float | None, form: str = ".3f") -> str:
        return "-" if value is None or not math.isfinite(value) else format(value, form)  # JSON has None for NaN

    score = text(row["score"], ".2f") + (f" ± {row['sd']:.2f}" if row["sd"] is not None else "")
    difference = row["difference"]
    if difference is not None:
        low, high = text(difference["low"], "+.2f"), text(difference["high"], "+.2f")
        against = f"{difference['mean']:+.2f}" + (f" [{low}, {high}]" if low != "-" else "")
    else:
        against = "-" if score == "-" else "reference"  # "-": scores without an average
    ratios = {name: text((row["ratios"] or {}).get(name)) for name, *_ in COSTS}
    if row["theory"] is not None:
        ratios["mean_saved_bytes"] += f" ({row['theory'][0]:.2f})"
        ratios["flops"] += f" ({row['theory'][1]:.2f})"
    frozen = f"{row['frozen']:.1f} of {row['units']}" if row["units"] else "-"
    return [str(row["seeds"]), score, against, *ratios.values(), frozen]


def _differences(histories: Sequence[History]) -> list[tuple[str, list[str]]]:
    """Settings and versions of all runs, those that differ first."""
    rows: dict[str, list[str]] = {}
    parts = [{**{f"SafeConfig.{k}": v for k, v in h.config.items()}, **h.settings, **h.environment} for h in histories]
    for name in dict.fromkeys(name for part in parts for name in part):
        rows[name] = ["-" if name not in part else json.dumps(part[name]).strip('"') for part in parts]
    return sorted(rows.items(), key=lambda row: len(set(row[1])) == 1)


@contextmanager
def _written_by(command: str, path: Path) -> Iterator[dict[str, Any]]:
    """The contents of a JSON file of ``command``.

    Raises:
        RunError: the file cannot be read, or the body of the ``with`` cannot use it.
    """
    try:
        yield json.loads(path.read_text(encoding="utf-8"))
    except (OSError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{path} is not what `adafreeze {command}` writes ({type(error).__name__}: {error}).",
            fix=f"Run `adafreeze {command}` again.",
        ) from error
