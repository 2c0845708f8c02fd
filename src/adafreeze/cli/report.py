"""``adafreeze report``: one page about finished or running runs."""

from __future__ import annotations

from collections.abc import Sequence

from ..report import write_report
from ..train.parser import Parser

__all__ = ["main"]


def main(argv: Sequence[str]) -> None:
    """Write the page."""
    parser = Parser(
        prog="adafreeze report",
        description="One self-contained HTML page from the journals of runs: savings, scores, the history of each "
        "block, costs and curves. Runs that still train are allowed.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="output folder of train, demo, compare or analyze, or a journal.jsonl"
    )
    parser.add_argument("-o", "--output", default="report.html", help="the page")
    options = parser.parse_args(argv)
    print(f"Report: {write_report(options.runs, options.output)}")
