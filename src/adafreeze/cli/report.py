"""``adafreeze report``: one page about finished or running runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, and say where."""
    from ..report import write_report

    parser = argparse.ArgumentParser(
        prog="adafreeze report",
        description="One self-contained HTML page from the journals of runs: what was saved, the scores, what each "
        "block did, costs and curves. A run that still trains can be looked at too.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="output folder of train, demo, compare or analyze, or a journal.jsonl"
    )
    parser.add_argument("-o", "--output", default="report.html", help="the page (default report.html)")
    options = parser.parse_args(argv)
    print(f"The page is {write_report(options.runs, options.output)}.")
    return 0
