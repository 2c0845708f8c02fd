"""``adafreeze export-config``: what a run found out, as a table and as the adapter_config.json of the next run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, RunError
from ..train.arguments import parse_flags

if TYPE_CHECKING:
    from peft import PeftConfig

    from ..train.export import Export

__all__ = ["main"]

USAGE = """usage: adafreeze export-config RUN [-o FOLDER] [--min_share SHARE] [--keep_ranks] [--adapter_config FOLDER]

Writes the adapter_config.json of a next run: adapters in the blocks that stayed live in RUN (the output folder of
`adafreeze train`, or a journal.jsonl), ranks by score, at the same number of parameters.

  -o, --output FOLDER      where it goes; default: the folder `next` beside the journal
  --min_share SHARE        the blocks with at least this share of the total score, whatever froze
  --keep_ranks             the run's own ranks: pick blocks alone
  --adapter_config FOLDER  the run's saved adapter, where it does not lie beside the journal

In a script: get_peft_model(model, LoraConfig.from_pretrained(FOLDER)).
"""


@dataclass
class ExportArguments:
    """Of which run, and how."""

    _argument_group_name = "export"

    run: str = field(metadata={"help": "The output folder of a run, or its journal."})
    output: str | None = field(default=None, metadata={"help": "Where the configuration goes.", "aliases": ["-o"]})
    min_share: float | None = field(default=None, metadata={"help": "Blocks with this share of the score."})
    keep_ranks: bool = field(default=False, metadata={"help": "Pick blocks alone."})
    adapter_config: str | None = field(default=None, metadata={"help": "The folder of the run's adapter."})


def main(argv: Sequence[str] | None = None) -> int:
    """Read, decide, write, print."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0
    run, *flags = arguments
    if run.startswith("-"):
        raise ConfigError(
            f"{run} stands before the run.",
            cause="The first word says what is exported.",
            fix=f"adafreeze export-config RUN {run}",
        )
    (given,) = parse_flags(
        [ExportArguments], ["--run", run, *flags], prog="adafreeze export-config", description="Export a run."
    )
    from ..train.export import export_config

    made = export_config(
        run, adapter_config=given.adapter_config, min_share=given.min_share, keep_ranks=given.keep_ranks
    )
    path = Path(run).expanduser()
    folder = Path(given.output).expanduser() if given.output else (path if path.is_dir() else path.parent) / "next"
    _save(made.config, folder)
    _show(run, made)
    print(f"Written to {folder / 'adapter_config.json'}.")
    return 0


def _save(config: PeftConfig, folder: Path) -> None:
    if any(folder.glob("adapter_model.*")):
        raise RunError(
            f"{folder} holds a trained adapter.",
            cause="Its adapter_config.json belongs to its weights: with another it would not load.",
            fix=f"-o {folder / 'next'}",
        )
    try:
        config.save_pretrained(str(folder))
    except (OSError, AssertionError) as error:
        raise RunError(
            f"{folder} cannot be written ({error}).",
            cause="It or a folder above it is a file or read-only, or the disk is full.",
            fix="-o path/that/you/can/write",
        ) from error


def _show(run: str, made: Export) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"The blocks of {run}", title_justify="left")
    for column in ("block", "score", "share", "frozen at step", "rank"):
        table.add_column(column, justify="left" if column == "block" else "right", no_wrap=True)
    for block in made.blocks:
        rank = "" if not block.kept else "as it is" if block.rank is None else str(block.rank)
        frozen = "" if block.frozen_at is None else f"{block.frozen_at}"
        table.add_row(block.name, f"{block.score:.3g}", f"{block.share:.1%}", frozen, rank)
    console = Console()
    console.print(table)
    kept = sum(block.kept for block in made.blocks)
    lines = [f"Adapters in {kept} of {len(made.blocks)} blocks."]
    if made.parameters is not None:
        before, after = made.parameters
        lines[0] += f" Their parameters: {after:,}; in the run: {before:,}."
    for line in (*lines, *(f"- {note}" for note in made.notes)):
        console.print(line, markup=False, highlight=False)
