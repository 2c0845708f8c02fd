"""The tables of the commands."""

from __future__ import annotations

from rich.table import Column, Table

__all__ = ["number_table"]


def number_table(title: str, first: str, *others: str) -> Table:
    """A table with a left-aligned first column and right-aligned numbers."""
    numbers = [Column(name, justify="right", no_wrap=True) for name in others]
    return Table(Column(first, no_wrap=True), *numbers, title=title, title_justify="left")
