"""``adafreeze compare``: methods × tasks × seeds, each cell once, and one table."""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import SafeConfig
from ..errors import AdafreezeError, ConfigError, RunError
from ..report.page import SUMMARY_FILE
from ..train.output import JOURNAL_FILE, write_page

if TYPE_CHECKING:
    from ..methods import Method, Outcome, Row

__all__ = ["main"]

OUTCOME_FILE = "outcome.json"
DEFAULTS = {"save_strategy": "no", "report_to": "none"}
# Methods that had other rules when nobody wrote down yet what made a cell.
REVISED = ("autofreeze", "bottom-up", "safe+adapterdrop")
# Settings that came later: what they would have been before there were any.
BEFORE = {"SafeConfig.wait_for_loss": False, "SafeConfig.freeze_at_start": 0.0}
USAGE = "adafreeze compare [TASK.yaml ...] --output_dir FOLDER [--methods NAME ...] [--seeds N ...] [flags of train]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cells that are missing, and print the table; returns the exit code."""
    import sys

    words = list(sys.argv[1:] if argv is None else argv)
    options, flags = _parse(words)
    grid = _Grid(options, flags)
    grid.run()
    return grid.report()


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    parser = argparse.ArgumentParser(
        prog="adafreeze compare",
        usage=USAGE,
        description="Train the same adapters by several methods, with the same seeds and data order, and compare. Each "
        "TASK.yaml holds flags of `adafreeze train` and names a task; flags on the command line hold for all of them. "
        "Cells that are done are skipped: interrupted, or with more seeds, the same command goes on. Started twice, "
        "the cells are shared out.",
        allow_abbrev=False,
    )
    parser.add_argument("--methods", nargs="+", default=["plain", "safe"], metavar="NAME", help=_methods_help())
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default 0 1 2")
    parser.add_argument("--output_dir", required=True, help="one folder a cell: TASK/METHOD/seed-N")
    parser.add_argument("--reference", help="what the others are compared with (default plain, or the first method)")
    parser.add_argument("--metric", help="of the evaluation, such as f1 (default: accuracy, or the task's own)")
    options, flags = parser.parse_known_args(words[count:])
    options.tasks = [Path(word) for word in words[:count]]
    return options, flags


def _methods_help() -> str:
    return (
        "plain, safe, safe-paper, safe-no-cache, safe-budget, bottom-up, random, static-prefix, autofreeze, grades, "
        "top-blocks, equal-flops, checkpointing, adapterdrop, sparse-adapter, lora-fa, dora; two together: "
        "safe+lora-fa; one of your own: file.py:Class (default: plain safe)"
    )


class _Grid:
    """All cells of one command.

    Raises:
        AdafreezeError: a flag, a task file or a method cannot be used; nothing has been trained yet.
    """

    def __init__(self, options: argparse.Namespace, flags: list[str]) -> None:
        from ..methods import find_method, in_order

        self.options, self.folder = options, Path(options.output_dir).expanduser()
        self.methods: list[Method] = in_order([find_method(name) for name in options.methods])
        names = [method.name for method in self.methods]
        self.reference = options.reference or ("plain" if "plain" in names else names[0])
        if self.reference not in names:
            raise ConfigError(
                f"The reference {self.reference!r} is not compared.",
                cause=f"--methods are {' '.join(names)}.",
                fix=f"--reference {names[0]}",
            )
        for method in self.methods:
            method.digest({})  # of its file as it is now, whatever an editor does to that during the run
        self.tasks = self._tasks(options.tasks, flags)
        self.outcomes: dict[tuple[str, str, int], Outcome] = {}

    def _tasks(self, files: list[Path], flags: list[str]) -> dict[str, list[str]]:
        """Flags by task; each is parsed once, so that a typing error costs seconds and no cell."""
        from ..train.arguments import parse

        if any(word.split("=")[0] == "--method" for word in flags):
            raise ConfigError(
                "--method is a flag of `adafreeze train`.",
                cause="Here several methods are compared.",
                fix="--methods plain safe",
            )
        found: dict[str, list[str]] = {}
        for file in files or [None]:  # type: ignore[list-item]
            given = [] if file is None else ["--config", str(file)]
            words = [*given, *flags]
            for name, value in DEFAULTS.items():
                if not any(word.split("=")[0] == f"--{name}" for word in flags):
                    words += [f"--{name}", value]
            words += ["--method", "none"]  # what freezes is the methods' to say
            arguments = parse([*words, "--output_dir", str(self.folder)])
            SafeConfig.from_dict(arguments.freezing)
            name = file.stem if file is not None else _name_of(arguments.data)
            if name in found:
                raise ConfigError(
                    f"Two tasks are named {name!r}.",
                    cause="A task is named as its file.",
                    fix="Rename one of the files.",
                )
            if arguments.data.validation_file is None and arguments.data.validation_dir is None:
                _needs_evaluation(arguments.data)
            found[name] = words
        return found

    def run(self) -> None:
        """Every cell that is not done, in an order in which each finds what it needs."""
        cells = [(task, method, seed) for seed in self.options.seeds for task in self.tasks for method in self.methods]
        waiting = cells
        while waiting:
            left = [cell for cell in waiting if not self._cell(*cell, number=f"{cells.index(cell) + 1}/{len(cells)}")]
            if len(left) == len(waiting):
                time.sleep(2)  # another process has them
            waiting = left

    def _cell(self, task: str, method: Method, seed: int, number: str) -> bool:
        """Run one; False if another process is at it, or at one that it needs."""
        from filelock import FileLock, Timeout

        from ..methods import Outcome
        from ..train.arguments import parse

        if any((task, needed, seed) not in self.outcomes for needed in method.after):
            return False
        folder = self.folder / task / method.name.replace("/", "_") / f"seed-{seed}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock", timeout=0):
                arguments = parse([*self.tasks[task], "--output_dir", str(folder), "--seed", str(seed)])
                settings = {name: value for name, value in arguments.resolved.items() if name != "output_dir"}
                freezing = SafeConfig.from_dict(arguments.freezing).to_dict()  # another version's defaults may differ
                settings |= {f"SafeConfig.{name}": value for name, value in freezing.items()}
                made_by = method.digest({name: self.outcomes[task, name, seed] for name in method.after})
                outcome = _known(folder / OUTCOME_FILE, settings, made_by)
                if outcome is None:
                    print(f"\n[{number}] {task} · {method.name} · seed {seed}", flush=True)
                    outcome = self._train(arguments, method, task, seed, folder, settings)
                    outcome = replace(outcome, made_by=made_by)
                    outcome.save(folder / OUTCOME_FILE)
        except Timeout:
            return False
        except OSError as error:
            raise RunError(
                f"{folder} cannot be written ({error.strerror}).",
                cause="It or a folder above it is a file or read-only, or the disk is full.",
                fix="--output_dir path/that/you/can/write; what is done there already is kept.",
            ) from error
        assert isinstance(outcome, Outcome)
        self.outcomes[task, method.name, seed] = outcome
        return True

    def _train(
        self, arguments: Any, method: Method, task: str, seed: int, folder: Path, settings: Mapping[str, Any]
    ) -> Outcome:
        from ..methods import Outcome, outcome_of
        from .train import run

        arguments.run.overwrite_output_dir = True  # what a cell that was interrupted left there
        found = {name: self.outcomes[task, name, seed] for name in method.after}
        which: dict[str, Any] = {"task": task, "method": method.name, "seed": seed, "settings": settings}
        try:
            metrics = run(arguments, method=method, found=found)
        except AdafreezeError as error:
            print(f"{method.name} does not fit: {error}")
            return Outcome(**which, reason=error.fact)
        finally:
            gc.collect()
        return outcome_of(folder / JOURNAL_FILE, metrics, **which)

    def report(self) -> int:
        """Write and print the summary; 2 if no method ran."""
        from ..env import environment
        from ..methods import default_metric, summarize

        order = [
            self.outcomes[task, method.name, seed]
            for task in self.tasks
            for method in self.methods
            for seed in self.options.seeds
        ]
        metrics: dict[str, str] = {}
        for task in self.tasks:
            of_task = [outcome for outcome in order if outcome.task == task]
            chosen = self.options.metric or default_metric(of_task)
            lacking = [o for o in of_task if o.reason is None and chosen not in o.metrics]
            if chosen is None or lacking:
                known = next((sorted(o.metrics) for o in of_task if o.reason is None), [])
                reasons = {o.method: o.reason for o in of_task if o.reason is not None}
                raise RunError(
                    f"The task {task!r} has no score to compare.",
                    cause=f"Its evaluation gives {', '.join(known)}."
                    if known
                    else "; ".join(f"{name}: {reason}" for name, reason in reasons.items()),
                    fix=f"--metric {known[0]}" if known else "Change the flags that the reasons name.",
                )
            metrics[task] = chosen
        rows = summarize(order, metrics, self.reference)
        summary = {
            "reference": self.reference,
            "metrics": metrics,
            "rows": [asdict(row) for row in rows],
            "outcomes": [asdict(outcome) for outcome in order],
            "environment": environment(),
        }
        path = self.folder / SUMMARY_FILE
        path.write_text(json.dumps(_finite(summary), indent=2) + "\n", encoding="utf-8")
        _print(rows, metrics, self.reference)
        print(f"All numbers: {path}")
        write_page(self.folder, [self.folder])
        return 0


def _known(path: Path, settings: Mapping[str, Any], made_by: str) -> Outcome | None:
    """What an earlier start left; None if there is nothing, or it did not fit (which is tried again)."""
    from ..methods import Outcome

    if not path.exists():
        return None
    try:
        outcome = Outcome.load(path)
    except ValueError as error:
        raise RunError(
            f"{error}", cause="The file was changed.", fix=f"Remove {path}; the cell is then trained again."
        ) from error
    if outcome.reason is not None or (outcome.made_by is None and outcome.method in REVISED):
        return None
    now, then = json.loads(json.dumps(settings)), BEFORE | dict(outcome.settings)
    differing = [name for name in {*now, *then} if now.get(name) != then.get(name)]
    if differing:
        name = min(differing)
        raise RunError(
            f"{path.parent} was trained with other settings: {name} was {then.get(name)!r}, and is {now.get(name)!r}.",
            cause="A table of cells with different settings compares nothing.",
            fix=f"Give another --output_dir, or remove {path.parent}.",
        )
    if outcome.made_by not in (None, made_by):  # None: of a version that did not write it down
        raise RunError(
            f"{path.parent} was trained by a method {outcome.method!r} that is not today's.",
            cause="Its file was changed since, or Python's version, or what it takes over from another method came to "
            "something else.",
            fix=f"Give another --output_dir, or remove {path.parent}; the cell is then trained again.",
        )
    return outcome


def _name_of(data: Any) -> str:
    place = data.train_file or data.train_dir
    name = data.task_name or (Path(place).stem if place else data.dataset_name) or "task"
    return str(name).replace("/", "_")


def _needs_evaluation(data: Any) -> None:
    if data.validation_split is None and data.dataset_name is None and data.task_name is None:
        raise ConfigError(
            "There is nothing to compare the methods on.",
            cause="No validation data are given.",
            fix="--validation_file validation.csv, or --validation_split 0.1",
        )


def _finite(value: Any) -> Any:
    """NaN, which JSON cannot hold, as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _print(rows: list[Row], metrics: Mapping[str, str], reference: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(132, Console().width))
    for task in dict.fromkeys(row.task for row in rows):
        title = f"average over {len(metrics)} tasks" if task is None else f"{task}: {metrics[task]}"
        table = Table(title=f"{title}; ratios against {reference}, in brackets by arithmetic", title_justify="left")
        table.add_column("method")
        for heading in (
            "n",
            "score",
            "difference [95 %]",
            "saved bytes",
            "peak",
            "FLOPs",
            "time",
            "CPU time",
            "frozen",
        ):
            table.add_column(heading, justify="right")
        reasons = []
        for row in (row for row in rows if row.task == task):
            if row.reason is not None:
                table.add_row(row.method, "-", *["-"] * 8)
                reasons.append(f"{row.method}: {row.reason}")
            else:
                table.add_row(*_cells(row))
        console.print()
        console.print(table)
        for reason in reasons:
            console.print(f"[dim]not run, {reason}[/dim]", highlight=False)


def _cells(row: Row) -> list[str]:
    sd = f" ± {row.sd:.2f}" if row.sd is not None else ""
    difference = "reference" if math.isfinite(row.score) else "-"  # of scores that have no average
    if row.difference is not None:
        found = row.difference
        bounds = f" [{found.low:+.2f}, {found.high:+.2f}]" if math.isfinite(found.low) else ""
        difference = f"{found.mean:+.2f}{bounds}"
    ratios = dict.fromkeys(("mean_saved_bytes", "peak_saved_bytes", "flops", "seconds", "cpu_seconds"), "-")
    for name, value in (row.ratios or {}).items():
        ratios[name] = f"{value:.3f}" if math.isfinite(value) else "-"
    if row.theory is not None:
        ratios["mean_saved_bytes"] += f" ({row.theory[0]:.2f})"
        ratios["flops"] += f" ({row.theory[1]:.2f})"
    frozen = f"{row.frozen:.1f} of {row.units}" if row.units else "-"
    score = f"{row.score:.2f}{sd}" if math.isfinite(row.score) else "-"
    return [row.method, str(row.seeds), score, difference, *ratios.values(), frozen]
