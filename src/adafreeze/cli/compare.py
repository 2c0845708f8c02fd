"""``adafreeze compare``: methods × tasks × seeds, and one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from ..errors import ConfigError
from ..methods import METHODS
from ..report.page import SUMMARY_FILE, comparison_cells
from ..train import Arguments, Comparison, compare
from ..train.arguments import DataArguments, parse
from ..train.output import write_page
from ..train.parser import Parser
from ._table import number_table

__all__ = ["main"]

DEFAULTS = ("--save_strategy", "no", "--report_to", "none")  # override a task file, but not the command line
HEADINGS = ("n", "score", "difference [95 %]", "saved bytes", "peak", "FLOPs", "time", "CPU time", "frozen")


def main(argv: Sequence[str]) -> None:
    """Train the missing cells and print the table."""
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    parser = Parser(
        prog="adafreeze compare",
        usage="adafreeze compare [TASK.yaml ...] --output_dir FOLDER [--methods NAME ...] [--seeds N ...] [flags of "
        "train]",
        description="Train the same adapters by several methods, with the same seeds and data order, and compare. Each "
        "TASK.yaml contains flags of `adafreeze train` and names a task; flags on the command line apply to all tasks. "
        "Finished cells are skipped: the same command continues an interrupted table or adds seeds. Several processes "
        "with the same command share the cells.",
    )
    names = f"{', '.join(METHODS)}; two together: safe+lora-fa; one of your own: file.py:Class"
    parser.add_argument("--methods", nargs="+", default=["plain", "safe"], metavar="NAME", help=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="seeds of each method")
    parser.add_argument("--output_dir", required=True, help="gets one folder per cell: TASK/METHOD/seed-N")
    parser.add_argument("--reference", help="the others are compared with it (default: plain, or the first method)")
    parser.add_argument("--metric", help="of the evaluation, such as f1 (default: accuracy, or the task's own)")
    options, flags = parser.parse_known_args(argv[count:])
    tasks = _tasks(argv[:count], flags, options.output_dir)
    found = compare(tasks, **vars(options))
    _print(found)
    folder = Path(options.output_dir).expanduser()
    print(f"All numbers: {folder / SUMMARY_FILE}")
    write_page(folder, [folder])


def _tasks(files: Sequence[str], flags: list[str], output_dir: str) -> dict[str, Arguments]:
    if any(word.split("=")[0] == "--method" for word in flags):
        raise ConfigError(
            "--method is a flag of `adafreeze train`; here several methods are compared.", fix="--methods plain safe"
        )
    found: dict[str, Arguments] = {}
    for given in [["--config", file] for file in files] or [[]]:
        arguments = parse([*given, *DEFAULTS, *flags, "--output_dir", output_dir])
        name = Path(given[1]).stem if given else _name_of(arguments.data)
        if name in found:
            raise ConfigError(f"Two tasks are named {name!r}, because their files are.", fix="Rename one of the files.")
        found[name] = arguments
    return found


def _name_of(data: DataArguments) -> str:
    place = data.train_file or data.train_dir
    name = data.task_name or (Path(place).stem if place else data.dataset_name) or "task"
    return name.replace("/", "_")


def _print(found: Comparison) -> None:
    console = Console(width=max(132, Console().width))
    for task in dict.fromkeys(row.task for row in found.rows):
        rows = [row for row in found.rows if row.task == task]
        title = f"average over {len(found.metrics)} tasks" if task is None else f"{task}: {found.metrics[task]}"
        title += f"; ratios to {found.reference}, in brackets by arithmetic"
        table = number_table(title, "method", *HEADINGS)
        for row in rows:
            table.add_row(row.method, *(comparison_cells(asdict(row)) if row.reason is None else "-" * len(HEADINGS)))
        console.print()
        console.print(table)
        for row in rows:
            if row.reason is not None:
                console.print(f"[dim]not run, {row.method}: {row.reason}[/dim]", highlight=False)
