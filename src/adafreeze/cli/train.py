"""``adafreeze train``: one run."""

from __future__ import annotations

from collections.abc import Sequence

from ..train import train
from ..train.arguments import parse
from ..train.output import write_page

__all__ = ["main"]


def main(argv: Sequence[str]) -> None:
    """Train by the flags in ``argv``."""
    arguments = parse(argv)
    train(arguments)
    if arguments.training.process_index == 0:
        write_page(arguments.folder, [arguments.folder])
