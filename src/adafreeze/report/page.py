"""The page: histories, tables and charts in one HTML file that needs nothing else."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import ConfigError, RunError
from ..journal import History, read_history
from ..journal.events import JOURNAL_FILE
from .charts import Chart, number_text
from .sections import analysis_charts, costs, curves_of, headline, run_charts, slug

__all__ = ["write_report"]

SUMMARY_FILE, ANALYSIS_FILE = "compare.json", "analysis.json"
MOST_RUNS = 12


def write_report(places: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] = "report.html") -> Path:
    """One page about runs: what was saved, scores, stack, costs, curves, settings; and tables of ``compare``.

    Args:
        places: output folders of ``adafreeze train``, ``demo``, ``compare`` or ``analyze``, or journals. The runs
            of a folder of ``compare`` are those of its first seed. The first twelve are drawn, the others named.
        output: the file.

    Returns:
        The file.

    Raises:
        ConfigError: jinja2 is not installed.
        RunError: a place holds none of these, or the file cannot be written.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ConfigError(
            "The page needs jinja2, which is not installed.",
            cause="It is part of the extra `report`.",
            fix='pip install "adafreeze[report]"',
        ) from error
    histories, left_out, table, landscape = _gather([Path(place).expanduser() for place in places])
    plain = next((h for h in histories if h.method in ("plain", "none")), None)
    plain = plain or next((h for h in histories if h.done and not h.freezes), None)
    shown = [history for history in histories if history.freezes] or histories[:1]
    charts = [chart for history in histories for chart in run_charts(history)]
    charts += [*curves_of(histories), *landscape]
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = page.from_string(files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")).render(
        histories=histories,
        headlines=[
            ("" if len(histories) == 1 else f"{history.name}: ") + headline(history, plain) for history in shown
        ],
        left_out=left_out,
        costs=costs(histories),
        charts=charts,
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
        raise RunError(
            f"{path} cannot be written ({error.strerror}).",
            cause="The folder is read-only, or the disk is full.",
            fix="-o path/that/you/can/write.html",
        ) from error
    return path


def _gather(
    places: Sequence[Path],
) -> tuple[list[History], list[str], list[dict[str, Any]] | None, list[Chart]]:
    """Runs that are drawn, names of those that are not, rows of a comparison, landscape and spectrum."""
    runs: list[tuple[Path, str | None]] = []
    table, landscape = None, []
    for place in places:
        compared, analyzed = (place / SUMMARY_FILE).is_file(), (place / ANALYSIS_FILE).is_file()
        if compared:
            with _of(place / SUMMARY_FILE, "compare") as summary:
                table = [_row(row) for row in summary["rows"]]
                runs += _cells(place, summary["outcomes"])
        if analyzed:
            with _of(place / ANALYSIS_FILE, "analyze") as found:
                landscape = list(analysis_charts(found))
        if not (compared or analyzed) or (place / JOURNAL_FILE).is_file():
            runs.append((place, None))
    histories = [read_history(place, name) for place, name in runs[:MOST_RUNS]]
    _tell_apart(histories)
    return histories, [name or str(place) for place, name in runs[MOST_RUNS:]], table, landscape


def _tell_apart(histories: Sequence[History]) -> None:
    """Runs of one name get the folders above it, as many as it takes; a number, where that is not enough."""
    for depth in (2, 3, 4):
        count = Counter(slug(history.name) for history in histories)
        for history in [history for history in histories if count[slug(history.name)] > 1]:
            folders = history.path.absolute().parent.parts
            if history.name.endswith(folders[-1]):  # and not a name that it was given
                history.name = "/".join(folders[-depth:])
    seen: Counter[str] = Counter()
    for history in histories:
        seen[key := slug(history.name)] += 1
        if seen[key] > 1:
            history.name += f" ({seen[key]})"


def _cells(folder: Path, outcomes: Sequence[dict[str, Any]]) -> list[tuple[Path, str | None]]:
    """The runs of the first task and seed, by the method's name."""
    first = [o for o in outcomes if (o["task"], o["seed"]) == (outcomes[0]["task"], outcomes[0]["seed"])]
    cells = [(folder / o["task"] / o["method"].replace("/", "_") / f"seed-{o['seed']}", o["method"]) for o in first]
    return [(cell, name) for cell, name in cells if (cell / JOURNAL_FILE).is_file()]


def _row(row: dict[str, Any]) -> dict[str, Any]:
    difference, ratios = row["difference"], row["ratios"] or {}
    bounds = ""
    if difference and difference["low"] is not None:
        bounds = f" [{difference['low']:+.2f}, {difference['high']:+.2f}]"
    return {
        "task": row["task"] or "all tasks",
        "method": row["method"],
        "reason": row["reason"],
        "cells": [
            str(row["seeds"]),
            "-" if row["score"] is None else f"{row['score']:.2f}",
            f"{difference['mean']:+.2f}{bounds}" if difference else "",
            *("-" if ratios.get(name) is None else f"{ratios[name]:.3f}"
              for name in ("mean_saved_bytes", "peak_saved_bytes", "flops", "seconds", "cpu_seconds")),
            f"{number_text(row['frozen'])} of {row['units']}" if row["units"] else "-",
        ],
    }  # fmt: skip


def _differences(histories: Sequence[History]) -> list[tuple[str, list[str]]]:
    """Settings of all runs: first those in which they differ."""
    rows: dict[str, list[str]] = {}
    parts = [{**{f"SafeConfig.{k}": v for k, v in h.config.items()}, **h.settings, **h.environment} for h in histories]
    for name in dict.fromkeys(name for part in parts for name in part):
        rows[name] = ["-" if name not in part else json.dumps(part[name]).strip('"') for part in parts]
    return sorted(rows.items(), key=lambda row: len(set(row[1])) == 1)


@contextmanager
def _of(path: Path, command: str) -> Iterator[dict[str, Any]]:
    """What a command has written, in whose form the body of the ``with`` can rely.

    Raises:
        RunError: the file cannot be read, or the body finds it in another form.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read ({error}).", cause="It was cut off or edited.", fix="Run the command again."
        ) from error
    try:
        yield found
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{path} is not what `adafreeze {command}` writes.",
            cause="It was edited, or another version wrote it.",
            fix=f"Run `adafreeze {command}` again.",
        ) from error
