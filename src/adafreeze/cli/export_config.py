"""``adafreeze export-config``: the scores of a run, as a table and as the adapter_config.json of the next run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..errors import RunError
from ..integrations.export import Export, export_config
from ..train.output import writing
from ..train.parser import Parser
from ._table import number_table

__all__ = ["main"]


def main(argv: Sequence[str]) -> None:
    """Read, decide, write, print."""
    parser = Parser(
        prog="adafreeze export-config",
        description="Write the adapter_config.json of a next run: adapters in the blocks that stayed live in RUN, "
        "ranks by score, with the same number of parameters.",
        epilog="In a script: get_peft_model(model, LoraConfig.from_pretrained(FOLDER)).",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="the output folder of `adafreeze train`, or a journal.jsonl")
    add("-o", "--output", metavar="FOLDER", help="where it is written; by default `next`, beside the journal")
    add("--min_share", type=float, metavar="SHARE", help="keep the blocks with at least this share of the total score")
    add("--keep_ranks", action="store_true", help="pick blocks, but keep the ranks of the run")
    add("--adapter_config", metavar="FOLDER", help="the run's saved adapter, if it is not beside the journal")
    given = parser.parse_args([*argv] or ["--help"])
    made = export_config(
        given.run, adapter_config=given.adapter_config, min_share=given.min_share, keep_ranks=given.keep_ranks
    )
    run = Path(given.run).expanduser()
    folder = Path(given.output).expanduser() if given.output else (run if run.is_dir() else run.parent) / "next"
    if any(folder.glob("adapter_model.*")):
        raise RunError(
            f"{folder} contains a trained adapter, which would not load with another adapter_config.json.",
            fix=f"-o {folder / 'next'}",
        )
    with writing(folder, "-o"):
        folder.mkdir(parents=True, exist_ok=True)
        made.config.save_pretrained(str(folder))
    _show(given.run, made)
    print(f"Written to {folder / 'adapter_config.json'}.")


def _show(run: str, made: Export) -> None:
    table = number_table(f"The blocks of {run}", "block", "score", "share", "frozen at step", "rank")
    for block in made.blocks:
        rank = "" if not block.kept else "unchanged" if block.rank is None else str(block.rank)
        frozen = "" if block.frozen_at is None else str(block.frozen_at)
        table.add_row(block.name, f"{block.score:.3g}", f"{block.share:.1%}", frozen, rank)
    summary = f"Adapters in {sum(block.kept for block in made.blocks)} of {len(made.blocks)} blocks."
    if made.parameters is not None:
        before, after = made.parameters
        summary += f" Parameters: {after:,}; in the run: {before:,}."
    console = Console()
    console.print(table)
    for line in (summary, *(f"- {note}" for note in made.notes)):
        console.print(line, markup=False, highlight=False)
