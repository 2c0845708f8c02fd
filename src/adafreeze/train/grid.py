"""The grid of compare: methods × tasks × seeds. Each cell is trained once, and its result is kept in its folder."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..config import SafeConfig
from ..errors import AdafreezeError, ConfigError, RunError
from ..methods import Method, Outcome, Row, default_metric, find_method, in_order, outcome_of, summarize
from ..report.page import SUMMARY_FILE
from .arguments import Arguments
from .output import JOURNAL_FILE, writing
from .run import train

__all__ = ["Comparison", "compare"]

OUTCOME_FILE = "outcome.json"


@dataclass(frozen=True)
class Comparison:
    """All results of a grid, which ``compare`` also writes to compare.json in its output folder."""

    reference: str  # the method that the others are compared with
    metrics: dict[str, str]  # the score of each task
    rows: list[Row]  # one per task and method, and the averages over tasks
    outcomes: list[Outcome]  # one per cell


def compare(
    tasks: Mapping[str, Arguments],
    methods: Sequence[str | Method] = ("plain", "safe"),
    seeds: Sequence[int] = (0, 1, 2),
    *,
    output_dir: str,
    reference: str | None = None,
    metric: str | None = None,
) -> Comparison:
    """Train the cells that are missing in ``output_dir``, with the same seeds and data order, and compare them.

    Several processes with the same call share the cells.

    Args:
        tasks: settings by the name of the task; ``output_dir``, ``seed`` and ``method`` of each cell are set here.
        methods: names as for ``--methods``, or methods of your own.
        seeds: of each task and method.
        output_dir: with one folder per cell: TASK/METHOD/seed-N.
        reference: a method; by default plain, or the first one.
        metric: of the evaluation, such as ``"f1"``; by default accuracy, or the task's own.

    Raises:
        AdafreezeError: a setting cannot be used (before any training), or a cell was trained with other settings.
    """
    from ..env import environment  # not at import time, or `python -m adafreeze.env` warns

    for name, arguments in tasks.items():
        SafeConfig.from_dict(arguments.freezing)
        data = arguments.data
        places = (data.validation_file, data.validation_dir, data.validation_split, data.dataset_name, data.task_name)
        if not any(places):
            raise ConfigError(
                f"The task {name!r} has no validation data to compare the methods on.",
                fix="--validation_file validation.csv, or --validation_split 0.1",
            )
    chosen = in_order([find_method(method) if isinstance(method, str) else method for method in methods])
    names = [method.name for method in chosen]
    reference = reference or ("plain" if "plain" in names else names[0])
    if reference not in names:
        raise ConfigError(
            f"The reference {reference!r} is not compared; the methods are {' '.join(names)}.",
            fix=f"--reference {names[0]}",
        )
    for method in chosen:
        method.digest({})  # reads its file now, before an editor changes it during the run
    folder = Path(output_dir).expanduser()
    outcomes = _finish_cells(tasks, chosen, seeds, folder)
    order = [outcomes[task, name, seed] for task in tasks for name in names for seed in seeds]
    metrics = {task: _metric_of(task, [one for one in order if one.task == task], metric) for task in tasks}
    found = Comparison(reference, metrics, summarize(order, metrics, reference), order)
    text = json.dumps(asdict(found) | {"environment": environment()})
    summary = json.loads(text, parse_constant=lambda _: None)  # JSON has no NaN
    (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return found


def _finish_cells(
    tasks: Mapping[str, Arguments], methods: Sequence[Method], seeds: Sequence[int], folder: Path
) -> dict[tuple[str, str, int], Outcome]:
    """The results of all cells, by task, method and seed; each cell after those that it needs."""
    outcomes: dict[tuple[str, str, int], Outcome] = {}
    cells = [(task, method, seed) for seed in seeds for task in tasks for method in methods]
    while len(outcomes) < len(cells):
        before = len(outcomes)
        for number, (task, method, seed) in enumerate(cells, 1):
            needed = [(task, name, seed) for name in method.after]
            if (task, method.name, seed) in outcomes or any(key not in outcomes for key in needed):
                continue
            found = {key[1]: outcomes[key] for key in needed}
            place = folder / task / method.name.replace("/", "_") / f"seed-{seed}"
            with writing(place), suppress(Timeout):  # Timeout: another process trains this cell
                place.mkdir(parents=True, exist_ok=True)
                with FileLock(place / ".lock", timeout=0):
                    title = f"[{number}/{len(cells)}] {task} · {method.name} · seed {seed}"
                    outcomes[task, method.name, seed] = _cell(tasks[task], method, found, task, seed, place, title)
        if len(outcomes) == before:
            time.sleep(2)
    return outcomes


def _cell(
    arguments: Arguments,
    method: Method,
    found: Mapping[str, Outcome],
    task: str,
    seed: int,
    folder: Path,
    title: str,
) -> Outcome:
    """The result in ``folder``; trained now if there is none."""
    # The files of an interrupted cell are overwritten. The method alone decides what freezes.
    arguments = arguments.changed(output_dir=folder, seed=seed, method="none", overwrite_output_dir=True)
    settings = {name: value for name, value in arguments.resolved.items() if name != "output_dir"}
    freezing = SafeConfig.from_dict(arguments.freezing).to_dict()  # all fields: defaults change between versions
    settings |= {f"SafeConfig.{name}": value for name, value in freezing.items()}
    made_by = method.digest(found)
    outcome = _known(folder / OUTCOME_FILE, settings, made_by)
    if outcome is not None:
        return outcome
    print(f"\n{title}", flush=True)
    which: dict[str, Any] = {"task": task, "method": method.name, "seed": seed, "settings": settings}
    try:
        outcome = outcome_of(folder / JOURNAL_FILE, train(arguments, method=method, found=found), **which)
    except AdafreezeError as error:
        print(f"{method.name} does not fit: {error}")
        outcome = Outcome(**which, reason=error.fact)
    gc.collect()
    outcome = replace(outcome, made_by=made_by)
    outcome.save(folder / OUTCOME_FILE)
    return outcome


def _known(path: Path, settings: Mapping[str, Any], made_by: str) -> Outcome | None:
    """The result of an earlier call; None if there is none, or the method did not fit (which is tried again)."""
    if not path.exists():
        return None
    fix = f"Give another --output_dir, or remove {path.parent} to train it again."
    try:
        outcome = Outcome.load(path)
    except ValueError as error:
        raise RunError(str(error), fix=f"Remove {path} to train the cell again.") from error
    if outcome.reason is not None:
        return None
    now, then = json.loads(json.dumps(settings)), outcome.settings
    differing = sorted(name for name in {*now, *then} if name not in now or name not in then or now[name] != then[name])
    if differing:
        name = differing[0]
        raise RunError(
            f"{path.parent} was trained with other settings: {name} was {then.get(name)!r}, and is {now.get(name)!r}.",
            fix=fix,
        )
    if outcome.made_by != made_by:
        raise RunError(
            f"The code of the method {outcome.method!r}, or a result that it builds on, changed since {path.parent} "
            "was trained.",
            fix=fix,
        )
    return outcome


def _metric_of(task: str, outcomes: Sequence[Outcome], metric: str | None) -> str:
    """The name of the score of ``task``, which all its results have."""
    chosen = metric or default_metric(outcomes)
    ran = [outcome for outcome in outcomes if outcome.reason is None]
    if not ran:
        reasons = {outcome.method: outcome.reason for outcome in outcomes}
        raise RunError(
            f"No method ran on the task {task!r}: {'; '.join(f'{name}: {reason}' for name, reason in reasons.items())}",
            fix="Change the flags that the reasons name.",
        )
    if chosen is None or any(chosen not in outcome.metrics for outcome in ran):
        known = sorted(ran[0].metrics)
        raise RunError(
            f"The task {task!r} has no score {chosen or 'to compare'}; its evaluation gives {', '.join(known)}.",
            fix=f"--metric {known[0] if known else 'accuracy'}",
        )
    return chosen
